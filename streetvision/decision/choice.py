"""All calibrators by name; what each scores out of group folds; which one to deploy.

Deployable are platt, beta, quadratic and pchip: strictly increasing, with the mean at the prior of
their split; and the ensembles of such maps, tier_1 to tier_3. Isotonic and Venn–Abers have steps,
and a temperature alone has no intercept, so that a shift to the served prior would be wrong after
it: these are reported only. `auto` and `multi_objective` choose.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError
from streetvision.decision.calibrators import (
    CalibrationMap,
    Calibrator,
    FloatArray,
    Platt,
    PlattMap,
    check_sample,
)
from streetvision.decision.ensemble import TIERS, EnsembleMap, fit_ensembles
from streetvision.decision.folds import (
    OutOfFold,
    all_out_of_fold,
    group_folds,
    out_of_fold,
)
from streetvision.decision.inputs import sigmoid
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
from streetvision.stats.metrics import all_metrics, prior_weights

AUTO = "auto"
MULTI_OBJECTIVE = "multi_objective"
# What `multi_objective` may lose of MCC.
MCC_LOSS = 0.02

_MAPS: dict[str, type[CalibrationMap]] = {
    each.kind: each
    for each in (
        TemperatureMap, PlattMap, BetaMap, QuadraticMap, IsotonicMap, PchipMap, VennAbersMap,
        EnsembleMap,
    )
}  # fmt: skip
#: Fewest parameters first: of equally good ones the first is chosen.
CALIBRATORS: dict[str, Calibrator[CalibrationMap]] = {
    each.kind: each
    for each in (
        Temperature(), Platt(), Beta(), Quadratic(), Isotonic(), Pchip(), VennAbers(),
    )
}  # fmt: skip
DEPLOYABLE = tuple(kind for kind in CALIBRATORS if _MAPS[kind].deployable())
#: What `fit_policy` takes as `calibrator`.
ALLOWED = (AUTO, *DEPLOYABLE, *TIERS, MULTI_OBJECTIVE)

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
    """Return `kind`; UserError if a policy may not use that calibrator or way to choose one."""
    if kind not in ALLOWED:
        raise UserError(
            f"the calibrator {kind!r} cannot be deployed; one of {', '.join(ALLOWED)} is needed"
        )
    return kind


def estimate_all(
    logits: FloatArray,
    truth: NDArray[np.bool_],
    groups: ArrayLike,
    folds: list[NDArray[np.bool_]],
    kinds: tuple[str, ...] = tuple(CALIBRATORS),
    *,
    tiers: bool,
) -> dict[str, OutOfFold]:
    """Return log-odds of the calibrators `kinds`, and of all tiers, out of `folds`; {} without.

    In each fold the ensembles choose their weights out of folds of the rest.
    """
    found = {}
    for kind in kinds:
        estimate = out_of_fold(CALIBRATORS[kind].fit, logits, truth, groups, folds)
        if estimate is not None:
            found[kind] = estimate
    return found | (all_out_of_fold(_fit_tiers, logits, truth, groups, folds) if tiers else {})


def _fit_tiers(
    logits: FloatArray, truth: NDArray[np.bool_], groups: NDArray[Any]
) -> dict[str, EnsembleMap]:
    members = {name: tier.members for name, tier in TIERS.items()}
    return fit_ensembles(members, check_sample(logits, truth, groups, None))


def choose_calibrator(truth: NDArray[np.bool_], estimates: Mapping[str, OutOfFold]) -> str:
    """Return the deployable calibrator with the lowest out-of-fold log loss; Platt without folds.

    Log loss is proper; a calibration error is not, and rewards a saturated model.
    """
    losses = {
        kind: _log_loss(truth, estimate.log_odds)
        for kind, estimate in estimates.items()
        if kind in DEPLOYABLE
    }
    if not losses:
        _log.warning("no group folds of both classes to choose a calibrator on: Platt is used")
        return Platt.kind
    return min(losses, key=losses.__getitem__)


def _log_loss(truth: NDArray[np.bool_], log_odds: FloatArray) -> float:
    """Mean log loss in nats, unclipped."""
    return float(np.logaddexp(0.0, np.where(truth, -log_odds, log_odds)).mean())


def choose_multi_objective(
    logits: FloatArray,
    truth: NDArray[np.bool_],
    estimates: Mapping[str, OutOfFold],
    served_prior: float,
) -> str:
    """Return the calibrator or tier with the lowest ECE of those that cost little else.

    All out of fold, at the served prior, decided at 0.5. Compared with the logits as they are, moved
    to the served prior alone (what would be deployed without a calibrator), MCC may be lower by
    0.02 at most, and FNR not higher. Log loss breaks ties. Platt, with a warning, if there are no
    folds or nothing qualifies.
    """
    weights = prior_weights(truth, served_prior)
    served = _log_odds(served_prior)

    def measure(log_odds: FloatArray) -> dict[str, float]:
        return all_metrics(truth, sigmoid(log_odds + served), weights)

    before = measure(logits - _log_odds(float(truth.mean())))
    after = {
        kind: measure(estimate.log_odds - estimate.prior_log_odds)
        for kind, estimate in estimates.items()
        if kind in DEPLOYABLE or kind in TIERS
    }
    qualified = [
        (found["ece"], found["log_loss"], kind)
        for kind, found in after.items()
        if found["mcc"] >= before["mcc"] - MCC_LOSS and found["fnr"] <= before["fnr"]
    ]
    if not qualified:
        _log.warning("no calibrator keeps MCC and FNR out of fold: Platt is used")
        return Platt.kind
    return min(qualified)[2]


def _log_odds(probability: float) -> float:
    return float(np.log(probability) - np.log1p(-probability))


def fit_kind(
    kind: str,
    logits: FloatArray,
    truth: NDArray[np.bool_],
    groups: ArrayLike,
    seed: int,
    served_prior: float,
) -> CalibrationMap:
    """Return the map of a calibrator or tier, chosen out of group folds of this very data if asked.

    `kind` is one of `ALLOWED`; `seed` is that of the folds.
    """
    if kind in {AUTO, MULTI_OBJECTIVE}:
        folds = group_folds(truth, groups, seed)
        tiers = kind == MULTI_OBJECTIVE
        estimates = estimate_all(logits, truth, groups, folds, DEPLOYABLE, tiers=tiers)
        if kind == AUTO:
            kind = choose_calibrator(truth, estimates)
        else:
            kind = choose_multi_objective(logits, truth, estimates, served_prior)
    chosen: Calibrator[CalibrationMap] = TIERS[kind] if kind in TIERS else CALIBRATORS[kind]
    return chosen.fit(logits, truth, groups)
