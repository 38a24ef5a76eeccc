"""Calibrators with a formula besides Platt's: temperature, beta, and quadratic on logits.

Beta and quadratic have two coefficients that must be positive for the map to be strictly
increasing: both are fitted by maximum likelihood under that bound (`bounded_logistic`), start at
Platt's map, and get their intercept solved for last, so that their mean is the split's prior.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError
from streetvision.decision.calibrators import (
    NEWTON_STEPS,
    NO_OVERLAP,
    SLOPE_FLOOR,
    CalibrationMap,
    Calibrator,
    FloatArray,
    Sample,
    logistic_slope,
    smoothed_targets,
    solve_intercept,
    standardise,
)
from streetvision.decision.inputs import check_number, check_positive, sigmoid

# Probabilities of logits that vary by less differ by too little to see a curve.
BETA_SPREAD = 1e-4
# Added to the Hessian, as a share of its trace: directions that the data say nothing about stay.
DAMPING = 1e-10

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TemperatureMap(CalibrationMap):
    """log-odds = logit / temperature, with temperature > 0."""

    temperature: float

    kind: ClassVar[str] = "temperature"
    strictly_increasing: ClassVar[bool] = True
    keeps_prior: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self.temperature, "the temperature")

    def __call__(self, logits: ArrayLike) -> FloatArray:
        """Return log-odds [N] of logits [N]."""
        return np.asarray(logits, dtype=np.float64) / self.temperature


class Temperature(Calibrator[TemperatureMap]):
    """Maximum likelihood of the temperature (Guo et al., 2017, arXiv 1706.04599).

    It has no intercept, so its mean is not the prior: for reporting only. Where the sign of the
    logit separates the classes it is fitted to Platt's smoothed targets; where logits do not rank
    positives higher, the slope is `SLOPE_FLOOR` over their root mean square.
    """

    kind: ClassVar[str] = "temperature"

    def _fit(self, sample: Sample) -> TemperatureMap:
        from scipy.optimize import brentq

        values, truth, weight, _ = sample
        scale = float(np.sqrt(np.average(values**2, weights=weight))) or 1.0
        x = values / scale
        separable = x[truth].min() >= -NO_OVERLAP and x[~truth].max() <= NO_OVERLAP
        target = smoothed_targets(x, truth, weight) if separable else truth

        def slope_of_loss(slope: float) -> float:
            return float(np.average((sigmoid(slope * x) - target) * x, weights=weight))

        if slope_of_loss(SLOPE_FLOOR) >= 0:
            return TemperatureMap(scale / SLOPE_FLOOR)
        high = 1.0
        while slope_of_loss(high) < 0:  # ends: as the slope grows, one logit that is wrong decides
            high *= 4
        slope = brentq(slope_of_loss, SLOPE_FLOOR, high, xtol=1e-14, rtol=1e-13)
        return TemperatureMap(scale / float(slope))


@dataclass(frozen=True)
class BetaMap(CalibrationMap):
    """log-odds = a · ln p - b · ln(1 - p) + c with p = sigmoid(logit), and a, b > 0.

    The slope on the logit goes from a (low logits) to b (high ones). Kull et al. allow one of both
    to be 0, but then one tail is flat in floating-point numbers.
    """

    a: float
    b: float
    c: float

    kind: ClassVar[str] = "beta"
    strictly_increasing: ClassVar[bool] = True
    keeps_prior: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.a, "the beta calibrator's a")
        check_positive(self.b, "the beta calibrator's b")
        check_number(self.c, "the beta calibrator's c")

    def __call__(self, logits: ArrayLike) -> FloatArray:
        """Return log-odds [N] of logits [N]."""
        x = np.asarray(logits, dtype=np.float64)
        # The same as a · ln p - b · ln(1 - p), and exactly a · x where a = b.
        even = -np.abs(x) - 2 * np.log1p(np.exp(-np.abs(x)))  # ln p + ln(1 - p)
        log_odds: FloatArray = (self.a + self.b) / 2 * x + (self.a - self.b) / 2 * even + self.c
        return log_odds


class Beta(Calibrator[BetaMap]):
    """Beta calibration (Kull et al., 2017, PMLR 54), a and b at least `SLOPE_FLOOR` over the spread.

    Maximum likelihood under these bounds; separable logits use Platt's smoothed targets.
    """

    kind: ClassVar[str] = "beta"

    def _fit(self, sample: Sample) -> BetaMap:
        values, truth, weight, _ = sample
        scaled, _, spread = standardise(values, weight)
        target = smoothed_targets(scaled, truth, weight)
        start = max(logistic_slope(scaled, target, weight), SLOPE_FLOOR) / spread
        a = b = start
        if scaled.any() and spread > BETA_SPREAD:  # 0 where the logits are constant
            features = np.stack([-np.logaddexp(0.0, -values), np.logaddexp(0.0, values)])
            a, b = bounded_logistic(features, target, weight, SLOPE_FLOOR / spread, start)
        return BetaMap(a, b, solve_intercept(BetaMap(a, b, 0.0)(values), truth, weight))


@dataclass(frozen=True)
class QuadraticMap(CalibrationMap):
    """A parabola of the logit between `low` and `high`, continued by its tangents beyond.

    `slope_low` and `slope_high` > 0 are its slopes there, so it increases everywhere; `intercept`
    is the log-odds at `low`.
    """

    low: float
    high: float
    slope_low: float
    slope_high: float
    intercept: float

    kind: ClassVar[str] = "quadratic"
    strictly_increasing: ClassVar[bool] = True
    keeps_prior: ClassVar[bool] = True

    def __post_init__(self) -> None:
        low = check_number(self.low, "the quadratic calibrator's low")
        if check_number(self.high, "the quadratic calibrator's high") <= low:
            raise UserError(f"the quadratic calibrator's high is {self.high!r}; it must be > {low}")
        check_positive(self.slope_low, "the quadratic calibrator's slope_low")
        check_positive(self.slope_high, "the quadratic calibrator's slope_high")
        check_number(self.intercept, "the quadratic calibrator's intercept")

    def __call__(self, logits: ArrayLike) -> FloatArray:
        """Return log-odds [N] of logits [N]."""
        x = np.asarray(logits, dtype=np.float64)
        features = _quadratic_features(x, self.low, self.high)
        slopes = np.array([self.slope_low, self.slope_high])
        log_odds: FloatArray = slopes @ features + self.intercept
        return log_odds


class Quadratic(Calibrator[QuadraticMap]):
    """Logistic regression on the logit and its square, constrained to increase over the data.

    The slope of a parabola is linear, so it is positive over the data if it is at both ends: the
    two slopes there are the coefficients, each at least `SLOPE_FLOOR` over the spread. Separable
    logits use Platt's smoothed targets.
    """

    kind: ClassVar[str] = "quadratic"

    def _fit(self, sample: Sample) -> QuadraticMap:
        values, truth, weight, _ = sample
        scaled, _, spread = standardise(values, weight)
        target = smoothed_targets(scaled, truth, weight)
        start = max(logistic_slope(scaled, target, weight), SLOPE_FLOOR) / spread
        low, high = float(values.min()), float(values.max())
        slopes = [start, start]
        if scaled.any():  # 0 where the logits are constant
            features = _quadratic_features(values, low, high)
            slopes = bounded_logistic(features, target, weight, SLOPE_FLOOR / spread, start)
        else:
            low, high = low - 0.5, high + 0.5
        shape = QuadraticMap(low, high, slopes[0], slopes[1], 0.0)
        return replace(shape, intercept=solve_intercept(shape(values), truth, weight))


def _quadratic_features(x: FloatArray, low: float, high: float) -> FloatArray:
    """Return what slope 1 at `low` (0 at `high`), and the reverse, add up to from `low`, [2, N]."""
    inside = np.clip(x, low, high) - low
    right = inside**2 / (2 * (high - low))
    return np.stack([inside - right + np.minimum(x - low, 0.0), right + np.maximum(x - high, 0.0)])


def bounded_logistic(
    features: FloatArray,
    target: FloatArray,
    weight: FloatArray,
    floor: float,
    start: float,
) -> list[float]:
    """Return coefficients [D] >= `floor` of the maximum-likelihood logistic regression.

    Newton's method; each step minimises the quadratic model under the bounds exactly, by trying
    every set of coefficients at the bound (2^D with D = 2). The problem is convex, and the path
    stays within the bounds. The intercept is free and not returned.

    Parameters
    ----------
    features, target, weight
        [D, N]; probabilities [N]; [N].
    floor, start
        Least value of each coefficient, and the value that all start at; `start` >= `floor`.

    Where nearly all images are one logit but for the last digits, it may stop before it converged;
    what it returns then is within the bounds and no worse than the start.
    """
    share = weight / weight.sum()
    centred = features - (features @ share)[:, np.newaxis]
    scale = np.sqrt(centred**2 @ share)
    scale[scale <= NO_OVERLAP * scale.max()] = scale.max() or 1.0  # saturated: no information
    design = np.concatenate([centred / scale[:, np.newaxis], np.ones((1, target.size))])
    least = floor * scale

    def loss(parameters: FloatArray) -> float:
        z = parameters @ design
        return float(share @ (np.logaddexp(0.0, z) - target * z))

    slopes = start * scale
    parameters = np.append(slopes, solve_intercept(slopes @ design[:-1], target, weight))
    current = loss(parameters)
    for _ in range(NEWTON_STEPS):
        z = parameters @ design
        p = sigmoid(z)
        gradient = design @ (share * (p - target))
        hessian = (design * (share * p * sigmoid(-z))) @ design.T
        hessian += DAMPING * np.trace(hessian) * np.eye(len(parameters))
        step = _bounded_step(gradient, hessian, least - parameters[:-1])
        if -gradient @ step < 1e-12:  # as in Platt's: one full step more gains what floats hold
            parameters = parameters + step
            break
        size = 1.0
        while (proposed := loss(parameters + size * step)) >= current and size > 1e-12:
            size /= 2
        if proposed >= current:
            break
        parameters, current = parameters + size * step, proposed
    else:
        _log.debug("stopped after %d Newton steps", NEWTON_STEPS)
    found: list[float] = np.maximum(parameters[:-1] / scale, floor).tolist()
    return found


def _bounded_step(gradient: FloatArray, hessian: FloatArray, least: FloatArray) -> FloatArray:
    """Return the step [D + 1] that minimises g·s + s·H·s / 2 with s[:D] >= `least` (all <= 0)."""
    best, best_value = np.zeros_like(gradient), np.inf
    for bound in product((False, True), repeat=least.size):
        held: NDArray[np.bool_] = np.array([*bound, False])
        step = np.where(held, np.append(least, 0.0), 0.0)
        right = -gradient - hessian @ step
        step[~held] = np.linalg.solve(hessian[np.ix_(~held, ~held)], right[~held])
        value = float(gradient @ step + step @ hessian @ step / 2)
        if (step[:-1] >= least).all() and value < best_value:
            best, best_value = step, value
    return best
