"""What Subnet 34 (BitMind) pays: a score of a whole benchmark, for decisions and for calibrated probabilities.

    score = √(((MCC + 1) / 2)^1.2 · max(0, (0.25 − Brier) / 0.25)^1.8)

Decisions are p > 0.5, MCC is 0 where it is undefined, probabilities are kept 10⁻⁷ away from 0 and 1, and the
product 10⁻¹² away from 0. A constant 0.5 has a Brier score of 0.25 and earns nothing. Source:
BitMind-AI/gasbench, `benchmarks/utils/metrics.py`, of two classes. There are no rolling windows: a model is
scored once, on some thousand pictures, if it was right on 80 % of an entrance exam. Weights of data sources,
more than two classes and the second pass on augmented pictures differ from round to round and are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.errors import UserError
from streetvision.evaluation.metrics import Floats, Integers, mcc_from_counts

CHALLENGES = 1000  # pictures of a benchmark, where nobody says otherwise
_ALPHA, _BETA, _CHANCE = 1.2, 1.8, 0.25  # exponents; Brier score of a constant 0.5
_FLOOR, _CLIP = 1e-12, 1e-7
_RARE = 1e-10  # counts less probable than this are left out
_FAR = 6.0  # standard deviations between a Brier score and the kink at 0.25


class Answers(NamedTuple):
    """A miner's answers to pictures of one class: how often "roadwork", and how far off.

    `rate` [R] of p > 0.5; mean and variance [R, 2] of the squared error of answers "no roadwork", "roadwork".
    """

    rate: Floats
    mean: Floats
    variance: Floats


def score(labels: ArrayLike, probabilities: ArrayLike) -> Floats:
    """Scores [...] of benchmarks, labels {0, 1} and probabilities [0, 1] of shape [..., T].

    Raises
    ------
    UserError
        Shapes differ, labels outside {0, 1}, probabilities outside [0, 1].
    """
    y, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if p.shape != y.shape or not p.ndim or not p.shape[-1]:
        raise UserError(
            f"labels and probabilities must have one shape [..., T], got {y.shape} and {p.shape}"
        )
    if not np.isin(y, (0, 1)).all():
        raise UserError(f"labels must be 0 or 1, got {y[~np.isin(y, (0, 1))][0]!r}")
    if not ((p >= 0) & (p <= 1)).all():
        raise UserError("probabilities must lie in [0, 1]")
    yes = p > 0.5
    counts = (yes & (y == 1), yes & (y == 0), ~yes & (y == 0), ~yes & (y == 1))
    mcc = mcc_from_counts(*(each.sum(axis=-1) for each in counts))
    return _score(np.asarray(mcc), squared_error(y, p).mean(axis=-1))


def squared_error(labels: NDArray[np.generic], probabilities: Floats) -> Floats:
    """(p − y)², probabilities kept away from 0 and 1; of any shape."""
    error: Floats = (np.clip(probabilities, _CLIP, 1 - _CLIP) - labels.astype(np.float64)) ** 2
    return error


def _score(mcc: Floats, brier: Floats) -> Floats:
    decided = np.clip((mcc + 1) / 2, 0, 1) ** _ALPHA
    calibrated = np.maximum(0, (_CHANCE - brier) / _CHANCE) ** _BETA
    return np.minimum(np.sqrt(np.maximum(_FLOOR, decided * calibrated)), 1)


def score_moments(
    negatives: Answers, positives: Answers, positive_share: float, challenges: int = CHALLENGES
) -> tuple[Floats, Floats]:
    """Mean [R] and standard deviation [R] of the score of a benchmark of independent pictures.

    Of `challenges` pictures the share, rounded, shows roadwork; at least one of either class. How many of them
    are called roadwork is binomial, and summed over exactly. Given these counts the Brier score is a mean of
    independent errors: taken as normal, with their means and variances.
    """
    n_positive = min(max(round(positive_share * challenges), 1), challenges - 1)
    n_negative = challenges - n_positive
    found = []
    for row in range(len(positives.rate)):
        tp, tp_chance = _likely(n_positive, positives.rate[row])
        fp, fp_chance = _likely(n_negative, negatives.rate[row])
        mcc = mcc_from_counts(tp[:, None], fp, n_negative - fp, n_positive - tp[:, None])

        def summed(what: str, row: int = row, tp: Integers = tp, fp: Integers = fp) -> Floats:
            """Of squared errors, a mean or variance of the sum by counts [tp, fp]."""
            of_positives, of_negatives = (getattr(x, what)[row] for x in (positives, negatives))
            first = tp * of_positives[1] + (n_positive - tp) * of_positives[0]
            second = fp * of_negatives[1] + (n_negative - fp) * of_negatives[0]
            total: Floats = first[:, None] + second
            return total

        brier = summed("mean") / challenges
        spread = np.sqrt(np.maximum(summed("variance"), 0)) / challenges
        # Three nodes are exact for what is near a polynomial of degree 5, which the kink is not.
        far = (_CHANCE - brier > _FAR * spread).all()
        nodes, weights = np.polynomial.hermite_e.hermegauss(3 if far else 41)
        scores = _score(mcc[..., None], brier[..., None] + spread[..., None] * nodes)
        weights = weights / weights.sum()
        moments = [tp_chance @ (scores**power @ weights) @ fp_chance for power in (1, 2)]
        found.append((moments[0], np.sqrt(max(moments[1] - moments[0] ** 2, 0))))
    mean, deviation = np.array(found).reshape(-1, 2).T
    return mean, deviation


def _likely(n: int, rate: float) -> tuple[Integers, Floats]:
    """Counts of n that are not too rare, and their probabilities, which add up to 1."""
    from scipy.stats import binom

    k = np.arange(n + 1)
    chance = np.asarray(binom.pmf(k, n, rate))
    kept = chance > _RARE
    return k[kept], chance[kept] / chance[kept].sum()
