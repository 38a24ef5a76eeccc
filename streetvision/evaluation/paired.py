"""What a comparison of two models needs beside the intervals of `bootstrap`.

McNemar's test and Fisher's z take images as independent: where the images of a group are alike they are too
sure, so they are shown for comparison and decide nothing. Fisher's z is for normal variables besides. Its
variance of a correlation r is (1 - r²)² / n; that of two binary variables is about (1 - r²) / n, so that its
interval of a high MCC is too narrow even for independent images.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from streetvision.evaluation.bootstrap import (
    MIN_GROUPS,
    Interval,
    Resting,
    check_groups,
    group_sign_flip_test,
    spread,
)
from streetvision.evaluation.metrics import (
    N_BINS,
    Floats,
    Integers,
    check_sample,
    mcc_from_counts,
)
from streetvision.subnet.reward import reward_moments

LEVEL, POWER = 0.95, 0.8
_NO_VARIATION = 1e-12
FISHER_Z = "fisher_z_iid"
_NODES = 40  # of the reward's interpolation, along each rate


def resting_groups(labels: Integers, index: Integers, served_prior: float) -> Resting:
    """The groups that a metric rests on, re-weighted to a prior in (0, 1), of group index [N] in 0..G-1."""
    n_groups = int(index.max()) + 1
    images = np.bincount(index * 2 + labels, minlength=2 * n_groups).reshape(n_groups, 2)
    return Resting.of(images.astype(np.float64), served_prior)


def groups_needed(distance: float, standard_error: float | None, n_groups: int) -> int | None:
    """Groups with which a two-sided 95 % interval excludes a value this far off with 80 % power.

    The standard error [same unit as `distance`] of `n_groups` groups shrinks with the root of their
    number; at least 5 are needed for any interval. None without distance or standard error.
    """
    if not distance or standard_error is None:
        return None
    normal = NormalDist()
    reach = normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(POWER)
    return max(MIN_GROUPS, math.ceil(n_groups * (reach * standard_error / distance) ** 2))


def groups_needed_for_ece(limit: float, ece: float, high: float, n_groups: int) -> int | None:
    """Groups with which a debiased ECE's two-sided 95 % interval excludes a limit, with 80 % power.

    `ece` is what `n_groups` groups show and `high` the upper end of its interval. Its square over B bins has
    the variance (2 V² + 4 V ece²) / B, V the variance of a bin's share of positives, which falls as groups are
    added: of a calibrated model the error shrinks with their number, not with its root. V here follows from the
    interval, V that suffices from the distance to the limit. None at the limit.
    """
    normal = NormalDist()
    distance = ece**2 - limit**2
    error = (high**2 - ece**2) / normal.inv_cdf((1 + LEVEL) / 2)
    if not distance or error <= 0:
        return None
    wanted = abs(distance) / (normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(POWER))
    here, sufficient = (
        math.sqrt(ece**4 + N_BINS * each**2 / 2) - ece**2 for each in (error, wanted)
    )
    return max(MIN_GROUPS, math.ceil(n_groups * here / sufficient))


def same_mcc_p(
    labels: ArrayLike,
    base: ArrayLike,
    head: ArrayLike,
    groups: ArrayLike,
    served_prior: float,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value in (0, 1] that both models have the same MCC: the larger one of two tests.

    Swaps of whole groups are exact where the models are exchangeable within a group, but equal MCCs are
    not that: where one model fails by image and the other by whole groups, what the groups contribute is
    skewed, no swap is, and a test set that lacks the failing groups looks sure. The jackknife with
    Student's t depends on no such symmetry, only on enough groups. A difference that has to convince
    both (an intersection-union test, Berger 1982, doi 10.1080/00401706.1982.10487790) is at most as
    often a false one as the better of them says, and is found hardly less often.

    Parameters
    ----------
    labels, base, head, groups
        [N] in {0, 1}, probabilities [N] twice, group [N] of any sortable type.
    served_prior
        Positive share in (0, 1) that both MCCs are re-weighted to.
    n_permutations, seed
        As in `group_sign_flip_test`.

    Raises
    ------
    UserError
        A class is missing.
    """
    y, a, index = check_groups(labels, base, groups)
    _, b = check_sample(y, head)
    swaps = group_sign_flip_test(y, a, b, index, served_prior, n_permutations, seed)
    return max(swaps, _jackknife_p(y, a, b, index, served_prior))


def _jackknife_p(
    labels: Integers, base: Floats, head: Floats, groups: Integers, served_prior: float
) -> float:
    """Two-sided p-value that is at most 5 % where the jackknife interval of `bootstrap` excludes 0."""
    from scipy.special import stdtr

    n_groups, resting = int(groups.max()) + 1, resting_groups(labels, groups, served_prior)
    if resting.effective < 2:
        return 1.0  # nearly all of a class is in one group: no spread to judge by
    key = groups * 2 + labels
    counts = np.array(
        [np.bincount(key, x, 2 * n_groups) for x in (np.ones(len(key)), base > 0.5, head > 0.5)]
    ).reshape(3, n_groups, 2)
    total = counts.sum(axis=1, keepdims=True)
    images, *called = np.concatenate([total, total - counts], axis=1)  # all groups, without each
    values = []
    for side in called:
        fpr, tpr = (side / images).T
        odds = (1 - served_prior) / served_prior
        values.append(mcc_from_counts(tp=tpr, fp=odds * fpr, tn=odds * (1 - fpr), fn=1 - tpr))
    differences = values[1] - values[0]
    delta, left_out = differences[0], differences[1:]
    error, freedom = spread(left_out, resting)
    if error <= _NO_VARIATION:
        return 1.0
    return 2 * float(stdtr(freedom, -abs(delta) / error))


def holm(p_values: ArrayLike) -> Floats:
    """Adjust p-values [M] for M tests (Holm 1979): the family-wise error stays below the level."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided exact p-value that changed decisions become right as often as wrong; i.i.d. images."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def fisher_z_interval(labels: ArrayLike, base: ArrayLike, head: ArrayLike) -> Interval | None:
    """95 % interval of head's MCC minus base's, of decisions [N] on the same labels [N]; i.i.d. images.

    None where an MCC is ±1 or undefined, or there are fewer than four images.
    """
    y, a, b = (np.asarray(x).astype(np.float64) for x in (labels, base, head))
    r_a, r_b, between = (_correlation(*pair) for pair in ((y, a), (y, b), (a, b)))
    if len(y) <= 3 or max(abs(r_a), abs(r_b)) >= 1 or 0 in {np.ptp(y), np.ptp(a), np.ptp(b)}:
        return None
    low, high = correlation_difference_bounds(r_a, r_b, between, len(y))
    return Interval(r_b - r_a, low, high, FISHER_Z)


def correlation_difference_bounds(
    r_a: float, r_b: float, between: float, n: int
) -> tuple[float, float]:
    """95 % interval of r_b - r_a, the correlations of a and b with one variable; `between` is theirs.

    Fisher's z interval of each, combined with the correlation of the two estimates (Zou 2007,
    doi 10.1037/1082-989X.12.4.399). For n > 3 independent draws of normal variables; |r| < 1.
    """
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2) / math.sqrt(n - 3)
    (low_a, high_a), (low_b, high_b) = (
        (math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach)) for r in (r_a, r_b)
    )
    rest = 1 - r_a**2 - r_b**2 - between**2
    shared = ((between - r_a * r_b / 2) * rest + between**3) / ((1 - r_a**2) * (1 - r_b**2))

    def combined(x: float, y: float) -> float:
        return math.sqrt(max(x**2 + y**2 - 2 * shared * x * y, 0.0))

    delta = r_b - r_a
    return delta - combined(r_b - low_b, high_a - r_a), delta + combined(high_b - r_b, r_a - low_a)


def _correlation(x: Floats, y: Floats) -> float:
    """Correlation of two binary columns, 0 where it is undefined."""
    counts = [(x == i) & (y == j) for i, j in ((1, 1), (0, 1), (0, 0), (1, 0))]
    return float(mcc_from_counts(*(each.sum() for each in counts)))


def expected_reward(
    true_positive_rate: Floats, false_positive_rate: Floats, positive_share: float
) -> Floats:
    """`reward_moments`'s mean [R] for thousands of rates [R] in [0, 1]; NaN where they are.

    It is a polynomial of the two rates, close to one of low degree: interpolated between 40 × 40 Chebyshev
    points, within 1e-8 (a test).
    """
    from numpy.polynomial.chebyshev import chebvander

    x, y = (chebvander(2 * r - 1, _NODES - 1) for r in (true_positive_rate, false_positive_rate))
    reward: Floats = ((x @ _reward_coefficients(positive_share)) * y).sum(axis=1)
    return reward


@cache
def _reward_coefficients(positive_share: float) -> Floats:
    """Chebyshev coefficients [40, 40] of the mean reward, by true and false positive rate."""
    from numpy.polynomial.chebyshev import chebpts1, chebvander

    points = chebpts1(_NODES)
    tpr, fpr = ((each.ravel() + 1) / 2 for each in np.meshgrid(points, points, indexing="ij"))
    values = reward_moments(tpr, fpr, positive_share)[0].reshape(_NODES, _NODES)
    inverse = np.linalg.inv(chebvander(points, _NODES - 1))
    coefficients: Floats = inverse @ values @ inverse.T
    return coefficients
