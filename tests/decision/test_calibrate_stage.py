"""The stage `calibrate` on made-up embeddings: what its parameters switch on, and what they do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from scipy.special import expit

from stages.calibrate import calibrate
from stages.common import Stage
from streetvision.core.artifacts import ArtifactSchema, read_json, write_json_atomic
from streetvision.core.errors import UserError
from streetvision.core.params import Cvfm, ViewGrid, check_params
from streetvision.data.store import write_arrow
from streetvision.decision.pickling import dump_policy_pickle
from streetvision.decision.policy import policy_from_document
from streetvision.decision.report import sweep_thresholds
from streetvision.decision.validator import PolicyValidator
from streetvision.fusion.fusion import Fusion, FusionConfig, save_fusion

REPOSITORY = Path(__file__).parents[2]
ROWS = 1200


def embeddings(
    logits: NDArray[Any], labels: NDArray[Any], groups: NDArray[Any], repeats: int
) -> dict[str, pa.Array]:
    """Columns of single views, features left out."""
    boxes = np.tile([0.0, 0.0, 1.0, 1.0], len(logits))
    return {
        "id": pa.array([f"{i // repeats}#{i % repeats}" for i in range(len(logits))]),
        "group": pa.array([f"g{g}" for g in groups]),
        "drive": pa.array([f"d{i // repeats % 120}" for i in range(len(logits))]),
        "view": pa.array(["global"] * len(logits)),
        "label": pa.array(labels.astype(np.int8)),
        "logit": pa.array(logits.astype(np.float32)),
        "content": pa.array(np.full(len(logits), 64)),
        "box": pa.FixedSizeListArray.from_arrays(pa.array(boxes), 4),
    }


@pytest.fixture
def project(tmp_path: Path) -> ArtifactSchema:
    paths = ArtifactSchema(tmp_path)
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    rng = np.random.default_rng(0)
    logits = rng.normal(1, 6, ROWS).astype(np.float32)
    labels = rng.random(ROWS) < expit(0.7 * logits)
    groups = np.arange(ROWS) % 60
    write_arrow(paths.embeddings("val_calib"), embeddings(logits, labels, groups, 1))
    # Distorted, logits are half as large and lower.
    often = np.arange(ROWS).repeat(2)
    moved = logits[often] / 2 - 3 + rng.normal(0, 0.3, 2 * ROWS)
    distorted = paths.embeddings("val_calib", "served")
    write_arrow(distorted, embeddings(moved, labels[often], groups[often], 2))
    save_fusion(Fusion(FusionConfig.of("single", Cvfm(), ViewGrid(), 0)), paths.cvfm)
    (paths.classifier).mkdir(parents=True)
    document, _ = sweep_thresholds(
        logits, labels, groups, n_thresholds=11, selection="exact", n_resamples=100, seed=0,
        split_used="val_calib",
    )  # fmt: skip
    write_json_atomic(paths.threshold, {"threshold": document["threshold"]})
    return paths


def run(paths: ArtifactSchema, **decision: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    params = check_params({"decision": {"n_resamples": 100} | decision}, "params.yaml")
    calibrate(Stage("calibrate", params, paths))
    document = read_json(paths.scrc_params, "calibrate")
    return document, json.loads(paths.metric("calibrate").read_text())


@pytest.mark.parametrize("abstention", ["none", "scrc_t"])
def test_the_policy_is_fitted_on_the_images_that_are_named(
    project: ArtifactSchema, abstention: str
) -> None:
    found = {
        fit_on: run(project, fit_on=fit_on, abstention=abstention, alpha=0.25)
        for fit_on in ("served", "clean")
    }
    half = 1 if abstention == "none" else 2
    slopes = {}
    for fit_on, (document, metrics) in found.items():
        policy = policy_from_document(document)
        assert document["scrc_params"]["fit_on"] == metrics["fit_on"] == policy.fit_on == fit_on
        slopes[fit_on] = policy.calibrator.to_dict()["slope"]
        assert metrics["on_clean"]["n"] == ROWS // half
        assert metrics["on_served"]["n"] == 2 * ROWS // half
        assert metrics["n"] == metrics[f"on_{fit_on}"]["n"]
        # What is expected of the groups that were left out is near to what the fit itself says.
        assert metrics["after"]["served"]["log_loss"] == pytest.approx(
            metrics[f"on_{fit_on}"]["log_loss"], abs=0.02
        )
    assert slopes["served"] == pytest.approx(2 * slopes["clean"], rel=0.15)
    for metric in ("log_loss", "ece"):
        for name, other in (("clean", "served"), ("served", "clean")):
            own, foreign = found[name][1][f"on_{name}"], found[other][1][f"on_{name}"]
            assert own[metric] < foreign[metric]


def test_drives_may_be_the_units(project: ArtifactSchema) -> None:
    for unit, found in (("group", 60), ("drive", 120)):
        document, metrics = run(project, exchangeable_unit=unit, abstention="scrc_t", alpha=0.25)
        assert metrics["groups"] == metrics["threshold"]["n_groups"] == found // 2
        assert metrics["exchangeable_unit"] == unit
        band = document["scrc_params"]["abstention"]
        assert band["exchangeable_unit"] == unit
        assert band["n_groups"] == metrics["abstention"]["groups"] == found // 2


def test_abstention_is_off_and_costs_nothing(project: ArtifactSchema) -> None:
    document, metrics = run(project)
    assert document["scrc_params"]["abstention"] is None
    assert "abstention" not in metrics
    assert {"tier_1", "tier_2", "tier_3"} <= set(metrics["candidates"])
    assert document["scrc_params"]["fit_on"] == "served"
    before = project.scrc_params.read_bytes()
    run(project, alpha=0.2, delta=0.3, control="fnr", guarantee_fraction=0.3)
    assert project.scrc_params.read_bytes() == before


@pytest.mark.parametrize(("method", "calibrator"), [("scrc_t", "platt"), ("scrc_i", "tier_2")])
def test_the_band_is_in_the_policy_and_its_pickle(
    project: ArtifactSchema, method: str, calibrator: str
) -> None:
    document, metrics = run(project, abstention=method, calibrator=calibrator, alpha=0.25)
    PolicyValidator().validate(document)
    policy = policy_from_document(document)
    assert policy.abstention is not None
    assert policy.abstention.method == method
    assert policy.abstention.min_confidence is not None
    assert policy.calibrator.kind == ("platt" if method == "scrc_t" else "ensemble")
    assert project.scrc_pickle.read_bytes() == dump_policy_pickle(document)
    assert metrics["groups"] == metrics["abstention"]["groups"] == 30
    assert 0 < metrics["abstention"]["acceptance"] <= 1


@pytest.mark.parametrize("value", [1.5, None, True, "0.5", float("nan")])
def test_a_damaged_baseline_is_a_users_problem(project: ArtifactSchema, value: object) -> None:
    project.threshold.write_text(json.dumps({"threshold": value}))
    with pytest.raises(UserError, match=r"threshold\.json: threshold is .*rerun `sweep`"):
        run(project)
