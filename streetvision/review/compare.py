"""Two models on the same test images: what differs, how sure that is, and what it would take to tell.

Both sides are resampled, swapped and counted in whole groups, paired image by image. Everything is at the
served prior, but for the two tests that take images as independent; those are marked i.i.d. and stand
there for comparison only, being too sure where the images of a group are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from streetvision.evaluation.predictions import (
    Matching,
    Predictions,
    joined_groups,
    match_predictions,
)
from streetvision.stats.bootstrap import (
    MIN_EFFECTIVE,
    Interval,
    delete_one,
    difference_scale,
    spread,
    statistic_intervals,
)
from streetvision.stats.metrics import (
    METRIC_RANGES,
    Floats,
    GroupTable,
    Integers,
    all_metrics,
    all_metrics_batch,
    in_range,
    prior_weights,
)
from streetvision.stats.paired import (
    LEVEL,
    fisher_z_interval,
    groups_needed,
    holm,
    mcnemar_exact,
    resting_groups,
    same_mcc_p,
)
from streetvision.subnet.reward import expected_reward

RESAMPLES = 10_000
REWARD = "reward"
_BATCH = ("mcc", "accuracy", "fnr", "fpr", "ece", "ece_debiased", "log_loss")
METRICS = (*_BATCH, REWARD)
HIGHER_IS_BETTER = frozenset({"mcc", "accuracy", REWARD})
_RANGES = METRIC_RANGES | {REWARD: (0.0, 1.0)}
# On which scale the jackknife interval of one side's value is symmetric; as `group_intervals` has it.
_SCALES = dict.fromkeys(METRICS, "logit") | {
    "mcc": "atanh", "log_loss": "log", "ece": "none", "ece_debiased": "square"
}  # fmt: skip
Evaluate = Callable[[Floats, Sequence[str]], dict[str, Floats]]


@dataclass(frozen=True)
class Difference:
    """One metric of both sides, and head minus base.

    Attributes
    ----------
    standard_error
        Of the difference, by `bootstrap.spread`; None where there is no interval.
    groups_needed, images_needed
        Test size at which a true difference like this one is seen with 80 % power, images a group as here;
        None where there is no difference or no standard error.
    """

    metric: str
    base: Interval
    head: Interval
    delta: Interval
    standard_error: float | None
    groups_needed: int | None
    images_needed: int | None

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval excludes 0, else `not told apart`."""
        if (
            self.delta.low is None
            or self.delta.high is None
            or self.delta.low <= 0 <= self.delta.high
        ):
            return "not told apart"
        return "better" if (self.delta.low > 0) == (self.metric in HIGHER_IS_BETTER) else "worse"


@dataclass(frozen=True)
class SliceDifference:
    """MCC of both sides on a part of the test set.

    `p_value` is that of `same_mcc_p` and `p_holm` the same after Holm's correction over all slices
    that have one: a slice needs both classes, each in at least 4.5 effective groups. `base`, `head` and
    `delta` are None where a class is missing.
    """

    name: str
    value: str
    n: int
    n_groups: int
    base: float | None
    head: float | None
    delta: Interval | None
    p_value: float | None
    p_holm: float | None


@dataclass(frozen=True)
class Change:
    """An image whose decision (p > 0.5) changed; `base` and `head` are probabilities."""

    id: str
    group: str
    label: int
    base: float
    head: float

    @property
    def right(self) -> str:
        """Which side decides it rightly: base or head."""
        return "head" if (self.head > 0.5) == (self.label == 1) else "base"


@dataclass(frozen=True)
class Comparison:
    """Head against base on the images they share.

    Attributes
    ----------
    n, n_positive, n_groups, effective_groups, served_prior
        Size of what was compared (`bootstrap.Resting`), and the share of roadwork that metrics are
        re-weighted to.
    differences
        By metric, in the order of `METRICS`; a metric that is undefined for the sample is left out.
    same_mcc_p
        That both have the same MCC, by `paired.same_mcc_p`. In simulation its level held for clustered
        groups of unequal length, also where only the operating points or the correlations differ.
    mcnemar_p, fisher_z
        i.i.d.: McNemar's exact test on decisions, and Zou's interval of the difference of MCC at the natural
        prior (None where a correlation is undefined or ±1).
    changes
        Largest change of probability first.
    """

    matching: Matching
    n: int
    n_positive: int
    n_groups: int
    effective_groups: float
    served_prior: float
    differences: dict[str, Difference]
    same_mcc_p: float
    mcnemar_p: float
    fisher_z: Interval | None
    slices: tuple[SliceDifference, ...]
    changes: tuple[Change, ...]


def compare_predictions(
    base: Predictions,
    head: Predictions,
    served_prior: float,
    *,
    against_all_negatives: Sequence[str] = (),
    seed: int = 0,
    n_resamples: int = RESAMPLES,
) -> Comparison:
    """Compare two models on the images that both answered.

    Images that one side alone has, or that have another label on the other side, are left out (and
    counted in `matching`). Images that either side keeps in one group stay together. Slices are those of
    `head`; an image without one is in no slice of that name.

    Parameters
    ----------
    served_prior
        Positive share in (0, 1) to which every metric is re-weighted.
    against_all_negatives
        Slices that only positives have: each part is put against all negatives.
    seed, n_resamples
        Of the bootstrap and, as many, of the sign-flips.

    Raises
    ------
    UserError
        Less than half of the images, or only one class, in common.
    """
    matching, rows_a, rows_b = match_predictions(base, head)
    y = head.labels[rows_b]
    a, b = base.probabilities[rows_a], head.probabilities[rows_b]
    prior_weights(y, served_prior)  # refuses one class before the work
    index = joined_groups(base.groups[rows_a], head.groups[rows_b])
    changed = np.flatnonzero((a > 0.5) != (b > 0.5))
    changed = changed[np.argsort(-np.abs(a - b)[changed], kind="stable")]
    ids, groups = head.ids[rows_b], head.groups[rows_b]
    right_a, right_b = ((p > 0.5) == (y == 1) for p in (a, b))
    gained, lost = int((right_b & ~right_a).sum()), int((right_a & ~right_b).sum())
    return Comparison(
        matching=matching,
        n=len(y),
        n_positive=int(y.sum()),
        n_groups=int(index.max()) + 1,
        effective_groups=resting_groups(y, index, served_prior).effective,
        served_prior=float(served_prior),
        differences=_differences(y, a, b, index, served_prior, n_resamples, seed),
        same_mcc_p=same_mcc_p(y, a, b, index, served_prior, n_resamples, seed),
        mcnemar_p=mcnemar_exact(gained, lost),
        fisher_z=fisher_z_interval(y, a > 0.5, b > 0.5),
        slices=_slices(
            y,
            a,
            b,
            index,
            {name: parts[rows_b] for name, parts in head.slices.items()},
            against_all_negatives,
            served_prior,
            n_resamples,
            seed,
        ),
        changes=tuple(
            Change(str(ids[i]), str(groups[i]), int(y[i]), float(a[i]), float(b[i]))
            for i in changed
        ),
    )


def difference_intervals(
    labels: Integers,
    base: Floats,
    head: Floats,
    groups: Integers,
    served_prior: float,
    metrics: Sequence[str] = METRICS,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % intervals of head's metrics minus base's; one that is undefined for the sample is left out.

    In simulation (`make bench ONLY=comparison`, each figure ± 0.7) they cover the true difference of MCC,
    accuracy, log loss and reward in 95.0 to 97.8 % from 60 groups on and in 95.0 to 99.3 % with 8 to 45.
    The plain ECE has none: it grows with the noise of its bins. The debiased one's held the true
    difference in 95.4 to 99.3 %.

    Parameters
    ----------
    labels, base, head, groups
        [N] in {0, 1}, probabilities [N] twice, group index [N] in 0..G-1.
    served_prior, n_resamples, seed
        As in `compare_predictions`.
    metrics
        Names of `METRICS`.
    """
    evaluate = _evaluator(labels, base, head, groups, served_prior, metrics)
    return _intervals(evaluate, metrics, labels, groups, served_prior, n_resamples, seed)


def _evaluator(
    labels: Integers,
    a: Floats,
    b: Floats,
    index: Integers,
    served_prior: float,
    metrics: Sequence[str],
) -> Evaluate:
    """Values by name: `mcc` is the difference, `base.mcc` and `head.mcc` are either side's."""
    tables = {
        side: GroupTable.build(labels, p, index, served_prior)
        for side, p in (("base", a), ("head", b))
    }
    wanted = {*metrics, "fnr", "fpr"} if REWARD in metrics else {*metrics}

    def evaluate(multiplicities: Floats, names: Sequence[str]) -> dict[str, Floats]:
        values: dict[str, Floats] = {}
        for side, table in tables.items():
            found = all_metrics_batch(
                table, multiplicities, served_prior, sorted(wanted - {REWARD})
            )
            if REWARD in wanted:
                found[REWARD] = expected_reward(1 - found["fnr"], found["fpr"], served_prior)
            values |= {f"{side}.{m}": found[m] for m in metrics}
        for m in metrics:
            base, head = (values[f"{side}.{m}"] for side in tables)
            values[m] = head - base if m == REWARD else in_range(m, head) - in_range(m, base)
        return {name: values[name] for name in names}

    return evaluate


def _intervals(
    evaluate: Evaluate,
    names: Sequence[str],
    labels: Integers,
    index: Integers,
    served_prior: float,
    n_resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Intervals by name, as `_evaluator` has them."""
    ranges, scales = {}, {}
    for name in names:
        side, _, metric = name.rpartition(".")
        low, high = _RANGES[metric]
        ranges[name] = (low, high) if side else (low - high, high - low)
        scales[name] = _SCALES[metric] if side else difference_scale(metric)
    resting = resting_groups(labels, index, served_prior)
    return statistic_intervals(
        evaluate, int(index.max()) + 1, dict.fromkeys(names, resting), ranges, n_resamples,
        LEVEL, seed, scales,
    )  # fmt: skip


def _differences(
    labels: Integers,
    a: Floats,
    b: Floats,
    index: Integers,
    served_prior: float,
    n_resamples: int,
    seed: int,
) -> dict[str, Difference]:
    n_groups = int(index.max()) + 1
    evaluate = _evaluator(labels, a, b, index, served_prior, METRICS)
    names = [f"{side}{metric}" for side in ("", "base.", "head.") for metric in METRICS]
    intervals = _intervals(evaluate, names, labels, index, served_prior, n_resamples, seed)
    resting = resting_groups(labels, index, served_prior)
    left_out = delete_one(evaluate, n_groups, METRICS)
    found = {}
    for metric in METRICS:
        if metric not in intervals:
            continue
        delta = intervals[metric]
        error, _ = spread(left_out[metric], resting)
        known = error if math.isfinite(error) and error > 0 and delta.low is not None else None
        needed = groups_needed(delta.value, known, n_groups)
        found[metric] = Difference(
            metric, intervals[f"base.{metric}"], intervals[f"head.{metric}"], delta, known, needed,
            None if needed is None else math.ceil(needed * len(labels) / n_groups),
        )  # fmt: skip
    return found


def _slices(
    labels: Integers,
    a: Floats,
    b: Floats,
    index: Integers,
    slices: Mapping[str, NDArray[np.str_]],
    against_all_negatives: Sequence[str],
    served_prior: float,
    n_resamples: int,
    seed: int,
) -> tuple[SliceDifference, ...]:
    found = []
    for name, parts in slices.items():
        for value in sorted(set(parts.tolist()) - {""}):
            own = parts == value
            if name in against_all_negatives:
                own &= labels == 1
            scored = own | (labels == 0) if name in against_all_negatives else own
            n, n_groups = int(own.sum()), len(np.unique(index[own]))
            if scored.all() or not n:
                continue  # the whole test set is no slice
            y, group = labels[scored], np.unique(index[scored], return_inverse=True)[1]
            base = head = p_value = delta = None
            if 0 < y.sum() < len(y):
                pair = (y, a[scored], b[scored], group, served_prior)
                delta = difference_intervals(*pair, ("mcc",), n_resamples, seed)["mcc"]
                p_value = same_mcc_p(*pair, n_resamples, seed)
                weights = prior_weights(y, served_prior)
                base, head = (all_metrics(y, p[scored], weights)["mcc"] for p in (a, b))
                if resting_groups(y, group, served_prior).effective < MIN_EFFECTIVE:
                    p_value = None
            found.append(
                SliceDifference(name, value, n, n_groups, base, head, delta, p_value, None)
            )
    tested = {place: each.p_value for place, each in enumerate(found) if each.p_value is not None}
    by_place = dict(zip(tested, holm(list(tested.values())).tolist(), strict=True))
    return tuple(replace(each, p_holm=by_place.get(place)) for place, each in enumerate(found))
