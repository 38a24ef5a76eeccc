"""Folds of whole groups, and what a calibrator says of the groups that it did not see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.decision.calibrators import CalibrationMap, FloatArray
from streetvision.decision.inputs import check_groups

MAX_FOLDS = 5


@dataclass(frozen=True)
class OutOfFold:
    """Log-odds [N], each of a map that saw nothing of the image's group.

    `prior_log_odds` [N] are those of the share of positives that the map was fitted at.
    """

    log_odds: FloatArray
    prior_log_odds: FloatArray


def out_of_fold(
    fit: Callable[[FloatArray, NDArray[np.bool_], NDArray[Any]], CalibrationMap],
    logits: FloatArray,
    truth: NDArray[np.bool_],
    groups: ArrayLike,
    folds: list[NDArray[np.bool_]],
) -> OutOfFold | None:
    """Return calibrated log-odds out of `folds` of `group_folds`; None without folds."""
    return all_out_of_fold(lambda *fold: {"": fit(*fold)}, logits, truth, groups, folds).get("")


def all_out_of_fold(
    fit: Callable[[FloatArray, NDArray[np.bool_], NDArray[Any]], Mapping[str, CalibrationMap]],
    logits: FloatArray,
    truth: NDArray[np.bool_],
    groups: ArrayLike,
    folds: list[NDArray[np.bool_]],
) -> dict[str, OutOfFold]:
    """Return `out_of_fold` of all maps that `fit` fits together; nothing without folds."""
    names = np.asarray(groups)
    found: dict[str, OutOfFold] = {}
    for held_out in folds:
        kept = ~held_out
        share = truth[kept].mean()
        for name, fitted in fit(logits[kept], truth[kept], names[kept]).items():
            if name not in found:
                found[name] = OutOfFold(np.empty_like(logits), np.empty_like(logits))
            found[name].log_odds[held_out] = fitted(logits[held_out])
            found[name].prior_log_odds[held_out] = np.log(share) - np.log1p(-share)
    return found


def group_folds(truth: NDArray[np.bool_], groups: ArrayLike, seed: int) -> list[NDArray[np.bool_]]:
    """Return masks [N] of up to 5 folds of whole groups; none if a rest would hold one class."""
    codes, n_groups = check_groups(groups, truth.size)
    # No more folds than images of a class: every fold should hold some of both.
    n_folds = min(MAX_FOLDS, n_groups, int(truth.sum()), int((~truth).sum()))
    if n_folds < 2:
        return []
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    folds = []
    for kept, held in splitter.split(np.zeros(truth.size), truth, codes):
        if truth[kept].all() or not truth[kept].any():
            return []
        mask = np.zeros(truth.size, dtype=np.bool_)
        mask[held] = True
        folds.append(mask)
    return [fold for fold in folds if fold.any()]
