"""Platt scaling against scikit-learn, and what it does where maximum likelihood has no answer."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from streetvision.core.errors import UserError
from streetvision.decision import calibrators
from streetvision.decision.calibrators import (
    SLOPE_FLOOR,
    Platt,
    PlattMap,
    check_mean_is_prior,
)
from streetvision.decision.choice import calibration_map_from_dict

Arrays = tuple[NDArray[np.float64], NDArray[np.int64]]


def simulated(seed: int, size: int = 400, gap: float = 2.0, prior: float = 0.75) -> Arrays:
    rng = np.random.default_rng(seed)
    labels = (rng.random(size) < prior).astype(np.int64)
    return rng.normal(gap * labels, 1.5) * 3 - 1, labels


def sklearn_fit(
    logits: NDArray[np.float64], labels: NDArray[np.int64], weights: NDArray[np.float64] | None
) -> tuple[float, float]:
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
    model.fit(logits[:, np.newaxis], labels, sample_weight=weights)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_platt_is_unpenalised_logistic_regression(seed: int, weighted: bool, offset: float) -> None:
    logits, labels = simulated(seed)
    weights = np.random.default_rng(seed).uniform(0.1, 3, labels.size) if weighted else None
    fitted = Platt().fit(logits + offset, labels, weights=weights)
    slope, intercept = sklearn_fit(logits, labels, weights)
    assert fitted.slope == pytest.approx(slope, abs=1e-4)
    assert fitted.intercept + fitted.slope * offset == pytest.approx(intercept, abs=1e-4)


def test_platt_recovers_the_true_map() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(1, 3, 200_000)
    labels = rng.random(logits.size) < expit(0.4 * logits - 0.7)
    fitted = Platt().fit(logits, labels)
    assert fitted.slope == pytest.approx(0.4, abs=0.01)
    assert fitted.intercept == pytest.approx(-0.7, abs=0.02)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_data_give_an_increasing_map_whose_mean_is_the_prior(data: st.DataObject) -> None:
    logits = data.draw(st.lists(st.floats(-60, 60), min_size=2, max_size=25))
    labels = data.draw(
        st.lists(st.integers(0, 1), min_size=len(logits), max_size=len(logits)).filter(
            lambda drawn: 0 < sum(drawn) < len(drawn)
        )
    )
    fitted = Platt().fit(logits, labels)
    assert fitted.slope > 0
    assert expit(fitted(logits)).mean() == pytest.approx(np.mean(labels), abs=1e-6)


@pytest.mark.parametrize("gap", [1e-3, 1.0, 1e3])
def test_separable_logits_use_smoothed_targets_for_the_slope(gap: float) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(30) % 3 > 0  # 20 positives
    logits = np.where(labels, gap, -gap) * rng.uniform(0.5, 1.5, 30)
    fitted = Platt().fit(logits, labels)
    # A soft target is two hard ones with weights; the scale keeps scikit-learn's solver well.
    target = np.where(labels, 21 / 22, 1 / 12)
    twice = np.concatenate([logits, logits]) / gap
    hard = np.repeat([1, 0], 30)
    slope, _ = sklearn_fit(twice, hard, np.concatenate([target, 1 - target]))
    assert fitted.slope * gap == pytest.approx(slope, rel=1e-4)
    assert expit(fitted(logits)).mean() == pytest.approx(2 / 3, abs=1e-9)
    assert expit(fitted(logits))[labels].min() > 0.5
    assert expit(fitted(logits)).max() < 0.9999


@pytest.mark.parametrize("overlap", [0.0, 1e-308, 1e-12])
def test_classes_that_touch_at_a_tie_do_not_diverge(overlap: float) -> None:
    fitted = Platt().fit([-1.0, overlap, 0.0, 1.0], [0, 0, 1, 1])
    assert 0 < fitted.slope < 10
    assert fitted.intercept == pytest.approx(0, abs=1e-9)


def test_one_overlapping_pair_still_converges() -> None:
    logits = np.concatenate([np.linspace(-30, -10, 50), [1e-4, 0.0], np.linspace(10, 30, 50)])
    labels = np.concatenate([np.zeros(51), np.ones(51)])
    fitted = Platt().fit(logits, labels)
    assert np.isfinite([fitted.slope, fitted.intercept]).all()
    assert expit(fitted(logits[:50])).max() < 0.02


def test_logits_that_rank_backwards_get_the_smallest_slope(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logits, labels = simulated(2)
    with caplog.at_level(logging.WARNING):
        fitted = Platt().fit(-logits, labels)
    assert "do not rank positives above negatives" in caplog.text
    assert fitted.slope == pytest.approx(SLOPE_FLOOR / logits.std())
    np.testing.assert_allclose(expit(fitted(-logits)), labels.mean(), atol=1e-3)

    def best_loss(slope: float) -> float:
        return float(
            minimize_scalar(
                lambda b: log_loss(labels, expit(-slope * logits + b)), bounds=(-9, 9)
            ).fun
        )

    # The likelihood falls with the slope, so the smallest one is the best increasing map.
    losses = [best_loss(fitted.slope * factor) for factor in (1, 30, 300)]
    assert losses == sorted(losses)


@pytest.mark.parametrize("value", [0.0, 40.0, 1e6])
def test_constant_logits_give_the_prior(value: float) -> None:
    logits = np.full(8, value) * (1 + 1e-15 * np.arange(8))  # constant but for rounding
    fitted = Platt().fit(logits, [0, 0, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(expit(fitted(logits)), 0.75, atol=1e-6)


def test_weightless_images_do_not_count() -> None:
    logits, labels = simulated(3)
    weights = np.ones(labels.size)
    weights[::4] = 0
    kept = weights > 0
    assert Platt().fit(logits, labels, weights=weights) == Platt().fit(logits[kept], labels[kept])


def test_a_mean_that_misses_the_prior_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = simulated(4)
    good = Platt().fit(logits, labels)
    check_mean_is_prior(good, logits, labels)
    with pytest.raises(RuntimeError, match="is not the prior"):
        check_mean_is_prior(PlattMap(good.slope, good.intercept + 1e-4), logits, labels)
    monkeypatch.setattr(calibrators, "solve_intercept", lambda *_: 0.0)
    with pytest.raises(RuntimeError, match="is not the prior"):
        Platt().fit(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([0.0, 1.0], [1, 1], "both classes"),
        ([0.0, np.nan], [0, 1], "not finite"),
        ([0.0, 1.0, 2.0], [0, 1], "3 logits but labels"),
    ],
)
def test_input_errors(logits: list[float], labels: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Platt().fit(logits, labels)


def test_the_document_round_trip_is_exact() -> None:
    fitted = Platt().fit(*simulated(5))
    document = json.loads(json.dumps(fitted.to_dict()))
    assert document["kind"] == "platt"
    assert document["strictly_increasing"] is True
    assert calibration_map_from_dict(document) == fitted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "spline"}, "kind 'spline' is not one of beta, ensemble, isotonic, pchip, platt"),
        ({"kind": None}, "kind None"),
        ({"slope": -1.0}, "slope is -1.0"),
        ({"slope": float("nan")}, "slope is nan"),
        ({"slope": "1"}, "slope is '1'"),
        ({"intercept": True}, "intercept is True"),
        ({"strictly_increasing": False}, "strictly_increasing is False"),
        ({"extra": 1}, "unknown extra"),
    ],
)
def test_document_errors_name_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibration_map_from_dict(PlattMap(1.0, 0.0).to_dict() | change)


def test_an_incomplete_document_is_refused() -> None:
    with pytest.raises(UserError, match="lacks intercept"):
        calibration_map_from_dict({"kind": "platt", "strictly_increasing": True, "slope": 1.0})
    with pytest.raises(UserError, match="an object with a `kind`"):
        calibration_map_from_dict([1.0, 2.0])
