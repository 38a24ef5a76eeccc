"""What Subnet 72's validator pays: its reward of a history, and what a pair of error rates earns.

Reward = (0.5 · MCC of the last 100 answers + 0.5 · accuracy of the last 10)³, MCC clipped at 0. Source:
the public validator (natixnetwork/streetvision-subnet, commit 28a1755). Challenges are independent, so
what a miner earns depends on its true and false positive rate and on the share of roadwork alone; mean
and variance are sums over all confusion counts, without simulation.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.errors import UserError
from streetvision.evaluation.metrics import Floats, check_prior, mcc_from_counts

MCC_WINDOW = 100
ACCURACY_WINDOW = 10
POWER = 3
NO_ANSWER = -1.0
_DAY_ELEMENTS = 1 << 21  # challenges simulated at once


def rewards(predictions: ArrayLike, labels: ArrayLike) -> Floats:
    """Reward after each challenge of histories that begin empty.

    Both [..., T], time last; labels in {0, 1}. −1 is no answer: it earns 0, keeps its place in the
    windows and counts in neither metric. Another value outside [0, 1] earns 0 and is counted as
    `np.round` makes it; where that is neither 0 nor 1, no metric exists and the windows that hold it
    earn 0. Decisions are `np.round`, so 0.5 is "no roadwork". MCC is 0 where only one class was seen
    or predicted.

    Raises
    ------
    UserError
        Shapes differ, labels outside {0, 1}, NaN.
    """
    p = np.asarray(predictions, dtype=np.float64)
    mcc, accuracy = rolling_metrics(p, labels)
    paid: Floats = ((np.maximum(mcc, 0) + accuracy) / 2) ** POWER * ((p >= 0) & (p <= 1))
    return paid


def rolling_metrics(predictions: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """MCC over the last 100 and accuracy over the last 10 after each challenge, as the reward takes them.

    Arguments and errors are those of `rewards`; MCC is not clipped. 0 where no metric exists.
    """
    p = np.asarray(predictions, dtype=np.float64)
    y = np.asarray(labels)
    if p.shape != y.shape or not p.ndim:
        raise UserError(
            f"predictions and labels must have one shape [..., T], got {p.shape} and {y.shape}"
        )
    if not np.isin(y, (0, 1)).all():
        raise UserError(f"labels must be 0 or 1, got {y[~np.isin(y, (0, 1))][0]!r}")
    if np.isnan(p).any():
        raise UserError("a prediction is NaN; −1 stands for no answer")
    answered = p != NO_ANSWER
    decided = np.round(p)
    unusable = answered & (decided != 0) & (decided != 1)
    said_yes, said_no = answered & (decided == 1), answered & (decided == 0)
    tp, fp = said_yes & (y == 1), said_yes & (y == 0)
    tn, fn = said_no & (y == 0), said_no & (y == 1)
    mcc = mcc_from_counts(*(_window_sums(x, MCC_WINDOW) for x in (tp, fp, tn, fn)))
    mcc = np.where(_window_sums(unusable, MCC_WINDOW) > 0, 0.0, mcc)
    counted = _window_sums(answered, ACCURACY_WINDOW)
    right = _window_sums(tp | tn, ACCURACY_WINDOW)
    accuracy = np.divide(right, counted, out=np.zeros(p.shape), where=counted > 0)
    accuracy = np.where(_window_sums(unusable, ACCURACY_WINDOW) > 0, 0.0, accuracy)
    return mcc, accuracy


def _window_sums(values: NDArray[np.bool_], window: int) -> NDArray[np.int64]:
    """Sums over the last `window` entries of the last axis, fewer at its start."""
    sums = values.cumsum(axis=-1, dtype=np.int64)
    sums[..., window:] -= sums[..., :-window].copy()
    return sums


def reward_moments(
    true_positive_rate: ArrayLike, false_positive_rate: ArrayLike, positive_share: float
) -> tuple[Floats, Floats]:
    """Mean [R] and standard deviation [R] of the reward of one challenge, once the windows are full.

    The confusion counts of 100 independent challenges are multinomial. Given them, the right ones
    among the last 10 are hypergeometric, as the order is exchangeable: both are summed exactly.

    Takes rates [R] in [0, 1] and the share of roadwork in (0, 1).
    """
    share = check_prior(positive_share)
    tpr, fpr = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (true_positive_rate, false_positive_rate))
    )  # fmt: skip
    if not ((tpr >= 0) & (tpr <= 1) & (fpr >= 0) & (fpr <= 1)).all():
        raise UserError("true and false positive rates must lie in [0, 1]")
    positives = _binomial(MCC_WINDOW, np.array([share])).ravel()
    first, second = np.zeros(len(tpr)), np.zeros(len(tpr))
    for n_positive, (mean, square) in enumerate(_paid_by_counts()):
        tp = _binomial(n_positive, tpr) * positives[n_positive]
        tn = _binomial(MCC_WINDOW - n_positive, 1 - fpr)
        first += ((tp @ mean) * tn).sum(axis=1)
        second += ((tp @ square) * tn).sum(axis=1)
    return first, np.sqrt(np.maximum(second - first**2, 0))


@cache
def _paid_by_counts() -> list[tuple[Floats, Floats]]:
    """Mean and mean square of the reward by positives, then [tp, tn] of a full window."""
    from scipy.stats import hypergeom

    k = np.arange(ACCURACY_WINDOW + 1)
    # [right answers among 100, right answers among the last 10]
    right = np.arange(MCC_WINDOW + 1)[:, None]
    recent = np.asarray(hypergeom.pmf(k, MCC_WINDOW, right, ACCURACY_WINDOW))
    tables = []
    for n in range(MCC_WINDOW + 1):
        tp, tn = np.arange(n + 1)[:, None], np.arange(MCC_WINDOW - n + 1)
        mcc = np.maximum(mcc_from_counts(tp, MCC_WINDOW - n - tn, tn, n - tp), 0)
        paid = ((mcc[..., None] + k / ACCURACY_WINDOW) / 2) ** POWER
        chance = recent[tp + tn]
        tables.append(((chance * paid).sum(axis=-1), (chance * paid**2).sum(axis=-1)))
    return tables


def _binomial(n: int, p: Floats) -> Floats:
    """Probabilities [R, n + 1] of 0..n successes at rates [R]."""
    from scipy.special import gammaln, xlog1py, xlogy

    k = np.arange(n + 1)
    ways = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    chances: Floats = np.exp(ways + xlogy(k, p[:, None]) + xlog1py(n - k, -p[:, None]))
    return chances


def simulate_rewards(
    true_positive_rate: float,
    false_positive_rate: float,
    positive_share: float,
    days: int,
    challenges_per_day: int,
    seed: int,
) -> Floats:
    """Rewards [days, challenges_per_day] of independent days that begin with full windows."""
    rng = np.random.default_rng(seed)
    length = MCC_WINDOW - 1 + challenges_per_day
    found = []
    block = max(1, _DAY_ELEMENTS // length)
    for start in range(0, days, block):
        shape = (min(block, days - start), length)
        labels = (rng.random(shape) < positive_share).astype(np.int64)
        rate = np.where(labels == 1, true_positive_rate, false_positive_rate)
        decided = (rng.random(shape) < rate).astype(np.float64)
        found.append(rewards(decided, labels)[:, MCC_WINDOW - 1 :])
    return np.concatenate(found)


def beats_rival(accuracy: float, rival_accuracy: float, challenges: int) -> float:
    """Probability of more right answers than a rival out of as many challenges; a tie counts half.

    Both answer independently, with their accuracies in [0, 1]; increases with `accuracy`.
    """
    own, rival = _binomial(challenges, np.array([accuracy, rival_accuracy]))
    fewer = np.append(0, rival.cumsum()[:-1])  # the rival has fewer right than k
    return float(np.clip((own * (fewer + rival / 2)).sum(), 0, 1))
