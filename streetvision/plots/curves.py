"""Curves as data: columns of the small tables that `dvc plots diff` draws, revisions over each other.

Each takes labels [N] in {0, 1} and probabilities [N] in [0, 1], and returns columns by name. The templates
that draw them are in `.dvc/plots`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError
from streetvision.stats.metrics import (
    N_BINS,
    Floats,
    check_prior,
    check_sample,
    curve_counts,
    equal_width_bins,
    prior_weights,
)

MOST_POINTS = 200  # of a curve: a plot is about 300 pixels wide

Columns = dict[str, list[float]]


def roc_curve(labels: ArrayLike, probabilities: ArrayLike) -> Columns:
    """`threshold`, `fpr` and `tpr` of the rule p >= threshold; the first point calls nothing roadwork.

    Of more than `MOST_POINTS` points these stay: both ends, the one of p > 0.5, and every so many
    images one. Class weights do not change the curve.

    Raises
    ------
    UserError
        Labels of one class.
    """
    threshold, tp, fp = _points(labels, probabilities)
    return {
        "threshold": threshold.tolist(),
        "fpr": (fp / fp[-1]).tolist(),
        "tpr": (tp / tp[-1]).tolist(),
    }


def precision_recall_curve(
    labels: ArrayLike, probabilities: ArrayLike, served_prior: float
) -> Columns:
    """`threshold`, `recall` and `precision` of the points of `roc_curve`, at a prior in (0, 1).

    Raises
    ------
    UserError
        Labels of one class, or a prior outside (0, 1).
    """
    threshold, tp, fp = _points(labels, probabilities)
    prior = check_prior(served_prior)
    hits, alarms = prior * tp / tp[-1], (1 - prior) * fp / fp[-1]
    called = hits + alarms
    # Nothing called: the precision is 1 by convention, where the curve begins.
    precision = np.divide(hits, called, out=np.ones_like(called), where=called > 0)
    return {
        "threshold": threshold.tolist(),
        "recall": (tp / tp[-1]).tolist(),
        "precision": precision.tolist(),
    }


def reliability_table(
    labels: ArrayLike, probabilities: ArrayLike, served_prior: float, panel: str
) -> dict[str, list[float] | list[str]]:
    """Share of positives in the 15 bins of the ECE, a row for each bin that has an image.

    `probability` is the mean in the bin and `share` that of positives, both with the weights of the
    served prior; `low` and `high` are its 95 % Wilson score interval (Wilson 1927) of the bin's
    effective size (sum of weights)^2 / (sum of squares), images taken as independent. `images` counts
    them, `bin` is the bin's lower edge, and `panel`, in each row, says what the table is of.

    Raises
    ------
    UserError
        A prior outside (0, 1).
    """
    y, p = check_sample(labels, probabilities)
    w = prior_weights(y, served_prior)
    bins = equal_width_bins(p)
    images = np.bincount(bins, minlength=N_BINS)
    used = np.flatnonzero(images)
    mass, squares, hits, total = (
        np.bincount(bins, x, minlength=N_BINS)[used] for x in (w, w**2, w * y, w * p)
    )
    low, high = wilson_interval(hits / mass, mass**2 / squares)
    return {
        "panel": [panel] * len(used),
        "probability": (total / mass).tolist(),
        "share": (hits / mass).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "bin": (used / N_BINS).tolist(),
        "images": images[used].tolist(),
    }


def wilson_interval(share: Floats, n: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends of the 95 % score interval of binomial shares [B] of `n` trials [B] (Wilson 1927)."""
    z = 1.959963984540054
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.maximum(centre - reach, 0.0), np.minimum(centre + reach, 1.0)


def _points(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Thresholds [K], descending, with true and false positives [K] of p >= each, from none to all."""
    y, p = check_sample(labels, probabilities)
    if not 0 < y.sum() < len(y):
        raise UserError("a curve over the threshold needs both classes")
    scores, tp, fp = (np.asarray(each, dtype=np.float64) for each in curve_counts(y, p))
    scores, tp, fp = np.append(1.0, scores), np.append(0.0, tp), np.append(0.0, fp)
    decided = int(np.sum(scores[1:] > 0.5))  # the row of p > 0.5
    kept = np.append(evenly(len(scores), MOST_POINTS - 1), decided)
    rows = np.unique(kept)
    return scores[rows], tp[rows], fp[rows]


def evenly(n: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the rows 0 to n - 1, both ends among them, at even distances."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))
