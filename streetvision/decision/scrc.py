"""Selective conformal risk control (SCRC): answer the confident images, with a promise on errors.

After Xu, Guo & Wei (arXiv 2512.12844): an image is accepted if its confidence, the distance of the
deployed probability from ½, reaches a threshold, and the error among the accepted is controlled.
Whole groups are exchangeable, not images: a group counts once, whatever its size, and nothing is
assumed about the images within it. For group g and threshold number k, of a fixed list of
thresholds from strict to lax,

    accepted A_g(k) = mean over its images of w · accept,    wrong N_g(k) = ... of w · accept · error,

so 0 <= N_g <= A_g <= B, the largest weight. The selective risk of a threshold, R = E[N_g] / E[A_g],
is the error of an accepted image that is drawn from a random group at the served prior. The
weights w move the class shares from the calibration prior to the served one; they, the map and the
list of thresholds come from other groups than those that hold the guarantee.

No rule with finite data can promise P(error | accepted) <= alpha without a further assumption: if
errors are a coin of bias just above alpha, whatever is accepted is wrong at that rate, and no data
tell this coin from one just below alpha. Accepting nothing is therefore part of both rules, and
counts as risk 0 in both promises:

- `scrc_t` (in expectation; needs exchangeable groups). Let T be a future group and Ā the mean of A
  over the G calibration groups and T. At the chosen k, **E[N_T(k) / Ā(k)] <= alpha**. Proof:
  N_g / Ā may rise and fall along k, so each group is charged its worst value up to k, which only
  rises. Over all G + 1 groups jointly, the laxest k at which their mean charge is at most alpha is
  symmetric in the groups, so the charge of T there is at most alpha in expectation. The rule puts
  the largest charge that T can add, B / (ΣA + B), in place of T's own, so that one fixed threshold
  comes out before T is seen; it is never laxer than the joint one.
- `scrc_i` (PAC; needs independent groups). **R <= alpha with probability at least 1 - delta** over
  the calibration groups. Learn then Test (arXiv 2110.01052): the thresholds are tested from strict
  to lax until the first is not shown to have E[N - alpha · A] <= 0. A test multiplies the bets
  1 + b (alpha · A_g - N_g) / (B - alpha · B) and averages over a fixed mix of b (betting,
  arXiv 2010.09686): under the null its mean is at most 1, so it exceeds 1 / delta with probability
  at most delta (Markov).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError
from streetvision.decision.inputs import check_groups, check_prior

FloatArray = NDArray[np.float64]
Method = Literal["scrc_t", "scrc_i"]
Control = Literal["error", "fnr"]
Unit = Literal["group", "drive"]

METHODS: tuple[Method, ...] = ("scrc_t", "scrc_i")
CONTROLS: tuple[Control, ...] = ("error", "fnr")
UNITS: tuple[Unit, ...] = ("group", "drive")
# Shares of the fitted images that the thresholds of the list accept.
ACCEPTED_SHARES = np.linspace(0.05, 1.0, 20)
# Bets as shares of the largest possible one, which a wholly wrong group ruins. It has half of the
# stake, because it is the best one where no error is seen.
BETS = np.linspace(0.05, 1.0, 20)
STAKES = np.append(np.full(19, 0.5 / 19), 0.5)
# No data set grows to more groups than this: above, "never" is the honest answer.
MOST_GROUPS = 10**9


@dataclass(frozen=True)
class Risks:
    """What each group accepts and gets wrong at each threshold.

    `accepted` and `wrong` are [G, K], 0 <= wrong <= accepted <= `bound`, not falling along K: from
    the strictest threshold to the laxest.
    """

    accepted: FloatArray
    wrong: FloatArray
    bound: float

    @property
    def n_groups(self) -> int:
        """Number of groups G."""
        return int(self.accepted.shape[0])


def confidence(probability: ArrayLike) -> FloatArray:
    """Return the distance of deployed probabilities [N] from ½, in [0, ½]."""
    distance: FloatArray = np.abs(np.asarray(probability, dtype=np.float64) - 0.5)
    return distance


def class_weights(calibration_prior: float, served_prior: float) -> tuple[float, float]:
    """Return the weights of a negative and of a positive that make one prior the other."""
    check_prior(calibration_prior, "calibration_prior")
    check_prior(served_prior, "served_prior")
    return (1 - served_prior) / (1 - calibration_prior), served_prior / calibration_prior


def guarantee_groups(groups: ArrayLike, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Return whether each image [N] is of the groups that hold the guarantee.

    Groups are drawn without a look at anything else, which keeps them exchangeable; `fraction` of
    them, in (0, 1), rounded, but at least one on either side.

    Raises
    ------
    UserError
        If there are fewer than 2 groups, or `fraction` is not between 0 and 1.
    """
    names = np.asarray(groups)
    codes, n_groups = check_groups(names, names.size)
    if not 0 < fraction < 1:
        raise UserError(f"guarantee_fraction is {fraction}; it must be between 0 and 1")
    if n_groups < 2:
        raise UserError(
            "1 group cannot both fit a map and hold a guarantee; at least 2 are needed, "
            "or decision.abstention none"
        )
    size = min(max(round(fraction * n_groups), 1), n_groups - 1)
    held = np.random.default_rng(seed).permutation(n_groups)[:size]
    chosen: NDArray[np.bool_] = np.isin(codes, held)
    return chosen


def group_risks(
    probability: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    thresholds: ArrayLike,
    weights: tuple[float, float] = (1.0, 1.0),
    control: Control = "error",
) -> Risks:
    """Return what each group accepts and gets wrong at each threshold of confidence.

    Parameters
    ----------
    probability, labels, groups
        Deployed probability, 0 or 1, and group of each image, [N].
    thresholds
        Confidences in [0, ½], strictly descending, [K]: image i is accepted at k if its
        confidence is at least `thresholds[k]`.
    weights
        Of a negative and of a positive image (`class_weights`).
    control
        `error`: decisions p > ½ that are wrong, among all images. `fnr`: positives that are
        missed, among the positives; groups without one are left out.

    Raises
    ------
    UserError
        If lengths differ, or no image counts.
    """
    values, truth = np.asarray(probability, dtype=np.float64), np.asarray(labels) == 1
    names, limits = np.asarray(groups), np.asarray(thresholds, dtype=np.float64)
    if not values.shape == truth.shape == names.shape:
        raise UserError(
            f"probabilities of shape {values.shape}, labels of {truth.shape} and groups of "
            f"{names.shape}; one each per image"
        )
    weight = np.where(truth, weights[1], weights[0])
    bound = max(weights)
    if control == "fnr":
        values, names, truth = values[truth], names[truth], truth[truth]
        weight, bound = np.ones(values.size), 1.0
    if not values.size:
        raise UserError("no image to control the risk on")
    codes, n_groups = check_groups(names, values.size)
    wrong = (values > 0.5) != truth
    # The first threshold that accepts an image; K where none does.
    first = np.searchsorted(-limits, -confidence(values), side="left")
    share = weight / np.bincount(codes, minlength=n_groups)[codes]
    cell, width = codes * (limits.size + 1) + first, limits.size + 1

    def mass(of: FloatArray) -> FloatArray:
        table = np.bincount(cell, of, minlength=n_groups * width).reshape(n_groups, width)
        total: FloatArray = np.cumsum(table[:, :-1], axis=1)
        return total

    return Risks(mass(share), mass(share * wrong), bound)


def candidate_thresholds(
    probability: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    weights: tuple[float, float] = (1.0, 1.0),
    control: Control = "error",
) -> FloatArray:
    """Return the thresholds [K] to try, descending to 0, from images that hold no guarantee.

    They accept 5 %, 10 %, … 100 % of these images. The list starts at the one with the lowest
    (wrong + B) / (accepted + B), summed over these groups: a stricter one would accept too little
    to show anything.
    """
    known = confidence(probability)
    if control == "fnr":
        known = known[np.asarray(labels) == 1]
    edges = np.append(np.quantile(known, 1 - ACCEPTED_SHARES[:-1]), 0.0)
    thresholds = np.unique(edges)[::-1]
    risks = group_risks(probability, labels, groups, thresholds, weights, control)
    risk = (risks.wrong.sum(axis=0) + risks.bound) / (risks.accepted.sum(axis=0) + risks.bound)
    return thresholds[int(np.argmin(risk)) :]


def scrc_t(risks: Risks, alpha: float) -> int | None:
    """Return the laxest threshold with the promise in expectation; None to accept nothing.

    The promise and its proof are in the module docstring; `alpha` is in (0, 1).
    """
    passed = np.flatnonzero(_charges(risks) <= check_level(alpha, "alpha"))
    return int(passed[-1]) if passed.size else None


def scrc_i(risks: Risks, alpha: float, delta: float) -> int | None:
    """Return the laxest threshold with the PAC promise; None to accept nothing.

    The promise and its proof are in the module docstring; `alpha` and `delta` are in (0, 1).
    """
    needed = -math.log(check_level(delta, "delta"))
    passed = _log_capital(_log_bets(risks, check_level(alpha, "alpha"))) >= needed
    n_passed = int(passed.size if passed.all() else np.argmin(passed))  # before the first failure
    return n_passed - 1 if n_passed else None


def _charges(risks: Risks) -> FloatArray:
    """Return the mean charge [K] of G + 1 groups, the last one the worst possible."""
    accepted = risks.accepted.sum(axis=0)
    share = np.divide(risks.wrong, accepted, out=np.zeros_like(risks.wrong), where=accepted > 0)
    worst = risks.bound / (accepted + risks.bound)
    known: FloatArray = np.maximum.accumulate(share, axis=1).sum(axis=0)
    charges: FloatArray = known + np.maximum.accumulate(worst)
    return charges


def _log_bets(risks: Risks, alpha: float) -> FloatArray:
    """Return the log of each bet's product over the groups, [J, K]."""
    gain = (alpha * risks.accepted - risks.wrong) / (risks.bound * (1 - alpha))  # >= -1
    with np.errstate(divide="ignore"):  # the largest bet may lose all: log 0
        return np.stack([np.log1p(np.maximum(bet * gain, -1.0)).sum(axis=0) for bet in BETS])


def _log_capital(log_bets: FloatArray) -> FloatArray:
    """Return the log of the stakes' total capital [K]."""
    from scipy.special import logsumexp

    return np.asarray(logsumexp(log_bets, axis=0, b=STAKES[:, np.newaxis]), dtype=np.float64)


def smallest_alpha(risks: Risks, delta: float | None = None) -> float:
    """Return the least level at which anything would have been accepted: `scrc_i` with a delta.

    A diagnosis. The level must be chosen before the data: set to this number, nothing is promised.
    1 where no level below 1 does.
    """
    if delta is None:
        return float(min(_charges(risks)[0], 1.0))
    return _least_alpha(Risks(risks.accepted[:, :1], risks.wrong[:, :1], risks.bound), delta)


def alpha_limit(risks: Risks, delta: float | None = None) -> float:
    """Return the least level that so many groups could promise with all accepted and none wrong.

    For `scrc_t` (no delta) and equal weights it is 1 / (G + 1).
    """
    accepted = risks.accepted[:, -1:]
    if delta is None:
        return float(risks.bound / (accepted.sum() + risks.bound))
    return _least_alpha(Risks(accepted, np.zeros_like(accepted), risks.bound), delta)


def _least_alpha(risks: Risks, delta: float) -> float:
    """Return the least alpha at which `scrc_i` accepts the single threshold of `risks`."""
    low, high = 0.0, 1.0 - 1e-9
    if scrc_i(risks, high, delta) is None:
        return 1.0
    while high - low > 1e-6:  # every bet's product rises with alpha from where it is above 1
        middle = (low + high) / 2
        low, high = (low, middle) if scrc_i(risks, middle, delta) == 0 else (middle, high)
    return high


def groups_needed(risks: Risks, alpha: float, delta: float | None = None) -> int | None:
    """Return how many groups like these would let anything be accepted; None: no number would.

    Like these: with the same errors at the strictest threshold. `scrc_i` with a delta.
    """
    check_level(alpha, "alpha")
    n_groups = risks.n_groups
    accepted, wrong = risks.accepted[:, 0].sum(), risks.wrong[:, 0].sum()
    if accepted == 0 or wrong >= alpha * accepted:
        return None
    if delta is None:
        # wrong / accepted + B / (m · accepted + B) <= alpha for m such data sets.
        room = alpha - wrong / accepted
        needed = risks.bound * (1 / room - 1) / accepted * n_groups
        return max(1, math.ceil(needed - 1e-9)) if needed < MOST_GROUPS else None
    each = _log_bets(risks, alpha)[:, :1] / n_groups
    wanted = -math.log(check_level(delta, "delta"))

    def enough(groups: int) -> bool:
        return bool(_log_capital(groups * each)[0] >= wanted)

    high = 1
    while not enough(high):
        high *= 2
        if high > MOST_GROUPS:
            return None
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def check_level(value: float, name: str) -> float:
    """Return `value`; UserError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise UserError(f"{name} is {value}; a level between 0 and 1 is needed")
    return value
