"""Which images get a second pass, and the policy of the rule that both passes make."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streetvision.core.errors import UserError
from streetvision.core.params import Decision
from streetvision.decision.calibrators import PlattMap
from streetvision.decision.fitting import Passes, fit_decision
from streetvision.decision.hard_images import HardImages, unsure_between
from streetvision.decision.policy import (
    Policy,
    fit_policy,
    fit_rule,
    policy_from_document,
    scrc_document,
)
from streetvision.decision.report import calibration_metrics
from streetvision.decision.scrc import guarantee_groups
from streetvision.decision.validator import PolicyValidator


def passes(seed: int, groups: int = 40) -> dict[str, Passes]:
    """A second pass that knows more than the first; distortion costs both."""
    rng = np.random.default_rng(seed)
    units = np.repeat([f"g{n:02d}" for n in range(groups)], 20)
    labels = (rng.random(units.size) < 0.6).astype(np.int64)
    found = {}
    for name, lost in (("clean", 0.0), ("served", 1.5)):
        signal = 4 * labels - 2 - lost * labels
        single = signal + rng.normal(0, 2, units.size)
        found[name] = Passes(single, signal + rng.normal(0, 1, units.size), labels, units)
    return found


@settings(deadline=None)
@given(
    st.floats(0.2, 5),
    st.floats(-3, 3),
    st.floats(0.1, 0.9),
    st.floats(-1, 1),
    st.floats(0.05, 0.45),
)
def test_the_band_is_what_the_first_pass_leaves_within_the_margin(
    slope: float, intercept: float, served: float, shift: float, margin: float
) -> None:
    policy = Policy(PlattMap(slope, intercept), 0.6, served, shift)
    band = unsure_between(policy.deployed_logit, margin)
    edges = policy.deployed_probability([band.low, band.high])
    np.testing.assert_allclose(edges, [0.5 - margin, 0.5 + margin], atol=1e-6)
    logits = np.linspace(band.low - 2, band.high + 2, 101)
    near = np.abs(policy.deployed_probability(logits) - 0.5) < margin
    inside = np.abs(np.abs(policy.deployed_probability(logits) - 0.5) - margin) > 1e-6
    np.testing.assert_array_equal(band.chosen(logits)[inside], near[inside])


def test_the_edges_of_the_band_are_not_hard() -> None:
    band = HardImages(-1.0, 2.0)
    single = np.array([-1.0, -0.999, 0.0, 2.0, 5.0])
    assert band.chosen(single).tolist() == [False, True, True, False, False]
    assert band.compose(single, single + 10).tolist() == [-1.0, 9.001, 10.0, 2.0, 5.0]


@pytest.mark.parametrize("fit_on", ["clean", "served"])
@pytest.mark.parametrize("abstention", ["none", "scrc_t"])
def test_the_policy_is_that_of_the_composed_logits(fit_on: Any, abstention: Any) -> None:
    found = passes(0)
    decision = Decision(
        fit_on=fit_on, hard_image_views="all", hard_image_margin=0.3, n_resamples=100,
        abstention=abstention, alpha=0.2,
    )  # fmt: skip
    policy, report, fitted = fit_decision(found, decision, 3, several_views=True)
    single, fused, labels, units = found[fit_on]
    rows = np.ones(units.size, bool) if abstention == "none" else ~guarantee_groups(units, 0.5, 3)
    first, _ = fit_rule(single[rows], labels[rows] == 1, units[rows], 0.5, 100, 3, "platt")
    hard = np.abs(first.deployed_probability(single) - 0.5) < 0.3
    composed = np.where(hard, fused, single)
    assert 0.1 < hard.mean() < 0.9
    np.testing.assert_array_equal(fitted.logits, composed)
    alone, _ = fit_policy(composed[rows], labels[rows], units[rows], 0.5, 100, 3)
    assert policy.calibrator == alone.calibrator
    assert policy.threshold_shift == alone.threshold_shift
    assert (policy.fit_on, policy.hard_images is not None) == (fit_on, True)
    assert report["hard_images"][f"share_{fit_on}"] == pytest.approx(hard.mean())
    metrics = calibration_metrics(report, policy, composed, labels, 0.5, single)
    assert metrics["hard_images"] == report["hard_images"]
    document = json.loads(json.dumps(scrc_document(policy, report), allow_nan=False))
    PolicyValidator().validate(document)
    assert policy_from_document(document) == policy


def test_a_second_pass_is_off_by_default_and_needs_views() -> None:
    found = passes(1)
    off, report, fitted = fit_decision(found, Decision(n_resamples=100), 3, several_views=True)
    assert off.hard_images is None
    assert "hard_images" not in report
    np.testing.assert_array_equal(fitted.logits, found["served"].fused)
    asked = Decision(n_resamples=100, hard_image_views="all")
    assert fit_decision(found, asked, 3, several_views=False)[0] == off


@pytest.mark.parametrize(
    ("band", "message"),
    [
        ({"low": 1.0, "high": 1.0}, r"hard_images.low is 1.0; it must be below high, 1.0"),
        ({"low": "x", "high": 1.0}, "hard_images.low is 'x'; a finite number is needed"),
        ({"low": 0.0}, "hard_images lacks high"),
        ({"low": 0.0, "high": 1.0, "views": 3}, "hard_images has unknown views"),
    ],
)
def test_document_errors_name_the_key(band: Any, message: str) -> None:
    report = {"metrics": {"before": {}, "after": None}}
    document = scrc_document(Policy(PlattMap(1.0, 0.2), 0.6, 0.5), report)
    document["scrc_params"]["hard_images"] = band
    with pytest.raises(UserError, match=message):
        policy_from_document(document)
