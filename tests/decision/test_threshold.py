"""The exact MCC optimum, its grid and its bagged median, against slow and obvious references."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_score

from streetvision.core.errors import UserError
from streetvision.decision.threshold import (
    BaggedThreshold,
    bagged_median_threshold,
    metrics_at_threshold,
    select_threshold_max_mcc,
    thresholds_document,
)
from streetvision.stats.metrics import prior_weights

RATIOS = {"mcc", "accuracy", "precision", "recall", "f1", "fnr", "fpr"}
SCHEMA_METRICS = RATIOS | {"tp", "tn", "fp", "fn"}


@st.composite
def scored(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits with many ties, saturated ones among them, and labels of both classes."""
    size = draw(st.integers(2, 40))
    levels = [-800.0, -40.0, -1.5, -0.5, 0.0, 1e-17, 0.25, 2.0, 36.0, 37.0, 40.0]
    logit = st.one_of(st.sampled_from(levels), st.floats(-5, 5))
    logits = np.array(draw(st.lists(logit, min_size=size, max_size=size)))
    labels = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    labels[0], labels[1] = 0, 1
    return logits, np.array(labels)


def brute_force(
    logits: NDArray[np.float64], labels: NDArray[np.int64], weights: NDArray[np.float64] | None
) -> float:
    """Best MCC over every distinct score as a threshold, and 0, by scikit-learn."""
    probability = expit(logits)
    return max(
        matthews_corrcoef(labels, probability > t, sample_weight=weights)
        for t in {0.0, *probability.tolist()}
    )


@settings(max_examples=80, deadline=None)
@given(scored(), st.booleans())
def test_exact_optimum_is_the_best_of_every_distinct_score(
    data: tuple[NDArray[np.float64], NDArray[np.int64]], weighted: bool
) -> None:
    logits, labels = data
    weights = prior_weights(labels, 0.5) if weighted else None
    threshold, mcc, metrics = select_threshold_max_mcc(logits, labels, weights=weights)
    assert 0 <= threshold <= 1
    assert mcc == pytest.approx(brute_force(logits, labels, weights), abs=1e-9)
    # What is reported is what p > threshold does.
    decided = expit(logits) > threshold
    w = np.ones(len(labels)) if weights is None else weights
    for name, mask in {
        "tp": decided & (labels == 1),
        "fp": decided & (labels == 0),
        "fn": ~decided & (labels == 1),
        "tn": ~decided & (labels == 0),
    }.items():
        assert metrics[name] == pytest.approx(w[mask].sum(), abs=1e-12)
    assert metrics["mcc"] == mcc
    assert mcc == pytest.approx(matthews_corrcoef(labels, decided, sample_weight=w), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(scored(), st.integers(2, 60))
def test_grid_counts_equal_brute_force_and_never_beat_the_exact_optimum(
    data: tuple[NDArray[np.float64], NDArray[np.int64]], n_thresholds: int
) -> None:
    logits, labels = data
    _, mcc, _, curve = select_threshold_max_mcc(logits, labels, n_thresholds, return_curve=True)
    assert len(curve.threshold) == n_thresholds
    assert curve.threshold[0] == 0
    assert curve.threshold[-1] == 1
    for row, t in enumerate(curve.threshold):
        decided = expit(logits) > t
        assert curve.tp[row] == (decided & (labels == 1)).sum()
        assert curve.fp[row] == (decided & (labels == 0)).sum()
        assert curve.fn[row] == (~decided & (labels == 1)).sum()
        assert curve.tn[row] == (~decided & (labels == 0)).sum()
        assert curve.mcc[row] == pytest.approx(matthews_corrcoef(labels, decided), abs=1e-12)
    assert curve.mcc[curve.best_index] == curve.mcc.max() <= mcc + 1e-12


def forms(logits: NDArray[np.float64]) -> dict[str, Any]:
    """The same log-odds, as people have them."""
    two = np.stack([3 - logits, 3 + 0 * logits], axis=1)
    return {
        "[N, 1]": logits[:, None],
        "[N, 2]": two,
        "list": logits.tolist(),
        "list [N, 2]": two.tolist(),
        "tensor": torch.from_numpy(logits),
        "tensor [N, 2] with a gradient": torch.from_numpy(two).requires_grad_(),
        "BF16": torch.from_numpy(logits).bfloat16(),
    }


def test_logits_of_two_classes_are_their_softmax() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    # Sixteenths, which BF16 holds exactly.
    logits = np.clip(np.round(16 * (2 * labels - 1 + rng.normal(0, 1.5, 200))) / 16, -7, 7)
    wanted = select_threshold_max_mcc(logits, labels)
    # Independently: the softmax of two classes, thresholded at every value it takes.
    two = forms(logits)["[N, 2]"]
    p = np.exp(two[:, 1]) / np.exp(two).sum(axis=1)
    best = max(matthews_corrcoef(labels, p > t) for t in np.append(0, np.unique(p)))
    assert wanted[1] == pytest.approx(best)
    for name, values in forms(logits).items():
        for truth in (labels, labels.tolist(), torch.from_numpy(labels), labels[:, None]):
            found = select_threshold_max_mcc(values, truth)
            assert found[0] == pytest.approx(wanted[0], abs=1e-6), name
            assert found[1:] == (pytest.approx(wanted[1]), pytest.approx(wanted[2])), name
            curve = select_threshold_max_mcc(values, truth, 50, return_curve=True)[3]
            assert len(curve.mcc) == 50
        assert metrics_at_threshold(values, labels, wanted[0]) == pytest.approx(wanted[2])


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.zeros((4, 3)), r"logits have shape \(4, 3\); \[N\], \[N, 1\] or \[N, 2\]"),
        (np.zeros((4, 2, 1)), r"logits have shape \(4, 2, 1\)"),
        (0.5, r"logits have shape \(\)"),
        ([["a", "b"]] * 4, "logits are of type <U1; numbers are needed"),
        ([[1.0, 2.0], [1.0]], "rows of different lengths are no array"),
        (np.full((4, 2), np.inf), "4 of 4 logits are not finite"),
    ],
)
def test_other_logits_are_refused(logits: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_threshold_max_mcc(logits, [0, 1, 0, 1])


def test_the_widest_optimal_plateau_wins_and_its_centre_is_returned() -> None:
    def logit(p: float) -> float:
        return float(np.log(p / (1 - p)))

    # Optimal: [.1, .2) and, by symmetry of the counts, [.5, .9): both make one mistake.
    logits = [logit(p) for p in (0.1, 0.2, 0.5, 0.9)]
    labels = [0, 1, 0, 1]
    threshold, mcc, _ = select_threshold_max_mcc(logits, labels)
    assert mcc == pytest.approx(1 / np.sqrt(3))
    assert threshold == pytest.approx(0.7)


def test_weightless_images_do_not_split_a_plateau() -> None:
    logits, labels = np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0, 1, 0, 1])
    threshold, mcc, _ = select_threshold_max_mcc(logits, labels, weights=[1, 0, 0, 1])
    assert mcc == pytest.approx(1)
    assert threshold == pytest.approx(0.5)


def test_neighbouring_floats_are_cut_apart_although_their_centre_is_no_float() -> None:
    ladder = 0.5 + np.arange(200) * np.spacing(0.5)
    ladder = ladder[np.unique(expit(ladder), return_index=True)[1]]
    rounded_up = 0
    for logits in itertools.pairwise(ladder):
        low, high = expit(logits)
        rounded_up += (low + high) / 2 == high
        threshold, mcc, _ = select_threshold_max_mcc(logits, [0, 1])
        assert mcc == pytest.approx(1)
        assert low <= threshold < high
    assert rounded_up > 0


def test_saturated_logits_are_one_cut_point() -> None:
    threshold, mcc, metrics = select_threshold_max_mcc([-40.0, 38.0, 40.0, 800.0], [0, 0, 1, 1])
    assert metrics["fp"] == 1  # p is 1.0 for 38 and 40: no probability threshold tells them apart
    assert mcc == pytest.approx(1 / np.sqrt(3))
    assert threshold == pytest.approx(0.5)


def test_metrics_agree_with_sklearn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 500)
    logits = rng.normal(2.0 * labels, 1.5)
    threshold, _, metrics = select_threshold_max_mcc(logits, labels)
    decided = expit(logits) > threshold
    assert set(metrics) == SCHEMA_METRICS
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, decided))
    assert metrics["precision"] == pytest.approx(precision_score(labels, decided))
    assert metrics["f1"] == pytest.approx(f1_score(labels, decided))
    assert metrics["fnr"] == pytest.approx(1 - metrics["recall"])
    assert metrics["fpr"] == pytest.approx(metrics["fp"] / (labels == 0).sum())


def test_metrics_at_a_given_threshold_are_those_of_the_curve() -> None:
    logits = np.array([-1.0, 0.0, 0.0, 1.0, 2.0])
    labels = np.array([0, 0, 1, 1, 0])
    weights = prior_weights(labels, 0.5)
    threshold, _, metrics, curve = select_threshold_max_mcc(
        logits, labels, 41, return_curve=True, weights=weights
    )
    assert metrics_at_threshold(logits, labels, threshold, weights) == pytest.approx(metrics)
    for row, t in enumerate(curve.threshold):  # row 20 is 0.5, where two images are negative
        at = metrics_at_threshold(logits, labels, float(t), weights)
        assert at["mcc"] == pytest.approx(curve.mcc[row])
        assert at["tp"] == pytest.approx(curve.tp[row])
        assert at["fn"] == pytest.approx(curve.fn[row])
    counts = metrics_at_threshold(logits, labels, 0.5)
    assert [counts[name] for name in ("tp", "tn", "fp", "fn")] == [1, 2, 1, 1]
    with pytest.raises(UserError, match=r"threshold is 1\.5"):
        metrics_at_threshold(logits, labels, 1.5)


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        ([0.0, 1.0], [0], {}, "2 logits but labels of shape"),
        ([0.0, np.nan], [0, 1], {}, "1 of 2 logits are not finite"),
        ([0.0, np.inf], [0, 1], {}, "not finite"),
        ([0.0, 1.0], [0, 2], {}, "label 2"),
        ([0.0, 1.0], ["0", "1"], {}, "labels are of type"),
        ([0.0, 1.0], [1, 1], {}, "all 2 labels are 1"),
        ([], [], {}, "empty"),
        ([[0.0, 1.0]], [[0, 1]], {}, "shape"),
        ([0.0, 1.0], [0, 1], {"n_thresholds": 1}, "n_thresholds is 1"),
        ([0.0, 1.0], [0, 1], {"weights": [1.0]}, "weights of shape"),
        ([0.0, 1.0], [0, 1], {"weights": [1.0, -1.0]}, "negative"),
        ([0.0, 1.0], [0, 1], {"weights": [1.0, 0.0]}, "sum to 0"),
    ],
)
def test_input_errors_say_what_is_wrong(
    logits: list[float], labels: list[int], options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        select_threshold_max_mcc(logits, labels, **options)  # type: ignore[call-overload]


def test_a_million_scores() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1_000_000)
    logits = rng.normal(2.0 * labels - 1, 1.0)
    threshold, mcc, metrics, _ = select_threshold_max_mcc(logits, labels, return_curve=True)
    # The truth: cut at logit 0, tpr = 1 - fpr = Φ(1) = .8413, MCC = 2 Φ(1) - 1.
    assert mcc == pytest.approx(0.6827, abs=0.003)
    assert threshold == pytest.approx(0.5, abs=0.02)
    assert metrics["tp"] + metrics["tn"] + metrics["fp"] + metrics["fn"] == 1_000_000


def grouped(
    seed: int, n_groups: int, per_group: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), per_group)
    labels = rng.integers(0, 2, groups.size)
    logits = rng.normal(2.0 * labels - 1 + 0.5 * rng.normal(size=n_groups)[groups], 1.0)
    return np.round(logits, 1), labels, groups


@pytest.mark.parametrize("prior", [None, 0.5, 0.8])
def test_bagged_median_equals_resampling_one_at_a_time(prior: float | None) -> None:
    logits, labels, groups = grouped(1, 8, 9)
    bagged = bagged_median_threshold(logits, labels, groups, n_resamples=60, seed=3, prior=prior)
    draws = np.random.default_rng(3).multinomial(8, np.full(8, 1 / 8), size=60)
    singles = []
    for times in draws:
        rows = np.repeat(np.arange(labels.size), times[groups])
        weights = None if prior is None else prior_weights(labels[rows], prior)
        singles.append(select_threshold_max_mcc(logits[rows], labels[rows], weights=weights)[0])
    assert bagged.median == pytest.approx(np.median(singles), abs=1e-12)
    assert (bagged.n_groups, bagged.n_resamples, bagged.n_used) == (8, 60, 60)


def test_blocks_do_not_change_the_bagged_median(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, groups = grouped(2, 12, 5)
    whole = bagged_median_threshold(logits, labels, groups, 50, seed=0, prior=0.5)
    monkeypatch.setattr("streetvision.decision.threshold.BLOCK_ELEMENTS", 200)
    assert bagged_median_threshold(logits, labels, groups, 50, seed=0, prior=0.5) == whole


def test_one_class_resamples_are_left_out() -> None:
    logits, labels = np.array([-1.0, -0.5, 1.0, 2.0]), np.array([0, 0, 1, 1])
    bagged = bagged_median_threshold(logits, labels, [0, 0, 1, 1], 200, seed=0)
    assert 60 < bagged.n_used < 140  # half of the draws of two groups are one group twice
    assert bagged.median == pytest.approx(expit([-0.5, 1.0]).mean())
    seed = next(
        s
        for s in range(20)
        if np.random.default_rng(s).multinomial(2, [0.5, 0.5], size=1).max() == 2
    )
    with pytest.raises(UserError, match="holds both classes"):
        bagged_median_threshold(logits, labels, [0, 0, 1, 1], 1, seed=seed)


def test_interval_is_withheld_below_five_groups_and_wider_with_few() -> None:
    logits, labels, groups = grouped(4, 64, 20)
    few = bagged_median_threshold(logits, labels, groups % 4, 50, seed=0)
    assert few.low is None
    assert few.high is None
    assert not few.excludes(0.999)
    # One group with most of the images is little more than one group.
    large = bagged_median_threshold(logits, labels, np.where(groups < 50, 0, groups), 50, seed=0)
    assert (large.low, large.n_groups) == (None, 15)
    positives, negatives = (np.bincount(groups[labels == label]) for label in (1, 0))
    wanted = min(n.sum() ** 2 / (n**2).sum() for n in (positives, negatives))
    many = bagged_median_threshold(logits, labels, groups, 4000, seed=0)
    assert many.effective_groups == pytest.approx(wanted)
    assert many.low is not None
    assert many.high is not None
    assert many.low <= many.median <= many.high
    assert many.excludes(0.0)
    assert not many.excludes(many.median)


def test_interval_is_the_expanded_percentile_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    # With known resampled optima 0 … 1, the interval's ends are its tail probabilities.
    optima = np.linspace(0, 1, 10_001)
    monkeypatch.setattr(
        "streetvision.decision.threshold._resampled_optima", lambda *_: optima.copy()
    )
    monkeypatch.setattr("streetvision.decision.threshold.BLOCK_ELEMENTS", 10**9)
    tails = {}
    for n_groups in (5, 15, 60, 1000):
        groups = np.arange(2 * n_groups) % n_groups
        labels = np.arange(2 * n_groups) // n_groups
        bagged = bagged_median_threshold(np.zeros(2 * n_groups), labels, groups, 10, seed=0)
        assert bagged.low is not None
        tails[n_groups] = bagged.low
    # Φ(sqrt(G / (G-1)) · t(.025, G-1)) from tables of t: 2.776, 2.145, 2.001, 1.962.
    assert tails[5] == pytest.approx(0.00095, abs=2e-4)
    assert tails[15] == pytest.approx(0.0132, abs=2e-4)
    assert tails[60] == pytest.approx(0.0218, abs=2e-4)
    assert tails[1000] == pytest.approx(0.025, abs=2e-4)


def test_group_bootstrap_is_wider_than_row_bootstrap_where_groups_differ() -> None:
    logits, labels, groups = grouped(5, 80, 20)
    by_group = bagged_median_threshold(logits, labels, groups, 500, seed=0, prior=0.5)
    by_row = bagged_median_threshold(logits, labels, np.arange(labels.size), 500, seed=0, prior=0.5)
    assert by_group.high is not None
    assert by_group.low is not None
    assert by_row.high is not None
    assert by_row.low is not None
    assert by_group.high - by_group.low > by_row.high - by_row.low


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": [0, 1]}, "groups of shape"),
        ({"n_resamples": 0}, "n_resamples is 0"),
        ({"prior": 1.0}, "prior of the resamples"),
    ],
)
def test_bagging_input_errors(options: dict[str, object], message: str) -> None:
    arguments = {"groups": [0, 1, 2], "n_resamples": 5, "seed": 0, "prior": 0.5} | options
    with pytest.raises(UserError, match=message):
        bagged_median_threshold([0.0, 1.0, 2.0], [0, 1, 1], **arguments)  # type: ignore[arg-type]


def test_document_has_the_schema_and_is_finite_json() -> None:
    logits, labels, _ = grouped(6, 10, 10)
    threshold, mcc, metrics, curve = select_threshold_max_mcc(
        logits, labels, 100, return_curve=True
    )
    bagged = BaggedThreshold(0.4, None, None, 3, 2.5, 10, 9)
    document = thresholds_document(threshold, metrics, curve, bagged, "val_calib")
    assert document["policy_type"] == "threshold"
    assert document["optimize_metric"] == "mcc"
    assert document["n_thresholds"] == 100
    assert document["split_used"] == "val_calib"
    assert document["class_names"] == ["None", "Roadwork"]
    assert set(document["metrics"]) == SCHEMA_METRICS
    assert isinstance(document["metrics"]["tp"], int)
    assert document["grid"]["mcc"] <= mcc
    assert document["bagged"]["median"] == 0.4
    assert json.loads(json.dumps(document, allow_nan=False)) == document
