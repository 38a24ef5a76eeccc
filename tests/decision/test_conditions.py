"""What the deployed policy is expected to do on clean and on distorted images, out of group folds."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss, matthews_corrcoef

from streetvision.decision.conditions import REPORTED, Condition, conditions_report
from streetvision.decision.folds import group_folds
from streetvision.decision.policy import fit_policy
from streetvision.stats.metrics import prior_weights


def simulated(seed: int, n_groups: int = 60, repeats: int = 2) -> dict[str, Condition]:
    """Distortion takes 2 off the logits of positives and a little off those of negatives."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"g{n:03d}" for n in range(n_groups)], 25)
    labels = (rng.random(groups.size) < 0.6).astype(np.int64)
    logits = rng.normal(4 * labels - 2.0, 1.5) + rng.normal(size=n_groups).repeat(25) * 0.3
    clean = Condition(logits, labels, groups)
    often = np.repeat(np.arange(labels.size), repeats)
    moved = logits[often] - 2.0 * labels[often] - 0.2 + rng.normal(0, 0.5, often.size)
    return {"clean": clean, "served": Condition(moved, labels[often], groups[often])}


@pytest.mark.parametrize("fit_on", ["clean", "served"])
def test_both_conditions_are_answered_by_policies_that_saw_nothing_of_the_group(
    fit_on: str,
) -> None:
    conditions = simulated(0)
    report = conditions_report(conditions, fit_on, 0.5, 50, 3, "platt")
    fitted = conditions[fit_on]
    assert set(report) == {"on_clean", "on_served"}
    for name, each in conditions.items():
        logit = np.full(each.labels.size, np.nan)
        for fold in group_folds(fitted.labels == 1, fitted.groups, 3):
            policy, _ = fit_policy(*fitted.part(~fold), 0.5, 50, 3)
            rows = np.isin(each.groups, list(set(fitted.groups[fold])))
            logit[rows] = policy.deployed_logit(each.logits[rows])
        found, weights = report[f"on_{name}"], prior_weights(each.labels, 0.5)
        probability = 1 / (1 + np.exp(-logit))
        assert set(found) == {"n", *REPORTED}
        assert found["n"] == each.labels.size
        assert found["mcc"] == pytest.approx(
            matthews_corrcoef(each.labels, probability > 0.5, sample_weight=weights)
        )
        assert found["fnr"] == pytest.approx(np.mean(probability[each.labels == 1] <= 0.5))
        assert found["fpr"] == pytest.approx(np.mean(probability[each.labels == 0] > 0.5))
        assert found["log_loss"] == pytest.approx(
            log_loss(each.labels, probability, sample_weight=weights)
        )


def test_a_policy_serves_best_what_it_was_fitted_on() -> None:
    conditions = simulated(1)
    on = {name: conditions_report(conditions, name, 0.5, 50, 0, "platt") for name in conditions}
    for name, other in (("clean", "served"), ("served", "clean")):
        for metric, sign in (("mcc", 1), ("log_loss", -1), ("ece", -1)):
            own, foreign = on[name][f"on_{name}"][metric], on[other][f"on_{name}"][metric]
            assert sign * (own - foreign) > 0.005, (name, metric)
    # Clean calibration misses distorted roadwork.
    assert on["clean"]["on_served"]["fnr"] > on["served"]["on_served"]["fnr"] + 0.1


def test_nothing_is_reported_where_folds_are_impossible() -> None:
    clean = Condition(np.array([1.0, -1.0, 2.0]), np.array([1, 0, 1]), np.array(["a", "a", "b"]))
    assert conditions_report({"clean": clean}, "clean", 0.5, 100, 0, "platt") == {}
