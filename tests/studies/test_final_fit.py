"""The final fit: all groups are trained on, and whatever is said of it is the cross-validation's."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from streetvision import cli
from streetvision.bundle import Predictor
from streetvision.bundle.natix.install import install
from streetvision.bundle.natix.stand_in import make_checkout
from streetvision.bundle.validate import BundleValidator
from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.errors import UserError
from streetvision.core.params import Params, check_params, load_params
from streetvision.data.store import open_split
from streetvision.decision.policy import fit_policy
from streetvision.models.optim import warmup_cosine
from streetvision.presets import merge
from streetvision.studies.crossval import REPORT, divide, fingerprint
from streetvision.studies.final_fit import _check, _roles, final_fit
from streetvision.training import training

GROUPS, IMAGES, EPOCHS = 6, 8, 4
CHANGES: dict[str, Any] = {
    "data": {
        "local_root": "images",
        "sources": [{"kind": "csv", "name": "noise", "path": "labels.csv"}],
        "side_px": 32,
        "train_fraction": 0.4,
        "val_select_fraction": 0.2,
        "val_calib_fraction": 0.2,
        "val_test_fraction": 0.2,
    },
    "train": {
        "backbone": "street_resnet_tiny",
        "height_px": 32,
        "width_px": 32,
        "epochs": EPOCHS,
        "batch_size": 8,
        "precision": "fp32",
    },
    "cvfm": {"mode": "single"},
    "decision": {"n_resamples": 100},
    "evaluate": {"n_resamples": 100},
    "hardware": {"workers": 1, "device": "cpu"},
}


def changed(params: Params, **changes: Any) -> Params:
    return check_params(merge(params.model_dump(mode="json"), changes), "test")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of six groups, five with both classes, cross-validated in two parts by the command."""
    root = tmp_path_factory.mktemp("final")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = ["file,label,group"]
    for number in range(GROUPS * IMAGES):
        group = number // IMAGES
        label = 1 if group == GROUPS - 1 else number % 2
        pixels = rng.integers(0, 160, (48, 48, 3), dtype=np.uint8)
        pixels[8:32, 8 + group : 32 + group] = 255 if label else 90
        Image.fromarray(pixels).save(root / f"images/{number}.png")
        lines.append(f"{number}.png,{label},g{group}")
    (root / "images/labels.csv").write_text("\n".join(lines))
    document = merge(Params().model_dump(mode="json"), CHANGES)
    (root / "params.yaml").write_text(yaml.safe_dump(document))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli.main(["crossval"]) == 0
    return root


def test_the_command_trains_on_everything_and_its_bundle_is_served(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project)
    trained: list[tuple[set[str], Any, Any]] = []
    real = training.fit_classifier

    def spying(model: Any, config: Any, train: Any, fit: Any, *rest: Any, **named: Any) -> Any:
        result = real(model, config, train, fit, *rest, **named)
        trained.append((set(fit.groups), train, result))
        return result

    monkeypatch.setattr(training, "fit_classifier", spying)
    # Folds that chose an epoch on the way; where these noisy ones end hangs on the last digit.
    shutil.copytree(project / "report/crossval", tmp_path / "crossval")
    path = tmp_path / f"crossval/{REPORT}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"median_epochs": 2.0}))
    arguments = ["--crossval", str(tmp_path / "crossval"), "--output", str(tmp_path / "final")]
    assert cli.main(["final-fit", *arguments]) == 0
    said = capsys.readouterr().out
    (groups, train, result), report = (
        trained[0],
        json.loads(path.read_text()),
    )
    assert groups == {f"g{number}" for number in range(GROUPS)}
    epochs = len(result.history)
    assert epochs == report["median_epochs"] == 2
    assert train.choose_epoch == "last"
    # Stopped on the way down of the folds' cosine, not at the end of a shorter one.
    steps = GROUPS * IMAGES // train.batch_size
    factor = warmup_cosine(EPOCHS * steps, train.warmup_fraction)
    assert result.history[-1]["learning_rate"] / train.learning_rate == pytest.approx(
        factor(epochs * steps)
    )
    assert factor(epochs * steps) > 0.1

    bundle = tmp_path / "final/bundle"
    BundleValidator().validate(bundle)
    answer = Predictor.load(bundle)(project / "images/0.png")
    assert 0 < answer < 1
    assert install(bundle, make_checkout(tmp_path / "checkout")).changed

    # The policy is that of the folds' held-out logits.
    with (project / "report/crossval/logits.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["condition"] == "served"]
    logits = np.array([float(row["fused"]) for row in rows])
    policy, _ = fit_policy(
        logits, np.array([int(row["label"]) for row in rows]), np.array([row["unit"] for row in rows]),
        0.5, 100, 7,
    )  # fmt: skip
    served = Predictor.load(bundle).policy
    np.testing.assert_array_equal(
        served.deployed_probability(logits), policy.deployed_probability(logits)
    )
    assert served.fit_on == "served"

    card = (tmp_path / "final/card.md").read_text()
    assert "**Nothing below was measured of this bundle itself**" in card
    pipeline = report["pipeline"]
    assert f"{pipeline['mcc']:.3f} [" in card
    assert f"{pipeline['mcc_mean']:.3f} ± {pipeline['mcc_std']:.3f}" in card
    assert f"Trained on {GROUPS * IMAGES} of {GROUPS * IMAGES} images" in card
    assert "by the cross-validation: MCC" in said
    found = json.loads((tmp_path / "final/final_fit.json").read_text())
    assert found["crossval"]["pipeline"] == pipeline
    assert found["metrics_are_of"].startswith("cross-validation")


def test_other_parameters_or_data_are_refused(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    params, paths = load_params(project / "params.yaml"), ArtifactSchema(project)
    other = changed(params, train={"learning_rate": 0.1})
    with pytest.raises(UserError, match="of other parameters or data than these"):
        final_fit(other, paths, project / "report/crossval", tmp_path)
    # What changes no decision of a fold may change.
    same = changed(
        params, hardware={"workers": 2}, evaluate={"mistakes": 3}, export={"make_tar": True}
    )
    assert fingerprint(same, project) == fingerprint(params, project)
    monkeypatch.chdir(project)
    assert cli.main(["final-fit", "--crossval", str(tmp_path)]) == 2
    assert "crossval.json is missing; the stage `crossval` makes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "modes", "message"),
    [
        ({"decision": {"abstention": "scrc_t"}}, {"single": 5}, "by groups that the network has not seen"),
        ({"train": {"augmentation_gate": 3}}, {"single": 5}, "augmentation_gate compares on VAL_SELECT"),
        ({}, {"single": 2, "mlp": 3}, r"different fusions \(mlp 3, single 2\)"),
    ],
)  # fmt: skip
def test_what_only_held_out_groups_could_give_is_refused(
    changes: dict[str, Any], modes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _check(changed(Params(), **changes), {"fingerprint": "x", "modes": modes}, "x")


def test_a_trained_fusion_keeps_its_parts_from_training(
    write_split: Callable[..., Path], tmp_path: Path
) -> None:
    split = open_split("crossval", "whole", write_split(tmp_path / "whole.arrow", 80, groups=10))
    params = changed(Params(), data={"fusion_fraction": 0.3}, cvfm={"mode": "mlp"})
    rows, fusion = _roles(params, split, split.groups)
    parts = [np.setdiff1d(rows["train"], fusion), fusion, rows["val_select"]]
    names = [set(split.groups[part]) for part in parts]
    assert sum(map(len, names)) == len(set.union(*names)) == 10
    assert all(names)
    rows, fusion = _roles(changed(params, cvfm={"mode": "topk_mean"}), split, split.groups)
    assert len(rows["train"]) == 80
    assert len(fusion) == 0
    # The folds of a rule keep nothing, either.
    _, fusion = divide(
        changed(params, cvfm={"mode": "topk_mean"}), split, split.groups, np.arange(80) < 8
    )
    assert len(fusion) == 0
