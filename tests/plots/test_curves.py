"""The tables that `dvc plots diff` draws, against scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as sk

from streetvision.core.errors import UserError
from streetvision.plots.curves import (
    MOST_POINTS,
    evenly,
    precision_recall_curve,
    reliability_table,
    roc_curve,
    wilson_interval,
)
from streetvision.stats.metrics import N_BINS, all_metrics, prior_weights

RNG = np.random.default_rng(3)


def sample(n: int, digits: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities, the coarser the more of them tied."""
    y = RNG.permutation(np.arange(n) % 3 // 2)
    return y, np.clip(0.35 + 0.3 * y + RNG.normal(0, 0.2, n), 0, 1).round(digits)


@pytest.mark.parametrize("digits", [9, 1])
def test_a_short_curve_is_scikit_learns(digits: int) -> None:
    y, p = sample(150, digits)
    fpr, tpr, threshold = sk.roc_curve(y, p, drop_intermediate=False)
    found = roc_curve(y, p)
    np.testing.assert_allclose(found["fpr"], fpr)
    np.testing.assert_allclose(found["tpr"], tpr)
    assert found["threshold"][1:] == threshold[1:].tolist()
    weights = prior_weights(y, 0.3)
    precision, recall, _ = sk.precision_recall_curve(y, p, sample_weight=weights)
    found = precision_recall_curve(y, p, 0.3)
    n = len(recall)
    np.testing.assert_allclose(found["recall"][:n], recall[::-1])
    np.testing.assert_allclose(found["precision"][:n], precision[::-1])


@given(st.integers(0, 2**32 - 1), st.integers(4, 3000))
def test_a_thinned_curve_is_a_part_of_the_whole(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    y = np.append([0, 1], rng.integers(0, 2, n - 2))
    p = rng.random(n) ** rng.choice([0.01, 1, 100])
    fpr, tpr, threshold = sk.roc_curve(y, p, drop_intermediate=False)
    whole = list(zip(threshold[1:], fpr[1:], tpr[1:], strict=True))
    found = list(zip(*roc_curve(y, p).values(), strict=True))
    assert len(found) <= MOST_POINTS
    assert found[0] == (1.0, 0.0, 0.0)
    assert found[-1][1:] == (1.0, 1.0)
    places = [whole.index(point) for point in found[1:]]
    assert places == sorted(set(places))
    # No gap is wider than the even one.
    assert max(np.diff([-1, *places])) <= len(whole) / (MOST_POINTS - 2) + 1
    # The plot's dot: the lowest threshold above a half is the decision p > 0.5.
    values = all_metrics(y, p)
    above = [point for point in found if point[0] > 0.5]
    if len(above) > 1:
        assert above[-1][1:] == pytest.approx((values["fpr"], values["recall"]))
    else:
        assert not (p > 0.5).any()


def test_the_precision_where_nothing_is_called_is_one() -> None:
    found = precision_recall_curve([1, 0], [0.9, 0.1], 0.5)
    assert found == {"threshold": [1.0, 0.9, 0.1], "recall": [0, 1, 1], "precision": [1, 1, 0.5]}


def test_reliability_is_the_error_that_the_report_states() -> None:
    y, p = sample(500)
    table = reliability_table(y, p, 0.3, "here")
    weights = prior_weights(y, 0.3)
    bins = np.minimum((p * N_BINS).astype(int), N_BINS - 1)
    assert table["panel"] == ["here"] * len(set(bins.tolist()))
    assert sum(table["images"]) == len(y)
    mass, error = [], []
    for row, place in enumerate(sorted(set(bins.tolist()))):
        own = bins == place
        assert table["bin"][row] == place / N_BINS
        assert table["images"][row] == own.sum()
        assert table["probability"][row] == pytest.approx(np.average(p[own], weights=weights[own]))
        assert table["share"][row] == pytest.approx(np.average(y[own], weights=weights[own]))
        assert 0 <= table["low"][row] <= table["share"][row] + 1e-12
        assert table["share"][row] - 1e-12 <= table["high"][row] <= 1
        mass.append(weights[own].sum())
        error.append(abs(table["share"][row] - table["probability"][row]))
    ece = np.average(error, weights=mass)
    assert ece == pytest.approx(all_metrics(y, p, weights)["ece"])


@given(st.integers(1, 400), st.floats(0, 1))
def test_the_interval_is_wilsons(n: int, share: float) -> None:
    hits = round(share * n)
    low, high = wilson_interval(np.array([hits / n]), np.array([float(n)]))
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.integers(1, 10_000), st.integers(2, 300))
def test_rows_at_even_distances(n: int, most: int) -> None:
    rows = evenly(n, most)
    assert len(rows) == min(n, most)
    assert (rows[0], rows[-1]) == (0, n - 1)
    if len(rows) > 1:
        assert np.ptp(np.diff(rows)) <= 1


def test_mistakes_are_named() -> None:
    for call in (
        lambda: roc_curve([1, 1], [0.1, 0.2]),
        lambda: precision_recall_curve([0, 0], [0.1, 0.2], 0.5),
        lambda: reliability_table([1], [0.5], 0.5, "here"),
    ):
        with pytest.raises(UserError, match="both"):
            call()
    with pytest.raises(UserError, match="prior"):
        precision_recall_curve([0, 1], [0.1, 0.2], 1.0)
    with pytest.raises(UserError, match="lie in"):
        roc_curve([0, 1], [0.1, 1.2])
