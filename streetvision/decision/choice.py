"""All calibrators by name; what each scores out of group folds; which one to deploy.

Deployable are platt, beta, quadratic and pchip: strictly increasing, with the mean at the prior of
their split. Isotonic and Venn–Abers have steps, and a temperature alone has no intercept, so that
a shift to the served prior would be wrong after it: these are reported only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.decision.calibrators import (
    CalibrationMap,
    Calibrator,
    FloatArray,
    Platt,
    PlattMap,
)
from streetvision.decision.inputs import check_groups
from streetvision.decision.nonparametric import (
    Isotonic,
    IsotonicMap,
    Pchip,
    PchipMap,
    VennAbers,
    VennAbersMap,
)
from streetvision.decision.parametric import (
    Beta,
    BetaMap,
    Quadratic,
    QuadraticMap,
    Temperature,
    TemperatureMap,
)
from streetvision.errors import UserError

AUTO = "auto"
MAX_FOLDS = 5

_MAPS: dict[str, type[CalibrationMap]] = {
    each.kind: each
    for each in (
        TemperatureMap, PlattMap, BetaMap, QuadraticMap, IsotonicMap, PchipMap, VennAbersMap,
    )
}  # fmt: skip
#: Fewest parameters first: of equally good ones the first is chosen.
CALIBRATORS: dict[str, Calibrator] = {
    each.kind: each
    for each in (
        Temperature(), Platt(), Beta(), Quadratic(), Isotonic(), Pchip(), VennAbers(),
    )
}  # fmt: skip
DEPLOYABLE = tuple(kind for kind in CALIBRATORS if _MAPS[kind].deployable())

_log = logging.getLogger(__name__)


def calibration_map_from_dict(document: object) -> CalibrationMap:
    """Return the map that `CalibrationMap.to_dict` described, equal to the bit.

    Raises
    ------
    UserError
        If the kind is unknown, or a key is missing, unknown or unusable.
    """
    if not isinstance(document, Mapping) or "kind" not in document:
        raise UserError(f"the calibrator is {document!r}; an object with a `kind` is needed")
    kind = document["kind"]
    if not isinstance(kind, str) or kind not in _MAPS:
        raise UserError(f"the calibrator's kind {kind!r} is not one of {', '.join(sorted(_MAPS))}")
    fitted = _MAPS[kind].from_dict(document)
    if document["strictly_increasing"] is not fitted.strictly_increasing:
        raise UserError(
            f"the calibrator's strictly_increasing is {document['strictly_increasing']!r}; "
            f"{kind} has {fitted.strictly_increasing}"
        )
    return fitted


def check_deployable(kind: str) -> str:
    """Return `kind`; UserError if a policy may not use that calibrator."""
    if kind not in DEPLOYABLE:
        raise UserError(
            f"the calibrator {kind!r} cannot be deployed; one of "
            f"{', '.join((AUTO, *DEPLOYABLE))} is needed"
        )
    return kind


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
    if not folds:
        return None
    names = np.asarray(groups)
    log_odds, prior = np.empty_like(logits), np.empty_like(logits)
    for held_out in folds:
        kept = ~held_out
        fitted = fit(logits[kept], truth[kept], names[kept])
        log_odds[held_out] = fitted(logits[held_out])
        share = truth[kept].mean()
        prior[held_out] = np.log(share) - np.log1p(-share)
    return OutOfFold(log_odds, prior)


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


def choose_calibrator(truth: NDArray[np.bool_], estimates: Mapping[str, OutOfFold | None]) -> str:
    """Return the deployable calibrator with the lowest out-of-fold log loss; Platt without folds.

    Log loss is proper; a calibration error is not, and rewards a saturated model.
    """
    losses = {
        kind: _log_loss(truth, estimate.log_odds)
        for kind, estimate in estimates.items()
        if kind in DEPLOYABLE and estimate is not None
    }
    if not losses:
        _log.warning("no group folds of both classes to choose a calibrator on: Platt is used")
        return Platt.kind
    return min(losses, key=losses.__getitem__)


def _log_loss(truth: NDArray[np.bool_], log_odds: FloatArray) -> float:
    """Mean log loss in nats, unclipped."""
    return float(np.logaddexp(0.0, np.where(truth, -log_odds, log_odds)).mean())


def fit_best(
    logits: FloatArray, truth: NDArray[np.bool_], groups: ArrayLike, seed: int
) -> CalibrationMap:
    """Return the map of the calibrator that does best out of group folds of this very data."""
    folds = group_folds(truth, groups, seed)
    estimates = {
        kind: out_of_fold(CALIBRATORS[kind].fit, logits, truth, groups, folds)
        for kind in DEPLOYABLE
    }
    return CALIBRATORS[choose_calibrator(truth, estimates)].fit(logits, truth, groups)
