"""The gate's verdicts, its interval against the paired one, and how often it errs, by simulation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import matthews_corrcoef

from streetvision.core.errors import UserError
from streetvision.stats.bootstrap import paired_group_interval
from streetvision.training.gate import augmentation_gate, gate_verdict

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
numbers = st.floats(-1, 1)


def sample(n_groups: int, size: int) -> tuple[Integers, Integers]:
    """Groups of `size` images, both classes in each."""
    groups = np.repeat(np.arange(n_groups), size)
    return np.arange(len(groups)) % 2, groups


def runner(
    labels: Integers, groups: Integers, plain: float, augmented: float, seed: int = 0
) -> Callable[[bool, int], Floats]:
    """A model that errs with these rates, more in some groups than in others, the same for all runs."""
    spread = np.random.default_rng(seed).normal(0, 0.05, groups.max() + 1)[groups]

    def run(augment: bool, training_seed: int) -> Floats:
        rng = np.random.default_rng([seed, training_seed, augment])
        wrong = rng.random(len(labels)) < np.clip((augmented if augment else plain) + spread, 0, 1)
        return np.where(wrong, 1 - labels, labels) * 0.8 + 0.1

    return run


# --------------------------------------------------------------------------- verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.03, 0.2, "pass"),
        (0.01, 0.02, "pass"),
        (-0.0301, 0.2, "inconclusive"),
        (-0.2, -0.03, "inconclusive"),
        (-0.2, -0.0301, "fail"),
    ],
)
def test_verdict(low: float, high: float, verdict: str) -> None:
    assert gate_verdict(low, high) == verdict


@given(numbers, numbers, st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_better_interval_or_a_wider_margin_never_worsens_the_verdict(
    one: float, other: float, up: float, margin: float
) -> None:
    order = ("fail", "inconclusive", "pass")
    low, high = sorted((one, other))
    found = order.index(gate_verdict(low, high, margin))
    assert order.index(gate_verdict(low + up, high + up, margin)) >= found
    assert order.index(gate_verdict(low, high, margin + up)) >= found


# --------------------------------------------------------------------------- interval


@pytest.mark.parametrize("n_groups", [12, 80])
def test_of_one_seed_it_is_the_paired_interval(n_groups: int) -> None:
    labels, groups = sample(n_groups, 10)
    run = runner(labels, groups, 0.15, 0.2)
    found = augmentation_gate(run, labels, groups, [3], n_resamples=500, level=0.9)
    wanted = paired_group_interval(
        labels, run(False, 3), run(True, 3), groups, n_resamples=500, level=0.9
    )
    assert (found.delta, found.low, found.high) == (wanted.value, wanted.low, wanted.high)
    assert found.method == wanted.method
    assert np.isnan(found.delta_std)


def test_of_more_seeds_it_is_the_mean_difference() -> None:
    labels, groups = sample(20, 10)
    run = runner(labels, groups, 0.1, 0.2)
    asked: list[tuple[bool, int]] = []

    def recorded(augment: bool, seed: int) -> Floats:
        asked.append((augment, seed))
        return run(augment, seed)

    found = augmentation_gate(recorded, labels, groups, [1, 5, 9])
    assert sorted(asked) == [(augment, seed) for augment in (False, True) for seed in (1, 5, 9)]
    differences = [
        matthews_corrcoef(labels, run(True, seed) > 0.5)
        - matthews_corrcoef(labels, run(False, seed) > 0.5)
        for seed in (1, 5, 9)
    ]
    assert found.delta == pytest.approx(np.mean(differences))
    assert found.delta_std == pytest.approx(np.std(differences, ddof=1))
    assert found.seeds == (1, 5, 9)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.delta < found.high
    assert found.verdict == gate_verdict(found.low, found.high)


@pytest.mark.parametrize("with_positives", [3, 4])
def test_few_groups_are_inconclusive_and_it_is_said(with_positives: int) -> None:
    groups = np.repeat(np.arange(10), 20)
    labels = ((np.arange(200) % 2 == 1) & (groups < with_positives)).astype(np.int64)
    found = augmentation_gate(runner(labels, groups, 0.05, 0.4), labels, groups, [0, 1])
    assert found.verdict == "inconclusive"
    assert (found.low, found.high) == (None, None)
    assert f"rests on {with_positives}.0 effective groups" in found.method
    assert found.delta < -0.1


def test_equal_models_give_no_interval() -> None:
    labels, groups = sample(10, 10)
    run = runner(labels, groups, 0.2, 0.2)
    found = augmentation_gate(lambda _, seed: run(False, seed), labels, groups, [0, 1])
    assert (found.verdict, found.delta, found.low) == ("inconclusive", 0.0, None)
    assert "no variation" in found.method


def test_what_the_gate_refuses() -> None:
    labels, groups = sample(10, 10)
    run = runner(labels, groups, 0.1, 0.1)
    with pytest.raises(UserError, match="at least one seed"):
        augmentation_gate(run, labels, groups, [])
    with pytest.raises(UserError, match="one class only"):
        augmentation_gate(run, np.ones(100, np.int64), groups, [0])


# --------------------------------------------------------------------------- how often it errs


def share_failed(plain: float, augmented: float, n_groups: int, size: int, times: int) -> float:
    labels, groups = sample(n_groups, size)
    failed = 0
    for seed in range(times):
        run = runner(labels, groups, plain, augmented, seed)
        found = augmentation_gate(run, labels, groups, [0, 1, 2], n_resamples=300)
        failed += found.verdict == "fail"
    return failed / times


@pytest.mark.parametrize("n_groups", [8, 20])
def test_no_difference_rarely_fails(n_groups: int) -> None:
    assert share_failed(0.2, 0.2, n_groups, 12, 500) <= 0.02


def test_a_loss_at_the_margin_fails_as_rarely_as_the_level_says() -> None:
    """Where -0.03 is the truth, one-sided 2.5 % of the intervals lie below it; MCC is 1 - 2 errors."""
    assert share_failed(0.2, 0.215, 20, 20, 500) <= 0.045


def test_a_tenth_less_fails() -> None:
    assert share_failed(0.1, 0.15, 40, 50, 40) >= 0.95
