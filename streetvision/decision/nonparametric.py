"""Calibrators without a formula: isotonic, PCHIP-smoothed isotonic, and Venn–Abers.

Isotonic regression and Venn–Abers have steps, so they are for reporting only; the PCHIP through the
centres of the isotonic blocks is strictly increasing and may be deployed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError
from streetvision.decision.calibrators import (
    SLOPE_FLOOR,
    CalibrationMap,
    Calibrator,
    FloatArray,
    Sample,
    solve_intercept,
    standardise,
)
from streetvision.decision.inputs import check_row

# Logits that agree to so many decimals of their standard deviation are one knot of the PCHIP.
KNOT_DECIMALS = 4


class _Ties(NamedTuple):
    """Images of equal logits taken together, ascending, [K] each."""

    logit: FloatArray
    weight: FloatArray
    positive: FloatArray  # weight of the positives


def _ties(values: FloatArray, truth: NDArray[np.bool_], weight: FloatArray) -> _Ties:
    logit, index = np.unique(values, return_inverse=True)
    weights, positive = np.bincount(index, weight), np.bincount(index, weight * truth)
    return _Ties(logit, weights.astype(np.float64), positive.astype(np.float64))


def _isotonic_blocks(ties: _Ties) -> tuple[FloatArray, NDArray[np.intp]]:
    """Return the share of positives [B] of each isotonic block, and its edges [B + 1] in the ties."""
    from scipy.optimize import isotonic_regression

    fitted = isotonic_regression(ties.positive / ties.weight, weights=ties.weight)
    blocks = np.asarray(fitted.blocks, dtype=np.intp)
    return np.asarray(fitted.x, dtype=np.float64)[blocks[:-1]], blocks


def _clip(probability: FloatArray, ties: _Ties) -> FloatArray:
    """Return probabilities away from 0 and 1, as far as Platt's smoothed targets are."""
    positive = ties.positive.sum()
    negative = ties.weight.sum() - positive
    return np.clip(probability, 1 / (negative + 2), (positive + 1) / (positive + 2))


def _log_odds(probability: FloatArray) -> FloatArray:
    return np.log(probability) - np.log1p(-probability)


@dataclass(frozen=True)
class IsotonicMap(CalibrationMap):
    """Probability interpolated linearly between `knots` [K] of logits, constant beyond.

    `probabilities` [K] are in (0, 1) and do not fall.
    """

    knots: tuple[float, ...]
    probabilities: tuple[float, ...]

    kind: ClassVar[str] = "isotonic"
    strictly_increasing: ClassVar[bool] = False
    keeps_prior: ClassVar[bool] = False

    def __post_init__(self) -> None:
        knots = check_row(self.knots, "the isotonic knots", ascending=True)
        _check_steps(self.probabilities, "the isotonic probabilities", knots)
        if not (self.probabilities[0] > 0 and self.probabilities[-1] < 1):
            raise UserError("the isotonic probabilities must lie between 0 and 1, both excluded")

    def __call__(self, logits: ArrayLike) -> FloatArray:
        """Return log-odds [N] of logits [N]."""
        x = np.asarray(logits, dtype=np.float64)
        return _log_odds(np.interp(x, self.knots, self.probabilities))


class Isotonic(Calibrator[IsotonicMap]):
    """Isotonic regression (Zadrozny & Elkan, 2002), by pooling adjacent violators.

    Clipped to [1 / (n₋ + 2), (n₊ + 1) / (n₊ + 2)], without which its log loss is infinite.
    """

    kind: ClassVar[str] = "isotonic"

    def _fit(self, sample: Sample) -> IsotonicMap:
        ties = _ties(*sample[:3])
        share, blocks = _isotonic_blocks(ties)
        # A block is flat from its first to its last logit; one logit alone is one knot.
        knots = np.stack([ties.logit[blocks[:-1]], ties.logit[blocks[1:] - 1]], axis=1).ravel()
        probabilities = np.repeat(_clip(share, ties), 2)
        distinct = np.append(True, np.diff(knots) > 0)
        return IsotonicMap(tuple(knots[distinct].tolist()), tuple(probabilities[distinct].tolist()))


@dataclass(frozen=True)
class PchipMap(CalibrationMap):
    """A monotone cubic Hermite spline of log-odds over logits, continued by its tangents.

    `knots`, `log_odds` and `slopes` are [K]; the first two ascend. Slopes are positive and at most
    three times the secants beside them, which makes the spline increase (Fritsch & Carlson, 1980).
    """

    knots: tuple[float, ...]
    log_odds: tuple[float, ...]
    slopes: tuple[float, ...]

    kind: ClassVar[str] = "pchip"
    strictly_increasing: ClassVar[bool] = True
    keeps_prior: ClassVar[bool] = True

    def __post_init__(self) -> None:
        knots = check_row(self.knots, "the pchip knots", ascending=True)
        log_odds = check_row(self.log_odds, "the pchip log_odds", ascending=True)
        slopes = check_row(self.slopes, "the pchip slopes")
        if not knots.size == log_odds.size == slopes.size:
            raise UserError(
                f"the pchip calibrator has {knots.size} knots, {log_odds.size} log_odds and "
                f"{slopes.size} slopes; as many of each are needed"
            )
        limit = 3 * np.diff(log_odds) / np.diff(knots) * (1 + 1e-6)
        if (slopes <= 0).any() or (slopes[:-1] > limit).any() or (slopes[1:] > limit).any():
            raise UserError("the pchip slopes must be > 0 and at most 3 times the secants beside")

    def __call__(self, logits: ArrayLike) -> FloatArray:
        """Return log-odds [N] of logits [N]."""
        from scipy.interpolate import CubicHermiteSpline

        x = np.asarray(logits, dtype=np.float64)
        low, high = self.knots[0], self.knots[-1]
        beyond = self.slopes[0] * np.minimum(x - low, 0.0)
        beyond += self.slopes[-1] * np.maximum(x - high, 0.0)
        if len(self.knots) == 1:
            return beyond + self.log_odds[0]
        spline = CubicHermiteSpline(self.knots, self.log_odds, self.slopes)
        return np.asarray(spline(np.clip(x, low, high)), dtype=np.float64) + beyond


class Pchip(Calibrator[PchipMap]):
    """PCHIP (Fritsch & Butland, 1984) of log-odds through the centres of the isotonic blocks.

    A block's centre is its mean logit, its height its clipped share of positives (`Isotonic`).
    A line of slope `SLOPE_FLOOR` over the standard deviation of the logits is added, so that the
    slope is positive everywhere. Smoothing moves the mean; a constant is added to bring it back to
    the prior.
    """

    kind: ClassVar[str] = "pchip"

    def _fit(self, sample: Sample) -> PchipMap:
        values, truth, weight, _ = sample
        scaled, centre, spread = standardise(values, weight)
        ties = _ties(np.round(scaled, KNOT_DECIMALS), truth, weight)
        share, blocks = _isotonic_blocks(ties)
        knots = np.add.reduceat(ties.logit * ties.weight, blocks[:-1]) / np.add.reduceat(
            ties.weight, blocks[:-1]
        )
        height = _log_odds(_clip(share, ties))
        # The spline is linear in heights and slopes: this is the PCHIP plus the line.
        raised = height + SLOPE_FLOOR * knots
        knots = centre + spread * knots
        slopes = _pchip_slopes(knots, height) + SLOPE_FLOOR / spread
        shape = PchipMap(*(tuple(row.tolist()) for row in (knots, raised, slopes)))
        shift = solve_intercept(shape(values), truth, weight)
        return PchipMap(shape.knots, tuple((raised + shift).tolist()), shape.slopes)


def _pchip_slopes(knots: FloatArray, height: FloatArray) -> FloatArray:
    """Return the slopes [K] of the PCHIP at its knots; 0 for a single one."""
    from scipy.interpolate import PchipInterpolator

    if knots.size == 1:
        return np.zeros(1)
    return np.asarray(PchipInterpolator(knots, height).derivative()(knots), dtype=np.float64)


@dataclass(frozen=True)
class VennAbersMap(CalibrationMap):
    """Two probabilities for each logit, merged to p = upper / (1 - lower + upper).

    `knots` [K] are the logits that were fitted; `lower` [K] is the isotonic probability at a knot
    after adding the tested logit as a negative, `upper` [K] as a positive. Below the first knot
    the lower one is 0, above the last the upper one is 1.
    """

    knots: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]

    kind: ClassVar[str] = "venn_abers"
    strictly_increasing: ClassVar[bool] = False
    keeps_prior: ClassVar[bool] = False

    def __post_init__(self) -> None:
        knots = check_row(self.knots, "the venn_abers knots", ascending=True)
        _check_steps(self.lower, "the venn_abers lower", knots)
        _check_steps(self.upper, "the venn_abers upper", knots)
        if not (self.lower[-1] < 1 and self.upper[0] > 0):
            raise UserError("the venn_abers lower must stay below 1 and its upper above 0")

    def interval(self, logits: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return the lower and the upper probability [N] of logits [N]."""
        x, knots = np.asarray(logits, dtype=np.float64), np.array(self.knots)
        lower = np.append(0.0, self.lower)[np.searchsorted(knots, x, side="right")]
        upper = np.append(self.upper, 1.0)[np.searchsorted(knots, x, side="left")]
        return lower, upper

    def __call__(self, logits: ArrayLike) -> FloatArray:
        """Return log-odds [N] of the merged probability of logits [N]."""
        lower, upper = self.interval(logits)
        return np.log(upper) - np.log1p(-lower)


class VennAbers(Calibrator[VennAbersMap]):
    """The inductive Venn–Abers predictor (Vovk, Petej & Fedorova, 2015, arXiv 1511.00213).

    The merged probability minimises the largest regret of log loss over the two. A tested logit
    weighs 1, as an image without weights does.
    """

    kind: ClassVar[str] = "venn_abers"

    def _fit(self, sample: Sample) -> VennAbersMap:
        ties = _ties(*sample[:3])
        upper = _with_a_positive(ties.weight, ties.positive)
        # The lower one mirrors it: logits reversed, classes swapped.
        lower = 1 - _with_a_positive(ties.weight[::-1], (ties.weight - ties.positive)[::-1])[::-1]
        # Rounding may let equal neighbours fall, and pass 0 or 1, by the last bit.
        lower, upper = (np.maximum.accumulate(np.clip(row, 0, 1)) for row in (lower, upper))
        return VennAbersMap(*(tuple(row.tolist()) for row in (ties.logit, lower, upper)))


def _with_a_positive(weight: FloatArray, positive: FloatArray) -> FloatArray:
    """Return, for each tie [K], its isotonic value once a positive of weight 1 has joined it.

    Algorithms 1 and 2 of Vovk et al.: the value is the slope of the lower convex hull of the
    cumulated (weight, positives). The added positive moves all points left of its tie by (-1, -1);
    from one tie to the next, one more point moves, and the hull is repaired from its left end.
    """
    cumulated = zip(np.cumsum(weight).tolist(), np.cumsum(positive).tolist(), strict=True)
    points = [(-1.0, -1.0), (0.0, 0.0), *cumulated]
    hull: list[tuple[float, float]] = []
    for point in reversed(points):  # from the right, so that the left end is the top of the stack
        while len(hull) > 1 and _is_above(hull[-1], point, hull[-2]):
            hull.pop()
        hull.append(point)
    values = []
    for x, y in points[2:]:
        (left_x, left_y), (right_x, right_y) = hull[-1], hull[-2]
        values.append((right_y - left_y) / (right_x - left_x))
        moved = (x - 1, y - 1)
        if _is_above(moved, hull[-1], hull[-2]):
            continue
        hull.pop()
        while len(hull) > 1 and _is_above(hull[-1], moved, hull[-2]):
            hull.pop()
        hull.append(moved)
    return np.array(values)


def _is_above(
    middle: tuple[float, float], left: tuple[float, float], right: tuple[float, float]
) -> bool:
    """Whether `middle` lies on or above the line from `left` to `right`."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (
        middle[0] - left[0]
    )


def _check_steps(value: tuple[float, ...], name: str, knots: FloatArray) -> None:
    """UserError unless there are K probabilities in [0, 1] that do not fall."""
    row = check_row(value, name)
    if row.size != knots.size:
        raise UserError(f"{name} has {row.size} numbers for {knots.size} knots; one each is needed")
    if (np.diff(row) < 0).any() or row[0] < 0 or row[-1] > 1:
        raise UserError(f"{name} must be probabilities that do not fall")
