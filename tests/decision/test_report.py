"""What `sweep` and `calibrate` report agrees with the functions and with scikit-learn."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, matthews_corrcoef

from streetvision.core.artifacts import json_text
from streetvision.decision.policy import fit_policy
from streetvision.decision.report import calibration_metrics, sweep_thresholds
from streetvision.decision.threshold import bagged_median_threshold, select_threshold_max_mcc
from streetvision.stats.metrics import prior_weights


def scores(seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Logits, labels and groups of 240 images in 24 groups."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(240) < 0.7).astype(np.int64)
    return rng.normal(labels * 2 - 0.4, 1.2), labels, rng.integers(0, 24, 240)


def flat(tree: Any) -> list[Any]:
    if not isinstance(tree, dict):
        return [tree]
    return [leaf for value in tree.values() for leaf in flat(value)]


def sweep(seed: int, selection: str) -> tuple[dict[str, Any], Any]:
    return sweep_thresholds(
        *scores(seed), n_thresholds=301, selection=selection, n_resamples=100, seed=5,
        split_used="val_calib",
    )  # fmt: skip


def mcc_of(document: dict[str, Any]) -> float:
    """The one MCC that the document gives for its threshold."""
    found = [value for key, value in walk(document) if key.endswith("mcc") and "grid" not in key]
    assert found
    return float(found[0])


def walk(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        pairs += walk(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return pairs


def threshold_of(document: dict[str, Any]) -> float:
    return float(next(value for key, value in walk(document) if key == "threshold"))


@pytest.mark.parametrize("seed", range(3))
def test_exact_takes_the_optimum_and_bagged_the_median(seed: int) -> None:
    logits, labels, groups = scores(seed)
    probability = 1 / (1 + np.exp(-logits))
    for selection in ("exact", "bagged_median"):
        document, curve = sweep(seed, selection)
        threshold = threshold_of(document)
        if selection == "exact":
            wanted = select_threshold_max_mcc(logits, labels)[0]
        else:
            wanted = bagged_median_threshold(logits, labels, groups, 100, 5).median
        assert threshold == wanted
        measured = matthews_corrcoef(labels, probability > threshold)
        assert mcc_of(document) == pytest.approx(measured, abs=1e-12)
        assert len(curve.threshold) == 301
        assert curve.mcc.max() <= matthews_corrcoef(
            labels, probability > select_threshold_max_mcc(logits, labels)[0]
        ) + 1e-12  # fmt: skip
        assert any(value == "val_calib" for _, value in walk(document))
        assert json.loads(json_text(document))


def test_both_selections_have_the_same_keys() -> None:
    exact, bagged = sweep(1, "exact")[0], sweep(1, "bagged_median")[0]
    assert [key for key, _ in walk(exact)] == [key for key, _ in walk(bagged)]


@pytest.mark.parametrize(("seed", "prior"), [(0, 0.5), (1, 0.3), (2, 0.5)])
def test_calibration_metrics(seed: int, prior: float) -> None:
    logits, labels, groups = scores(seed)
    policy, report = fit_policy(logits, labels, groups, prior, 200, 7)
    metrics = calibration_metrics(report, policy, logits, labels, 0.6)
    weights = prior_weights(labels, prior)
    deployed = policy.deployed_probability(logits) > 0.5
    baseline = 1 / (1 + np.exp(-logits)) > 0.6
    for name, decided in (("deployed", deployed), ("phase_2_threshold", baseline)):
        found = metrics["decision"][name]
        assert found["mcc"] == pytest.approx(
            matthews_corrcoef(labels, decided, sample_weight=weights), abs=1e-12
        )
        assert found["accuracy"] == pytest.approx(
            accuracy_score(labels, decided, sample_weight=weights), abs=1e-12
        )
        assert found["fnr"] == pytest.approx(np.mean(~decided[labels == 1]), abs=1e-12)
        assert found["fpr"] == pytest.approx(np.mean(decided[labels == 0]), abs=1e-12)
    # Fused logits are held against the threshold on the single-view logits that it was chosen on.
    fused = calibration_metrics(report, policy, logits, labels, 0.6, single_logits=logits[::-1])
    other = 1 / (1 + np.exp(-logits[::-1])) > 0.6
    assert fused["decision"]["deployed"] == metrics["decision"]["deployed"]
    assert fused["decision"]["phase_2_threshold"]["fpr"] == pytest.approx(
        np.mean(other[labels == 0]), abs=1e-12
    )
    assert metrics["n"] == 240
    assert metrics["groups"] == len(np.unique(groups))
    assert metrics["calibration_prior"] == labels.mean()
    assert metrics["served_prior"] == prior
    assert set(metrics) >= {"before", "after", "candidates", "threshold", "folds"}
    for values in metrics["candidates"].values():
        assert set(values) == {"log_loss", "brier", "ece", "deployable", "deployed"}
    for leaf in flat(metrics):
        assert leaf in {"clean", "group"} or math.isfinite(leaf)


def test_what_does_not_exist_is_left_out() -> None:
    # Two groups: no interval of the threshold; one of them pure, so that a fold has one class.
    logits = np.array([2.0, 1.0, -1.0, -2.0, 1.5, 0.5])
    labels = np.array([1, 0, 1, 0, 1, 1])
    groups = np.array([0, 0, 0, 0, 1, 1])
    policy, report = fit_policy(logits, labels, groups, 0.5, 100, 7)
    metrics = calibration_metrics(report, policy, logits, labels, 0.5)
    assert "low" not in metrics["threshold"]
    assert ("after" in metrics) == (metrics["folds"] > 0)
    assert metrics["folds"] == 0
    assert "candidates" not in metrics
    assert None not in flat(metrics)
