"""Ensembles of calibrators: weights against a grid and scipy, maps that increase, documents."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, softmax
from sklearn.metrics import log_loss

from streetvision.core.errors import UserError
from streetvision.decision.calibrators import PlattMap, check_sample
from streetvision.decision.choice import CALIBRATORS, calibration_map_from_dict
from streetvision.decision.ensemble import (
    TIERS,
    Ensemble,
    EnsembleMap,
    fit_ensembles,
    simplex_weights,
)
from streetvision.decision.folds import group_folds, out_of_fold

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def simulated(seed: int, size: int = 600) -> tuple[Floats, Bools, NDArray[np.intp]]:
    """Bent log-odds in 30 groups: no single member is right."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.5, 3, size)
    labels = rng.random(size) < 0.04 + 0.92 * expit(1.3 * logits - 0.8)
    return logits, labels, np.arange(size) % 30


def mixture_loss(weights: Floats, log_odds: Floats, labels: Bools) -> float:
    p = weights @ expit(log_odds)
    return -float(np.mean(np.log(np.where(labels, p, 1 - p))))


@pytest.mark.parametrize("seed", range(5))
def test_weights_of_two_against_a_grid(seed: int) -> None:
    logits, labels, _ = simulated(seed)
    rng = np.random.default_rng(seed)
    log_odds = np.stack(
        [logits * 0.4 + rng.normal(0, 1, 600), 1.5 * logits + rng.normal(0, 1, 600)]
    )
    found = simplex_weights(log_odds, labels, np.ones(600))
    grid = np.linspace(0, 1, 2001)
    losses = [mixture_loss(np.array([a, 1 - a]), log_odds, labels) for a in grid]
    assert found.sum() == pytest.approx(1)
    assert found[0] == pytest.approx(grid[np.argmin(losses)], abs=2e-3)
    assert mixture_loss(found, log_odds, labels) <= min(losses) + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_weights_of_five_against_an_optimiser_without_constraints(seed: int) -> None:
    logits, labels, _ = simulated(seed)
    rng = np.random.default_rng(seed)
    log_odds = np.stack([s * logits + rng.normal(0, 1.5, 600) for s in (0.2, 0.5, 1, 1.5, 3)])
    weight = rng.integers(1, 4, 600).astype(float)
    found = simplex_weights(log_odds, labels, weight)

    def loss(weights: Floats) -> float:
        p = weights @ expit(log_odds)
        return -float(np.average(np.log(np.where(labels, p, 1 - p)), weights=weight))

    best = min(
        minimize(lambda v: loss(softmax(v)), start, method="BFGS").fun
        for start in rng.normal(size=(4, 5))
    )
    assert loss(found) <= best + 1e-7
    assert loss(found) <= min(loss(corner) for corner in np.eye(5)) + 1e-12


def test_a_member_that_is_right_gets_all_the_weight() -> None:
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 2, 20_000)
    labels = rng.random(20_000) < expit(log_odds)
    found = simplex_weights(np.stack([-log_odds, log_odds]), labels, np.ones(20_000))
    assert found[1] > 0.99
    # Certain and wrong somewhere: no infinite loss on the way.
    certain = simplex_weights(np.stack([1e4 * log_odds, log_odds]), labels, np.ones(20_000))
    assert np.isfinite(certain).all()
    assert certain[1] > 0.8


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(
        st.tuples(st.floats(-60, 60, width=32), st.booleans()), min_size=2, max_size=25
    ).filter(lambda drawn: 0 < sum(label for _, label in drawn) < len(drawn)),
    tier=st.sampled_from(list(TIERS)),
    tested=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30),
)
def test_any_data_give_a_strictly_increasing_map_at_the_prior(
    data: list[tuple[float, bool]], tier: str, tested: list[float]
) -> None:
    logits, labels = np.array([x for x, _ in data]), np.array([y for _, y in data])
    fitted = TIERS[tier].fit(logits, labels)
    assert expit(fitted(logits)).mean() == pytest.approx(labels.mean(), abs=1e-6)
    ordered = np.unique(np.concatenate([tested, logits]))
    log_odds = fitted(ordered)
    assert np.isfinite(log_odds).all()
    assert (np.diff(log_odds) >= -1e-12 * (1 + np.abs(log_odds[1:]))).all()
    apart = np.diff(ordered) > 1e-4 * max(1.0, float(np.abs(ordered).max()))
    assert (np.diff(log_odds)[apart] > 0).all()
    document = json.loads(json.dumps(fitted.to_dict(), allow_nan=False))
    rebuilt = calibration_map_from_dict(document)
    assert rebuilt == fitted
    assert rebuilt(ordered).tobytes() == log_odds.tobytes()


def test_the_map_is_the_mean_of_its_members() -> None:
    logits, labels, groups = simulated(1)
    fitted = TIERS["tier_3"].fit(logits, labels, groups)
    mean = sum(
        w * expit(member(logits)) for w, member in zip(fitted.weights, fitted.members, strict=True)
    )
    np.testing.assert_allclose(
        fitted(logits), np.log(mean) - np.log(1 - mean) + fitted.intercept, atol=1e-9
    )
    far = EnsembleMap((PlattMap(1.0, 0.0), PlattMap(2.0, 0.0)), (0.5, 0.5), 0.0)([-800.0, 800.0])
    np.testing.assert_allclose(far, [-800 - np.log(2), 800 + np.log(2)], rtol=1e-9)


def test_weights_come_from_groups_that_the_members_did_not_see() -> None:
    logits, labels, groups = simulated(2)
    members = TIERS["tier_3"].members
    fitted = TIERS["tier_3"].fit(logits, labels, groups)
    folds = group_folds(labels, groups, 0)
    held = [out_of_fold(CALIBRATORS[k].fit, logits, labels, groups, folds) for k in members]
    wanted = simplex_weights(
        np.stack([h.log_odds for h in held if h is not None]), labels, np.ones(labels.size)
    )
    kept = wanted > 1e-6
    assert [member.kind for member in fitted.members] == list(np.array(members)[kept])
    np.testing.assert_allclose(fitted.weights, wanted[kept], atol=1e-6)


def test_fitting_together_is_fitting_apart() -> None:
    data = simulated(3)
    members = {name: tier.members for name, tier in TIERS.items()}
    together = fit_ensembles(members, check_sample(*data, None))
    assert together == {name: t.fit(*data) for name, t in TIERS.items()}


def test_a_weight_of_zero_is_no_image() -> None:
    logits, labels, groups = simulated(4)
    weights = (np.arange(labels.size) % 3 > 0).astype(float)
    used = weights > 0
    tier = TIERS["tier_2"]
    assert tier.fit(logits, labels, groups, weights) == tier.fit(
        logits[used], labels[used], groups[used]
    )


def test_without_folds_members_weigh_alike() -> None:
    logits, labels = np.array([2.0, 1.0, -1.0, -2.0, 1.5]), np.array([1, 0, 1, 0, 1])
    fitted = Ensemble(("platt", "beta")).fit(logits, labels, np.zeros(5))
    assert fitted.weights == (0.5, 0.5)


@pytest.mark.parametrize("tier", TIERS)
def test_an_ensemble_comes_close_to_the_best_of_its_members(tier: str) -> None:
    # On new images, with the truth known: mean regret over five fits.
    tested, truth, _ = simulated(99, 20_000)
    losses: dict[str, list[float]] = {}
    for seed in range(5):
        data = simulated(seed)
        for kind in TIERS[tier].members:
            losses.setdefault(kind, []).append(
                log_loss(truth, expit(CALIBRATORS[kind].fit(*data)(tested)))
            )
        losses.setdefault("", []).append(log_loss(truth, expit(TIERS[tier].fit(*data)(tested))))
    means = {kind: np.mean(values) for kind, values in losses.items()}
    best = min(value for kind, value in means.items() if kind)
    worst = max(value for kind, value in means.items() if kind)
    assert means[""] <= best + 0.005
    assert means[""] <= worst


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [0.5, 0.4]}, "add up to 1"),
        ({"weights": [1.5, -0.5]}, "must be > 0"),
        ({"weights": [1.0]}, "1 weights for 2 members"),
        ({"weights": "all"}, "a list is needed"),
        ({"members": 3}, "a list is needed"),
        ({"members": [{"kind": "isotonic"}, {}]}, "'isotonic'; one of temperature, platt"),
        ({"intercept": None}, "intercept is None"),
        ({"bias": 0.0}, "unknown bias"),
        ({"strictly_increasing": False}, "strictly_increasing is False"),
    ],
)
def test_document_errors_name_the_key(change: dict[str, object], message: str) -> None:
    members = (PlattMap(1.0, 0.0), PlattMap(2.0, 0.5))
    document = EnsembleMap(members, (0.25, 0.75), 0.1).to_dict() | change
    with pytest.raises(UserError, match=message):
        calibration_map_from_dict(document)


def test_a_missing_key_is_named() -> None:
    document = EnsembleMap((PlattMap(1.0, 0.0),), (1.0,), 0.1).to_dict()
    del document["weights"]
    with pytest.raises(UserError, match="lacks weights"):
        calibration_map_from_dict(document)
