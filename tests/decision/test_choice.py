"""What all calibrators have in common, and choosing between them out of group folds."""

from __future__ import annotations

import json
import logging
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import log_loss

from streetvision.core.errors import UserError
from streetvision.core.params import Decision, check_params
from streetvision.decision.calibrators import Platt
from streetvision.decision.choice import (
    ALLOWED,
    AUTO,
    CALIBRATORS,
    DEPLOYABLE,
    MULTI_OBJECTIVE,
    calibration_map_from_dict,
    check_deployable,
    choose_calibrator,
    choose_multi_objective,
    fit_kind,
)
from streetvision.decision.ensemble import TIERS
from streetvision.decision.folds import OutOfFold, group_folds, out_of_fold
from streetvision.decision.policy import Policy, fit_policy, policy_from_document, scrc_document

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
KINDS = list(CALIBRATORS)


@st.composite
def samples(draw: st.DrawFn) -> tuple[Floats, Bools]:
    """Any logits, with ties, separable or backwards; both labels."""
    logits = draw(st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=25))
    labels = draw(
        st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)).filter(
            lambda drawn: 0 < sum(drawn) < len(drawn)
        )
    )
    return np.array(logits, dtype=np.float64), np.array(labels)


def simulated(seed: int, size: int = 300) -> tuple[Floats, Bools]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.5, 2, size)
    return logits, rng.random(size) < expit(1.3 * logits - 0.4 + 0.08 * logits**2)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(sample=samples(), tested=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30))
def test_any_data_give_a_monotone_bounded_map(
    kind: str, sample: tuple[Floats, Bools], tested: list[float]
) -> None:
    logits, labels = sample
    fitted = CALIBRATORS[kind].fit(logits, labels)
    ordered = np.unique(np.concatenate([tested, logits]))
    log_odds = fitted(ordered)
    assert np.isfinite(log_odds).all()
    # Not falling but for rounding, which may show where many log-odds are added up.
    assert (np.diff(log_odds) >= -1e-12 * (1 + np.abs(log_odds[1:]))).all()
    if fitted.strictly_increasing:
        apart = np.diff(ordered) > 1e-4 * max(1.0, float(np.abs(ordered).max()))
        assert (np.diff(log_odds)[apart] > 0).all()
    if fitted.keeps_prior:
        assert expit(fitted(logits)).mean() == pytest.approx(labels.mean(), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(sample=samples())
def test_the_document_round_trip_is_exact(kind: str, sample: tuple[Floats, Bools]) -> None:
    fitted = CALIBRATORS[kind].fit(*sample)
    document = json.loads(json.dumps(fitted.to_dict(), allow_nan=False))
    rebuilt = calibration_map_from_dict(document)
    assert rebuilt == fitted
    tested = np.linspace(-70, 70, 57)
    assert rebuilt(tested).tobytes() == fitted(tested).tobytes()
    assert document["kind"] == kind
    if kind in DEPLOYABLE:
        policy = Policy(fitted, 0.7, 0.5)
        report = {"metrics": {"before": {}, "after": None}}
        stored = json.loads(json.dumps(scrc_document(policy, report)))
        assert policy_from_document(stored) == policy
    else:
        with pytest.raises(UserError, match="may be reported but not deployed"):
            Policy(fitted, 0.7, 0.5)


# A temperature is not free in the offset, and beta looks at the probabilities themselves.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "beta"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.05, 20),
    offset=st.floats(-50, 50),
)
def test_affine_changes_of_the_logits_do_not_matter(
    kind: str, seed: int, scale: float, offset: float
) -> None:
    logits, labels = simulated(seed)
    if kind == "temperature":
        offset = 0.0
    if kind == "pchip":  # its knots are rounded: only changes that keep the rounding are exact
        scale, offset = 2.0 ** round(np.log2(scale)), 0.0
    tested = np.linspace(-6, 6, 41) + 1e-3
    before = CALIBRATORS[kind].fit(logits, labels)(tested)
    after = CALIBRATORS[kind].fit(scale * logits + offset, labels)(scale * tested + offset)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_swapping_the_classes_swaps_the_map(kind: str, seed: int) -> None:
    logits, labels = simulated(seed)
    tested = np.linspace(-6, 6, 41) + 1e-3
    here = CALIBRATORS[kind].fit(logits, labels)(tested)
    mirrored = CALIBRATORS[kind].fit(-logits, ~labels)(-tested)
    np.testing.assert_allclose(-mirrored, here, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_a_repetition(kind: str) -> None:
    logits, labels = simulated(3)
    times = np.random.default_rng(0).integers(0, 4, labels.size)
    tested = np.linspace(-6, 6, 41) + 1e-3
    weighted = CALIBRATORS[kind].fit(logits, labels, weights=times.astype(float))(tested)
    repeated = CALIBRATORS[kind].fit(np.repeat(logits, times), np.repeat(labels, times))(tested)
    np.testing.assert_allclose(weighted, repeated, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_is_pure_and_checks_its_input(kind: str) -> None:
    logits, labels = simulated(0)
    copies = logits.copy(), labels.copy()
    assert CALIBRATORS[kind].fit(logits, labels) == CALIBRATORS[kind].fit(logits, labels)
    np.testing.assert_array_equal(logits, copies[0])
    np.testing.assert_array_equal(labels, copies[1])
    with pytest.raises(UserError, match="both classes"):
        CALIBRATORS[kind].fit([0.0, 1.0], [1, 1])
    with pytest.raises(UserError, match="not finite"):
        CALIBRATORS[kind].fit([0.0, np.inf], [0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_more_data_come_closer_to_the_truth(kind: str) -> None:
    # Regret of log loss against the true map, which all but a temperature can approach.
    rng = np.random.default_rng(5)
    tested = rng.normal(0.5, 2, 4000)
    truth = 1.4 * tested + (0.0 if kind == "temperature" else 0.5)
    share = expit(truth)

    def regret(size: int) -> float:
        logits = rng.normal(0.5, 2, size)
        offset = 0.0 if kind == "temperature" else 0.5
        labels = rng.random(size) < expit(1.4 * logits + offset)
        found = CALIBRATORS[kind].fit(logits, labels)(tested)
        return float(
            np.mean(
                share * (np.logaddexp(0, -found) - np.logaddexp(0, -truth))
                + (1 - share) * (np.logaddexp(0, found) - np.logaddexp(0, truth))
            )
        )

    few, many = (np.mean([regret(size) for _ in range(10)]) for size in (100, 5000))
    assert 0 <= many < few / 3
    assert many < 0.005


def test_what_may_be_deployed_agrees_with_the_parameters() -> None:
    assert DEPLOYABLE == ("platt", "beta", "quadratic", "pchip")
    allowed = get_args(Decision.model_fields["calibrator"].annotation)
    assert set(allowed) == {*ALLOWED, *CALIBRATORS}
    for kind in allowed:
        if kind in ALLOWED:
            assert check_params({"decision": {"calibrator": kind}}, "x").decision.calibrator == kind
            assert check_deployable(kind) == kind
            continue
        message = rf"x: decision\.calibrator: .* not deployed; use .* \(got '{kind}'\)"
        with pytest.raises(UserError, match=message):
            check_params({"decision": {"calibrator": kind}}, "x")
        with pytest.raises(UserError, match="cannot be deployed; one of auto, platt"):
            check_deployable(kind)
    with pytest.raises(UserError, match=r"decision\.calibrator .* is not one of"):
        check_params({"decision": {"calibrator": "spline"}}, "x")


def test_the_seed_deals_the_folds() -> None:
    groups = np.repeat(np.arange(40), 6)
    truth = np.arange(240) % 2 == 1
    one, again, other = (np.array(group_folds(truth, groups, seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_folds_are_of_whole_groups() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(10, 17, 210)
    truth = rng.random(210) < 0.7
    folds = group_folds(truth, groups, 0)
    assert len(folds) == 5
    assert np.sum(folds, axis=0).tolist() == [1] * 210
    for fold in folds:
        assert not set(groups[fold]) & set(groups[~fold])


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_fold_never_sees_the_held_out_group(kind: str) -> None:
    logits, labels = simulated(1)
    groups = np.arange(300) % 12
    folds = group_folds(labels, groups, 0)
    found = out_of_fold(CALIBRATORS[kind].fit, logits, labels, groups, folds)
    assert found is not None
    for fold in folds:
        by_hand = CALIBRATORS[kind].fit(logits[~fold], labels[~fold])(logits[fold])
        np.testing.assert_array_equal(found.log_odds[fold], by_hand)
        np.testing.assert_allclose(expit(found.prior_log_odds[fold]), labels[~fold].mean())
    # Turning the labels of one group must not move its own log-odds.
    turned = np.where(groups == 3, ~labels, labels)
    other = out_of_fold(CALIBRATORS[kind].fit, logits, turned, groups, folds)
    assert other is not None
    np.testing.assert_array_equal(other.log_odds[groups == 3], found.log_odds[groups == 3])
    assert (other.log_odds != found.log_odds).any()


def test_the_choice_is_the_lowest_log_loss_of_those_that_may_be_deployed() -> None:
    truth = np.array([True, False, True, False])
    sign = np.where(truth, 1.0, -1.0)
    estimates = {
        kind: OutOfFold(strength * sign, np.zeros(4))
        for kind, strength in [
            ("temperature", 9.0), ("platt", 1.0), ("beta", 2.0), ("quadratic", 3.0),
            ("isotonic", 8.0), ("pchip", 2.5), ("venn_abers", 7.0),
        ]
    }  # fmt: skip
    assert choose_calibrator(truth, estimates) == "quadratic"
    estimates["platt"] = estimates["quadratic"]
    assert choose_calibrator(truth, estimates) == "platt"  # the simplest of equals


def test_without_folds_platt_is_used(caplog: pytest.LogCaptureFixture) -> None:
    logits, labels = np.array([2.0, 1.0, -1.0, -2.0, 1.5]), np.array([1, 0, 1, 0, 1], bool)
    with caplog.at_level(logging.WARNING):
        fitted = fit_kind(AUTO, logits, labels, np.zeros(5), 0, 0.5)
    assert fitted == Platt().fit(logits, labels)
    assert "Platt is used" in caplog.text


def bent(seed: int) -> tuple[Floats, Bools, NDArray[np.int64]]:
    """Log-odds that are flat below 0 and steep above: no straight line is right."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, 6000)
    labels = rng.random(6000) < expit(np.where(logits > 0, 2.0, 0.1) * logits)
    return logits, labels, np.repeat(np.arange(100), 60)


def test_auto_takes_a_bent_map_where_the_truth_bends() -> None:
    data = bent(0)
    policy, report = fit_policy(*data, 0.5, 100, 0, AUTO)
    candidates = report["candidates"]
    losses = {kind: candidates[kind]["log_loss"] for kind in DEPLOYABLE}
    best = min(losses, key=losses.__getitem__)
    assert policy.calibrator.kind == best
    assert best in {"beta", "pchip", "quadratic"}
    assert [kind for kind, values in candidates.items() if values["deployed"]] == [best]
    # Nested: each fold chooses for itself, so this is not the minimum over the candidates.
    assert report["metrics"]["after"]["natural"]["log_loss"] >= losses[best] - 1e-12
    assert report["metrics"]["after"]["natural"]["log_loss"] < losses["platt"]


@pytest.mark.parametrize("kind", [*DEPLOYABLE, AUTO])
def test_candidates_have_fixed_keys_and_are_out_of_fold(kind: str) -> None:
    logits, labels, groups = bent(1)
    policy, report = fit_policy(logits, labels, groups, 0.5, 100, 0, kind)
    assert list(report["candidates"]) == KINDS
    folds = group_folds(labels, groups, 0)
    for name, values in report["candidates"].items():
        assert set(values) == {"log_loss", "brier", "ece", "deployable", "deployed"}
        assert values["deployable"] == (name in DEPLOYABLE)
        found = out_of_fold(CALIBRATORS[name].fit, logits, labels, groups, folds)
        assert found is not None
        assert values["log_loss"] == pytest.approx(log_loss(labels, expit(found.log_odds)))
    if kind != AUTO:
        assert policy.calibrator.kind == kind
        wanted = report["candidates"][kind]
        assert report["metrics"]["after"]["natural"] == {
            key: wanted[key] for key in ("log_loss", "brier", "ece")
        }
    assert expit(policy.calibrator(logits)).mean() == pytest.approx(labels.mean(), abs=1e-6)


def estimates_of(labels: Bools, **log_odds: Floats) -> dict[str, OutOfFold]:
    prior = np.full(labels.size, np.log(labels.mean() / (1 - labels.mean())))
    return {name: OutOfFold(values, prior) for name, values in log_odds.items()}


def test_multi_objective_takes_the_lowest_ece_that_keeps_mcc_and_fnr() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2, 20_000)
    labels = rng.random(20_000) < expit(truth)
    raw = 2.5 * truth  # overconfident, the same decisions
    near, far = 1.1 * truth, 1.7 * truth
    choose = choose_multi_objective
    assert choose(raw, labels, estimates_of(labels, platt=far, beta=near), 0.5) == "beta"
    # Calibrated best, but it misses more roadwork; or confuses more.
    strict = near - 0.4
    assert choose(raw, labels, estimates_of(labels, platt=far, beta=strict), 0.5) == "platt"
    confused = np.where(rng.random(20_000) < 0.1, -near, near)
    assert choose(raw, labels, estimates_of(labels, platt=far, tier_1=confused), 0.5) == "platt"
    # What is not deployable is no candidate; of equals the log loss decides.
    assert choose(raw, labels, estimates_of(labels, platt=far, isotonic=near), 0.5) == "platt"
    tie = np.where(np.abs(truth) > 0, near, 0)
    assert choose(raw, labels, estimates_of(labels, tier_2=tie, beta=near), 0.5) == "beta"


def test_multi_objective_compares_at_the_served_prior() -> None:
    """Logits that are right at 80 % of roadwork miss more of it, moved to 50 %: so do those beside them."""
    rng = np.random.default_rng(0)
    truth = rng.random(2000) < 0.8
    prior = np.log(truth.mean()) - np.log1p(-truth.mean())
    logits = prior + rng.normal(np.where(truth, 1.0, -1.0), 1.4)
    estimates = {"beta": OutOfFold(logits, np.full(2000, prior))}
    assert choose_multi_objective(logits, truth, estimates, 0.5) == "beta"


def test_multi_objective_falls_back_to_platt(caplog: pytest.LogCaptureFixture) -> None:
    logits, labels = simulated(0)
    with caplog.at_level(logging.WARNING):
        assert choose_multi_objective(logits, labels, {}, 0.5) == "platt"
    assert "Platt is used" in caplog.text


@pytest.mark.parametrize("kind", [*TIERS, MULTI_OBJECTIVE])
def test_tiers_are_deployed_and_reported_out_of_fold(kind: str) -> None:
    logits, labels, groups = bent(2)
    policy, report = fit_policy(logits, labels, groups, 0.5, 100, 0, kind)
    candidates = report["candidates"]
    assert list(candidates) == [*KINDS, *TIERS]
    deployed = [name for name, values in candidates.items() if values["deployed"]]
    assert len(deployed) == 1
    assert all(candidates[tier]["deployable"] for tier in TIERS)
    folds = group_folds(labels, groups, 0)
    for name, tier in TIERS.items():
        found = out_of_fold(tier.fit, logits, labels, groups, folds)
        assert found is not None
        assert candidates[name]["log_loss"] == pytest.approx(
            log_loss(labels, expit(found.log_odds))
        )
    chosen = deployed[0]
    if kind in TIERS:
        assert chosen == kind
        assert policy.calibrator == TIERS[kind].fit(logits, labels, groups)
        assert report["metrics"]["after"]["natural"]["ece"] == candidates[kind]["ece"]
    assert expit(policy.calibrator(logits)).mean() == pytest.approx(labels.mean(), abs=1e-6)
    stored = json.loads(json.dumps(scrc_document(policy, report), allow_nan=False))
    assert policy_from_document(stored) == policy


def test_what_cannot_be_deployed_is_refused() -> None:
    for kind in ("temperature", "isotonic", "venn_abers", "spline"):
        with pytest.raises(UserError, match=f"'{kind}' cannot be deployed"):
            fit_policy(*bent(0), 0.5, 100, 0, kind)


def test_old_policy_documents_load() -> None:
    old = {
        "metrics": {"after": None, "before": {}},
        "policy_type": "scrc",
        "scrc_params": {
            "abstention": None,
            "calibration_prior": 0.59,
            "calibrator": {
                "intercept": -0.42, "kind": "platt", "slope": 1.04, "strictly_increasing": True,
            },
            "decision_threshold": 0.5,
            "served_prior": 0.5,
            "threshold_shift": 0.0,
        },
    }  # fmt: skip
    policy = policy_from_document(old)
    assert policy.calibrator.to_dict() == old["scrc_params"]["calibrator"]  # type: ignore[index]
    old["scrc_params"] |= {"fit_on": "clean", "hard_images": None}  # type: ignore[operator]
    assert scrc_document(policy, old) == old  # type: ignore[arg-type]
