"""The threshold with the best Matthews correlation (MCC), and how far it can be trusted.

A threshold t in [0, 1] cuts the probabilities p = sigmoid(logit): positive means p > t, strictly.
Images of one p are one cut point, so logits that saturate the sigmoid in float64 (above about 36.7)
count as tied: no threshold on a probability can tell them apart.

Which optimum: the exact one over all cut points. Every t between two neighbouring probabilities
decides alike, so an optimum is a plateau; where several are optimal the widest (in probability) is
taken, the lowest of equally wide ones, and its centre is returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.artifacts import read_json
from streetvision.core.errors import UserError
from streetvision.core.processes import in_threads
from streetvision.decision.inputs import (
    check_groups,
    check_prior,
    check_scores,
    check_weights,
    sigmoid,
)
from streetvision.stats.bootstrap import MIN_EFFECTIVE, Resting
from streetvision.stats.metrics import count_metrics, mcc_from_counts

FloatArray = NDArray[np.float64]

CLASS_NAMES = ("None", "Roadwork")
INTERVAL_LEVEL = 0.95
# MCCs this close are equal: they differ by rounding alone.
MCC_TOLERANCE = 1e-12
# Resamples are worked off in blocks of about this many numbers (2 MiB an array: larger ones leave the cache).
BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class ThresholdCurve:
    """Confusion counts over evenly spaced thresholds 0 … 1; every array is [n_thresholds].

    The counts are weighted where weights were given.
    """

    threshold: FloatArray
    mcc: FloatArray
    tp: FloatArray
    tn: FloatArray
    fp: FloatArray
    fn: FloatArray

    @property
    def best_index(self) -> int:
        """Row of the grid's own optimum: the first of the best MCC (exact optima are finer)."""
        return int(np.argmax(self.mcc))


@dataclass(frozen=True)
class BaggedThreshold:
    """The median MCC-optimal threshold over group-bootstrap resamples, and its 95 % interval.

    `low` and `high` are None below 4.5 effective groups (of the class with fewer, see `Resting`), where no
    interval can be trusted. `n_used` of the `n_resamples` resamples held both classes; the others have no
    optimum and are left out.
    """

    median: float
    low: float | None
    high: float | None
    n_groups: int
    effective_groups: float
    n_resamples: int
    n_used: int

    def excludes(self, threshold: float) -> bool:
        """Whether there is an interval and `threshold` lies outside of it."""
        if self.low is None or self.high is None:
            return False
        return not self.low <= threshold <= self.high


class _Cuts(NamedTuple):
    """All ways to cut the sorted probabilities in two, lowest threshold first."""

    order: NDArray[np.intp]  # [N] sorts the images by probability
    below: NDArray[np.intp]  # [C] number of images at or below the cut: predicted negative
    lower: FloatArray  # [C] thresholds lower <= t < upper make this cut
    upper: FloatArray  # [C]


class _Counts(NamedTuple):
    """Confusion counts, each of the same shape."""

    tp: FloatArray
    tn: FloatArray
    fp: FloatArray
    fn: FloatArray

    def at(self, index: NDArray[np.intp] | int) -> _Counts:
        return _Counts(*(count[..., index] for count in self))

    def mcc(self) -> FloatArray:
        return np.asarray(mcc_from_counts(**self._asdict()))


def _cuts(logits: FloatArray) -> tuple[_Cuts, FloatArray]:
    """Return the cut points and the sorted probabilities [N]."""
    probability = sigmoid(logits)
    order = np.argsort(probability)
    ranked = probability[order]
    size = ranked.size
    below = np.concatenate(([0], np.flatnonzero(np.diff(ranked)) + 1, [size]))
    edges = np.concatenate(([0.0], ranked, [1.0]))
    lower, upper = edges[below], edges[below + 1]
    if ranked[0] == 0.0:  # p = 0 is not > 0: no threshold makes everything positive
        below, lower, upper = below[1:], lower[1:], upper[1:]
    return _Cuts(order, below, lower, upper), ranked


def _counts(positive: FloatArray, negative: FloatArray) -> _Counts:
    """Cumulate class weights [..., N], sorted by probability, to counts at 0 … N images below.

    Both ends are cumulated separately, so that a count of nothing is exactly 0.
    """

    def below(weights: FloatArray) -> FloatArray:
        start = np.zeros((*weights.shape[:-1], 1))
        return np.concatenate((start, np.cumsum(weights, axis=-1)), axis=-1)

    def above(weights: FloatArray) -> FloatArray:
        return below(weights[..., ::-1])[..., ::-1]

    return _Counts(tp=above(positive), tn=below(negative), fp=above(negative), fn=below(positive))


def _best_plateaus(mcc: FloatArray, cuts: _Cuts) -> tuple[FloatArray, NDArray[np.intp]]:
    """Return the centre of each row's widest optimal plateau and the cut that it makes, [R] each.

    Neighbouring cuts of equal MCC are one plateau. `mcc` is [R, C].
    """
    best = mcc >= mcc.max(axis=1, keepdims=True) - MCC_TOLERANCE
    step = np.diff(best.astype(np.int8), axis=1, prepend=0, append=0)
    row, first = np.nonzero(step == 1)
    last = np.nonzero(step == -1)[1] - 1
    lower, upper = cuts.lower[first], cuts.upper[last]
    ranking = np.lexsort((first, lower - upper, row))
    widest = ranking[np.unique(row[ranking], return_index=True)[1]]
    centre = (lower[widest] + upper[widest]) / 2
    index = np.searchsorted(cuts.lower, centre, side="right") - 1
    # The centre of two neighbouring floats may round up to the next cut: its lower edge is in it.
    over = index > last[widest]
    index[over] = last[widest][over]
    centre[over] = cuts.lower[index[over]]
    return centre, index


def _metrics(counts: _Counts, *, whole: bool) -> dict[str, float]:
    """Return the metrics of one confusion matrix [] with its counts; a ratio of nothing is 0."""
    metrics = {
        name: float(np.nan_to_num(value, nan=0.0))
        for name, value in count_metrics(**counts._asdict()).items()
    }
    number = int if whole else float
    return metrics | {name: number(count) for name, count in counts._asdict().items()}


@overload
def select_threshold_max_mcc(
    logits: ArrayLike,
    labels: ArrayLike,
    n_thresholds: int = ...,
    return_curve: Literal[False] = ...,
    weights: ArrayLike | None = ...,
) -> tuple[float, float, dict[str, float]]: ...


@overload
def select_threshold_max_mcc(
    logits: ArrayLike,
    labels: ArrayLike,
    n_thresholds: int = ...,
    *,
    return_curve: Literal[True],
    weights: ArrayLike | None = ...,
) -> tuple[float, float, dict[str, float], ThresholdCurve]: ...


def select_threshold_max_mcc(
    logits: ArrayLike,
    labels: ArrayLike,
    n_thresholds: int = 5000,
    return_curve: bool = False,
    weights: ArrayLike | None = None,
) -> tuple[float, float, dict[str, float]] | tuple[float, float, dict[str, float], ThresholdCurve]:
    """Return the probability threshold with the best MCC: the exact optimum over all cut points.

    Parameters
    ----------
    logits
        Log-odds of roadwork [N] or [N, 1], or logits [N, 2] of None and Roadwork, finite; a list, array or
        tensor, as are labels and weights.
    labels
        0 or 1, both present, [N].
    n_thresholds
        Rows of the curve, at least 2. The returned optimum does not depend on it.
    return_curve
        Whether to return the curve over `n_thresholds` evenly spaced thresholds as well; its
        own optimum is at `curve.best_index` and never better than the exact one.
    weights
        Weight of each image, [N]: `streetvision.stats.metrics.prior_weights` gives
        those of a served prior. None counts images.

    Returns
    -------
    threshold, mcc, metrics
        Threshold in [0, 1] (module docstring: which of equally good ones), its MCC, and mcc,
        accuracy, precision, recall, f1, fnr, fpr, tp, tn, fp, fn there; then the curve, if asked.

    Raises
    ------
    UserError
        If lengths differ, a logit is not finite, a label is not 0 or 1, a class is missing, a
        weight is negative, or `n_thresholds` < 2.
    """
    if n_thresholds < 2:
        raise UserError(f"n_thresholds is {n_thresholds}; at least 2 are needed (0 and 1)")
    values, truth = check_scores(logits, labels)
    weight = check_weights(weights, truth)
    cuts, ranked = _cuts(values)
    weight, truth = weight[cuts.order], truth[cuts.order]
    counts = _counts(np.where(truth, weight, 0.0), np.where(truth, 0.0, weight))

    candidates = counts.at(cuts.below)
    scores = candidates.mcc()
    centre, index = _best_plateaus(scores[np.newaxis], cuts)
    best = int(index[0])
    threshold, mcc = float(centre[0]), float(scores[best])
    metrics = _metrics(candidates.at(best), whole=weights is None)
    if not return_curve:
        return threshold, mcc, metrics
    grid = np.linspace(0.0, 1.0, n_thresholds)
    on_grid = counts.at(np.searchsorted(ranked, grid, side="right"))
    return threshold, mcc, metrics, ThresholdCurve(grid, on_grid.mcc(), *on_grid)


def metrics_at_threshold(
    logits: ArrayLike, labels: ArrayLike, threshold: float, weights: ArrayLike | None = None
) -> dict[str, float]:
    """Return the metrics of `select_threshold_max_mcc`, at a given `threshold` in [0, 1]."""
    if not 0 <= threshold <= 1:
        raise UserError(f"the threshold is {threshold}; a probability in [0, 1] is needed")
    values, truth = check_scores(logits, labels)
    weight = check_weights(weights, truth)
    decided = sigmoid(values) > threshold
    counts = _Counts(
        tp=weight[decided & truth].sum(),
        tn=weight[~decided & ~truth].sum(),
        fp=weight[decided & ~truth].sum(),
        fn=weight[~decided & truth].sum(),
    )
    return _metrics(counts, whole=weights is None)


def bagged_median_threshold(
    logits: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    n_resamples: int,
    seed: int,
    prior: float | None = None,
) -> BaggedThreshold:
    """Return the median exact MCC optimum over resamples of whole groups, and a 95 % interval.

    The interval is Hesterberg's expanded percentile interval ("What Teachers Should Know About
    the Bootstrap", 2015): the percentiles widen by t quantiles over the G groups and by
    sqrt(G / (G-1)), where groups of unequal size count for as many of equal size as tell as much
    (`Resting`). From 60 groups it is nearly the plain percentile interval, which is too narrow
    below; below 4.5 no interval is given.

    Parameters
    ----------
    logits, labels
        As in `select_threshold_max_mcc`, [N].
    groups
        Group (drive, place, near-duplicate cluster) of each image, [N].
    n_resamples
        Bootstrap resamples, at least 1; 1,000 for an interval.
    seed
        Seed of the resampling.
    prior
        Share of positives that every resample is weighted to; None keeps each resample's own.

    Raises
    ------
    UserError
        As `select_threshold_max_mcc`; if `n_resamples` < 1; if no resample held both classes.
    """
    from scipy import stats

    if n_resamples < 1:
        raise UserError(f"n_resamples is {n_resamples}; at least 1 is needed")
    if prior is not None:
        check_prior(prior, "the prior of the resamples")
    values, truth = check_scores(logits, labels)
    codes, n_groups = check_groups(groups, values.size)
    cuts, _ = _cuts(values)
    codes, truth = codes[cuts.order], truth[cuts.order]

    rng = np.random.default_rng(seed)
    draws = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_resamples)
    has_positive = np.bincount(codes[truth], minlength=n_groups) > 0
    has_negative = np.bincount(codes[~truth], minlength=n_groups) > 0
    draws = draws[(draws[:, has_positive].any(axis=1)) & (draws[:, has_negative].any(axis=1))]
    if not len(draws):
        raise UserError(
            f"none of {n_resamples} resamples of {n_groups} groups holds both classes; "
            "more groups or more resamples are needed"
        )
    times = draws.astype(np.float64)
    block = max(1, BLOCK_ELEMENTS // values.size)

    def optima(start: int) -> FloatArray:
        return _resampled_optima(times[start : start + block][:, codes], truth, prior, cuts)

    thresholds = np.concatenate(list(in_threads(optima, range(0, len(times), block))))
    low: float | None = None
    high: float | None = None
    images = np.bincount(codes * 2 + truth, minlength=2 * n_groups).reshape(n_groups, 2)
    effective = Resting.of(images.astype(np.float64), prior).effective
    if effective >= MIN_EFFECTIVE:
        t = stats.t.ppf((1 - INTERVAL_LEVEL) / 2, effective - 1)
        tail = float(stats.norm.cdf(t * np.sqrt(effective / (effective - 1))))
        low, high = (float(edge) for edge in np.quantile(thresholds, [tail, 1 - tail]))
    return BaggedThreshold(
        float(np.median(thresholds)), low, high, n_groups, effective, n_resamples, len(draws)
    )


def _resampled_optima(
    times: FloatArray, truth: NDArray[np.bool_], prior: float | None, cuts: _Cuts
) -> FloatArray:
    """Return the exact optimum [R] of each resample that draws image n `times[r, n]` times.

    At a share p of positives MCC = (TNR - FNR) sqrt(p (1 - p) / (q (1 - q))), where q = p FNR + (1 - p) TNR
    is the share below the cut: a third of the arithmetic of the four counts.
    """

    def below(drawn: FloatArray) -> tuple[FloatArray, FloatArray]:
        counts = np.zeros((len(drawn), drawn.shape[1] + 1))
        # Whole numbers, so that equal counts keep exactly equal MCCs.
        np.cumsum(drawn, axis=1, out=counts[:, 1:])
        total = counts[:, -1:]
        return np.take(counts, cuts.below, axis=1) / total, total

    positive = times * truth
    (fnr, n_positive), (tnr, n_negative) = below(positive), below(times - positive)
    share = n_positive / (n_positive + n_negative) if prior is None else prior
    low = share * fnr + (1 - share) * tnr
    spread = low * (1 - low)
    mcc = np.zeros_like(low)  # where nothing, or everything, is below
    np.divide(tnr - fnr, np.sqrt(spread, where=spread > 0, out=spread), where=spread > 0, out=mcc)
    return _best_plateaus(mcc * np.sqrt(share * (1 - share)), cuts)[0]


def thresholds_document(
    threshold: float,
    metrics: dict[str, float],
    curve: ThresholdCurve,
    bagged: BaggedThreshold,
    split_used: str,
) -> dict[str, Any]:
    """Return the content of `thresholds.json`.

    Parameters
    ----------
    threshold, metrics
        The threshold to use and its metrics: of `select_threshold_max_mcc`, or the bagged median
        and its `metrics_at_threshold`.
    curve
        Of the same scores; its own optimum is reported under `grid`.
    bagged
        The bagged median and its interval, of the same logits and weights.
    split_used
        Role of the split that the threshold was chosen on.
    """
    best = curve.best_index
    return {
        "policy_type": "threshold",
        "threshold": threshold,
        "optimize_metric": "mcc",
        "n_thresholds": int(curve.threshold.size),
        "split_used": split_used,
        "class_names": list(CLASS_NAMES),
        "metrics": dict(metrics),
        "grid": {"threshold": float(curve.threshold[best]), "mcc": float(curve.mcc[best])},
        "bagged": {
            "median": bagged.median,
            "low": bagged.low,
            "high": bagged.high,
            "level": INTERVAL_LEVEL,
            "n_groups": bagged.n_groups,
            "effective_groups": bagged.effective_groups,
            "n_resamples": bagged.n_resamples,
            "n_used": bagged.n_used,
        },
    }


def read_threshold(path: Path) -> float:
    """Return the threshold, 0 to 1, that the stage `sweep` wrote.

    Raises
    ------
    UserError
        The file is missing, broken, or holds no such number.
    """
    value = read_json(path, "sweep").get("threshold")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{path}: threshold is {value!r}, not a number from 0 to 1; rerun `sweep`")
    return float(value)
