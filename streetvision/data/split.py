"""The group-disjoint, label-stratified split into TRAIN, VAL_SELECT, VAL_CALIB and VAL_TEST.

TRAIN's fusion part is a fifth bin of the same assignment, so groups do not cross into it either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from streetvision.errors import UserError

MIN_GROUPS = 5
MIN_TRAIN_GROUPS = 3  # with a fusion part
_FUSION = "train's fusion part"
# Intervals count groups, so a split of one huge group is worth little; classes matter more.
_GROUP_WEIGHT = 0.1
_TRIALS = 200
_MAX_STEPS = 400_000  # group placements over all trials; bounds the time with very many groups


@dataclass(frozen=True)
class SplitResult:
    """Where every image goes."""

    split: NDArray[np.object_]  # name of the split, [N]
    fusion: NDArray[np.bool_]  # belongs to TRAIN's fusion part, [N]
    # `train`: all one-class groups are in TRAIN, outside its fusion part.
    one_class_groups: Literal["train", "anywhere"]


def split_groups(
    groups: Sequence[str] | NDArray[np.object_],
    labels: NDArray[np.integer],
    fractions: Mapping[str, float],
    fusion_fraction: float,
    seed: int,
) -> SplitResult:
    """Assign whole groups to splits so that each gets its share of both classes.

    Groups of one class go to TRAIN, since nothing can be told apart within them, provided that at
    least five groups have both classes and the one-class groups are no more than TRAIN's share of
    the images. Otherwise (as when every image is a group of its own) they may go anywhere.

    Seeded trials place the groups one by one, the larger ones roughly first, each where it brings
    the counts of both classes, and with little weight that of groups, nearest to their targets; of
    all trials the one with the smallest deviation is taken. The order of the images is irrelevant.

    Parameters
    ----------
    groups
        Group of every image, [N].
    labels
        0 or 1, [N].
    fractions
        Share of the images of each split; one of them is `train`.
    fusion_fraction
        Share of TRAIN's images in its fusion part; 0 for none.
    seed
        Of the trials.

    Raises
    ------
    UserError
        If there are too few groups, or too few groups with a class for every part to have it.
    """
    names, member = np.unique(np.asarray(groups, np.object_).astype(str), return_inverse=True)
    positives = np.bincount(member, weights=labels, minlength=len(names)).astype(np.int64)
    negatives = np.bincount(member, minlength=len(names)) - positives
    bins = dict(fractions)
    if fusion_fraction > 0:
        bins[_FUSION] = fractions["train"] * fusion_fraction
        bins["train"] = fractions["train"] - bins[_FUSION]
    _check(positives, negatives, list(bins))

    mixed = (positives > 0) & (negatives > 0)
    one_class_images = int((positives + negatives)[~mixed].sum())
    to_train = mixed.sum() >= MIN_GROUPS and one_class_images <= bins["train"] * len(labels)
    free = np.flatnonzero(mixed) if to_train else np.arange(len(names))
    assigned = np.full(len(names), list(bins).index("train"), np.int64)
    assigned[free] = _best_assignment(positives, negatives, free, bins, np.random.default_rng(seed))

    chosen = np.array(list(bins), np.object_)[assigned]
    fusion = chosen == _FUSION
    chosen[fusion] = "train"
    if fusion_fraction > 0 and (n_train := int((chosen == "train").sum())) < MIN_TRAIN_GROUPS:
        raise UserError(
            f"TRAIN has {n_train} groups; with a fusion part it needs at least {MIN_TRAIN_GROUPS}: "
            "add groups or set data.fusion_fraction to 0"
        )
    return SplitResult(chosen[member], fusion[member], "train" if to_train else "anywhere")


def _check(positives: NDArray[np.int64], negatives: NDArray[np.int64], bins: list[str]) -> None:
    """Refuse data that no assignment can split."""
    for counts, name in ((positives, "roadwork"), (negatives, "no roadwork")):
        if not counts.sum():
            raise UserError(f"no usable image is labelled `{name}`; both classes are needed")
    if len(positives) < MIN_GROUPS:
        raise UserError(
            f"the images form {len(positives)} groups and a split needs at least {MIN_GROUPS}: "
            "give finer groups (drives instead of cities) or more data"
        )
    for counts, name in ((positives, "roadwork"), (negatives, "no roadwork")):
        if (n_groups := int((counts > 0).sum())) < len(bins):
            raise UserError(
                f"only {n_groups} groups have images labelled `{name}`; each of {', '.join(bins)} "
                "needs at least one of its own"
            )


def _best_assignment(
    positives: NDArray[np.int64],
    negatives: NDArray[np.int64],
    free: NDArray[np.int64],
    bins: Mapping[str, float],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Bin of every free group, [len(free)]; the other groups are already in the bin `train`."""
    shares = np.array(list(bins.values()))
    size = positives[free] + negatives[free]
    # Each group's share of all positives, of all negatives and of the free groups, [3, groups].
    amounts = np.stack(
        [
            positives[free] / positives.sum(),
            negatives[free] / negatives.sum(),
            np.full(len(free), 1 / len(free)),
        ]
    )
    # What is in each bin before: one-class groups in TRAIN, which count for the two classes only.
    filled = np.zeros((3, len(shares)))
    fixed = np.setdiff1d(np.arange(len(positives)), free)
    filled[0, list(bins).index("train")] = positives[fixed].sum() / positives.sum()
    filled[1, list(bins).index("train")] = negatives[fixed].sum() / negatives.sum()

    best, best_score = None, np.inf
    for _ in range(max(1, min(_TRIALS, _MAX_STEPS // len(free)))):
        order = np.argsort(-size * np.exp(0.5 * rng.standard_normal(len(free))), kind="stable")
        assigned, score = _place(amounts[:, order], filled, shares)
        if score < best_score:
            best, best_score = np.empty_like(assigned), score
            best[order] = assigned
    if best is None:
        raise UserError(
            f"no assignment of the {len(positives)} groups gives each of {', '.join(bins)} both "
            "classes: give finer groups or more data"
        )
    return best


def _place(
    amounts: NDArray[np.float64], filled: NDArray[np.float64], shares: NDArray[np.float64]
) -> tuple[NDArray[np.int64], float]:
    """Place groups one by one; returns bins and the deviation, infinite if a bin lacks a class.

    The deviation is Pearson's chi-square against the targets, added up over positives, negatives
    and, with a small weight, groups. `amounts` [3, groups] is what each group brings, `filled`
    [3, bins] what each bin has at the start, `shares` [bins] the targets.
    """
    weight = [1 / share for share in shares.tolist()]
    miss_p, miss_n, miss_g = (shares - filled).tolist()
    lacks_p, lacks_n = (set(np.flatnonzero(row == 0).tolist()) for row in filled[:2])
    left_p, left_n = np.count_nonzero(amounts[:2], axis=1).tolist()
    everywhere = set(range(len(weight)))
    assigned = []
    for p, n, g in amounts.T.tolist():
        allowed = everywhere
        # No more groups with a class than bins without it: this one must go to such a bin.
        if p > 0 and left_p <= len(lacks_p):
            allowed = lacks_p
        if n > 0 and left_n <= len(lacks_n):
            allowed = (allowed & lacks_n) or lacks_n
        target, least = -1, np.inf
        for k in sorted(allowed):
            # Adding p to a bin that misses m changes the square of what it misses by p (p - 2 m).
            change = p * (p - 2 * miss_p[k]) + n * (n - 2 * miss_n[k])
            change = (change + _GROUP_WEIGHT * g * (g - 2 * miss_g[k])) * weight[k]
            if change < least:
                target, least = k, change
        assigned.append(target)
        miss_p[target] -= p
        miss_n[target] -= n
        miss_g[target] -= g
        if p > 0:
            left_p -= 1
            lacks_p.discard(target)
        if n > 0:
            left_n -= 1
            lacks_n.discard(target)
    deviation = np.inf
    if not lacks_p and not lacks_n:
        left = np.array([miss_p, miss_n, miss_g])
        deviation = float(np.array([1, 1, _GROUP_WEIGHT]) @ left**2 @ (1 / shares))
    return np.array(assigned, np.int64), deviation
