"""The evaluation report: every number of `metrics/evaluation.json`, as one dictionary."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError
from streetvision.stats.bootstrap import Interval, Resting, check_groups, group_intervals
from streetvision.stats.metrics import (
    N_BINS,
    Floats,
    Integers,
    all_metrics,
    check_prior,
    confusion,
    ece_noise_floor,
    prior_weights,
)

UNKNOWN = "unknown"
ECE_DEFINITION = (
    "sum over 15 equal-width bins of |mean probability - share of positives|, weighted by the bin, "
    "at the served prior; noise floor: mean and 95 % quantile for a perfectly calibrated model; no interval, "
    "as it exceeds the model's by that noise: ece_debiased has one, which held it in 94 to 100 % of simulations"
)


def evaluation_report(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    slices: Mapping[str, ArrayLike],
    served_prior: float,
    seed: int,
    n_resamples: int,
    against_all_negatives: Collection[str] = (),
) -> dict[str, Any]:
    """Report on one test split: nested dictionary with sorted keys and finite scalar leaves.

    `mcc`, `ece`, `served` and `served_interval` are at the served prior, `natural` and
    `natural_interval` as the split is; metrics or intervals that do not exist are left out
    (`interval_method` tells how MCC's was made or why there is none). Intervals count groups by their
    size: `effective_groups` (see `bootstrap.Resting`) of the negatives and of the positives; below 4.5
    there is no interval of what rests on these.

    Parameters
    ----------
    labels, probabilities, groups
        [N] in {0, 1}, [N] in [0, 1], [N] of any sortable type; both classes must be present
        (UserError).
    slices
        Name to values [N]: `slices.<name>.<value>` holds n, n_positive, n_groups and, where they
        exist, mcc, accuracy, recall, fnr and fpr, at the served prior. An empty value is "unknown".
    served_prior, seed, n_resamples
        Positive share in (0, 1); seed and number of the resamples.
    against_all_negatives
        Names of slices that only positives have (such as the size of the evidence). The positives
        of each value are put against all negatives; an empty value is skipped. n, n_positive and
        n_groups are then of these positives, and fpr, which is that of all images, is left out.
    """
    y, p, index = check_groups(labels, probabilities, groups)
    weights = prior_weights(y, served_prior)
    served = group_intervals(y, p, index, served_prior, n_resamples, seed=seed)
    natural = group_intervals(y, p, index, None, n_resamples, seed=seed)
    floor = ece_noise_floor(y, p, weights, seed=seed)
    n_groups = int(index.max()) + 1
    images = np.bincount(index * 2 + y, minlength=2 * n_groups).reshape(n_groups, 2).astype(float)
    missing = sorted(set(against_all_negatives) - set(slices))
    if missing:
        raise UserError(f"no slice {missing[0]!r} to put against all negatives")
    report = {
        "confusion": confusion(y, p),
        "ece": served["ece"].value,
        "ece_detail": {
            "bins": N_BINS,
            "definition": ECE_DEFINITION,
            "groups": n_groups,
            "n": len(y),
            "noise_floor": floor.mean,
            "noise_floor_upper": floor.upper,
        },
        "effective_groups": {
            name: Resting.of(images[:, classes]).effective
            for name, classes in (("negatives", [0]), ("positives", [1]))
        },
        "interval_method": served["mcc"].method,
        "mcc": served["mcc"].value,
        "n": len(y),
        "n_groups": n_groups,
        "natural": {name: interval.value for name, interval in natural.items()},
        "natural_interval": _bounds(natural),
        "positive_share": float(y.mean()),
        "served": {name: interval.value for name, interval in served.items()},
        "served_interval": _bounds(served),
        "served_prior": float(served_prior),
        "slices": {
            safe_key(name): _slice(
                y, p, index, np.asarray(values), served_prior, name in against_all_negatives
            )
            for name, values in slices.items()
        },
    }
    return _sorted(report)


def one_class_report(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    slices: Mapping[str, ArrayLike],
    served_prior: float,
    seed: int,
    n_resamples: int,
) -> dict[str, Any]:
    """What can be said of images of one class: recall of roadwork, or false alarms of its absence.

    Like `evaluation_report`; `mcc`, `ece`, `ece_detail`, `served` and `served_interval`, which need both
    classes, are null. `natural` has recall and fnr, or fpr, with their intervals over groups, and
    `mean_probability` is the mean of what the model says.
    """
    y, p, index = check_groups(labels, probabilities, groups)
    rates = ("recall", "fnr") if y.all() else ("fpr",)
    found = group_intervals(y, p, index, None, n_resamples, seed=seed, metrics=rates)
    report = dict.fromkeys(("ece", "ece_detail", "mcc", "served", "served_interval"))
    return _sorted(
        report
        | {
            "confusion": confusion(y, p),
            "interval_method": found[rates[0]].method,
            "mean_probability": float(p.mean()),
            "n": len(y),
            "n_groups": int(index.max()) + 1,
            "natural": {name: interval.value for name, interval in found.items()},
            "natural_interval": _bounds(found),
            "positive_share": float(y.mean()),
            "served_prior": check_prior(served_prior),
            "slices": {
                safe_key(name): _slice(
                    y, p, index, np.asarray(values), served_prior, against_all_negatives=False
                )
                for name, values in slices.items()
            },
        }
    )


def safe_key(value: object) -> str:
    """Return a key without dots, spaces or other signs that a metrics path would trip over."""
    return re.sub(r"[^A-Za-z0-9_+-]+", "_", str(value)).strip("_") or UNKNOWN


def _bounds(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {
        name: {"low": interval.low, "high": interval.high}
        for name, interval in intervals.items()
        if interval.low is not None and interval.high is not None
    }


def _slice(
    labels: Integers,
    probabilities: Floats,
    index: Integers,
    values: NDArray[Any],
    served_prior: float,
    against_all_negatives: bool,
) -> dict[str, dict[str, float]]:
    if values.shape != labels.shape:
        raise UserError(f"a slice must have one value per image, got shape {values.shape}")
    names = np.array(["" if v is None else str(v) for v in values.tolist()])
    entries: dict[str, dict[str, float]] = {}
    for name in np.unique(names).tolist():
        own = names == name
        if against_all_negatives:
            own &= labels == 1
            if not name or not own.any():
                continue
        scored = own | (labels == 0) if against_all_negatives else own
        n_positive = int(labels[scored].sum())
        both = 0 < n_positive < scored.sum()
        weights = prior_weights(labels[scored], served_prior) if both else None
        found = all_metrics(labels[scored], probabilities[scored], weights)
        # In one class alone, MCC does not exist and accuracy is recall or 1 - fpr.
        wanted = ["recall", "fnr"]
        wanted += ["mcc", "accuracy"] if both else []
        wanted += [] if against_all_negatives else ["fpr"]
        entry: dict[str, float] = {
            "n": int(own.sum()),
            "n_groups": len(np.unique(index[own])),
            "n_positive": n_positive,
        }
        entry |= {metric: found[metric] for metric in wanted if metric in found}
        key = safe_key(name)
        while key in entries:  # two values that differ in signs alone stay two slices
            key += "_"
        entries[key] = entry
    return entries


def _sorted(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _sorted(value) if isinstance(value, dict) else value
        for key, value in sorted(tree.items())
    }
