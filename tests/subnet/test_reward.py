"""The validator's reward against a slow loop, its moments against simulation and the published table."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, matthews_corrcoef

from streetvision.errors import UserError
from streetvision.subnet.reward import beats_rival, reward_moments, rewards, simulate_rewards


def slow_rewards(predictions: list[float], labels: list[int]) -> list[float]:
    """The rules one after the other, as a validator keeps its books."""
    history: deque[tuple[float, int]] = deque(maxlen=100)
    found = []
    for prediction, label in zip(predictions, labels, strict=True):
        history.append((prediction, label))
        parts = []
        for window, kind in ((100, "mcc"), (10, "accuracy")):
            kept = [(np.round(p), y) for p, y in list(history)[-window:] if p != -1]
            if not kept or any(p not in {0.0, 1.0} for p, _ in kept):
                parts.append(0.0)
                continue
            decided, truth = [int(p) for p, _ in kept], [y for _, y in kept]
            if kind == "accuracy":
                parts.append(float(accuracy_score(truth, decided)))
            elif len(set(truth)) < 2 or len(set(decided)) < 2:
                parts.append(0.0)
            else:
                parts.append(max(0.0, float(matthews_corrcoef(truth, decided))))
        earned = (0.5 * parts[0] + 0.5 * parts[1]) ** 3
        found.append(earned if 0 <= prediction <= 1 else 0.0)
    return found


predictions = st.one_of(
    st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0, np.nextafter(0.5, 1), -1.0, 1.2, -0.3, 1.7, -0.8])
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(predictions, st.integers(0, 1)), min_size=1, max_size=30))
def test_rewards_are_those_of_the_loop(history: list[tuple[float, int]]) -> None:
    p, y = [p for p, _ in history], [y for _, y in history]
    assert rewards(p, y) == pytest.approx(slow_rewards(p, y), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_long_histories_of_good_and_odd_answers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, (2, 260))
    p = np.clip(y + rng.normal(0, 0.45, y.shape), 0, 1)
    p[0, rng.random(260) < 0.1] = -1.0
    p[1, [40, 150]] = [1.3, 1.8]
    found = rewards(p, y)
    for row in (0, 1):
        wanted = slow_rewards(p[row].tolist(), y[row].tolist())
        assert found[row] == pytest.approx(wanted, abs=1e-12)
    assert (found[0, p[0] == -1] == 0).all()


def test_the_rules_one_by_one() -> None:
    y = [0, 1] * 60
    perfect = rewards([float(v) for v in y], y)
    assert perfect[0] == 0.125  # one class: accuracy alone
    assert (perfect[1:] == 1).all()
    assert rewards([0.5] * 120, y)[-1] == pytest.approx(0.25**3)  # 0.5 rounds to "no roadwork"
    assert rewards([0.5], [0])[0] == 0.125
    wrong = rewards([1.0 - v for v in y], y)
    assert (wrong == 0).all()  # MCC −1 is clipped
    assert (rewards([-1.0] * 5, [0, 1, 0, 1, 0]) == 0).all()


@pytest.mark.parametrize(
    ("p", "y", "said"),
    [
        ([0.5], [0, 1], "one shape"),
        (0.5, 1, "one shape"),
        ([0.5], [2], "labels must be 0 or 1, got"),
        ([float("nan")], [1], "NaN"),
    ],
)
def test_what_is_no_history_is_refused(p: object, y: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        rewards(p, y)  # type: ignore[arg-type]


# Accuracy → mean reward, iid and balanced, as measured on the public validator's code.
TABLE = {0.90: (0.62, 0.65), 0.95: (0.80, 0.81), 0.975: (0.89, 0.89), 0.98: (0.915, 0.915),
         0.99: (0.957, 0.957), 1.0: (1.0, 1.0)}  # fmt: skip


@pytest.mark.parametrize("accuracy", TABLE)
def test_the_published_table_by_simulation_and_exactly(accuracy: float) -> None:
    low, high = TABLE[accuracy]
    mean = simulate_rewards(accuracy, 1 - accuracy, 0.5, 2000, 300, seed=0).mean()
    assert low - 0.01 <= mean <= high + 0.01
    assert reward_moments(accuracy, 1 - accuracy, 0.5)[0][0] == pytest.approx(mean, abs=0.004)


def test_mcc_over_100_at_98_percent_spreads_as_published() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (4000, 100))
    p = np.where(rng.random(y.shape) < 0.98, y, 1 - y)
    both = rewards(p, y)[:, -1] ** (1 / 3) * 2 - (p == y)[:, -10:].mean(axis=1)
    assert both.std() == pytest.approx(0.028, abs=0.002)


@pytest.mark.parametrize(
    ("tpr", "fpr", "share"), [(0.56, 0.02, 0.5), (0.9, 0.2, 0.3), (0.5, 0.5, 0.5), (0.0, 1.0, 0.5)]
)
def test_moments_are_those_of_simulated_days(tpr: float, fpr: float, share: float) -> None:
    paid = simulate_rewards(tpr, fpr, share, 3000, 1, seed=1)[:, 0]  # independent windows
    mean, deviation = reward_moments(tpr, fpr, share)
    error = max(float(deviation[0]) / np.sqrt(len(paid)), 1e-12)
    assert abs(paid.mean() - mean[0]) < 4 * error
    assert paid.std() == pytest.approx(deviation[0], rel=0.08, abs=1e-9)


def test_moments_of_many_rates_are_those_of_each() -> None:
    tpr, fpr = np.array([0.0, 0.4, 1.0, 1.0]), np.array([0.0, 0.1, 0.0, 1.0])
    mean, deviation = reward_moments(tpr, fpr, 0.5)
    for row in range(4):
        alone = reward_moments(tpr[row], fpr[row], 0.5)
        assert (alone[0][0], alone[1][0]) == pytest.approx((mean[row], deviation[row]))
    assert mean[2] == pytest.approx(1)
    assert deviation[2] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match=r"rates must lie in \[0, 1\]"):
        reward_moments(1.2, 0.0, 0.5)
    with pytest.raises(UserError, match="served prior"):
        reward_moments(0.9, 0.1, 1.0)


def test_days_begin_with_full_windows_and_repeat_with_the_seed() -> None:
    first = simulate_rewards(1.0, 0.0, 0.5, 3, 20, seed=4)
    assert first.shape == (3, 20)
    assert (first == 1).all()
    same = [simulate_rewards(0.8, 0.1, 0.5, 5, 30, seed=s) for s in (1, 1, 2)]
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])


def test_beating_a_rival_is_a_duel_of_two_binomials() -> None:
    def slow(own: float, rival: float, n: int) -> float:
        a, b = (stats.binom.pmf(np.arange(n + 1), n, p) for p in (own, rival))
        chances: NDArray[np.float64] = np.outer(a, b)
        return float(np.tril(chances, -1).sum() + np.trace(chances) / 2)

    for own, rival, n in ((0.9, 0.8, 10), (0.5, 0.5, 7), (0.95, 0.97, 300), (1.0, 0.3, 5)):
        assert beats_rival(own, rival, n) == pytest.approx(slow(own, rival, n), abs=1e-12)
    assert beats_rival(0.9, 0.9, 40) == pytest.approx(0.5)
    assert beats_rival(1.0, 0.0, 4) == 1
    chances = [beats_rival(a, 0.95, 300) for a in np.linspace(0, 1, 21)]
    assert chances == sorted(chances)
