"""The group-disjoint, label-stratified split into TRAIN, VAL_SELECT, VAL_CALIB and VAL_TEST.

TRAIN's fusion part is a fifth bin of the same assignment, so groups do not cross into it either.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streetvision.core.errors import UserError

log = logging.getLogger(__name__)

MIN_GROUPS = 5
MIN_TRAIN_GROUPS = 3  # with a fusion part
_FUSION = "train's fusion part"
MISSED = 1 / 3  # of its target: a part that is so much larger or smaller is worth a warning
# Intervals count groups, so a split of one huge group is worth little; classes matter more.
_GROUP_WEIGHT = 0.1
_IMAGE_WEIGHT = 4.0  # beside 1 of each class, where fractions are missed
_TRIALS = 200
_FEW_GROUPS = 50  # up to these, as many trials again place them in nearly any order
_MAX_STEPS = 400_000  # group placements over all trials; bounds the time with very many groups


@dataclass(frozen=True)
class SplitResult:
    """Where every image goes."""

    split: NDArray[np.object_]  # name of the split, [N]
    fusion: NDArray[np.bool_]  # belongs to TRAIN's fusion part, [N]


def split_groups(
    groups: Sequence[str] | NDArray[np.object_],
    labels: NDArray[np.integer],
    fractions: Mapping[str, float],
    fusion_fraction: float,
    seed: int,
) -> SplitResult:
    """Assign whole groups to splits so that each gets its share of both classes.

    Seeded trials place the groups one by one, the larger ones roughly first, each where it brings
    the counts of both classes, and with little weight those of groups with both classes, with
    roadwork only and without roadwork, nearest to their targets; of all trials the one with the
    smallest deviation is taken. So places without roadwork are in every split, as far as there are
    enough of them. Where a part misses its share of the images by a third, as beside a huge group,
    the trials are repeated with the images counted above the classes. The order of the images is
    irrelevant.

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
    bins = part_shares(fractions, fusion_fraction)
    _check(positives, negatives, list(bins))

    size = positives + negatives

    def misses(assigned: NDArray[np.int64]) -> NDArray[np.float64]:
        """What each part has too much or too little, of its target."""
        shares = np.array(list(bins.values()))
        images = np.bincount(assigned, weights=size, minlength=len(bins))
        return np.asarray(images / size.sum() / shares - 1)

    assigned = _best_assignment(positives, negatives, bins, seed)
    if np.abs(misses(assigned)).max() >= MISSED:
        other = _best_assignment(positives, negatives, bins, seed, _IMAGE_WEIGHT)
        assigned = min(assigned, other, key=lambda each: float(np.abs(misses(each)).max()))
    chosen = np.array(list(bins), np.object_)[assigned]
    fusion = chosen == _FUSION
    chosen[fusion] = "train"
    if fusion_fraction > 0 and (n_train := int((chosen == "train").sum())) < MIN_TRAIN_GROUPS:
        raise UserError(
            f"TRAIN has {n_train} groups; with a fusion part it needs at least {MIN_TRAIN_GROUPS}: "
            "add groups or set data.fusion_fraction to 0"
        )
    titles = {"train": f"train without {_FUSION}"} if fusion_fraction > 0 else {}
    missed = [
        f"{titles.get(part, part)} has {share * (1 + miss):.1%} of the images instead of {share:.1%}"
        for (part, share), miss in zip(bins.items(), misses(assigned).tolist(), strict=True)
        if abs(miss) >= MISSED
    ]
    if missed:
        log.warning(
            'groups stay whole, so fractions are missed by a third or more: %s; of %d groups "%s" is '
            "the largest, with %.1f %% of the images: give finer groups or more data",
            ", ".join(missed),
            len(size),
            names[size.argmax()],
            100 * size.max() / size.sum(),
        )
    return SplitResult(chosen[member], fusion[member])


def part_shares(fractions: Mapping[str, float], fusion_fraction: float) -> dict[str, float]:
    """Share of the images of each part that groups may not cross: the splits, `train` in two parts."""
    parts = dict(fractions)
    if fusion_fraction > 0:
        parts[_FUSION] = fractions["train"] * fusion_fraction
        parts["train"] = fractions["train"] - parts[_FUSION]
    return parts


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
    bins: Mapping[str, float],
    seed: int,
    image_weight: float = 0.0,
) -> NDArray[np.int64]:
    """Bin of every group, [groups]."""
    rng = np.random.default_rng(seed)
    size = positives + negatives
    kind = np.where(positives == 0, 2, np.where(negatives == 0, 1, 0))
    groups = np.stack(
        [positives / positives.sum(), negatives / negatives.sum(), size / size.sum(), kind]
    )
    shares = np.array(list(bins.values()))
    best, best_score = None, np.inf
    trials = max(1, min(_TRIALS, _MAX_STEPS // len(size)))
    at_random = _TRIALS if len(size) <= _FEW_GROUPS else 0
    for trial in range(trials + at_random):
        noise = np.exp((0.5 if trial < trials else 4.0) * rng.standard_normal(len(size)))
        order = np.argsort(-size * noise, kind="stable")
        assigned, score = _place(groups[:, order], shares, image_weight)
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
    groups: NDArray[np.float64], shares: NDArray[np.float64], image_weight: float
) -> tuple[NDArray[np.int64], float]:
    """Place groups one by one; returns bins and the deviation, infinite if a bin lacks a class.

    The deviation is Pearson's chi-square against the targets, added up over positives, negatives,
    with their weight images, and with a small weight groups of each kind. `groups` [4, groups] has
    each one's share of all positives, of all negatives and of all images, and its kind (0 both
    classes, 1 roadwork only, 2 none); `shares` [bins] are the targets.
    """
    weight = [1 / share for share in shares.tolist()]
    miss_p, miss_n, miss_i = shares.tolist(), shares.tolist(), shares.tolist()
    n_kind = np.bincount(groups[3].astype(np.int64), minlength=3)
    # Of each kind: its groups' share of it, the deviation's weight, what each bin misses.
    kinds = [
        (1 / max(n, 1), _GROUP_WEIGHT * (n / groups.shape[1]), shares.tolist())
        for n in n_kind.tolist()
    ]
    lacks_p, lacks_n = set(range(len(weight))), set(range(len(weight)))
    left_p, left_n = np.count_nonzero(groups[:2], axis=1).tolist()
    everywhere = set(range(len(weight)))
    assigned = []
    for p, n, i, kind in groups.T.tolist():
        g, weight_g, miss_g = kinds[int(kind)]
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
            change += image_weight * i * (i - 2 * miss_i[k])
            change = (change + weight_g * g * (g - 2 * miss_g[k])) * weight[k]
            if change < least:
                target, least = k, change
        assigned.append(target)
        miss_p[target] -= p
        miss_n[target] -= n
        miss_i[target] -= i
        miss_g[target] -= g
        if p > 0:
            left_p -= 1
            lacks_p.discard(target)
        if n > 0:
            left_n -= 1
            lacks_n.discard(target)
    deviation = np.inf
    if not lacks_p and not lacks_n:
        left = np.array([miss_p, miss_n, miss_i, *(miss for _, _, miss in kinds)])
        weights = np.array([1, 1, image_weight, *(weight_g for _, weight_g, _ in kinds)])
        deviation = float(weights @ left**2 @ (1 / shares))
    return np.array(assigned, np.int64), deviation
