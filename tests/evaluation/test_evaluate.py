"""A bundle on labelled images: the files, the mistakes' order, and scikit-learn's numbers."""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import matthews_corrcoef, roc_auc_score

from streetvision.bundle.predictor import Predictor
from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.errors import UserError
from streetvision.core.params import check_params
from streetvision.data.store import Split, open_split
from streetvision.evaluation.evaluate import (
    EVIDENCE_NAMES,
    Evaluation,
    _mistakes,
    evaluate_split,
    evidence_size,
    write_evaluation,
)
from streetvision.evaluation.predictions import parse_predictions
from streetvision.evaluation.report import safe_key
from streetvision.plots import curves
from streetvision.plots import pictures as plots

if TYPE_CHECKING:
    from tests.conftest import Trained


@pytest.fixture(scope="module")
def split(tiny_splits: dict[str, Path]) -> Split:
    return open_split("evaluate", "val_test", tiny_splits["val_test"])


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> Predictor:
    return Predictor.load(trained.bundle, "cpu")


@pytest.fixture(scope="module")
def evaluation(predictor: Predictor, split: Split) -> Evaluation:
    return evaluate_split(predictor, split, 0.3, n_resamples=100, mistakes=6, seed=7)


def test_the_seed_is_that_of_the_resamples(
    evaluation: Evaluation, predictor: Predictor, split: Split
) -> None:
    other = evaluate_split(predictor, split, 0.3, n_resamples=100, mistakes=6, seed=8).report
    noise = [each["ece_detail"].pop("noise_floor") for each in (deepcopy(evaluation.report), other)]
    assert noise[0] != noise[1]
    assert other["served"] == evaluation.report["served"]


def test_the_stage_takes_the_seed_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else of the stage is stubbed; `tests/pipeline` runs it whole."""
    from stages import evaluate as stage_evaluate
    from stages.common import Stage
    from streetvision.bundle import predictor as predictors
    from streetvision.data import store
    from streetvision.evaluation import evaluate

    asked = []

    class AskedError(Exception):
        pass

    def record(*_: Any, **settings: Any) -> None:
        asked.append(settings["seed"])
        raise AskedError

    monkeypatch.setattr(predictors.Predictor, "load", lambda *_: None)
    monkeypatch.setattr(store, "open_split", lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate_split", record)
    for seed in (7, 11):
        params = check_params({"seed": seed}, "test")
        with pytest.raises(AskedError):
            stage_evaluate.evaluate(Stage("evaluate", params, ArtifactSchema(Path())))
    assert asked == [7, 11]


def leaves(tree: Any) -> list[Any]:
    if not isinstance(tree, dict):
        return [tree]
    return [leaf for value in tree.values() for leaf in leaves(value)]


def test_the_numbers_are_scikit_learns(evaluation: Evaluation, split: Split) -> None:
    found = evaluation.predictions
    probability = found["probability"]
    decided = probability > 0.5
    natural = evaluation.report["natural"]
    assert natural["mcc"] == pytest.approx(matthews_corrcoef(split.labels, decided), abs=1e-12)
    share = split.labels.mean()
    weights = np.where(split.labels == 1, 0.3 / share, 0.7 / (1 - share))
    served = matthews_corrcoef(split.labels, decided, sample_weight=weights)
    assert evaluation.report["mcc"] == pytest.approx(served, abs=1e-12)
    assert evaluation.report["served"]["mcc"] == evaluation.report["mcc"]
    ranking = roc_auc_score(split.labels, probability)
    assert ranking in [pytest.approx(value) for value in natural.values()]
    confusion = evaluation.report["confusion"]
    assert confusion["tp"] == (decided & (split.labels == 1)).sum()
    assert confusion["fp"] == (decided & (split.labels == 0)).sum()
    assert evaluation.report["n"] == len(split)
    assert evaluation.report["n_groups"] == len(set(split.groups))
    assert evaluation.report["served_prior"] == 0.3


def test_the_seed_and_the_served_prior_reach_report_and_curves(
    evaluation: Evaluation, predictor: Predictor, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streetvision.evaluation import report

    seeds = []

    def reporting(*arguments: Any, **options: Any) -> dict[str, Any]:
        seeds.append(inspect.signature(real).bind(*arguments, **options).arguments["seed"])
        return evaluation.report

    real = report.evaluation_report
    monkeypatch.setattr(report, "evaluation_report", reporting)
    for seed in (7, 8):
        found = evaluate_split(predictor, split, 0.3, n_resamples=100, mistakes=6, seed=seed)
    assert seeds == [7, 8]
    sample = (split.labels, found.predictions["probability"])
    assert found.curves == {
        "roc.csv": curves.roc_curve(*sample),
        "precision_recall.csv": curves.precision_recall_curve(*sample, 0.3),
        "reliability.csv": curves.reliability_table(*sample, 0.3, "as served"),
    }


def test_predictions_are_the_predictors(
    evaluation: Evaluation, predictor: Predictor, split: Split
) -> None:
    images = [split.image(row) for row in range(len(split))]
    found = evaluation.predictions
    np.testing.assert_array_equal(found["probability"], predictor.probabilities(images))
    np.testing.assert_array_equal(found["id"], split.ids)
    np.testing.assert_array_equal(found["group"], split.groups)
    np.testing.assert_array_equal(found["label"], split.labels)


def test_slices(evaluation: Evaluation, split: Split) -> None:
    slices = evaluation.report["slices"]
    assert set(slices) == {"source", "weather", "daytime", "evidence_size"}
    weather = split.column("weather")
    for value, key in (("sunny", "sunny"), ("rain", "rain"), (None, "unknown")):
        assert slices["weather"][key]["n"] == (weather == value).sum()
    sizes = evidence_size(split.evidence_area())
    assert set(slices["evidence_size"]) == {safe_key(name) for name in EVIDENCE_NAMES}
    for name in EVIDENCE_NAMES:
        own = sizes == name
        assert slices["evidence_size"][safe_key(name)]["n"] == own.sum() > 0
        recall = (evaluation.predictions["probability"][own] > 0.5).mean()
        assert slices["evidence_size"][safe_key(name)]["recall"] == pytest.approx(recall)


def test_the_report_is_finite_and_scalar(evaluation: Evaluation) -> None:
    for leaf in leaves(evaluation.report):
        assert isinstance(leaf, (str, int, float))
        assert not isinstance(leaf, float) or np.isfinite(leaf)


def test_the_files(evaluation: Evaluation, split: Split, tmp_path: Path) -> None:
    report, folder = tmp_path / "evaluation.json", tmp_path / "plots"
    written = write_evaluation(evaluation, report, folder)
    assert sorted(path.name for path in written) == [
        "confusion.png", "evaluation.json", "mistakes.png", "precision_recall.csv",
        "predictions.csv", "reliability.csv", "roc.csv",
    ]  # fmt: skip
    assert sorted(written) == sorted([report, *folder.iterdir()])
    assert json.loads(report.read_text()) == evaluation.report
    with (folder / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    slices = ["source", "weather", "daytime", "evidence_size"]
    assert header == ["id", "group", "label", "probability", "image_sha256", *slices]
    found = evaluation.predictions
    assert [row[0] for row in rows] == found["id"].tolist()
    assert [row[1] for row in rows] == found["group"].tolist()
    assert [int(row[2]) for row in rows] == found["label"].tolist()
    assert [float(row[3]) for row in rows] == found["probability"].tolist()
    read = parse_predictions((folder / "predictions.csv").read_text(), "here")
    assert read.pictures is not None
    for row, name in enumerate(read.pictures):
        assert name == hashlib.sha256(split.image_bytes(row)).hexdigest()[:16]
    assert len(set(read.pictures)) == len(split)
    assert tuple(read.slices) == tuple(slices)
    for name in slices[:3]:
        assert read.slices[name].tolist() == [value or "" for value in split.column(name)]
    assert read.slices["evidence_size"].tolist() == evidence_size(split.evidence_area()).tolist()
    for path in folder.glob("*.png"):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert image.format == "PNG"
            assert min(image.size) > 100


def test_the_same_again_is_equal_to_the_byte(
    evaluation: Evaluation, predictor: Predictor, split: Split
) -> None:
    again = evaluate_split(predictor, split, 0.3, n_resamples=100, mistakes=6, seed=7)
    assert again.report == evaluation.report
    assert again.plots == evaluation.plots
    assert again.curves == evaluation.curves


def shown(
    split: Split, probabilities: list[float], count: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], list[str]]:
    """Images and captions of the contact sheet."""
    calls: list[tuple[list[Any], list[str]]] = []

    def record(images: list[Any], captions: list[str]) -> bytes:
        calls.append((images, captions))
        return b""

    monkeypatch.setattr(plots, "plot_mistakes", record)
    _mistakes(split, np.array(probabilities), count)
    return calls[0]


def test_mistakes_come_worst_first(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split.labels[:8].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    few = split.select(range(8))
    #                wrong  right  wrong, equally  half: missed  right  wrong, worst  half: right  right
    probabilities = [
        0.900,
        0.800,
        0.9000000000000,
        0.500000000,
        0.100,
        0.0200000000,
        0.5000000000,
        1.0,
    ]
    images, captions = shown(few, probabilities, 24, monkeypatch)
    assert captions == [
        "missed, p = 0.020", "false alarm, p = 0.900", "false alarm, p = 0.900", "missed, p = 0.500"
    ]  # fmt: skip
    for image, row in zip(images, [5, 0, 2, 3], strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(few.image(row)))
    assert shown(few, probabilities, 2, monkeypatch)[1] == captions[:2]
    assert shown(few, probabilities, 0, monkeypatch)[1] == []
    assert shown(few, few.labels.tolist(), 24, monkeypatch)[1] == []


@given(st.floats(0, 1))
def test_evidence_size_is_the_class_between_its_bounds(area: float) -> None:
    [name] = evidence_size(np.array([area]))
    if area < 0.0025:
        wanted = "below_0.25_percent"
    elif area < 0.01:
        wanted = "0.25_to_1_percent"
    elif area < 0.04:
        wanted = "1_to_4_percent"
    else:
        wanted = "above_4_percent"
    assert name == wanted


def test_evidence_size_of_nothing_is_empty() -> None:
    found = evidence_size(np.array([np.nan, 0.0025, 0.01, 0.04]))
    assert found.tolist() == ["", "0.25_to_1_percent", "1_to_4_percent", "above_4_percent"]
    assert evidence_size(np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("label", [0, 1])
def test_images_of_one_class_say_what_they_can(
    label: int, predictor: Predictor, tmp_path: Path, write_split: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    one = open_split("evaluate", "val_test", write_split(tmp_path / "a.arrow", labels=[label] * 8))
    found = evaluate_split(predictor, one, 0.5, n_resamples=100, mistakes=2, seed=7)
    report, probability = found.report, found.predictions["probability"]
    share = float((probability > 0.5).mean())
    wanted = {"recall": share, "fnr": 1 - share} if label else {"fpr": share}
    assert report["natural"] == pytest.approx(wanted)
    assert [report[name] for name in ("mcc", "ece", "ece_detail", "served")] == [None] * 4
    assert report["mean_probability"] == pytest.approx(probability.mean())
    assert (report["n"], report["positive_share"]) == (8, label)
    assert set(found.plots) == {"confusion.png", "mistakes.png"}
    assert found.curves == {}
    written = write_evaluation(found, tmp_path / "evaluation.json", tmp_path / "plots")
    assert json.loads(written[-1].read_text())["mcc"] is None
    assert ("recall", "the false alarm rate")[1 - label] in caplog.text
    for low_high in report["natural_interval"].values():
        assert low_high["low"] <= low_high["high"]


def test_impossible_priors_are_refused(predictor: Predictor, split: Split) -> None:
    for prior in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="prior"):
            evaluate_split(predictor, split, prior, n_resamples=100, mistakes=0, seed=7)
