"""Both subnets' rewards: the formula by hand, the exact mean against a simulation of the windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import brier_score_loss, matthews_corrcoef

from streetvision.core.errors import UserError
from streetvision.stats.metrics import mcc_from_counts
from streetvision.subnet import sn34
from streetvision.subnet.payment import REWARDS, answer_columns
from streetvision.subnet.reward import reward_moments

Sample = tuple[NDArray[np.int64], NDArray[np.float64]]


def sample(n: int, skill: float, sharpness: float, seed: int = 0) -> Sample:
    """Labels and probabilities; `sharpness` 1 is calibrated about, more is too sure."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    logits = skill * (2 * y - 1) + rng.normal(0, 1.5, n)
    return y, 1 / (1 + np.exp(-sharpness * logits))


def slow_score(y: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    mcc = matthews_corrcoef(y, p > 0.5)
    brier = brier_score_loss(y, np.clip(p, 1e-7, 1 - 1e-7))
    first, second = ((mcc + 1) / 2) ** 1.2, max(0.0, (0.25 - brier) / 0.25) ** 1.8
    return min(1.0, math.sqrt(max(1e-12, first * second)))


@pytest.mark.parametrize("skill", [0.0, 0.5, 1.5, 4.0, -2.0])
def test_the_score_of_subnet_34_by_hand(skill: float) -> None:
    for seed in range(20):
        y, p = sample(60, skill, 1.3, seed)
        assert sn34.score(y, p) == pytest.approx(slow_score(y, p), abs=1e-12)


def test_the_score_pays_calibration_and_its_ends() -> None:
    y = np.array([0, 1] * 50)
    assert sn34.score(y, y.astype(float)) == pytest.approx(1)
    assert sn34.score(y, np.full(100, 0.5)) == pytest.approx(1e-6)  # the floor
    assert sn34.score(y, 1.0 - y) == pytest.approx(1e-6)
    y, p = sample(4000, 1.0, 1.0)
    sharp, same = p**4 / (p**4 + (1 - p) ** 4), p
    assert np.array_equal(sharp > 0.5, same > 0.5)
    assert sn34.score(y, sharp) < sn34.score(y, same) - 0.02
    both = sn34.score(np.stack([y, y]), np.stack([sharp, same]))
    assert both.tolist() == [sn34.score(y, sharp), sn34.score(y, same)]


@pytest.mark.parametrize(
    ("y", "p", "said"),
    [([0, 1], [0.5], "one shape"), ([2], [0.5], "labels must be 0 or 1"), ([1], [1.2], r"in \[0, 1\]"),
     ([1], [float("nan")], r"in \[0, 1\]")],
)  # fmt: skip
def test_what_is_no_benchmark_is_refused(y: list[int], p: list[float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sn34.score(y, p)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(
    ("skill", "sharpness", "share"),
    [
        (1.5, 1.0, 0.5),
        (0.8, 3.0, 0.3),
        (3.0, 1.0, 0.5),
        (0.2, 2.0, 0.5),
        (0.5, 1.0, 0.5),
        (9.0, 1.0, 0.5),
    ],
)
def test_the_exact_mean_is_that_of_simulated_windows(
    name: str, skill: float, sharpness: float, share: float
) -> None:
    y, p = sample(400, skill, sharpness)
    weights = np.random.default_rng(3).uniform(0.2, 2, len(y))
    (mean,), (deviation,) = REWARDS[name].expected(y, p, weights, share)
    paid = REWARDS[name].simulate(y, p, weights, share, runs=4000, seed=1)
    assert abs(paid.mean() - mean) < 4 * deviation / np.sqrt(len(paid)) + 1e-6
    assert paid.std() == pytest.approx(deviation, rel=0.06, abs=1e-6)


@pytest.mark.parametrize("challenges", [60, 300])
def test_a_short_benchmark_is_still_near_its_simulation(challenges: int) -> None:
    """There the Brier score of given counts is least normal."""
    y, p = sample(500, 1.2, 1.5)
    sums = answer_columns(y, p).sum(axis=0)
    answers = []
    for label in (0, 1):
        error = sn34.squared_error(y, p)[y == label]
        yes = p[y == label] > 0.5
        cells = [error[~yes], error[yes]]
        assert sums[6 * label : 6 * label + 2].tolist() == [len(yes), yes.sum()]
        answers.append(
            sn34.Answers(
                np.array([yes.mean()]),
                np.array([[c.mean() for c in cells]]),
                np.array([[c.var() for c in cells]]),
            )
        )
    mean, deviation = sn34.score_moments(answers[0], answers[1], 0.5, challenges)
    rng = np.random.default_rng(0)
    half = challenges // 2
    rows = np.hstack([rng.choice(np.flatnonzero(y == c), (6000, half)) for c in (0, 1)])
    paid = sn34.score(y[rows], p[rows])
    assert abs(paid.mean() - mean[0]) < 4 * deviation[0] / np.sqrt(len(paid))
    assert paid.std() == pytest.approx(deviation[0], rel=0.05)


def answers_of(rate: float, rng: np.random.Generator) -> sn34.Answers:
    return sn34.Answers(
        np.array([rate]), rng.uniform(0.02, 0.15, (1, 2)), rng.uniform(0.001, 0.02, (1, 2))
    )


@pytest.mark.parametrize(
    ("tpr", "fpr", "challenges"),
    [(0.9, 0.1, 1000), (0.6, 0.02, 1000), (0.99, 0.01, 300), (1.0, 0.0, 50), (0.5, 0.5, 200), (0.97, 0.3, 12)],
)  # fmt: skip
def test_the_quadrature_is_the_sum_over_all_counts(tpr: float, fpr: float, challenges: int) -> None:
    rng = np.random.default_rng(0)
    low, high = answers_of(fpr, rng), answers_of(tpr, rng)
    n = challenges // 2
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    k = np.arange(n + 1)
    tp, fp = k[:, None], k[None, :]
    mcc = mcc_from_counts(tp, fp, n - fp, n - tp)
    brier, variance = (
        (tp * h[0, 1] + (n - tp) * h[0, 0] + fp * low_[0, 1] + (n - fp) * low_[0, 0]) / (2 * n)
        for low_, h in ((low.mean, high.mean), (low.variance, high.variance))
    )
    each = brier[..., None] + np.sqrt(variance / (2 * n))[..., None] * nodes
    scores = ((mcc[..., None] + 1) / 2) ** 0.6 * np.maximum(0, 1 - 4 * each) ** 0.9
    chance = stats.binom.pmf(k, n, tpr)[:, None] * stats.binom.pmf(k, n, fpr)
    wanted = [
        float((chance * (np.minimum(scores, 1) ** power @ weights / weights.sum())).sum())
        for power in (1, 2)
    ]
    mean, deviation = sn34.score_moments(low, high, 0.5, challenges)
    assert mean[0] == pytest.approx(wanted[0], abs=1e-6 if challenges > 100 else 1e-3)
    assert deviation[0] == pytest.approx(
        np.sqrt(wanted[1] - wanted[0] ** 2), rel=1e-3 if challenges > 100 else 0.03
    )


def test_subnet_72_pays_decisions_alone() -> None:
    y, p = sample(300, 1.0, 1.0)
    tpr, fpr = (p[y == 1] > 0.5).mean(), (p[y == 0] > 0.5).mean()
    wanted = reward_moments(tpr, fpr, 0.4)
    for answers in (p, np.round(p)):
        found = REWARDS["sn72"].expected(y, answers, positive_share=0.4)
        assert np.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("name", REWARDS)
def test_rows_of_weights_are_samples_of_their_own(name: str) -> None:
    y, p = sample(120, 1.0, 1.0)
    rows = np.random.default_rng(0).integers(0, 3, (4, len(y))).astype(float)
    rows[2] = rows[1] * 5  # only ratios count
    rows[3] = y == 1  # one class alone
    mean, deviation = REWARDS[name].expected(y, p, rows)
    for row in range(2):
        repeated = np.repeat(np.arange(len(y)), rows[row].astype(int))
        alone = REWARDS[name].expected(y[repeated], p[repeated])
        assert (alone[0][0], alone[1][0]) == pytest.approx((mean[row], deviation[row]))
    assert mean[2] == pytest.approx(mean[1])
    assert np.isnan(mean[3])
    assert np.isnan(deviation[3])
    with pytest.raises(UserError, match="no picture with label 0"):
        REWARDS[name].simulate(y, p, rows[3], runs=2, seed=0)
