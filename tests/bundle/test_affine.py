"""Policies as affine rules: exact where they are, nearest and with the same decisions where not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from streetvision.bundle.affine import (
    Affine,
    approximation_cost,
    exact_affine,
    nearest_affine,
    reference_logits,
)
from streetvision.core.errors import UserError
from streetvision.decision.calibrators import CalibrationMap, PlattMap
from streetvision.decision.ensemble import EnsembleMap
from streetvision.decision.parametric import BetaMap, QuadraticMap, TemperatureMap
from streetvision.decision.policy import Policy
from streetvision.stats.metrics import all_metrics, prior_weights

NUMBERS = st.floats(-3, 3)
SLOPES = st.floats(0.05, 4)
BENT = st.one_of(
    st.builds(BetaMap, SLOPES, SLOPES, NUMBERS),
    st.builds(lambda a, b, c: QuadraticMap(-4.0, 5.0, a, b, c), SLOPES, SLOPES, NUMBERS),
    st.builds(
        lambda t, s, b: EnsembleMap((TemperatureMap(t), PlattMap(s, b)), (0.3, 0.7), 0.2),
        SLOPES, SLOPES, NUMBERS,
    ),
)  # fmt: skip
PRIORS = st.floats(0.05, 0.95)


@given(SLOPES, NUMBERS, PRIORS, PRIORS, NUMBERS)
def test_an_affine_policy_is_kept(
    slope: float, intercept: float, calibration: float, served: float, shift: float
) -> None:
    policy = Policy(PlattMap(slope, intercept), calibration, served, shift)
    # An ensemble of one member is that member and an intercept.
    one = replace(policy, calibrator=EnsembleMap((PlattMap(slope, intercept),), (1.0,), 0.4))
    z = np.linspace(-30, 30, 301)
    for each in (policy, one):
        affine = exact_affine(each)
        assert affine is not None
        np.testing.assert_allclose(affine(z), each.deployed_logit(z), atol=1e-12)


@settings(max_examples=60)
@given(BENT, PRIORS, PRIORS, NUMBERS)
def test_every_decision_is_kept(
    calibrator: CalibrationMap, calibration: float, served: float, shift: float
) -> None:
    policy = Policy(calibrator, calibration, served, shift)
    assert exact_affine(policy) is None
    rng = np.random.default_rng(0)
    affine = nearest_affine(policy, rng.normal(0, 3, 50))
    assert affine.slope > 0
    z = np.concatenate([rng.normal(0, 4, 5000), np.linspace(-100, 100, 201)])
    z = z[np.abs(policy.deployed_logit(z)) > 1e-9]
    assert ((affine(z) > 0) == policy.decide(z)).all()
    assert approximation_cost(policy, affine, z)["decisions_changed"] == 0


def divergence(policy: Policy, affine: Affine, z: NDArray[np.float64]) -> float:
    p, d = expit(policy.deployed_logit(z)), affine(z)
    return float(np.mean(p * np.logaddexp(0, -d) + (1 - p) * np.logaddexp(0, d)))


@settings(max_examples=15)
@given(BENT, NUMBERS)
def test_the_slope_is_the_nearest(calibrator: CalibrationMap, shift: float) -> None:
    policy = Policy(calibrator, 0.7, 0.5, shift)
    z = np.random.default_rng(1).normal(0.5, 2, 200)
    affine = nearest_affine(policy, z)
    centre = -affine.intercept / affine.slope
    best = minimize_scalar(
        lambda log_slope: divergence(policy, Affine(e := float(np.exp(log_slope)), -e * centre), z),
        bounds=(-8, 5), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    assert divergence(policy, affine, z) <= best.fun + 1e-12
    assert affine.slope == pytest.approx(np.exp(best.x), rel=1e-3)


def test_the_reference_logits_span_what_is_deployed() -> None:
    policy = Policy(BetaMap(2.0, 0.5, 0.3), 0.7, 0.5, -0.4)
    z = reference_logits(policy)
    assert z.shape == (1001,)
    np.testing.assert_allclose(policy.deployed_probability(z[[0, -1]]), [0.001, 0.999], rtol=1e-6)


def test_the_cost_is_that_of_the_probabilities() -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(400) % 5 > 0
    z = rng.normal(2.0 * labels - 1, 1.5)
    policy = Policy(BetaMap(2.0, 0.5, 0.3), 0.8, 0.5)
    moved = Affine(1.0, 0.9)  # decides otherwise for some
    found = approximation_cost(policy, moved, z, labels)
    p, q = policy.deployed_probability(z), expit(z + 0.9)
    assert found["n"] == 400
    assert found["decisions_changed"] == ((p > 0.5) != (q > 0.5)).sum() > 0
    assert found["largest_change"] == pytest.approx(np.abs(p - q).max())
    weights = prior_weights(labels, 0.5)
    costs = [all_metrics(labels, x, weights)["mcc"] for x in (p, q)]
    assert found["mcc_cost"] == pytest.approx(costs[0] - costs[1])
    assert found["mcc_cost"] != 0
    kept = approximation_cost(policy, nearest_affine(policy, z), z, labels)
    assert kept["mcc_cost"] == 0
    assert kept["affine"]["log_loss"] != kept["policy"]["log_loss"]


def test_a_policy_that_never_changes_its_mind_has_no_rule() -> None:
    policy = Policy(BetaMap(1e-9, 2e-9, float(logit(0.9))), 0.9, 0.9)
    with pytest.raises(UserError, match=r"deploys no probability 0\.5"):
        nearest_affine(policy, np.arange(5.0))
    with pytest.raises(UserError, match="where the decision changes"):
        nearest_affine(Policy(BetaMap(1.0, 1.0, 0.0), 0.5, 0.5), np.zeros(3))
