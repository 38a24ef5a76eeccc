"""What every calibrator is, and Platt scaling: logits to log-odds that can be believed.

A `Calibrator` is fitted to logits and labels and returns a `CalibrationMap`: a pure function of
logits that can be written to JSON and rebuilt from it. A map works at the prior of the split that
it was fitted on; moving to the served prior comes after it (`streetvision.decision.policy`). All
calibrators are listed, compared and chosen from in `streetvision.decision.choice`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.decision.inputs import (
    check_groups,
    check_keys,
    check_number,
    check_positive,
    check_scores,
    check_weights,
    sigmoid,
)

FloatArray = NDArray[np.float64]

# A calibrated mean further from the prior than this is a bug, not rounding.
MEAN_TOLERANCE = 1e-6
# Log-odds for one standard deviation of the logits, where the data want no slope or a negative one.
SLOPE_FLOOR = 1e-3
# Logits that vary by less than this share of their mean are constant.
CONSTANT_SPREAD = 1e-9
# Classes that overlap by less, in standard deviations of the logits, count as separable: the
# slope that they want is beyond what floats hold.
NO_OVERLAP = 1e-6
NEWTON_STEPS = 500

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationMap(ABC):
    """A fitted map from logits [N] to calibrated log-odds [N]; its fields are its parameters."""

    kind: ClassVar[str]
    #: Whether a larger logit always gets larger log-odds. Others are for reporting only.
    strictly_increasing: ClassVar[bool]
    #: Whether the mean of a fit is the prior of its split, without which no shift to another prior
    #: is right. Others are for reporting only.
    keeps_prior: ClassVar[bool]

    @abstractmethod
    def __call__(self, logits: ArrayLike) -> FloatArray:
        """Return the log-odds [N] of logits [N] at the prior of the split that was fitted."""

    @classmethod
    def deployable(cls) -> bool:
        """Whether a policy may use such a map; a report may use any."""
        return cls.strictly_increasing and cls.keeps_prior

    def to_dict(self) -> dict[str, Any]:
        """Return `kind`, `strictly_increasing` and the parameters, ready for JSON."""
        parameters = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            "kind": self.kind,
            "strictly_increasing": self.strictly_increasing,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in parameters.items()},
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Return the map that `to_dict` described; UserError names a missing or wrong key."""
        names = [field.name for field in fields(cls)]
        check_keys(document, {"kind", "strictly_increasing", *names}, f"the {cls.kind} calibrator")
        values = {name: document[name] for name in names}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


Map_co = TypeVar("Map_co", bound=CalibrationMap, covariant=True)


class Sample(NamedTuple):
    """Checked images that weigh something: logits, labels, weights and groups, each [N]."""

    logits: FloatArray
    truth: NDArray[np.bool_]
    weight: FloatArray
    groups: NDArray[Any]

    def rows(self, chosen: NDArray[np.bool_]) -> Sample:
        """The images where `chosen` [N] is true."""
        logits, truth, weight, groups = self
        return Sample(logits[chosen], truth[chosen], weight[chosen], groups[chosen])


class Calibrator(ABC, Generic[Map_co]):
    """A way to fit a `CalibrationMap`. Fitting is pure: it changes nothing in the calibrator."""

    kind: ClassVar[str]

    def fit(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        groups: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> Map_co:
        """Return the map fitted to logits [N] and labels 0 or 1 [N].

        Parameters
        ----------
        logits, labels
            Of the calibration split, [N], both classes present.
        groups
            Group of each image, [N], for calibrators that choose something out of fold; None makes
            each image one.
        weights
            Weight of each image, [N]; None weighs all alike.

        Raises
        ------
        UserError
            If lengths differ, a logit is not finite, a label is not 0 or 1, or a class is missing.
        RuntimeError
            If the map should keep the prior and its mean probability misses it by more than 1e-6.
        """
        return self.fit_sample(check_sample(logits, labels, groups, weights))

    def fit_sample(self, sample: Sample) -> Map_co:
        """As `fit`, of what is checked already."""
        fitted = self._fit(sample)
        if fitted.keeps_prior:
            check_mean_is_prior(fitted, sample.logits, sample.truth, sample.weight)
        return fitted

    @abstractmethod
    def _fit(self, sample: Sample) -> Map_co:
        """Return the map; what it is, the class says."""


@dataclass(frozen=True)
class PlattMap(CalibrationMap):
    """log-odds = slope · logit + intercept, with slope > 0."""

    slope: float
    intercept: float

    kind: ClassVar[str] = "platt"
    strictly_increasing: ClassVar[bool] = True
    keeps_prior: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.slope, "the Platt slope")
        check_number(self.intercept, "the Platt intercept")

    def __call__(self, logits: ArrayLike) -> FloatArray:
        """Return log-odds [N] of logits [N]."""
        return self.slope * np.asarray(logits, dtype=np.float64) + self.intercept


class Platt(Calibrator[PlattMap]):
    """Logistic regression of the label on the logit, with an intercept, no penalty (Platt, 1999).

    The intercept is solved for last, so the mean calibrated probability is the split's prior.
    Two cases have no usable maximum-likelihood slope:

    - Separable logits (every positive at or above every negative) want an infinite one. The slope
      is then fitted to Platt's smoothed targets, (n₊ + 1) / (n₊ + 2) and 1 / (n₋ + 2).
    - Logits that do not rank positives higher want a slope ≤ 0. The likelihood is concave, so its
      best point among increasing maps is the smallest slope: `SLOPE_FLOOR` over the standard
      deviation of the logits. All probabilities are then about the prior; a warning is logged.
    """

    kind: ClassVar[str] = "platt"

    def _fit(self, sample: Sample) -> PlattMap:
        values, truth, weight, _ = sample
        scaled, centre, spread = standardise(values, weight)
        slope = logistic_slope(scaled, smoothed_targets(scaled, truth, weight), weight)
        if slope < SLOPE_FLOOR:
            _log.warning(
                "the logits do not rank positives above negatives: "
                "calibrated probabilities are about the prior for every image"
            )
            slope = SLOPE_FLOOR
        intercept = solve_intercept(slope * scaled, truth, weight)
        return PlattMap(slope / spread, intercept - slope * centre / spread)


def check_sample(
    logits: ArrayLike, labels: ArrayLike, groups: ArrayLike | None, weights: ArrayLike | None
) -> Sample:
    """Return the images that weigh something; UserError if anything of them is unusable."""
    values, truth = check_scores(logits, labels)
    weight = check_weights(weights, truth)
    names = np.arange(values.size) if groups is None else np.asarray(groups)
    check_groups(names, values.size)
    return Sample(values, truth, weight, names).rows(weight > 0)


def standardise(values: FloatArray, weight: FloatArray) -> tuple[FloatArray, float, float]:
    """Return (values - centre) / spread [N], the mean and the standard deviation (1 if constant)."""
    centre = float(np.average(values, weights=weight))
    spread = float(np.sqrt(np.average((values - centre) ** 2, weights=weight)))
    if spread <= CONSTANT_SPREAD * abs(centre):  # rounding is not a ranking
        values, spread = np.full_like(values, centre), 1.0
    return (values - centre) / spread, centre, spread


def smoothed_targets(
    scaled: FloatArray, truth: NDArray[np.bool_], weight: FloatArray
) -> FloatArray:
    """Return the labels [N] as probabilities, smoothed where the logits separate the classes."""
    if scaled[truth].min() < scaled[~truth].max() - NO_OVERLAP:
        return truth.astype(np.float64)
    n_positive, n_negative = weight[truth].sum(), weight[~truth].sum()
    smoothed: FloatArray = np.where(
        truth, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2)
    )
    return smoothed


def logistic_slope(x: FloatArray, target: FloatArray, weight: FloatArray) -> float:
    """Return the slope of the maximum-likelihood fit of sigmoid(slope · x + b) to `target`.

    0 where the best slope is not positive: the likelihood is concave, so its derivative at 0 tells.
    """
    from scipy.special import logit

    mean = np.average(target, weights=weight)
    if np.average((target - mean) * x, weights=weight) <= 0:
        return 0.0
    design = np.stack([x, np.ones_like(x)])  # [2, N]
    share = weight / weight.sum()

    def loss(parameters: FloatArray) -> float:
        z = parameters @ design
        return float(share @ (np.logaddexp(0.0, z) - target * z))

    parameters = np.array([0.0, logit(mean)])
    current = loss(parameters)
    for _ in range(NEWTON_STEPS):
        z = parameters @ design
        p = sigmoid(z)
        gradient = design @ (share * (p - target))
        hessian = (design * (share * p * sigmoid(-z))) @ design.T
        step = np.linalg.solve(hessian, gradient)
        # Half the squared Newton decrement estimates what is left to gain (Boyd & Vandenberghe,
        # 9.5). Convergence is quadratic here: one full step more gains all that floats can hold.
        if gradient @ step < 1e-12:
            return float((parameters - step)[0])
        size = 1.0
        while (proposed := loss(parameters - size * step)) >= current and size > 1e-12:
            size /= 2
        parameters, current = parameters - size * step, proposed
    raise RuntimeError(f"Platt scaling did not converge in {NEWTON_STEPS} Newton steps")


def solve_intercept(z: FloatArray, target: ArrayLike, weight: FloatArray) -> float:
    """Return b such that the weighted means of sigmoid(z + b) and of `target` [N] are the same."""
    from scipy.optimize import brentq
    from scipy.special import logit

    prior = float(np.average(np.asarray(target), weights=weight))
    # With b at logit(prior) - max(z) no probability exceeds the prior, and the other way round.
    margin = max(1.0, 1e-9 * float(np.abs(z).max()))  # for what rounding takes from huge log-odds
    low, high = logit(prior) - z.max() - margin, logit(prior) - z.min() + margin
    return float(brentq(lambda b: np.average(sigmoid(z + b), weights=weight) - prior, low, high))


def check_mean_is_prior(
    fitted: CalibrationMap,
    logits: ArrayLike,
    labels: ArrayLike,
    weights: FloatArray | None = None,
) -> None:
    """Check that the mean calibrated probability is the (weighted) share of positives.

    Maximum likelihood with an intercept guarantees it; a shift to another prior is right only then.

    Raises
    ------
    RuntimeError
        If they differ by more than 1e-6.
    """
    mean = float(np.average(sigmoid(fitted(logits)), weights=weights))
    prior = float(np.average(np.asarray(labels), weights=weights))
    if not abs(mean - prior) <= MEAN_TOLERANCE:
        raise RuntimeError(
            f"{fitted.kind}: the mean calibrated probability {mean:.9f} is not the prior "
            f"{prior:.9f} of its split; the map has no fitted intercept or did not converge"
        )
