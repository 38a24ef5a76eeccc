from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from streetvision.core.errors import UserError
from streetvision.stats.metrics import (
    COUNT_METRICS,
    METRIC_NAMES,
    METRIC_RANGES,
    GroupTable,
    all_metrics,
    all_metrics_batch,
    confusion,
    curve_counts,
    ece_noise_floor,
    mcc_from_counts,
    prior_weights,
)


def sample(n=400, seed=0, decimals=None):
    rng = np.random.default_rng(seed)
    p = rng.beta(0.7, 0.5, n)
    y = (rng.random(n) < 0.15 + 0.75 * p).astype(int)
    return y, p if decimals is None else p.round(decimals)


def slow_ece(y, p, w):
    """The definition, bin by bin: (0, 1/15], ..., and 0 in the first."""
    total = 0.0
    for k in range(15):
        inside = [
            i for i in range(len(p)) if (k / 15 < p[i] <= (k + 1) / 15) or (k == 0 and p[i] == 0)
        ]
        if inside:
            mass = sum(w[i] for i in inside)
            mean = sum(w[i] * p[i] for i in inside) / mass
            share = sum(w[i] * y[i] for i in inside) / mass
            total += mass / sum(w) * abs(mean - share)
    return total


@pytest.mark.parametrize("decimals", [None, 1])  # one decimal: many ties, and scores of exactly 0.5
@pytest.mark.parametrize("prior", [None, 0.5, 0.12])
def test_metrics_equal_sklearn(prior, decimals):
    y, p = sample(decimals=decimals)
    w = None if prior is None else prior_weights(y, prior)
    got = all_metrics(y, p, w)
    hard = (p > 0.5).astype(int)
    tn, fp, fn, tp = sk.confusion_matrix(y, hard, sample_weight=w).ravel()
    expected = {
        "accuracy": sk.accuracy_score(y, hard, sample_weight=w),
        "precision": sk.precision_score(y, hard, sample_weight=w),
        "recall": sk.recall_score(y, hard, sample_weight=w),
        "f1": sk.f1_score(y, hard, sample_weight=w),
        "mcc": sk.matthews_corrcoef(y, hard, sample_weight=w),
        "fnr": fn / (fn + tp),
        "fpr": fp / (fp + tn),
        "roc_auc": sk.roc_auc_score(y, p, sample_weight=w),
        "pr_auc": sk.average_precision_score(y, p, sample_weight=w),
        "brier": sk.brier_score_loss(y, p, sample_weight=w),
        "log_loss": sk.log_loss(y, np.clip(p, 1e-7, 1 - 1e-7), sample_weight=w),
        "ece": slow_ece(y, p, np.ones(len(y)) if w is None else w),
    }
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-12), name
    assert tuple(got) == METRIC_NAMES


def test_equal_mass_and_debiased_ece_equal_a_slow_loop():
    y, p = sample(n=450)  # 30 images in each bin
    bins = np.array_split(np.argsort(p), 15)
    gaps = [abs(p[b].mean() - y[b].mean()) for b in bins]
    # Kumar et al. 2019, section 4: subtract share (1 - share) / (n - 1) from each squared gap.
    squares = [
        (p[b].mean() - y[b].mean()) ** 2 - y[b].mean() * (1 - y[b].mean()) / (len(b) - 1)
        for b in bins
    ]
    got = all_metrics(y, p)
    assert got["ece_equal_mass"] == pytest.approx(np.mean(gaps), abs=1e-12)
    assert got["ece_debiased"] == pytest.approx(np.sqrt(np.mean(squares)), abs=1e-12)


def test_weighted_equal_mass_ece_has_bins_of_equal_weight():
    y, p = sample(n=3000)
    w = prior_weights(y, 0.5)
    order = np.argsort(p)
    before = (np.cumsum(w[order]) - w[order]) / w.sum()
    bins = np.floor((before + 1e-9) * 15).astype(int)
    gaps = [w[order][bins == k] @ (p - y)[order][bins == k] for k in range(15)]
    assert all_metrics(y, p, w)["ece_equal_mass"] == pytest.approx(
        np.abs(gaps).sum() / w.sum(), abs=1e-12
    )


@pytest.mark.parametrize("prior", [None, 0.5])
def test_debiasing_removes_the_bias_on_average(prior):
    """Squared and debiased error of a model off by 0.1 averages 0.01; the plain one is larger."""
    rng = np.random.default_rng(3)
    debiased, plain = [], []
    for _ in range(300):
        p = rng.uniform(0.2, 0.8, 300)
        truth = p - 0.1
        if prior is not None:  # draw at 80 % positives what re-weighting turns into `truth`
            odds = truth / (1 - truth) * 4
            truth = odds / (1 + odds)
        y = (rng.random(300) < truth).astype(int)
        w = None
        if prior is not None:
            w = np.where(y == 1, 1.0, 4.0)
        got = all_metrics(y, p, w)
        debiased.append(got["ece_debiased"] ** 2)
        plain.append(got["ece_equal_mass"] ** 2)
    assert np.mean(debiased) == pytest.approx(0.01, abs=0.0012)
    assert np.mean(plain) > 0.0125


def test_half_is_negative_and_counts_agree():
    y, p = np.array([1, 1, 0, 0]), np.array([0.5, np.nextafter(0.5, 1), 0.5, 0.9])
    assert confusion(y, p) == {"tp": 1, "fp": 1, "tn": 1, "fn": 1}
    assert all_metrics(y, p)["recall"] == 0.5


def test_undefined_is_absent_and_mcc_is_zero():
    only = all_metrics([1, 1], [0.2, 0.9])
    assert "roc_auc" not in only
    assert "fpr" not in only
    assert only["mcc"] == 0
    assert "precision" not in all_metrics([1, 0], [0.2, 0.1])
    assert mcc_from_counts([5, 0], [0, 0], [5, 3], [0, 2]).tolist() == [1.0, 0.0]


def test_mcc_of_huge_counts_does_not_overflow():
    assert mcc_from_counts(1e100, 0, 1e100, 0) == 1.0
    assert mcc_from_counts(49, 0, 51, 0) == 1.0


@given(
    st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=40),
    st.one_of(st.none(), st.floats(0.01, 0.99)),
)
@settings(max_examples=150, deadline=None)
def test_values_are_finite_and_in_range(rows, prior):
    y, p = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    w = prior_weights(y, prior) if prior is not None and 0 < y.sum() < len(y) else None
    got = all_metrics(y, p, w)
    assert {"accuracy", "mcc", "ece", "brier", "log_loss"} <= set(got)
    for name, value in got.items():
        low, high = METRIC_RANGES[name]
        assert low - 1e-12 <= value <= high + 1e-9


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.01, 0.99))
def test_prior_weights_have_their_share_and_sum(n_0, n_1, prior):
    y = np.repeat([0, 1], [n_0, n_1])
    w = prior_weights(y, prior)
    assert w.sum() == pytest.approx(len(y))
    assert w[y == 1].sum() / w.sum() == pytest.approx(prior)


def test_weights_act_like_repeated_images():
    """Except for the debiased ECE and the bin edges, weight 3 is three copies."""
    y, p = sample(n=60)
    copies = np.where(y == 0, 3, 1)
    weighted = all_metrics(y, p, copies)
    repeated = all_metrics(np.repeat(y, copies), np.repeat(p, copies))
    for name in set(METRIC_NAMES) - {"ece_debiased"}:
        assert weighted[name] == pytest.approx(repeated[name], abs=1e-12), name


def test_batch_of_count_metrics_needs_no_ranking_and_agrees():
    y, p = sample()
    groups = np.arange(len(y)) % 7
    table = GroupTable.build(y, p, groups, 0.5)
    rows = np.random.default_rng(0).integers(0, 3, (5, 7)).astype(float)
    few = all_metrics_batch(table, rows, 0.5, COUNT_METRICS)
    every = all_metrics_batch(table, rows, 0.5)
    assert tuple(few) == COUNT_METRICS
    for name in COUNT_METRICS:
        np.testing.assert_array_equal(few[name], every[name])


def test_noise_floor_matches_a_loop_over_simulated_labels():
    _, p = sample(n=300)
    rng = np.random.default_rng(1)
    loop = [all_metrics((rng.random(300) < p).astype(int), p)["ece"] for _ in range(400)]
    floor = ece_noise_floor(np.zeros(300), p, None, n_simulations=4000, seed=0)
    assert floor.mean == pytest.approx(np.mean(loop), rel=0.03)
    assert floor.upper == pytest.approx(np.quantile(loop, 0.95), rel=0.06)
    assert floor == ece_noise_floor(np.ones(300), p, None, n_simulations=4000, seed=0)


def test_noise_floor_at_a_served_prior_is_that_of_a_calibrated_model():
    """Data at 80 % positives, model calibrated at 50 %: its ECE must scatter round the floor."""
    rng = np.random.default_rng(2)
    errors = []
    for _ in range(200):
        y = (rng.random(400) < 0.8).astype(int)
        logit = rng.normal(np.where(y == 1, 1.0, -1.0), 1.0) * 2  # exact log-odds at 50/50
        p = 1 / (1 + np.exp(-logit))
        w = prior_weights(y, 0.5)
        errors.append(all_metrics(y, p, w)["ece"])
    floor = ece_noise_floor(y, p, w, seed=0)
    assert floor.mean == pytest.approx(np.mean(errors), rel=0.1)
    assert np.mean(np.array(errors) > floor.upper) < 0.12


def test_noise_floor_shrinks_with_the_sample():
    small, large = sample(n=200), sample(n=5000)
    assert ece_noise_floor(*large).mean < ece_noise_floor(*small).mean / 3


def test_curve_counts_end_at_the_totals():
    y, p = sample(decimals=1)
    scores, tp, fp = curve_counts(y, p)
    for score, t, f in zip(scores, tp, fp, strict=True):
        assert (t, f) == (y[p >= score].sum(), (1 - y)[p >= score].sum())
    assert len(scores) == len(np.unique(p))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prior_weights([1, 1], 0.5), "both classes"),
        (lambda: prior_weights([1, 0], 1.0), "between 0 and 1"),
        (lambda: all_metrics([], []), "non-empty"),
        (lambda: all_metrics([0, 2], [0.1, 0.2]), "0 or 1"),
        (lambda: all_metrics([0, 1], [0.1, np.nan]), "probabilities must lie"),
        (lambda: all_metrics([0, 1], [0.1]), "equal length"),
        (lambda: all_metrics([0, 0], [0.1, 0.2], [1, 2]), "equal within a class"),
        (lambda: all_metrics([0, 1], [0.1, 0.2], [1, 0]), "positive numbers"),
        (
            lambda: all_metrics_batch(
                GroupTable.build(np.array([0]), np.array([0.5]), np.array([0]), None),
                np.ones((1, 1)),
                None,
                ["auc"],
            ),
            "unknown metric 'auc'",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
