"""Isotonic, PCHIP and Venn–Abers against scikit-learn, scipy and their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression

from streetvision.core.errors import UserError
from streetvision.decision.choice import calibration_map_from_dict
from streetvision.decision.nonparametric import (
    Isotonic,
    IsotonicMap,
    Pchip,
    PchipMap,
    VennAbers,
    VennAbersMap,
)

Floats = NDArray[np.float64]
Arrays = tuple[Floats, NDArray[np.int64], Floats]


def sample(seed: int, size: int = 300, ties: bool = True, weighted: bool = True) -> Arrays:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, size)
    labels = (rng.random(size) < expit(1.5 * logits)).astype(np.int64)
    weights = rng.uniform(0.2, 3, size) if weighted else np.ones(size)
    return logits.round(1) if ties else logits, labels, weights


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_isotonic_agrees_with_sklearn(seed: int, ties: bool, weighted: bool) -> None:
    logits, labels, weights = sample(seed, ties=ties, weighted=weighted)
    positive, negative = weights[labels == 1].sum(), weights[labels == 0].sum()
    oracle = IsotonicRegression(
        y_min=1 / (negative + 2), y_max=(positive + 1) / (positive + 2), out_of_bounds="clip"
    ).fit(logits, labels, sample_weight=weights)
    tested = np.concatenate([logits, np.linspace(-9, 9, 500)])
    found = expit(Isotonic().fit(logits, labels, weights=weights)(tested))
    np.testing.assert_allclose(found, oracle.predict(tested), atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_pchip_goes_through_the_centres_of_the_isotonic_blocks(seed: int, weighted: bool) -> None:
    logits, labels, weights = sample(seed, weighted=weighted)
    positive, negative = weights[labels == 1].sum(), weights[labels == 0].sum()
    share = IsotonicRegression().fit(logits, labels, sample_weight=weights).predict(logits)
    levels = np.unique(share.round(9))
    centres, heights = [], []
    for level in levels:
        inside = np.abs(share - level) < 1e-8
        centres.append(np.average(logits[inside], weights=weights[inside]))
        heights.append(np.clip(level, 1 / (negative + 2), (positive + 1) / (positive + 2)))
    oracle = PchipInterpolator(centres, logit(heights))
    fitted = Pchip().fit(logits, labels, weights=weights)
    inside = np.linspace(centres[0], centres[-1], 1000)
    difference = fitted(inside) - oracle(inside)
    # A constant (the mean is the prior) and a line of a thousandth a standard deviation remain.
    np.testing.assert_allclose(difference, difference.mean(), atol=0.004)
    assert np.average(expit(fitted(logits)), weights=weights) == pytest.approx(
        np.average(labels, weights=weights), abs=1e-9
    )


def test_pchip_is_steep_enough_where_the_isotonic_map_is_flat() -> None:
    logits = np.linspace(-5, 5, 200)
    labels = np.tile([0, 1], 100)
    labels[0], labels[-1] = 0, 1
    fitted = Pchip().fit(logits, labels)
    slopes = np.diff(fitted(np.linspace(-50, 50, 10_001))) / 0.01
    assert slopes.min() >= 1e-3 / logits.std() * (1 - 1e-6)
    assert len(Pchip().fit(-logits, logits > 0).knots) == 1


def venn_abers_oracle(
    logits: Floats, labels: NDArray[np.int64], weights: Floats, tested: float
) -> tuple[float, float]:
    """The definition: one isotonic regression for each label that the tested logit might have."""
    found = [
        IsotonicRegression()
        .fit(
            np.append(logits, tested), np.append(labels, label), sample_weight=np.append(weights, 1)
        )
        .predict([tested])[0]
        for label in (0, 1)
    ]
    return found[0], found[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_venn_abers_agrees_with_its_definition(seed: int, weighted: bool) -> None:
    logits, labels, weights = sample(seed, size=60, weighted=weighted)
    fitted = VennAbers().fit(logits, labels, weights=weights)
    tested = np.concatenate([np.unique(logits), np.unique(logits) + 0.03, [-9.0, 9.0]])
    lower, upper = fitted.interval(tested)
    oracle = [venn_abers_oracle(logits, labels, weights, value) for value in tested]
    np.testing.assert_allclose(np.stack([lower, upper], axis=1), oracle, atol=1e-9)
    np.testing.assert_allclose(expit(fitted(tested)), upper / (1 - lower + upper))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_venn_abers_on_any_few_labels(data: st.DataObject) -> None:
    labels = np.array(
        data.draw(
            st.lists(st.integers(0, 1), min_size=2, max_size=12).filter(lambda d: len(set(d)) == 2)
        )
    )
    step = data.draw(st.sampled_from([1, 2, 3]))  # images of one logit
    logits = (np.arange(labels.size) // step).astype(np.float64)
    fitted = VennAbers().fit(logits, labels)
    tested = np.arange(-1, labels.size + 1) / 2
    oracle = [venn_abers_oracle(logits, labels, np.ones(labels.size), value) for value in tested]
    np.testing.assert_allclose(np.stack(fitted.interval(tested), axis=1), oracle, atol=1e-9)


def test_venn_abers_is_calibrated_in_the_large() -> None:
    # One of the two probabilities is perfectly calibrated, so the mean label lies between them.
    for seed in range(5):
        logits, labels, _ = sample(seed, 400)
        fresh, truth, _ = sample(seed + 100, 20_000)
        lower, upper = VennAbers().fit(logits, labels).interval(fresh)
        assert (lower < upper).all()
        assert lower.mean() - 0.02 < truth.mean() < upper.mean() + 0.02


ISOTONIC = IsotonicMap((0.0, 1.0), (0.2, 0.8))
PCHIP = PchipMap((0.0, 1.0, 2.0), (-1.0, 0.0, 2.0), (1.0, 1.5, 2.0))
VENN_ABERS = VennAbersMap((0.0, 1.0), (0.0, 0.6), (0.4, 1.0))


@pytest.mark.parametrize(
    ("good", "change", "message"),
    [
        (ISOTONIC, {"knots": [0.0, 0.0]}, "knots do not ascend"),
        (ISOTONIC, {"knots": []}, "a list of finite numbers"),
        (ISOTONIC, {"knots": 3.0}, "a list of finite numbers"),
        (ISOTONIC, {"probabilities": [0.8, 0.2]}, "that do not fall"),
        (ISOTONIC, {"probabilities": [0.0, 0.5]}, "both excluded"),
        (ISOTONIC, {"probabilities": [0.5]}, "1 numbers for 2 knots"),
        (PCHIP, {"log_odds": [0.0, 0.0, 1.0]}, "log_odds do not ascend"),
        (PCHIP, {"log_odds": [0.0, 1.0, float("nan")]}, "a number of the pchip log_odds is nan"),
        (PCHIP, {"slopes": [1.0, 0.0, 1.0]}, "slopes must be > 0"),
        (PCHIP, {"slopes": [3.1, 1.0, 1.0]}, "at most 3 times"),
        (PCHIP, {"slopes": [1.0, 1.0]}, "3 knots, 3 log_odds and 2 slopes"),
        (VENN_ABERS, {"lower": [0.0, 1.0]}, "must stay below 1"),
        (VENN_ABERS, {"upper": [0.5, 1.5]}, "that do not fall"),
    ],
)
def test_document_errors(good: Any, change: dict[str, Any], message: str) -> None:
    assert calibration_map_from_dict(good.to_dict()) == good
    with pytest.raises(UserError, match=message):
        calibration_map_from_dict(good.to_dict() | change)
