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

from streetvision.core.errors import UserError
from streetvision.stats.metrics import Floats, mcc_from_counts

CHALLENGES = 1000  # pictures of a benchmark, where nobody says otherwise
_ALPHA, _BETA, _CHANCE = 1.2, 1.8, 0.25  # exponents; Brier score of a constant 0.5
_FLOOR, _CLIP = 1e-12, 1e-7
_NODES = 9  # of the quadrature of each count
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

    Of `challenges` pictures the share, rounded, shows roadwork; at least one of either class. How many of each
    class are called roadwork is binomial: its expectations are Gauss quadratures, exact for polynomials of
    degree 17 (within 1e-6 of the sum over all counts; a test). Given these counts the Brier score is a mean of
    independent errors: taken as normal, with their means and variances.
    """
    n_positive = min(max(round(positive_share * challenges), 1), challenges - 1)
    n_negative = challenges - n_positive
    tp, tp_chance = _binomial_nodes(n_positive, positives.rate)
    fp, fp_chance = _binomial_nodes(n_negative, negatives.rate)
    tp, fp = tp[:, :, None], fp[:, None, :]  # [R, counts of tp, counts of fp]
    chance = tp_chance[:, :, None] * fp_chance[:, None, :]
    mcc = np.asarray(mcc_from_counts(tp, fp, n_negative - fp, n_positive - tp))

    def summed(of_negatives: Floats, of_positives: Floats) -> Floats:
        """Sum over the pictures of what is given for each class and answer [R, 2], by counts."""
        low, high = (each[:, :, None, None] for each in (of_negatives, of_positives))
        return np.asarray(
            tp * high[:, 1] + (n_positive - tp) * high[:, 0]
            + fp * low[:, 1] + (n_negative - fp) * low[:, 0]
        )  # fmt: skip

    brier = summed(negatives.mean, positives.mean) / challenges
    spread = np.sqrt(summed(negatives.variance, positives.variance)) / challenges
    # A few nodes are exact for what is near a polynomial, which the kink is not.
    near = ~(_CHANCE - brier > _FAR * spread)
    far = np.asarray(~near.any(axis=(1, 2)), dtype=np.bool_)
    first, second = np.empty(len(far)), np.empty(len(far))
    for rows, number in ((far, 3), (~far, 41)):
        nodes, weights = np.polynomial.hermite_e.hermegauss(number)
        scores = _score(
            mcc[rows, ..., None], brier[rows, ..., None] + spread[rows, ..., None] * nodes
        )
        for moment, values in ((first, scores), (second, scores**2)):
            moment[rows] = (values @ (weights / weights.sum()) * chance[rows]).sum(axis=(1, 2))
    return first, np.sqrt(np.maximum(second - first**2, 0))


def _binomial_nodes(n: int, rate: Floats) -> tuple[Floats, Floats]:
    """Gauss quadrature of the binomial distributions of n and rates [R]: counts and chances [R, K].

    By the Jacobi matrix of Krawtchouk's polynomials (Golub and Welsch 1969, doi 10.1090/S0025-5718-69-99647-1).
    """
    k = np.arange(min(_NODES, n + 1))
    p = rate[:, None]
    matrix = np.zeros((len(rate), len(k), len(k)))
    matrix[:, k, k] = p * (n - k) + (1 - p) * k
    matrix[:, k[1:], k[:-1]] = np.sqrt(
        k[1:] * (n - k[1:] + 1) * p * (1 - p)
    )  # the lower half is read
    counts, vectors = np.linalg.eigh(matrix)
    return np.clip(counts, 0, n), vectors[:, 0] ** 2
