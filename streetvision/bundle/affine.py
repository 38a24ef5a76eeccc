"""A policy as slope · logit + intercept: exactly, or by the nearest rule that keeps every decision.

Only an affine rule can be folded into a model's last layer, so that its two logits give the deployed
probability. Platt scaling and the shifts are affine; the other calibrators bend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError
from streetvision.decision.calibrators import CalibrationMap, PlattMap
from streetvision.decision.ensemble import EnsembleMap
from streetvision.decision.inputs import check_logits, sigmoid
from streetvision.decision.parametric import TemperatureMap
from streetvision.decision.policy import DECISION_THRESHOLD, Policy
from streetvision.stats.metrics import all_metrics, prior_weights

FloatArray = NDArray[np.float64]
# The reference logits: so many, evenly spaced between these deployed probabilities.
REFERENCE_POINTS = 1001
REFERENCE_PROBABILITIES = (0.001, 0.999)
# No logit is further from 0.
_FURTHEST = 1e6


@dataclass(frozen=True)
class Affine:
    """Deployed log-odds = slope · logit + intercept, with slope > 0."""

    slope: float
    intercept: float

    def __call__(self, logits: ArrayLike) -> FloatArray:
        """Return deployed log-odds [N] of logits [N]."""
        return self.slope * np.asarray(logits, dtype=np.float64) + self.intercept


def exact_affine(policy: Policy) -> Affine | None:
    """Return the policy as it is, or None if it is not affine in the logit."""
    slope = _slope(policy.calibrator)
    if slope is None:
        return None
    return Affine(slope, float(policy.deployed_logit([0.0])[0]))


def _slope(calibrator: CalibrationMap) -> float | None:
    if isinstance(calibrator, PlattMap):
        return calibrator.slope
    if isinstance(calibrator, TemperatureMap):
        return 1 / calibrator.temperature
    if isinstance(calibrator, EnsembleMap) and len(calibrator.members) == 1:
        return _slope(calibrator.members[0])
    return None


def nearest_affine(policy: Policy, logits: ArrayLike) -> Affine:
    """Return the affine rule nearest to the policy over `logits` [N] among those that decide alike.

    All of those cross 0 where the policy does, so one number is free: the slope that minimises the mean
    Kullback–Leibler divergence of the policy's probabilities from the rule's, which is convex.

    Raises
    ------
    UserError
        The policy decides alike for all logits within ±1,000,000, or none of `logits` differs from the
        one where its decision changes.
    """
    from scipy.optimize import brentq

    centre = _logit_at(policy, DECISION_THRESHOLD)
    distance = check_logits(logits) - centre
    if not distance.any():
        raise UserError("all logits are where the decision changes; no slope can be fitted")
    deployed = sigmoid(policy.deployed_logit(logits))

    def excess(slope: float) -> float:
        return float(np.mean((sigmoid(slope * distance) - deployed) * distance))

    high = 1 / float(np.abs(distance).max())
    while excess(high) < 0:
        high *= 2
    slope = float(brentq(excess, 0.0, high, xtol=1e-15, rtol=1e-13))
    return Affine(slope, -slope * centre)


def reference_logits(policy: Policy) -> FloatArray:
    """Logits [1001], evenly spaced from where the policy deploys 0.001 to where it deploys 0.999."""
    low, high = (_logit_at(policy, probability) for probability in REFERENCE_PROBABILITIES)
    return np.linspace(low, high, REFERENCE_POINTS)


def approximation_cost(
    policy: Policy, affine: Affine, logits: ArrayLike, labels: ArrayLike | None = None
) -> dict[str, Any]:
    """What the affine rule changes over `logits` [N], and with `labels` [N] what that costs.

    Returns
    -------
    n; decisions_changed; the largest and the mean change of the probability; with labels `mcc` and
    `log_loss` of the policy (`policy`) and of the rule (`affine`) at the served prior, and `mcc_cost`.
    """
    before, after = (sigmoid(rule(logits)) for rule in (policy.deployed_logit, affine))
    change = np.abs(after - before)
    found: dict[str, Any] = {
        "n": int(change.size),
        "decisions_changed": int(
            ((before > DECISION_THRESHOLD) != (after > DECISION_THRESHOLD)).sum()
        ),
        "largest_change": float(change.max()),
        "mean_change": float(change.mean()),
    }
    if labels is None:
        return found
    weights = prior_weights(labels, policy.served_prior)
    for name, probability in (("policy", before), ("affine", after)):
        values = all_metrics(labels, probability, weights)
        found[name] = {key: values[key] for key in ("mcc", "log_loss")}
    return found | {"mcc_cost": found["policy"]["mcc"] - found["affine"]["mcc"]}


def _logit_at(policy: Policy, probability: float) -> float:
    """The logit that the policy deploys as `probability`."""
    from scipy.optimize import brentq
    from scipy.special import logit

    def above(value: float) -> float:
        return float(policy.deployed_logit([value])[0]) - float(logit(probability))

    if above(-_FURTHEST) >= 0 or above(_FURTHEST) <= 0:
        raise UserError(
            f"the policy deploys no probability {probability} for a logit within ±{_FURTHEST:,.0f}; "
            "no affine rule is near it"
        )
    return float(brentq(above, -_FURTHEST, _FURTHEST, xtol=1e-14, rtol=1e-15))
