"""Binary classification metrics, for one sample or for thousands of group resamples at once.

There is one implementation of each metric. It works on sums per group and class (`GroupTable`), so
that a resample of groups is a row of multiplicities and its sums are one matrix product. Metrics of
a plain sample are those of a table with one group. Positive = label 1 = roadwork; the decision is
p > 0.5, strictly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError

N_BINS = 15
LOG_LOSS_CLIP = 1e-7
COUNT_METRICS = ("accuracy", "precision", "recall", "f1", "mcc", "fnr", "fpr")
RANK_METRICS = ("roc_auc", "pr_auc")
PROBABILITY_METRICS = ("ece", "ece_equal_mass", "ece_debiased", "brier", "log_loss")
# Their value on a sample exceeds the model's, by the noise of the bins.
PLAIN_ECE = ("ece", "ece_equal_mass")
METRIC_NAMES = COUNT_METRICS + RANK_METRICS + PROBABILITY_METRICS
# Attainable range of each metric that is not [0, 1].
METRIC_RANGES = dict.fromkeys(METRIC_NAMES, (0.0, 1.0)) | {
    "mcc": (-1.0, 1.0),
    "log_loss": (0.0, float(-np.log(LOG_LOSS_CLIP))),
}

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Columns of a group's sums: images, predicted positives, squared error, log loss; then, for
# equal-width and for equal-mass bins, images in each bin and their summed probability.
_N_SCALARS = 4
_WIDTH = slice(_N_SCALARS, _N_SCALARS + 2 * N_BINS)
_MASS = slice(_WIDTH.stop, _WIDTH.stop + 2 * N_BINS)


class NoiseFloor(NamedTuple):
    """ECE of a perfectly calibrated model: mean and 95 % quantile over simulations."""

    mean: float
    upper: float


def check_sample(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Integers, Floats]:
    """Return labels [N] in {0, 1} and probabilities [N] in [0, 1]; UserError if they are not."""
    p = np.asarray(probabilities, dtype=np.float64)
    y = np.asarray(labels)
    if y.ndim != 1 or p.shape != y.shape or not len(y):
        raise UserError(
            "labels and probabilities must be two non-empty lists of equal length, "
            f"got shapes {y.shape} and {p.shape}"
        )
    if not np.isin(y, (0, 1)).all():
        raise UserError(f"labels must be 0 or 1, got {y[~np.isin(y, (0, 1))][0]!r}")
    if not ((p >= 0) & (p <= 1)).all():  # also catches NaN
        raise UserError(f"probabilities must lie in [0, 1], got {p[~((p >= 0) & (p <= 1))][0]!r}")
    return y.astype(np.int64), p


def check_prior(served_prior: float) -> float:
    """Return a served prior in (0, 1); UserError otherwise."""
    if not 0 < served_prior < 1:
        raise UserError(f"the served prior must lie strictly between 0 and 1, got {served_prior}")
    return float(served_prior)


def prior_weights(labels: ArrayLike, served_prior: float) -> Floats:
    """Weights [N], equal within a class and summing to N, whose positive share is the served prior.

    Raises UserError when a class is missing: no weights can then produce the prior.
    """
    y = np.asarray(labels)
    n_positive = int((y == 1).sum())
    if n_positive in {0, len(y)}:
        raise UserError(
            f"cannot re-weight {len(y)} images with {n_positive} positives to a served prior of "
            f"{served_prior}: both classes must be present"
        )
    weight_0, weight_1 = _class_weights(
        np.array(len(y) - n_positive), np.array(n_positive), check_prior(served_prior)
    )
    return np.where(y == 1, weight_1, weight_0)


def mcc_from_counts(tp: ArrayLike, fp: ArrayLike, tn: ArrayLike, fn: ArrayLike) -> Any:
    """Matthews correlation in [-1, 1] from (weighted) counts, elementwise; 0 where it is undefined.

    Matthews (1975), doi 10.1016/0005-2795(75)90109-9. Two square roots, not one: large counts
    do not overflow, and a perfect prediction gives exactly 1.
    """
    tp, fp, tn, fn = (np.asarray(x, dtype=np.float64) for x in (tp, fp, tn, fn))
    scale = np.sqrt((tp + fp) * (tp + fn)) * np.sqrt((tn + fp) * (tn + fn))
    covariance = tp * tn - fp * fn
    mcc = np.divide(covariance, scale, out=np.zeros_like(scale + covariance), where=scale > 0)
    return np.clip(mcc, -1.0, 1.0)


def count_metrics(
    tp: ArrayLike, fp: ArrayLike, tn: ArrayLike, fn: ArrayLike
) -> dict[str, NDArray[np.float64]]:
    """Elementwise `COUNT_METRICS` of (weighted) confusion counts; NaN where a ratio is undefined.

    F1 is defined as 2 tp / (2 tp + fp + fn), which exists even without predicted positives.
    """
    tp, fp, tn, fn = (np.asarray(x, dtype=np.float64) for x in (tp, fp, tn, fn))
    return {
        "accuracy": _ratio(tp + tn, tp + fp + tn + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "mcc": mcc_from_counts(tp, fp, tn, fn),
        "fnr": _ratio(fn, tp + fn),
        "fpr": _ratio(fp, fp + tn),
    }


def confusion(labels: ArrayLike, probabilities: ArrayLike) -> dict[str, int]:
    """Count tp, fp, tn and fn of the decision p > 0.5."""
    y, p = check_sample(labels, probabilities)
    predicted = p > 0.5
    return {
        "tp": int((predicted & (y == 1)).sum()),
        "fp": int((predicted & (y == 0)).sum()),
        "tn": int((~predicted & (y == 0)).sum()),
        "fn": int((~predicted & (y == 1)).sum()),
    }


def all_metrics(
    labels: ArrayLike, probabilities: ArrayLike, weights: ArrayLike | None = None
) -> dict[str, float]:
    """Every metric of one sample; a metric that is undefined for it is left out, never NaN.

    `accuracy, precision, recall, f1, mcc, fnr, fpr` use the decision p > 0.5; MCC is 0 where it is
    undefined. `roc_auc` counts ties half. `pr_auc` is average precision, the step-wise sum.
    `brier` is the mean squared error. `log_loss` is in nats, of probabilities clipped to
    [1e-7, 1 - 1e-7].

    `ece` is the expected calibration error over 15 equal-width bins (0, 1/15], (1/15, 2/15], ...;
    `ece_equal_mass` over 15 bins cut at quantiles of the probabilities. `ece_debiased` is the root
    mean square error over those equal-mass bins, with each bin's sampling variance subtracted
    before the root and cut at 0 (Bröcker 2012; Kumar et al. 2019, arXiv 1909.10155; equal mass:
    Roelofs et al. 2022, arXiv 2012.08668). It leaves out bins of a single image, whose variance
    cannot be estimated.

    Parameters
    ----------
    labels, probabilities
        [N] in {0, 1} and [N] in [0, 1].
    weights
        [N], equal within each class as from `prior_weights`, or None for the natural prior.
        UserError where they differ within a class.
    """
    y, p = check_sample(labels, probabilities)
    prior = _implied_prior(y, weights)
    table = GroupTable.build(y, p, np.zeros(len(y), dtype=np.int64), prior)
    values = all_metrics_batch(table, np.ones((1, 1)), prior)
    return {name: float(in_range(name, v)[0]) for name, v in values.items() if np.isfinite(v[0])}


def in_range(metric: str, values: Floats) -> Floats:
    """A metric's values [R] of `all_metrics_batch`, in its range: a debiased ECE is 0 where negative."""
    clipped: Floats = np.clip(values, *METRIC_RANGES[metric])
    return clipped


@dataclass(frozen=True)
class GroupTable:
    """What the metrics need of a sample, summed by group: built once, used by every resample."""

    sums: Floats  # [G, 2, K]: group, class, column
    ordered: Integers  # [N] groups of the images, from high to low probability, negatives first
    # [D, 4]: for each distinct probability of a positive, and for the end: where in `ordered` the negatives
    # above it start, the negatives tied with it, its positives, and what comes after.
    steps: Integers

    @classmethod
    def build(
        cls, labels: Integers, probabilities: Floats, groups: Integers, served_prior: float | None
    ) -> GroupTable:
        """Sum labels [N] and probabilities [N] by group index [N] in 0..G-1.

        The edges of the equal-mass bins are quantiles of this sample at the served prior. Its
        resamples keep them, so that their interval is that of one fixed definition.
        """
        n_groups = int(groups.max()) + 1
        sums = np.zeros((n_groups * 2, _MASS.stop))
        key = groups * 2 + labels
        clipped = np.clip(probabilities, LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP)
        scalars = (
            np.ones(len(labels)),
            (probabilities > 0.5).astype(np.float64),
            (probabilities - labels) ** 2,
            -np.log(np.where(labels == 1, clipped, 1 - clipped)),
        )
        for column, values in enumerate(scalars):
            sums[:, column] = np.bincount(key, values, minlength=n_groups * 2)
        weights = None if served_prior is None else prior_weights(labels, served_prior)
        for columns, bins in (
            (_WIDTH, equal_width_bins(probabilities)),
            (_MASS, _equal_mass_bins(probabilities, weights)),
        ):
            size = n_groups * 2 * N_BINS
            counts = np.bincount(key * N_BINS + bins, minlength=size)
            totals = np.bincount(key * N_BINS + bins, probabilities, minlength=size)
            sums[:, columns] = np.hstack([counts.reshape(-1, N_BINS), totals.reshape(-1, N_BINS)])
        _, tp, fp = curve_counts(labels, probabilities)
        tied = np.diff(fp, prepend=0)
        chosen = np.diff(tp, prepend=0) > 0
        chosen[-1] = True
        tp, fp, tied = tp[chosen], fp[chosen], tied[chosen]
        ends = tp + fp
        positives = ends - np.diff(tp, prepend=0)
        return cls(
            sums=sums.reshape(n_groups, 2, -1),
            ordered=groups[np.lexsort((labels, -probabilities))],
            steps=np.stack([np.append(0, ends[:-1]), positives - tied, positives, ends], axis=1),
        )


def all_metrics_batch(
    table: GroupTable,
    multiplicities: Floats,
    served_prior: float | None,
    metrics: Sequence[str] = METRIC_NAMES,
) -> dict[str, Floats]:
    """Metrics [R] of R resamples; NaN where a metric is undefined for a resample.

    The square of a debiased ECE may be negative, by chance or by clustered images; so then is the
    `ece_debiased` given here, the signed root, which `all_metrics` has as 0.

    Parameters
    ----------
    table
        The sample's sums over G groups.
    multiplicities
        [R, G], how often each group occurs in each resample.
    served_prior
        Positive share to which each resample is re-weighted anew (the weights depend on its class
        counts), or None.
    metrics
        Names to compute; those of ranking walk over all images, the others are a matrix product.
    """
    unknown = sorted(set(metrics) - set(METRIC_NAMES))
    if unknown:
        raise UserError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRIC_NAMES)}")
    n_columns = 2 if set(metrics) <= set(COUNT_METRICS + RANK_METRICS) else _MASS.stop
    sums = table.sums[:, :, :n_columns]
    # [R, G] @ [G, 2K] -> [R, 2, K]
    raw = (multiplicities @ sums.reshape(len(sums), -1)).reshape(-1, 2, n_columns)
    weights = np.stack(_class_weights(raw[:, 0, 0], raw[:, 1, 0], served_prior), axis=1)  # [R, 2]
    weighted = raw * weights[:, :, None]
    values = count_metrics(
        tp=weighted[:, 1, 1],
        fp=weighted[:, 0, 1],
        tn=weighted[:, 0, 0] - weighted[:, 0, 1],
        fn=weighted[:, 1, 0] - weighted[:, 1, 1],
    )
    # MCC is 0 where a class is missing, but there is no re-weighted sample at all without both.
    values["mcc"] = np.where(np.isnan(weights).any(axis=1), np.nan, values["mcc"])
    if n_columns > 2:
        values |= _probability_metrics(raw, weighted, weights)
    if set(metrics) & set(RANK_METRICS):
        values |= _rank_metrics(table, multiplicities, weights)
    return {name: values[name] for name in METRIC_NAMES if name in metrics}


def equal_width_bins(probabilities: Floats) -> Integers:
    """Bin index [N] in 0..14 of each probability: bin k holds (k/15, (k+1)/15], bin 0 also 0."""
    bins: Integers = np.clip(np.ceil(probabilities * N_BINS) - 1, 0, N_BINS - 1).astype(np.int64)
    return bins


def ece_noise_floor(
    labels: ArrayLike,
    probabilities: ArrayLike,
    weights: ArrayLike | None = None,
    n_simulations: int = 1000,
    seed: int = 0,
) -> NoiseFloor:
    """ECE that a perfectly calibrated model with these probabilities would show by chance alone.

    Labels are drawn as Bernoulli(p) and scored with the bins of `ece` (consistency resampling,
    Bröcker & Smith 2007). `labels` only tell which class each of `weights` belongs to: in the
    sample, a model calibrated at the re-weighted prior has label odds p / (1 - p) times w0 / w1;
    labels are drawn at these and weighted again. Images are taken as independent.
    """
    y, p = check_sample(labels, probabilities)
    prior = _implied_prior(y, weights)
    if prior is None:
        chance = p
    else:
        weight_0, weight_1 = _class_weights(np.sum(y == 0), np.sum(y == 1), prior)
        chance = p * weight_0 / (p * weight_0 + (1 - p) * weight_1)
    bins = equal_width_bins(p)
    columns = np.zeros((len(p), 2 * N_BINS))  # image in bin k; its probability in bin k
    columns[np.arange(len(p)), bins] = 1.0
    columns[np.arange(len(p)), N_BINS + bins] = p
    total = columns.sum(axis=0)
    rng = np.random.default_rng(seed)
    chunk = max(1, (1 << 22) // len(p))
    errors = []
    for start in range(0, n_simulations, chunk):
        drawn = rng.random((min(chunk, n_simulations - start), len(p))) < chance
        positive = drawn.astype(np.float64) @ columns  # [S, 2 * bins]
        raw = np.stack([total - positive, positive], axis=1)  # [S, 2, 2 * bins]
        n_class = raw[:, :, :N_BINS].sum(axis=2)
        class_weights = np.stack(_class_weights(n_class[:, 0], n_class[:, 1], prior), axis=1)
        errors.append(_ece(raw * class_weights[:, :, None]))
    ece = np.concatenate(errors)
    ece = ece[np.isfinite(ece)]  # a draw of one class has no re-weighted error
    if not len(ece):
        raise UserError("no ECE noise floor: every simulated sample held one class only")
    return NoiseFloor(float(ece.mean()), float(np.quantile(ece, 0.95)))


def curve_counts(labels: Integers, probabilities: Floats) -> tuple[Floats, Integers, Integers]:
    """Distinct probabilities [D], descending, and tp [D] and fp [D] of the rule p >= each."""
    order = np.argsort(-probabilities, kind="stable")
    scores = probabilities[order]
    last = np.append(np.nonzero(np.diff(scores))[0], len(scores) - 1)
    tp = np.cumsum(labels[order])[last]
    return scores[last], tp, last + 1 - tp


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    ratio: Floats = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    np.divide(numerator, denominator, out=ratio, where=denominator > 0)
    return ratio


def _class_weights(
    n_negative: Any, n_positive: Any, served_prior: float | None
) -> tuple[Floats, Floats]:
    """Weights of a negative and a positive [R]: 1 without a prior, NaN where a class is missing."""
    n_0, n_1 = np.asarray(n_negative, np.float64), np.asarray(n_positive, np.float64)
    if served_prior is None:
        return np.ones_like(n_0), np.ones_like(n_1)
    total = np.where((n_0 > 0) & (n_1 > 0), n_0 + n_1, np.nan)
    return (1 - served_prior) * _ratio(total, n_0), served_prior * _ratio(total, n_1)


def _implied_prior(labels: Integers, weights: ArrayLike | None) -> float | None:
    """Positive share under the weights; every metric depends on them through it alone."""
    if weights is None:
        return None
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != labels.shape or not (np.isfinite(w) & (w > 0)).all():
        raise UserError(f"weights must be {len(labels)} finite positive numbers")
    for label in (0, 1):
        of_class = w[labels == label]
        if len(of_class) and np.ptp(of_class) > 1e-6 * of_class[0]:
            raise UserError(f"weights must be equal within a class, those of label {label} differ")
    share = float(w[labels == 1].sum() / w.sum())
    return share if 0 < share < 1 else None


def _equal_mass_bins(probabilities: Floats, weights: Floats | None) -> Integers:
    """Bin index [N] in 0..14: cut at the (weighted) 1/15, 2/15, ... quantiles; ties share a bin."""
    edges = np.quantile(
        probabilities, np.arange(1, N_BINS) / N_BINS, weights=weights, method="inverted_cdf"
    )
    return np.searchsorted(np.unique(edges), probabilities, side="left").astype(np.int64)


def _of_both(sums: Floats) -> Floats:
    """Sum [R, 2, ...] over the classes; along so short an axis `sum` takes ten times as long."""
    added: Floats = sums[:, 0] + sums[:, 1]
    return added


def _ece(weighted: Floats) -> Floats:
    """Sum over bins of |weighted error| over all weight, from sums [R, 2, 2 * bins]."""
    count, total = weighted[:, :, :N_BINS], weighted[:, :, N_BINS:]
    error = _of_both(total) - count[:, 1]
    return _ratio(np.abs(error).sum(axis=1), count.sum(axis=(1, 2)))


def _probability_metrics(raw: Floats, weighted: Floats, weights: Floats) -> dict[str, Floats]:
    weight = _of_both(weighted[:, :, 0])
    return {
        "ece": _ece(weighted[:, :, _WIDTH]),
        "ece_equal_mass": _ece(weighted[:, :, _MASS]),
        "ece_debiased": _debiased_error(raw[:, :, _MASS], weighted[:, :, _MASS], weights),
        "brier": _ratio(_of_both(weighted[:, :, 2]), weight),
        "log_loss": _ratio(_of_both(weighted[:, :, 3]), weight),
    }


def _debiased_error(raw: Floats, weighted: Floats, weights: Floats) -> Floats:
    """Signed root of the debiased squared error, see `all_metrics`, from sums [R, 2, 2 * bins]."""
    n = _of_both(raw[:, :, :N_BINS])
    mass = _of_both(weighted[:, :, :N_BINS])
    safe = np.where(mass > 0, mass, 1.0)
    share = weighted[:, 1, :N_BINS] / safe  # of positives in the bin
    mean = _of_both(weighted[:, :, N_BINS:]) / safe
    # Variance of a weighted share (linearised); without weights it is share (1 - share) / (n - 1).
    squares = (weights**2)[:, :, None] * raw[:, :, :N_BINS]
    spread = squares[:, 1] * (1 - share) ** 2 + squares[:, 0] * share**2
    variance = spread / safe**2 * n / np.maximum(n - 1, 1)
    terms = np.where(n >= 2, mass * ((mean - share) ** 2 - variance), 0.0)
    square = _ratio(terms.sum(axis=1), mass.sum(axis=1))
    root: Floats = np.sign(square) * np.sqrt(np.abs(square))
    return root


def _rank_metrics(table: GroupTable, multiplicities: Floats, weights: Floats) -> dict[str, Floats]:
    """ROC-AUC and average precision by one walk down the scores, all resamples side by side."""
    rows = list(np.ascontiguousarray(multiplicities.T))  # G times [R], contiguous
    ordered = [rows[group] for group in table.ordered.tolist()]
    odds = weights[:, 0] / weights[:, 1]
    tp, area, precision = np.zeros((3, len(odds)))
    fp = np.full(len(odds), 1e-300)  # not 0, so that tp + fp never is
    weighted_fp, scratch = fp * odds, np.empty(len(odds))
    for start, tied, middle, end in table.steps.tolist():
        if middle > start:
            added = reduce(np.add, ordered[start:middle])
            fp += added
            np.multiply(fp, odds, out=weighted_fp)
            np.multiply(added, tp, out=scratch)
            area += scratch
        if end > middle:
            hits = reduce(np.add, ordered[middle:end])
            if middle > tied:
                area += 0.5 * reduce(np.add, ordered[tied:middle]) * hits  # tied pairs count half
            tp += hits
            np.add(weighted_fp, tp, out=scratch)
            np.divide(tp, scratch, out=scratch)
            scratch *= hits
            precision += scratch
    pairs = tp * fp
    return {
        "roc_auc": _ratio(area, np.where(pairs >= 0.5, pairs, 0)),
        "pr_auc": _ratio(precision, tp),
    }
