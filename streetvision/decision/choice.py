"""All calibrators by name; what each scores out of group folds; which one to deploy.

Deployable are platt, beta, quadratic and pchip: strictly increasing, with the mean at the prior of
their split. Isotonic and Venn–Abers have steps, and a temperature alone has no intercept, so that
a shift to the served prior would be wrong after it: these are reported only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.decision.calibrators import (
    CalibrationMap,
    Calibrator,
    FloatArray,
    Platt,
    PlattMap,
)
from streetvision.decision.ensemble import EnsembleMap
from streetvision.decision.folds import OutOfFold, group_folds, out_of_fold
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

_MAPS: dict[str, type[CalibrationMap]] = {
    each.kind: each
    for each in (
        TemperatureMap, PlattMap, BetaMap, QuadraticMap, IsotonicMap, PchipMap, VennAbersMap,
        EnsembleMap,
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
