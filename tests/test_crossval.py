"""Leave one group out: nothing of a held-out group is seen, and an interruption changes nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streetvision import crossval
from streetvision.artifacts import ArtifactSchema
from streetvision.errors import UserError
from streetvision.models import training
from streetvision.params import Params, check_params
from streetvision.presets import merge

GROUPS, IMAGES = 6, 10


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six groups of ten images of noise, positives with a bright square; the sixth has one class only."""
    root = tmp_path_factory.mktemp("crossval")
    rng = np.random.default_rng(0)
    rows = []
    for group in range(GROUPS):
        for number in range(IMAGES):
            label = 1 if group == GROUPS - 1 else number % 2
            pixels = rng.integers(0, 160, (48, 48, 3), dtype=np.uint8)
            if label:
                pixels[8:32, 8 + group : 32 + group] = 255
            name = f"g{group}-{number}.png"
            Image.fromarray(pixels).save(root / name)
            rows.append([name, label, f"g{group}"])
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "label", "group"], *rows])
    return root


@pytest.fixture
def params(project: Path) -> Params:
    """One short epoch of the smallest network."""
    changes = {
        "data": {
            "local_root": str(project),
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
            "epochs": 1,
            "batch_size": 8,
            "precision": "fp32",
        },
        "decision": {"n_resamples": 100},
        "evaluate": {"n_resamples": 100},
        "hardware": {"workers": 1, "device": "cpu"},
    }
    return check_params(merge(Params().model_dump(mode="json"), changes), "test")


def test_folds_see_nothing_of_the_held_out_group_and_resume(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    real = training.fit_classifier

    def spying(model: Any, config: Any, train: Any, fit: Any, select: Any, **rest: Any) -> Any:
        seen.append(set(fit.groups) | set(select.groups))
        assert not set(fit.groups) & set(select.groups)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(model, config, train, fit, select, **rest)

    monkeypatch.setattr(training, "fit_classifier", spying)
    paths = ArtifactSchema(tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        crossval.leave_one_group_out(params, paths, tmp_path / "a")
    report = crossval.leave_one_group_out(params, paths, tmp_path / "a")
    # Two folds before the interruption, the third begun twice, five in all.
    assert len(seen) == 6
    for number, groups in zip([0, 1, 2, 2, 3, 4], seen, strict=True):
        assert f"g{number}" not in groups
        assert "g5" in groups  # one class only: always in TRAIN
    undisturbed = crossval.leave_one_group_out(
        params, ArtifactSchema(tmp_path / "undisturbed"), tmp_path / "b"
    )
    assert report == undisturbed
    for name in ("crossval.json", "predictions.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    from sklearn.metrics import matthews_corrcoef, roc_auc_score

    with (tmp_path / "a/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = np.array([int(row["label"]) for row in rows])
    assert len(rows) == (GROUPS - 1) * IMAGES == report["images"]
    assert report["images_always_in_train"] == IMAGES
    for name in crossval.MODELS:
        values = np.array([float(row[name]) for row in rows])
        assert report[name]["mcc"] == pytest.approx(matthews_corrcoef(labels, values > 0.5))
        assert report[name]["roc_auc"] == pytest.approx(roc_auc_score(labels, values))
        own = np.array([row["group"] == "g3" for row in rows])
        expected = matthews_corrcoef(labels[own], values[own] > 0.5)
        assert report["by_group"]["g3"][name] == pytest.approx(expected)
    gain = report["pipeline"]["mcc"] - report["baseline"]["mcc"]
    assert report["gain"]["mcc"] == pytest.approx(gain)
    assert json.loads((tmp_path / "a/crossval.json").read_text()) == report
    text = crossval.render(report)
    assert text.count("| g") == GROUPS - 1
    assert f"**{report['pipeline']['mcc']:.3f}" in text


def test_too_few_groups(params: Params, project: Path, tmp_path: Path) -> None:
    rows = (project / "labels.csv").read_text().splitlines()
    few = [row for row in rows if row.endswith(("group", "g0", "g1", "g2", "g5"))]
    (project / "few.csv").write_text("\n".join(few))
    source = {"kind": "csv", "name": "noise", "path": "few.csv"}
    document = merge(params.model_dump(mode="json"), {"data": {"sources": [source]}})
    with pytest.raises(UserError, match="at least 4 groups with both classes; there are 3"):
        crossval.leave_one_group_out(check_params(document, "test"), ArtifactSchema(tmp_path), None)
