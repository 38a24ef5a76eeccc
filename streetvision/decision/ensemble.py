"""Ensembles of calibrators: probabilities averaged with weights that group folds have chosen.

Three tiers: 1 is temperature and isotonic, 2 Platt and beta, 3 all. Only maps that increase strictly
may be deployed, so PCHIP-smoothed isotonic stands for isotonic, whose steps any average would keep;
Venn–Abers is left out for the same reason. A weighted mean of strictly increasing probabilities is
strictly increasing; one intercept for the whole, solved for last, brings the mean to the prior,
which a temperature alone does not keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError
from streetvision.decision.calibrators import (
    CalibrationMap,
    Calibrator,
    FloatArray,
    Platt,
    PlattMap,
    Sample,
    check_mean_is_prior,
    solve_intercept,
)
from streetvision.decision.folds import group_folds
from streetvision.decision.inputs import check_keys, check_number, check_row
from streetvision.decision.nonparametric import Pchip, PchipMap
from streetvision.decision.parametric import (
    Beta,
    BetaMap,
    Quadratic,
    QuadraticMap,
    Temperature,
    TemperatureMap,
)

# A member with less weight than this is left out.
LEAST_WEIGHT = 1e-6
WEIGHT_TOLERANCE = 1e-9

_MEMBERS: dict[str, tuple[Calibrator[CalibrationMap], type[CalibrationMap]]] = {
    one.kind: (one, its_map)
    for one, its_map in (
        (Temperature(), TemperatureMap), (Platt(), PlattMap), (Beta(), BetaMap),
        (Quadratic(), QuadraticMap), (Pchip(), PchipMap),
    )
}  # fmt: skip


@dataclass(frozen=True)
class EnsembleMap(CalibrationMap):
    """log-odds of Σ weight · p + `intercept`, where p are the members' probabilities.

    `members` are strictly increasing maps; `weights` are positive and add up to 1.
    """

    members: tuple[CalibrationMap, ...]
    weights: tuple[float, ...]
    intercept: float

    kind: ClassVar[str] = "ensemble"
    strictly_increasing: ClassVar[bool] = True
    keeps_prior: ClassVar[bool] = True

    def __post_init__(self) -> None:
        weights = check_row(self.weights, "the ensemble weights")
        if weights.size != len(self.members):
            raise UserError(
                f"the ensemble has {weights.size} weights for {len(self.members)} members; "
                "one each is needed"
            )
        if (weights <= 0).any() or abs(weights.sum() - 1) > WEIGHT_TOLERANCE:
            raise UserError("the ensemble weights must be > 0 and add up to 1")
        check_number(self.intercept, "the ensemble intercept")

    def __call__(self, logits: ArrayLike) -> FloatArray:
        """Return log-odds [N] of logits [N]."""
        log_odds = np.stack([member(logits) for member in self.members])
        share = np.log(np.array(self.weights))[:, np.newaxis]
        # Logs of Σ w p and of Σ w (1 - p): neither is rounded to 0 or 1.
        positive = np.logaddexp.reduce(share - np.logaddexp(0.0, -log_odds), axis=0)
        negative = np.logaddexp.reduce(share - np.logaddexp(0.0, log_odds), axis=0)
        mixed: FloatArray = positive - negative + self.intercept
        return mixed

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters, ready for JSON, with a document for each member."""
        return super().to_dict() | {"members": [member.to_dict() for member in self.members]}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Return the map that `to_dict` described; UserError names a missing or wrong key."""
        wanted = {"kind", "strictly_increasing", "members", "weights", "intercept"}
        check_keys(document, wanted, "the ensemble calibrator")
        for name in ("members", "weights"):
            if not isinstance(document[name], list):
                raise UserError(f"the ensemble {name} are {document[name]!r}; a list is needed")
        members = tuple(_member_from_dict(one) for one in document["members"])
        return cls(members, tuple(document["weights"]), document["intercept"])


def _member_from_dict(document: object) -> CalibrationMap:
    kind = document.get("kind") if isinstance(document, Mapping) else None
    if not isinstance(document, Mapping) or not isinstance(kind, str) or kind not in _MEMBERS:
        raise UserError(
            f"a member of the ensemble is of kind {kind!r}; one of {', '.join(_MEMBERS)} is needed"
        )
    if document.get("strictly_increasing") is not True:
        raise UserError(f"strictly_increasing of the ensemble's {kind} must be true")
    return _MEMBERS[kind][1].from_dict(document)


@dataclass(frozen=True)
class Ensemble(Calibrator[EnsembleMap]):
    """Fits `members` (kinds) to all images, and their weights to log loss out of group folds.

    The weights are the point of the simplex with the lowest log loss of the mixture, which is
    concave there (stacked generalisation: Wolpert, 1992; Breiman, 1996). Without folds of both
    classes the members weigh alike.
    """

    members: tuple[str, ...]
    seed: int = 0

    kind: ClassVar[str] = "ensemble"

    def _fit(self, sample: Sample) -> EnsembleMap:
        return fit_ensembles({"": self.members}, sample, self.seed)[""]


#: Members by tier.
TIERS: dict[str, Ensemble] = {
    "tier_1": Ensemble(("temperature", "pchip")),
    "tier_2": Ensemble(("platt", "beta")),
    "tier_3": Ensemble(tuple(_MEMBERS)),
}


def fit_ensembles(
    members: Mapping[str, tuple[str, ...]], sample: Sample, seed: int = 0
) -> dict[str, EnsembleMap]:
    """Return an ensemble of each entry of `members`; what they share is fitted once."""
    values, truth, weight, names = sample
    kinds = [kind for kind in _MEMBERS if any(kind in chosen for chosen in members.values())]
    folds = group_folds(truth, names, seed)
    held = {kind: np.empty_like(values) for kind in kinds}
    for fold in folds:
        for kind in kinds:
            held[kind][fold] = _MEMBERS[kind][0].fit_sample(sample.rows(~fold))(values[fold])
    maps = {kind: _MEMBERS[kind][0].fit_sample(sample) for kind in kinds}
    found = {}
    for name, chosen in members.items():
        share = np.full(len(chosen), 1 / len(chosen))
        if folds:
            share = simplex_weights(np.stack([held[kind] for kind in chosen]), truth, weight)
        kept = share > LEAST_WEIGHT
        share = share[kept] / share[kept].sum()
        parts = tuple(maps[kind] for kind, keep in zip(chosen, kept, strict=True) if keep)
        shape = EnsembleMap(parts, tuple(share.tolist()), 0.0)
        fitted = EnsembleMap(parts, shape.weights, solve_intercept(shape(values), truth, weight))
        check_mean_is_prior(fitted, values, truth, weight)
        found[name] = fitted
    return found


def simplex_weights(
    log_odds: FloatArray, truth: NDArray[np.bool_], weight: FloatArray
) -> FloatArray:
    """Return weights [M] >= 0 that add up to 1, with the lowest log loss of the mixture.

    Parameters
    ----------
    log_odds
        Of each member, out of fold, [M, N].
    truth, weight
        Labels and weights of the images, [N].
    """
    from scipy.optimize import LinearConstraint, minimize

    size = log_odds.shape[0]
    if size == 1:
        return np.ones(1)
    log_likelihood = -np.logaddexp(0.0, np.where(truth, -log_odds, log_odds))
    # Of each image relative to its best member, which moves the loss by a constant.
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=0))
    share = weight / weight.sum()

    def loss(point: FloatArray) -> float:
        return -float(share @ np.log(np.maximum(point @ likelihood, 1e-300)))

    def gradient(point: FloatArray) -> FloatArray:
        steepest: FloatArray = -likelihood @ (share / np.maximum(point @ likelihood, 1e-300))
        return steepest

    result = minimize(
        loss, np.full(size, 1 / size), jac=gradient, method="SLSQP", bounds=[(0, 1)] * size,
        constraints=LinearConstraint(np.ones((1, size)), 1, 1),
        options={"ftol": 1e-12, "maxiter": 200},
    )  # fmt: skip
    found = np.clip(result.x, 0, 1)
    # The corners, where the optimiser may stop a little short of one.
    points = [found / found.sum(), *np.eye(size)]
    best: FloatArray = min(points, key=loss)
    return best
