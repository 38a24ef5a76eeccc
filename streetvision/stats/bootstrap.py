"""Intervals and tests that count groups (drives, places, near-duplicate clusters), not images.

Frames of one group are not independent. From 60 groups on, intervals are percentiles of a bootstrap
over groups. With fewer those cover too rarely: then a jackknife with Student's t is used, and
below 5 groups there is no interval. Groups count by their size: these numbers are effective ones
(`Resting`). Both kinds are widened where few groups make most of the spread (`spread`): resamples and
jackknife alike see of a rare failure only whether it struck one of the large groups.

A calibration error that is not debiased has no interval: on a finite sample it exceeds that of the model by
the noise of its bins, so that no interval around it holds the model's. The debiased one has a jackknife's
whatever the number of groups (resamples add the noise again), on the scale of its square, which may be
negative and is unbiased. In simulation (`make bench ONLY=intervals`) it holds the true one in 94–100 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import ArrayLike

from streetvision.core.errors import UserError
from streetvision.stats.metrics import (
    METRIC_NAMES,
    METRIC_RANGES,
    PLAIN_ECE,
    PROBABILITY_METRICS,
    Floats,
    GroupTable,
    Integers,
    all_metrics_batch,
    check_prior,
    check_sample,
    count_metrics,
    in_range,
)

MIN_GROUPS_BOOTSTRAP = 60
MIN_GROUPS = 5
MIN_EFFECTIVE = 4.5  # rounds to 5: groups are never quite equal
MAX_EXACT_GROUPS = 12
BOOTSTRAP = "group_bootstrap_percentile"
JACKKNIFE = "group_jackknife_t"
BIASED = "none: an ECE exceeds the model's by the noise of its bins; ece_debiased has an interval"
# A bootstrap interval needs its metric to be defined in nearly all resamples.
_MAX_UNDEFINED = 0.05
_NO_VARIATION = 1e-12
_CHUNK_ELEMENTS = 1 << 20  # multiplicities held at once, 8 MiB: larger chunks leave the cache


@dataclass(frozen=True)
class Interval:
    """A point estimate with its interval; `low` and `high` are None where `method` says why.

    `effective_groups` is how many groups of equal size would tell as much, see `Resting`.
    """

    value: float
    low: float | None
    high: float | None
    method: str
    effective_groups: float | None = None


@dataclass(frozen=True)
class Resting:
    """The groups that a statistic rests on.

    Attributes
    ----------
    share
        [G] share that each group has in the statistic; adds up to 1.
    effective
        (Σ n)² / Σ n² over sizes n of the groups (Kish 1965): as many groups of equal size tell as much. Of a
        statistic of two classes that of the class with fewer. 0 where a class is missing.
    """

    share: Floats
    effective: float

    @classmethod
    def of(cls, images: Floats, prior: float | None = None) -> Resting:
        """Of images [G, K] by group and class; two classes are weighed to `prior`, if one is given."""
        totals = images.sum(axis=0)
        if not totals.all():
            return cls(np.full(len(images), 1 / len(images)), 0.0)
        shares = images / totals  # [G, K]
        weights = totals / totals.sum() if prior is None else np.array([1 - prior, prior])
        return cls(shares @ weights, float(1 / (shares**2).sum(axis=0).max()))


def check_groups(
    labels: ArrayLike, probabilities: ArrayLike, groups: ArrayLike
) -> tuple[Integers, Floats, Integers]:
    """Return labels [N], probabilities [N] and group indices [N] in 0..G-1; UserError if unfit."""
    y, p = check_sample(labels, probabilities)
    ids = np.asarray(groups)
    if ids.shape != y.shape:
        raise UserError(f"groups must have one entry per image ({len(y)}), got shape {ids.shape}")
    return y, p, np.unique(ids, return_inverse=True)[1].astype(np.int64)


def resample_multiplicities(
    n_groups: int, n_resamples: int, rng: np.random.Generator
) -> Iterator[Floats]:
    """Draw G of G groups with replacement, R times: blocks [r, G] of how often each was drawn."""
    block = max(1, _CHUNK_ELEMENTS // n_groups)
    for start in range(0, n_resamples, block):
        rows = min(block, n_resamples - start)
        drawn = rng.integers(0, n_groups, (rows, n_groups))
        drawn += np.arange(rows)[:, None] * n_groups
        counts = np.bincount(drawn.ravel(), minlength=rows * n_groups)
        yield counts.reshape(rows, n_groups).astype(np.float64)


def group_intervals(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    served_prior: float | None = None,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    metrics: Sequence[str] = METRIC_NAMES,
) -> dict[str, Interval]:
    """Interval of each defined metric, re-weighted to the served prior in every resample of groups.

    What decides between bootstrap, jackknife and no interval is the effective number of groups that a
    metric rests on: recall and fnr on the groups with positives, fpr on those with negatives, metrics
    that weigh both classes on the smaller of the two, and plain averages over images on all groups.

    Parameters
    ----------
    labels, probabilities, groups
        [N] in {0, 1}, [N] in [0, 1], [N] of any sortable type.
    served_prior
        Positive share in (0, 1) to re-weight to, or None for the sample as it is.
    n_resamples, level, seed
        Bootstrap resamples, coverage in (0, 1), and the seed that fixes the resamples.
    metrics
        Names to compute.
    """
    y, p, index = check_groups(labels, probabilities, groups)
    table = GroupTable.build(y, p, index, served_prior)
    return _intervals([table], served_prior, n_resamples, level, seed, metrics)


def statistic_intervals(
    evaluate: Callable[[Floats, Sequence[str]], dict[str, Floats]],
    n_groups: int,
    resting: Mapping[str, Resting],
    ranges: Mapping[str, tuple[float, float]],
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    scales: Mapping[str, str] | None = None,
) -> dict[str, Interval]:
    """Intervals of any statistics of groups; one that is undefined for the sample is left out.

    Parameters
    ----------
    evaluate
        From multiplicities [R, G] and names to statistics [R] by name; NaN where one is undefined.
    n_groups, resting
        G, and by name which of the groups a statistic rests on; how many decides on the method.
    ranges
        Attainable range by name.
    n_resamples, level, seed
        As in `group_intervals`.
    scales
        By name the scale on which a jackknife interval is symmetric: identity, logit, log, atanh, square
        or none (no interval, see `BIASED`); otherwise that of the metric of this name.
    """
    if not 0 < level < 1 or n_resamples < 1:
        raise UserError(
            f"level must lie in (0, 1) and n_resamples be at least 1, got {level} and {n_resamples}"
        )
    names = list(resting)
    scale_of = {m: _scale_of(m) if scales is None else scales[m] for m in names}
    many = {m: resting[m].effective > MIN_GROUPS_BOOTSTRAP - 0.5 for m in names}
    # Debiasing takes the sample's noise away, not that which a resample adds.
    boot = [m for m in names if many[m] and scale_of[m] not in {"square", "none"}]
    jack = [
        m
        for m in names
        if m not in boot and resting[m].effective >= MIN_EFFECTIVE and scale_of[m] != "none"
    ]
    blocks: list[Iterator[Floats]] = [iter([np.ones((1, n_groups))])]
    if boot or jack:
        blocks.append(_left_out(n_groups))
    if boot:
        blocks.append(resample_multiplicities(n_groups, n_resamples, np.random.default_rng(seed)))
    parts = [evaluate(block, names) for block in _together(chain(*blocks), n_groups)]
    values = {m: np.concatenate([part[m] for part in parts]) for m in names}
    intervals = {}
    for name in names:
        value = float(values[name][0])
        left_out, samples = values[name][1 : n_groups + 1], values[name][n_groups + 1 :]
        if not np.isfinite(value):
            continue
        if scale_of[name] == "none":
            found = Interval(value, None, None, BIASED)
        elif name in boot:
            found = _percentile_interval(
                value, samples, left_out, resting[name], level, ranges[name]
            )
        elif name in jack:
            found = _jackknife_interval(
                value, left_out, resting[name], level, ranges[name], scale_of[name]
            )
        else:
            found = Interval(value, None, None, too_few(resting[name]))
        low, high = ranges[name]
        intervals[name] = replace(
            found,
            value=min(max(value, low), high),
            effective_groups=resting[name].effective,
        )
    return intervals


def delete_one(
    evaluate: Callable[[Floats, Sequence[str]], dict[str, Floats]],
    n_groups: int,
    names: Sequence[str],
) -> dict[str, Floats]:
    """Statistics [G] by name, without each of the groups in turn; `evaluate` as in `statistic_intervals`."""
    parts = [evaluate(block, names) for block in _left_out(n_groups)]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _left_out(n_groups: int) -> Iterator[Floats]:
    """Multiplicities without each of the groups in turn, in blocks [r, G]."""
    block = max(1, _CHUNK_ELEMENTS // n_groups)
    for start in range(0, n_groups, block):
        rows = np.arange(start, min(start + block, n_groups))
        multiplicities = np.ones((len(rows), n_groups))
        multiplicities[np.arange(len(rows)), rows] = 0
        yield multiplicities


def _together(blocks: Iterable[Floats], n_groups: int) -> Iterator[Floats]:
    """The same rows in fewer blocks: however few its rows, to evaluate one is a walk over all images."""
    held: list[Floats] = []
    for block in blocks:
        if held and sum(map(len, [*held, block])) * n_groups > _CHUNK_ELEMENTS:
            yield np.concatenate(held)
            held = []
        held.append(block)
    yield np.concatenate(held)


def too_few(resting: Resting) -> str:
    """Why there is no interval, as `Interval.method` says it."""
    held = int((resting.share > 0).sum())
    return (
        f"none: rests on {resting.effective:.1f} effective groups (of {held}), "
        f"at least {MIN_EFFECTIVE} are needed"
    )


def spread(left_out: Floats, resting: Resting) -> tuple[float, float]:
    """Standard error of a statistic and its degrees of freedom, from its values [G] without each group.

    The error is the larger of two. The delete-one-group jackknife's (Tukey 1958) is blind to what the large
    groups happen not to show: where one group in 25 fails and a few groups make most of the data, it is too
    small whenever those few do not fail. The other takes the groups' contributions per image as drawn from
    one law whatever the size, with variance τ² + ω² / n_i between and within groups of share n_i, both
    fitted to the squared contributions by least squares, and adds up Σ n_i² (τ² + ω² / n_i): small groups
    tell what large ones may do. Of groups of equal size both are the same.
    """
    n = len(left_out)
    deviations = left_out - left_out.mean()
    jackknife = (n - 1) / n * float((deviations**2).sum())
    has = resting.share > 0
    share = resting.share[has]
    # Contributions per image; with (n - 1) / n this is the jackknife's variance where shares are equal.
    squares = (deviations[has] * (1 - share) / share) ** 2 * n / (n - 1)
    between, within = _non_negative_line(1 / share, squares)
    modelled = float((share**2 * (between + within / share)).sum())
    freedom = min(degrees_of_freedom(left_out, n), max(resting.effective - 1, 1.0))
    return max(jackknife, modelled) ** 0.5, freedom


def _non_negative_line(x: Floats, y: Floats) -> tuple[float, float]:
    """Intercept and slope, both ≥ 0, of the least squares line through x > 0 and y ≥ 0, [N] each."""
    centred = x - x.mean()
    spread_of_x = float((centred**2).sum())
    if spread_of_x <= _NO_VARIATION * float((x**2).sum()):
        return float(y.mean()), 0.0
    slope = float(centred @ y) / spread_of_x
    intercept = float(y.mean() - slope * x.mean())
    if slope < 0:
        return float(y.mean()), 0.0
    if intercept < 0:
        return 0.0, float(x @ y / (x @ x))
    return intercept, slope


def degrees_of_freedom(left_out: Floats, n_groups: float) -> float:
    """Of the variance of a statistic that rests on `n_groups` groups, G - 1 where they contribute normally.

    The variance of a sample variance is σ⁴ (κ / G + 2 / (G - 1)), κ the excess kurtosis of what the
    groups contribute; a χ² with 2 / (κ / G + 2 / (G - 1)) degrees of freedom has the same (Satterthwaite
    1946, doi 10.2307/3002019). Groups of unequal size, or a few in which a model fails, have a high κ.
    It is estimated from the statistic's values [G] without each of G groups, without bias for normal
    contributions (Joanes & Gill 1998, doi 10.1111/1467-9884.00122), and taken as 0 where negative.
    """
    deviations = left_out - left_out.mean()
    size, square = len(left_out), (deviations**2).mean()
    if size < 4 or not square > 0:
        return n_groups - 1.0
    plain = (deviations**4).mean() / square**2 - 3
    kurtosis = (size - 1) / ((size - 2) * (size - 3)) * ((size + 1) * plain + 6)
    return float(2 / (max(kurtosis, 0.0) / size + 2 / (n_groups - 1)))


def paired_group_interval(
    labels: ArrayLike,
    probabilities_a: ArrayLike,
    probabilities_b: ArrayLike,
    groups: ArrayLike,
    metric: str = "mcc",
    served_prior: float | None = None,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of a metric's difference, b minus a, on the same images and the same resamples.

    Arguments as in `group_intervals`. UserError when the metric is undefined for this sample.
    """
    y, a, index = check_groups(labels, probabilities_a, groups)
    _, b = check_sample(y, probabilities_b)
    tables = [GroupTable.build(y, p, index, served_prior) for p in (a, b)]
    intervals = _intervals(tables, served_prior, n_resamples, level, seed, (metric,))
    if metric not in intervals:
        raise UserError(f"{metric} is undefined for this sample of {len(y)} images")
    return intervals[metric]


def group_sign_flip_test(
    labels: ArrayLike,
    probabilities_a: ArrayLike,
    probabilities_b: ArrayLike,
    groups: ArrayLike,
    served_prior: float | None = None,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value in (0, 1] that a and b have the same MCC, by swapping them in whole groups.

    Under the null hypothesis a and b are exchangeable within a group. Only groups in which their
    decisions give different counts matter. All swaps are enumerated up to 12 such groups; beyond,
    `n_permutations` are drawn and the observed one counted among them (Phipson & Smyth 2010), so
    that the test keeps its level.
    """
    y, a, index = check_groups(labels, probabilities_a, groups)
    _, b = check_sample(y, probabilities_b)
    n_groups = int(index.max()) + 1
    n_positive = float(y.sum())
    odds = 1.0
    if served_prior is not None:
        served = check_prior(served_prior)
        if n_positive in {0.0, float(len(y))}:
            raise UserError("cannot re-weight to a served prior: both classes must be present")
        # Weight of a negative over that of a positive. No swap changes the class counts.
        odds = (1 - served) / served * n_positive / (len(y) - n_positive)
    counts_a, counts_b = (_positive_counts(y, p, index, n_groups) for p in (a, b))  # [G, 2]: fp, tp
    differs = (counts_a != counts_b).any(axis=1)
    shift = (counts_b - counts_a)[differs]
    if not len(shift):
        return 1.0
    total_a, total_b = counts_a.sum(axis=0), counts_b.sum(axis=0)

    def difference(swaps: Floats) -> Floats:
        moved = swaps @ shift
        mcc = [
            count_metrics(
                tp=counts[:, 1],
                fp=odds * counts[:, 0],
                tn=odds * (len(y) - n_positive - counts[:, 0]),
                fn=n_positive - counts[:, 1],
            )["mcc"]
            for counts in (total_a + moved, total_b - moved)
        ]
        return np.abs(mcc[1] - mcc[0])

    observed = difference(np.zeros((1, len(shift))))[0] - 1e-12
    if len(shift) <= MAX_EXACT_GROUPS:
        every = np.arange(1 << len(shift))[:, None] >> np.arange(len(shift)) & 1
        return float((difference(every.astype(np.float64)) >= observed).mean())
    rng = np.random.default_rng(seed)
    block = max(1, _CHUNK_ELEMENTS // len(shift))
    extreme = 1
    for start in range(0, n_permutations, block):
        size = (min(block, n_permutations - start), len(shift))
        swaps = rng.integers(0, 2, size).astype(np.float64)
        extreme += int((difference(swaps) >= observed).sum())
    return extreme / (1 + n_permutations)


def _positive_counts(
    labels: Integers, probabilities: Floats, index: Integers, n_groups: int
) -> Floats:
    key = index * 2 + labels
    counts = np.bincount(key, probabilities > 0.5, minlength=2 * n_groups)
    return counts.reshape(n_groups, 2).astype(np.float64)


def _intervals(
    tables: Sequence[GroupTable],
    served_prior: float | None,
    n_resamples: int,
    level: float,
    seed: int,
    metrics: Sequence[str],
) -> dict[str, Interval]:
    """Intervals of one table's metrics, or of the second's minus the first's."""
    images = tables[0].sums[:, :, 0]  # [G, 2]
    one = len(tables) == 1
    differences = {name: (low - high, high - low) for name, (low, high) in METRIC_RANGES.items()}
    return statistic_intervals(
        lambda multiplicities, names: _evaluate(tables, multiplicities, served_prior, names),
        len(images),
        {metric: resting_of(metric, images, served_prior) for metric in metrics},
        METRIC_RANGES if one else differences,
        n_resamples,
        level,
        seed,
        None if one else {m: difference_scale(m) for m in metrics},
    )


def difference_scale(metric: str) -> str:
    """Scale of the interval of a difference of two models, as in `statistic_intervals`."""
    return "none" if metric in PLAIN_ECE else "identity"


def _evaluate(
    tables: Sequence[GroupTable],
    multiplicities: Floats,
    served_prior: float | None,
    metrics: Sequence[str],
) -> dict[str, Floats]:
    values = [all_metrics_batch(t, multiplicities, served_prior, metrics) for t in tables]
    if len(values) == 1:
        return values[0]
    return {m: in_range(m, values[1][m]) - in_range(m, values[0][m]) for m in metrics}


def resting_of(metric: str, images: Floats, served_prior: float | None) -> Resting:
    """The groups that a metric rests on, of images [G, 2] by group and class."""
    if metric in {"recall", "fnr"}:
        return Resting.of(images[:, 1:])
    if metric == "fpr":
        return Resting.of(images[:, :1])
    averages = {"accuracy", *PROBABILITY_METRICS}
    if served_prior is None and metric in averages:
        return Resting.of(images.sum(axis=1, keepdims=True))
    return Resting.of(images, served_prior)


def _percentile_interval(
    value: float,
    samples: Floats,
    left_out: Floats,
    resting: Resting,
    level: float,
    bounds: tuple[float, float],
) -> Interval:
    """Expanded percentiles of resamples [R], moved apart by what they do not see of a rare failure.

    Percentiles lack Student's t and the factor G / (G - 1) of a sample's variance; the expanded percentile
    interval has both (Hesterberg 2015, doi 10.1080/00031305.2015.1089789).
    """
    from scipy.special import ndtr, stdtrit

    defined = samples[np.isfinite(samples)]
    if len(defined) < (1 - _MAX_UNDEFINED) * len(samples) or not np.isfinite(left_out).all():
        return Interval(value, None, None, "none: undefined in too many resamples")
    n = len(left_out)
    error, freedom = spread(left_out, resting)
    reach = stdtrit(freedom, (1 + level) / 2) * np.sqrt(n / (n - 1))
    ends = np.quantile(defined, [ndtr(-reach), ndtr(reach)])
    if ends[1] - ends[0] < _NO_VARIATION or error < _NO_VARIATION:
        return Interval(value, None, None, "none: no variation between groups")
    seen = np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    low, high = value + (ends - value) * error / seen
    return _clipped(value, low, high, bounds, BOOTSTRAP)


def _jackknife_interval(
    value: float,
    samples: Floats,
    resting: Resting,
    level: float,
    bounds: tuple[float, float],
    scale: str,
) -> Interval:
    """t-interval from delete-one-group values [G], symmetric on the given scale."""
    from scipy.special import stdtrit

    if not np.isfinite(samples).all():
        return Interval(value, None, None, "none: undefined without one of the groups")
    # At the end of its range a transformed value is infinite; there the plain scale has to do.
    inner = (samples > bounds[0]).all() and (samples < bounds[1]).all()
    if scale != "square" and not (inner and bounds[0] < value < bounds[1]):
        scale = "identity"
    centre, values = (_transform(np.asarray(x), scale) for x in (value, samples))
    error, freedom = spread(values, resting)
    if error < _NO_VARIATION:
        return Interval(value, None, None, "none: no variation between groups")
    reach = stdtrit(freedom, (1 + level) / 2) * error
    low, high = (_restore(x, scale) for x in (centre - reach, centre + reach))
    return _clipped(value, float(low), float(high), bounds, JACKKNIFE)


def _clipped(
    value: float, low: float, high: float, bounds: tuple[float, float], method: str
) -> Interval:
    return Interval(value, float(np.clip(low, *bounds)), float(np.clip(high, *bounds)), method)


def _scale_of(metric: str) -> str:
    if metric == "mcc":
        return "atanh"
    if metric in {"brier", "log_loss"}:
        return "log"
    if metric in PLAIN_ECE:
        return "none"
    return "square" if metric == "ece_debiased" else "logit"


def _transform(x: Floats, scale: str) -> Floats:
    if scale == "atanh":
        return np.arctanh(x)
    if scale == "log":
        return np.log(x)
    if scale == "square":
        return x * np.abs(x)
    return np.log(x) - np.log1p(-x) if scale == "logit" else x


def _restore(x: Floats, scale: str) -> Floats:
    if scale == "atanh":
        return np.tanh(x)
    if scale == "log":
        return np.exp(x)
    if scale == "square":
        return np.sign(x) * np.sqrt(np.abs(x))
    return 1 / (1 + np.exp(-x)) if scale == "logit" else x
