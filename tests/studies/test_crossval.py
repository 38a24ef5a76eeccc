"""Leave groups out: nothing of a held-out group is seen, and an interruption changes nothing."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.errors import UserError
from streetvision.core.params import Params, check_params
from streetvision.data.store import SplitAccessError, open_split, write_arrow
from streetvision.presets import merge
from streetvision.studies import crossval
from streetvision.studies.crossval_report import render
from streetvision.studies.leave_out import held_out_units
from streetvision.training import training

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
            rows.append([name, label, f"g{group}", f"city {group // 2}", f"{number}"])
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "label", "group", "city", "number"], *rows])
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
        "cvfm": {"mode": "single"},
        "decision": {"n_resamples": 100},
        "evaluate": {"n_resamples": 100},
        "hardware": {"workers": 1, "device": "cpu"},
    }
    return check_params(merge(Params().model_dump(mode="json"), changes), "test")


def test_folds_see_nothing_of_the_held_out_group_and_resume(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streetvision.decision import fitting
    from streetvision.explora import probe

    seen: list[set[str]] = []
    calibrated: list[set[str]] = []
    real, fit_decision, linear_probe = (
        training.fit_classifier,
        fitting.fit_decision,
        probe.linear_probe,
    )

    def calibrating(passes: Any, *arguments: Any, **rest: Any) -> Any:
        units = [set(each.units) for each in passes.values()]
        assert units[0] == units[1]
        assert not units[0] & seen[-1], "calibrated on groups that it was trained on"
        calibrated.append(units[0])
        return fit_decision(passes, *arguments, **rest)

    def probing(fit: Any, labels: Any, read: Any, *rest: Any) -> Any:
        rows = [{row.tobytes() for row in each} for each in (fit, read)]
        assert len(labels) == len(rows[0]) == (GROUPS - 1) * IMAGES
        assert len(rows[1]) == IMAGES
        assert not rows[0] & rows[1], "the baseline is fitted on what is held out"
        return linear_probe(fit, labels, read, *rest)

    monkeypatch.setattr(fitting, "fit_decision", calibrating)
    monkeypatch.setattr(probe, "linear_probe", probing)

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
        assert "g5" in groups  # one class only: never held out, here in TRAIN
    for number, groups in zip([0, 1, 2, 3, 4], calibrated, strict=True):
        assert groups
        assert f"g{number}" not in groups, "calibrated on what is held out"
    undisturbed = crossval.leave_one_group_out(
        params, ArtifactSchema(tmp_path / "undisturbed"), tmp_path / "b"
    )
    assert report == undisturbed
    for name in ("crossval.json", "predictions.csv", "logits.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    from sklearn.metrics import matthews_corrcoef, roc_auc_score

    with (tmp_path / "a/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = np.array([int(row["label"]) for row in rows])
    assert len(rows) == (GROUPS - 1) * IMAGES == report["images"]
    assert report["images_always_in_train"] == IMAGES
    for name in ("pipeline", "baseline"):
        values = np.array([float(row[name]) for row in rows])
        assert report[name]["mcc"] == pytest.approx(matthews_corrcoef(labels, values > 0.5))
        assert report[name]["roc_auc"] == pytest.approx(roc_auc_score(labels, values))
        own = np.array([row["group"] == "g3" for row in rows])
        expected = matthews_corrcoef(labels[own], values[own] > 0.5)
        assert report["by_fold"]["g3"][name] == pytest.approx(expected)
        each = [report["by_fold"][f"g{number}"][name] for number in range(GROUPS - 1)]
        assert report[name]["mcc_mean"] == pytest.approx(np.mean(each))
        assert report[name]["mcc_std"] == pytest.approx(np.std(each, ddof=1))
    gain = report["pipeline"]["mcc"] - report["baseline"]["mcc"]
    assert report["gain"]["mcc"] == pytest.approx(gain)
    assert json.loads((tmp_path / "a/crossval.json").read_text()) == report
    text = render(report)
    assert text.count("| g") == GROUPS - 1
    assert f"**{report['pipeline']['mcc']:.3f}" in text
    check_logits(tmp_path / "a", rows, report)


@pytest.mark.parametrize("what", ["code", "seed", "image", "folds", "column"])
def test_a_fold_of_other_code_or_data_is_not_taken_over(
    params: Params, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Folds of older code, mixed with those of newer, would be the estimate of no recipe."""
    begun: list[str] = []

    def fold(*arguments: Any) -> dict[str, Any]:
        begun.append(arguments[3][0])
        if len(begun) % 2 == 0:
            raise KeyboardInterrupt
        return {"ids": []}

    monkeypatch.setattr(crossval, "_run_fold", fold)
    monkeypatch.setattr(crossval, "frozen_features", lambda *_: None)
    paths = ArtifactSchema(tmp_path)
    local = tmp_path / "local"
    shutil.copytree(project, local)
    document = merge(params.model_dump(mode="json"), {"data": {"local_root": str(local)}})
    folds, column = None, "group"

    def run() -> list[str]:
        begun.clear()
        with pytest.raises(KeyboardInterrupt):
            crossval.leave_one_group_out(check_params(document, "test"), paths, None, folds, column)
        return begun[:]

    assert run() == ["g0", "g1"]
    assert run() == ["g1", "g2"]
    match what:
        case "code":
            real = crossval.code_sha256
            monkeypatch.setattr(crossval, "code_sha256", lambda *given: real(*given)[::-1])
        case "seed":
            document["seed"] += 1
        case "image":
            Image.new("RGB", (48, 48), (9, 9, 9)).save(local / "g0-0.png")
        case "folds":
            folds = 5
        case "column":
            column = "file"
            monkeypatch.setattr(crossval, "held_out_units", lambda split, _: split.groups)
    assert run() == ["g0", "g1"]


def check_logits(folder: Path, rows: list[dict[str, str]], report: dict[str, Any]) -> None:
    """One line an image and condition, of the same images in the same order."""
    with (folder / "logits.csv").open() as file:
        logits = list(csv.DictReader(file))
    clean = [row for row in logits if row["condition"] == "clean"]
    assert [row["id"] for row in clean] == [row["id"] for row in rows]
    assert [row["label"] for row in clean] == [row["label"] for row in rows]
    assert len(logits) == 2 * len(rows)  # `raw` serves each once
    assert all(row["single"] == row["fused"] for row in logits)
    assert {row["unit"] for row in clean} == {row["group"] for row in rows}
    # A policy of a single view is increasing in the logit, within a fold.
    for group in report["by_fold"]:
        pairs = [
            (float(a["fused"]), float(b["pipeline"]))
            for a, b in zip(clean, rows, strict=True)
            if b["group"] == group
        ]
        assert sorted(pairs) == sorted(pairs, key=lambda pair: pair[1])


def test_cities_are_held_out_in_parts_with_views_fused(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups are drives here; with ExPLoRA, which sees images without labels."""
    from streetvision.explora import pretraining

    seen: list[set[str]] = []
    fit, adapt = training.fit_classifier, pretraining.adapt_backbone

    def fitting(model: Any, config: Any, train: Any, part: Any, select: Any, **rest: Any) -> Any:
        seen.append(set(part.groups) | set(select.groups))
        return fit(model, config, train, part, select, **rest)

    def adapting(
        backbone: Any, explora: Any, part: Any, select: Any, *rest: Any, **named: Any
    ) -> Any:
        with pytest.raises(SplitAccessError):
            _ = part.labels
        seen.append(set(part.groups) | set(select.groups))
        return adapt(backbone, explora, part, select, *rest, **named)

    monkeypatch.setattr(training, "fit_classifier", fitting)
    monkeypatch.setattr(pretraining, "adapt_backbone", adapting)
    lines, rng = ["file,label,group,city"], np.random.default_rng(1)
    for number in range(8 * 2 * 4):
        drive, label = number // 4, number % 2
        pixels = rng.integers(0, 160, (48, 48, 3), dtype=np.uint8)
        pixels[8:32, 8 + drive : 32 + drive] = 255 if label else 0
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{label},drive {drive},city {drive // 2}")
    (tmp_path / "cities.csv").write_text("\n".join(lines))
    changes = {
        "data": {
            "local_root": str(tmp_path),
            "sources": [{"kind": "csv", "name": "noise", "path": "cities.csv"}],
            "fusion_fraction": 0.3,
        },
        "explora": {"enabled": True, "epochs": 1, "batch_size": 8, "precision": "fp32"},
        "views": {"grid": 2},
        "cvfm": {"mode": "mlp", "epochs": 2},
        "subnet": {"validator": "crop"},
        "embed": {"served_repeats": 2},
    }
    small = check_params(merge(params.model_dump(mode="json"), changes), "test")
    paths = ArtifactSchema(tmp_path)
    report = crossval.leave_one_group_out(small, paths, tmp_path / "out", 3, "city")
    assert [row["groups"] for row in report["by_fold"].values()] == [3, 3, 2]
    assert report["modes"] == {"mlp": 3}
    assert report["groups"] == 8
    with (tmp_path / "out/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 64
    held = [
        {row["group"] for row in rows[start:stop]} for start, stop in ((0, 24), (24, 48), (48, 64))
    ]
    assert [len(cities) for cities in held] == [3, 3, 2]
    assert len(set.union(*held)) == 8
    assert len(seen) == 6
    for number, drives in enumerate(seen):
        cities = {f"city {int(drive.split()[1]) // 2}" for drive in drives}
        assert not cities & held[number // 2]
    with (tmp_path / "out/logits.csv").open() as file:
        logits = list(csv.DictReader(file))
    assert len(logits) == 3 * len(rows)  # two distorted versions
    assert any(row["single"] != row["fused"] for row in logits)
    assert "fold 1 (3 groups)" in render(report)


def test_a_city_has_one_name_in_every_shard(write_split: Any, tmp_path: Path) -> None:
    """7 where a shard has integers, 7.0 where a missing value made them floating; "nan" is no city."""
    path = write_split(tmp_path / "whole.arrow", 16, groups=8)
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    cities = ['{"city": 7}', '{"city": 7.0}', '{"city": "7"}', '{"city": "nan"}', None]
    groups = table["group"].to_pylist()
    extra = [cities[min(sorted(set(groups)).index(group), 4)] for group in groups]
    columns = {name: table[name] for name in table.column_names}
    write_arrow(path, columns | {"extra": pa.array(extra, pa.string())})
    split = open_split("crossval", "whole", path)
    found = dict(zip(groups, held_out_units(split, "city"), strict=True))
    names = sorted(set(groups))
    assert [found[name] for name in names] == ["7", "7", "7", *names[3:]]


def test_what_is_held_out_must_be_whole_groups(write_split: Any, tmp_path: Path) -> None:
    split = open_split("crossval", "whole", write_split(tmp_path / "whole.arrow", 40))
    assert held_out_units(split, "group").tolist() == split.groups.tolist()
    assert held_out_units(split, "source").tolist() == ["easy"] * 40
    with pytest.raises(UserError, match=r"--groups weather: the group .* has both"):
        held_out_units(split, "weather")
    with pytest.raises(UserError, match='the data have no column "town"'):
        held_out_units(split, "town")
    for folds, number in ((None, 8), (8, 8), (3, 3)):
        parts = crossval.held_out_parts(split, split.groups, folds)
        assert len(parts) == number
        assert sorted(name for part in parts for name in part) == sorted(set(split.groups))
    with pytest.raises(UserError, match="--folds 9 is not between 2 and 8"):
        crossval.held_out_parts(split, split.groups, 9)
    many = np.array([f"g{row // 2}" for row in range(40 * 2)], dtype=object)[:40]
    assert len(crossval.held_out_parts(split, many, None)) == 20
    split = open_split("crossval", "whole", write_split(tmp_path / "many.arrow", 84, groups=21))
    assert [len(p) for p in crossval.held_out_parts(split, split.groups, None)] == [5, 4, 4, 4, 4]


def test_another_seed_does_not_move_the_split(write_split: Any, tmp_path: Path) -> None:
    """What chooses in one run may not be what another seed's run trained or calibrated on."""
    path = write_split(tmp_path / "whole.arrow", 160, groups=20)
    split = open_split("crossval", "whole", path)

    def rows(**seeds: Any) -> list[list[int]]:
        held_out = split.groups == split.groups[0]
        parts, fusion = crossval.divide(check_params(seeds, "test"), split, split.groups, held_out)
        return [part.tolist() for part in (*parts.values(), fusion)]

    first = rows(seed=1, data={"split_seed": 7})
    assert rows(seed=2, data={"split_seed": 7}) == first
    assert rows(seed=1, data={"split_seed": 8}) != first


def test_too_few_groups(params: Params, project: Path, tmp_path: Path) -> None:
    rows = (project / "labels.csv").read_text().splitlines()
    few = [row for row in rows if row.split(",")[2] in {"group", "g0", "g1", "g2", "g5"}]
    (project / "few.csv").write_text("\n".join(few))
    source = {"kind": "csv", "name": "noise", "path": "few.csv"}
    document = merge(params.model_dump(mode="json"), {"data": {"sources": [source]}})
    with pytest.raises(UserError, match="at least 4 groups with both classes; there are 3"):
        crossval.leave_one_group_out(check_params(document, "test"), ArtifactSchema(tmp_path), None)
