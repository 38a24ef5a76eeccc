"""The stage `calibrate` on made-up embeddings: what its parameters switch on, and what they do not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from stages.calibrate import calibrate
from stages.common import Stage
from streetvision.artifacts import ArtifactSchema, read_json, write_json_atomic
from streetvision.data.store import write_arrow
from streetvision.decision.pickling import load_policy_pickle
from streetvision.decision.policy import policy_from_document
from streetvision.decision.report import sweep_thresholds
from streetvision.decision.validator import PolicyValidator
from streetvision.errors import UserError
from streetvision.params import check_params

REPOSITORY = Path(__file__).parents[2]
ROWS = 1200


@pytest.fixture
def project(tmp_path: Path) -> ArtifactSchema:
    paths = ArtifactSchema(tmp_path)
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    rng = np.random.default_rng(0)
    logits = rng.normal(1, 6, ROWS).astype(np.float32)
    labels = rng.random(ROWS) < expit(0.7 * logits)
    groups = np.arange(ROWS) % 60
    columns = {
        "id": pa.array([str(i) for i in range(ROWS)]),
        "group": pa.array([f"g{g}" for g in groups]),
        "label": pa.array(labels.astype(np.int8)),
        "logit": pa.array(logits),
        "features": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(ROWS, np.float16)), 1),
    }
    write_arrow(paths.embeddings("val_calib"), columns)
    document, _ = sweep_thresholds(
        logits, labels, groups, n_thresholds=11, selection="exact", n_resamples=100, seed=0,
        split_used="val_calib",
    )  # fmt: skip
    write_json_atomic(paths.thresholds, document)
    return paths


def run(paths: ArtifactSchema, **decision: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    params = check_params({"decision": {"n_resamples": 100} | decision}, "params.yaml")
    calibrate(Stage("calibrate", params, paths))
    document = read_json(paths.scrc_params, "calibrate")
    return document, json.loads(paths.metric("calibrate").read_text())


def test_abstention_is_off_and_costs_nothing(project: ArtifactSchema) -> None:
    document, metrics = run(project)
    assert document["scrc_params"]["abstention"] is None
    assert "abstention" not in metrics
    assert {"tier_1", "tier_2", "tier_3"} <= set(metrics["candidates"])
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
    data = project.scrc_pickle.read_bytes()
    assert load_policy_pickle(data, hashlib.sha256(data).hexdigest()) == policy
    assert metrics["groups"] == metrics["abstention"]["groups"] == 30
    assert 0 < metrics["abstention"]["acceptance"] <= 1


def test_a_damaged_baseline_is_a_users_problem(project: ArtifactSchema) -> None:
    damaged = read_json(project.thresholds, "sweep") | {"threshold": 1.5}
    write_json_atomic(project.thresholds, damaged)
    with pytest.raises(UserError, match=r"threshold is 1\.5; it must be <= 1"):
        run(project)
