"""Temperature, beta and quadratic against scikit-learn and numerical optimisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from streetvision.core.errors import UserError
from streetvision.decision.calibrators import SLOPE_FLOOR, Platt
from streetvision.decision.choice import calibration_map_from_dict
from streetvision.decision.parametric import (
    Beta,
    BetaMap,
    Quadratic,
    QuadraticMap,
    Temperature,
    TemperatureMap,
    bounded_logistic,
)

Floats = NDArray[np.float64]
Arrays = tuple[Floats, NDArray[np.bool_]]


def from_truth(seed: int, truth: Any, size: int = 600, spread: float = 2.5) -> Arrays:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.5, spread, size)
    return logits, rng.random(size) < expit(truth(logits))


def loss(log_odds: Floats, labels: Floats, weights: Floats | None = None) -> float:
    sign = np.where(np.asarray(labels) == 1, -1.0, 1.0)
    return float(np.average(np.logaddexp(0, sign * log_odds), weights=weights))


def regression(columns: list[Floats], labels: Floats, weights: Floats | None) -> list[float]:
    model = LogisticRegression(C=np.inf, tol=1e-12, max_iter=100_000)
    model.fit(np.stack(columns, axis=1), labels, sample_weight=weights)
    return [*model.coef_[0].tolist(), float(model.intercept_[0])]


def random_weights(seed: int, size: int, weighted: bool) -> Floats | None:
    return np.random.default_rng(seed).uniform(0.2, 3, size) if weighted else None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("factor", [0.2, 0.7, 30.0])
def test_temperature_is_the_best_one(seed: int, weighted: bool, factor: float) -> None:
    logits, labels = from_truth(seed, lambda x: factor * x)
    weights = random_weights(seed, labels.size, weighted)
    fitted = Temperature().fit(logits, labels, weights=weights)
    best = minimize_scalar(
        lambda slope: loss(slope * logits, labels, weights), bounds=(1e-3, 500), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    assert 1 / fitted.temperature == pytest.approx(best.x, rel=1e-4)


def test_temperature_where_there_is_no_best_one() -> None:
    signs = np.array([-2.0, -1.0, 1.0, 3.0])
    separable = Temperature().fit(signs, signs > 0)
    assert 0.1 < separable.temperature < 10
    backwards = Temperature().fit(signs, signs < 0)
    assert backwards.temperature == pytest.approx(np.sqrt(np.mean(signs**2)) / SLOPE_FLOOR)
    assert Temperature().fit([0.0, 0.0, 0.0], [0, 1, 1]).temperature > 0


def beta_columns(logits: Floats) -> list[Floats]:
    probability = expit(logits)
    return [np.log(probability), -np.log1p(-probability)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_beta_is_logistic_regression_on_log_probabilities(seed: int, weighted: bool) -> None:
    def truth(x: Floats) -> Floats:
        return np.array([1.4, 0.6]) @ np.stack(beta_columns(x)) + 0.4

    logits, labels = from_truth(seed, truth, 3000)
    weights = random_weights(seed, labels.size, weighted)
    fitted = Beta().fit(logits, labels, weights=weights)
    wanted = regression(beta_columns(logits), labels, weights)
    assert min(wanted[:2]) > 0.1
    assert [fitted.a, fitted.b, fitted.c] == pytest.approx(wanted, abs=2e-4)


def bounded_oracle(columns: list[Floats], labels: Floats, floor: float) -> float:
    """Least loss with coefficients >= floor, by a general-purpose optimiser from many starts."""
    design = np.stack([*columns, np.ones_like(columns[0])])
    losses = [
        minimize(
            lambda c: loss(c @ design, labels), [start, start, 0.0], method="L-BFGS-B",
            bounds=[(floor, None), (floor, None), (None, None)],
            options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000},
        ).fun
        for start in (0.1, 1.0)
    ]  # fmt: skip
    return float(min(losses))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(-0.5, 1.5), (1.5, -0.5), (-0.4, -0.4)])
def test_beta_under_its_bounds_is_the_best_increasing_map(
    seed: int, shape: tuple[float, float]
) -> None:
    logits, labels = from_truth(
        seed, lambda x: np.array(shape) @ np.stack(beta_columns(x)) + 0.4, 2000
    )
    fitted = Beta().fit(logits, labels)
    floor = SLOPE_FLOOR / logits.std()
    assert min(fitted.a, fitted.b) == pytest.approx(floor)
    assert loss(fitted(logits), labels) == pytest.approx(
        bounded_oracle(beta_columns(logits), labels, floor), abs=1e-7
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_quadratic_is_logistic_regression_on_the_square(seed: int, weighted: bool) -> None:
    logits, labels = from_truth(seed, lambda x: x + 0.02 * x**2 - 0.3, 3000)
    weights = random_weights(seed, labels.size, weighted)
    fitted = Quadratic().fit(logits, labels, weights=weights)
    linear, square, constant = regression([logits, logits**2], labels, weights)
    assert linear + 2 * square * logits.min() > 0
    np.testing.assert_allclose(
        fitted(logits), linear * logits + square * logits**2 + constant, atol=2e-3
    )


@pytest.mark.parametrize("bend", [-1.0, -0.3, 0.3, 1.0])
def test_quadratic_under_its_bounds_is_the_best_increasing_map(bend: float) -> None:
    logits, labels = from_truth(0, lambda x: 0.3 * x + bend * x**2, 2000)
    fitted = Quadratic().fit(logits, labels)
    floor = SLOPE_FLOOR / logits.std()
    assert min(fitted.slope_low, fitted.slope_high) == pytest.approx(floor)
    low, high = logits.min(), logits.max()

    def z(parameters: Floats) -> Floats:
        return parameters[0] * logits + parameters[1] * logits**2 + parameters[2]

    best = minimize(
        lambda c: loss(z(c), labels), [0.1, 0.0, 0.0], method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda c, end=end: c[0] + 2 * c[1] * end - floor}
            for end in (low, high)
        ],
        options={"ftol": 1e-14, "maxiter": 1000},
    )  # fmt: skip
    assert loss(fitted(logits), labels) == pytest.approx(best.fun, abs=1e-6)


def test_quadratic_continues_by_its_tangents() -> None:
    fitted = QuadraticMap(-1.0, 3.0, 0.5, 2.0, 0.25)
    inside = np.linspace(-1, 3, 9)
    # The parabola with slope 0.5 at -1 and 2 at 3: slope 0.5 + 1.5 (x + 1) / 4.
    np.testing.assert_allclose(
        fitted(inside), 0.25 + 0.5 * (inside + 1) + 1.5 / 8 * (inside + 1) ** 2
    )
    assert fitted([-3.0])[0] == pytest.approx(0.25 - 2 * 0.5)
    assert fitted([5.0])[0] == pytest.approx(fitted([3.0])[0] + 2 * 2.0)


def test_the_true_map_is_recovered() -> None:
    beta, quadratic = BetaMap(0.5, 1.5, -0.4), QuadraticMap(-4.0, 5.0, 0.3, 2.0, -2.0)
    logits = np.linspace(-2, 3, 11)
    for calibrator, truth in ((Beta(), beta), (Quadratic(), quadratic)):
        fitted = calibrator.fit(*from_truth(1, truth, 300_000, 1.5))
        np.testing.assert_allclose(fitted(logits), truth(logits), atol=0.06)


@pytest.mark.parametrize("calibrator", [Beta(), Quadratic()])
def test_richer_maps_fit_their_own_data_at_least_as_well_as_platt(
    calibrator: Beta | Quadratic,
) -> None:
    for seed in range(20):
        logits, labels = from_truth(seed, np.sinh, 60)
        platt = loss(Platt().fit(logits, labels)(logits), labels)
        assert loss(calibrator.fit(logits, labels)(logits), labels) <= platt + 1e-9


def test_saturated_logits_keep_platts_slope_where_the_data_say_nothing() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(60, 3, 500)  # p is 1 to the last bit: ln p holds no information
    labels = rng.random(500) < expit(logits - 60)
    fitted = Beta().fit(logits, labels)
    platt = Platt().fit(logits, labels)
    assert fitted.b == pytest.approx(platt.slope, rel=1e-5)
    assert fitted.a == pytest.approx(platt.slope, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_fit_that_is_stopped_is_within_bounds_and_no_worse(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    logits, labels = from_truth(0, np.sinh)
    columns = np.stack(beta_columns(logits))

    def best(coefficients: list[float]) -> float:
        z = np.array(coefficients) @ columns
        return float(
            minimize_scalar(lambda b: loss(z + b, labels), bounds=(-9, 9), method="bounded").fun
        )

    monkeypatch.setattr("streetvision.decision.parametric.NEWTON_STEPS", steps)
    found = bounded_logistic(columns, labels.astype(float), np.ones(600), 0.3, 0.3)
    assert min(found) >= 0.3
    assert best(found) < best([0.3, 0.3])


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e3])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1e4])
@pytest.mark.parametrize("outlier", [0.0, 1e4])
@pytest.mark.parametrize("calibrator", [Beta(), Quadratic()])
def test_extreme_logits_give_an_increasing_map(
    scale: float, offset: float, outlier: float, calibrator: Beta | Quadratic
) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        unit = rng.normal(size=40)
        labels = rng.random(40) < expit(5 * unit)
        logits = offset + scale * unit
        logits[0] += scale * outlier
        fitted = calibrator.fit(logits, labels)
        found = fitted(np.sort(logits))
        assert (np.diff(found) >= -1e-6 * (1 + np.abs(found[1:]))).all()
        assert expit(fitted(logits)).mean() == pytest.approx(labels.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("good", "change", "message"),
    [
        (TemperatureMap(1.0), {"temperature": 0.0}, "the temperature is 0.0"),
        (BetaMap(1.0, 1.0, 0.0), {"a": 0.0}, "a is 0.0; it must be > 0"),
        (BetaMap(1.0, 1.0, 0.0), {"b": -1.0}, "b is -1.0"),
        (BetaMap(1.0, 1.0, 0.0), {"c": None}, "c is None"),
        (QuadraticMap(0.0, 1.0, 1.0, 1.0, 0.0), {"high": 0.0}, "high is 0.0; it must be > 0.0"),
        (QuadraticMap(0.0, 1.0, 1.0, 1.0, 0.0), {"slope_low": 0.0}, "slope_low is 0.0"),
        (QuadraticMap(0.0, 1.0, 1.0, 1.0, 0.0), {"slope_high": -1.0}, "slope_high is -1.0"),
        (QuadraticMap(0.0, 1.0, 1.0, 1.0, 0.0), {"intercept": [0.0]}, "intercept is"),
    ],
)
def test_document_errors(good: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibration_map_from_dict(good.to_dict() | change)
