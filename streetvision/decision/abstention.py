"""The abstention band around ½ that a policy carries, with its promise; fitted by `scrc`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError
from streetvision.decision.inputs import check_keys, check_number
from streetvision.decision.scrc import (
    CONTROLS,
    METHODS,
    UNITS,
    Control,
    Method,
    Unit,
    alpha_limit,
    candidate_thresholds,
    check_level,
    confidence,
    group_risks,
    groups_needed,
    scrc_i,
    scrc_t,
    smallest_alpha,
)

FloatArray = NDArray[np.float64]

_RISKS: dict[Control, str] = {"error": "share of errors", "fnr": "share of missed positives"}
# What a unit smaller than the group takes for granted.
_WEAKER: dict[Unit, str] = {
    "group": "",
    "drive": "; drives of one group are taken for independent, which a new group may break",
}


@dataclass(frozen=True)
class Abstention:
    """Images are accepted if their deployed probability is at least `min_confidence` from ½.

    `min_confidence` is in [0, ½], or None where the level could not be promised: nothing is
    accepted then. `alpha` is the level of the risk `control`; `delta` belongs to `scrc_i` alone;
    `n_groups` units of the kind `unit` hold the guarantee. UserError if a field is unusable.
    """

    method: Method
    control: Control
    alpha: float
    delta: float | None
    n_groups: int
    min_confidence: float | None
    unit: Unit = "group"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"abstention.method {self.method!r} is not one of {', '.join(METHODS)}")
        if self.control not in CONTROLS:
            raise UserError(
                f"abstention.control {self.control!r} is not one of {', '.join(CONTROLS)}"
            )
        if self.unit not in UNITS:
            raise UserError(
                f"abstention.exchangeable_unit is {self.unit!r}; it must be one of {', '.join(UNITS)}"
            )
        check_level(check_number(self.alpha, "abstention.alpha"), "abstention.alpha")
        if (self.delta is None) != (self.method == "scrc_t"):
            raise UserError(
                f"abstention.delta is {self.delta!r} with {self.method}; scrc_i needs one, and "
                "scrc_t has none"
            )
        if self.delta is not None:
            check_level(check_number(self.delta, "abstention.delta"), "abstention.delta")
        if isinstance(self.n_groups, bool) or not isinstance(self.n_groups, int):
            raise UserError(f"abstention.n_groups is {self.n_groups!r}; a whole number is needed")
        if self.n_groups < 1:
            raise UserError(f"abstention.n_groups is {self.n_groups}; it must be >= 1")
        if self.min_confidence is not None:
            least = check_number(self.min_confidence, "abstention.min_confidence")
            if not 0 <= least <= 0.5:
                raise UserError(f"abstention.min_confidence is {least}; it must be in [0, 0.5]")

    def accepts(self, probability: ArrayLike) -> NDArray[np.bool_]:
        """Return whether deployed probabilities [N] are accepted."""
        distance = confidence(probability)
        if self.min_confidence is None:
            return np.zeros(distance.shape, dtype=np.bool_)
        accepted: NDArray[np.bool_] = distance >= self.min_confidence
        return accepted

    @property
    def guarantee(self) -> str:
        """What is promised, in a sentence."""
        if self.min_confidence is None:
            return (
                f"none: {self.n_groups} {self.unit}s cannot promise the level {self.alpha:g}; "
                "nothing is accepted"
            )
        risk = f"the {_RISKS[self.control]} among accepted images of a new {self.unit}"
        if self.delta is None:
            promise = (
                f"{risk}, over the mean accepted share of all {self.unit}s, is at most {self.alpha:g} "
                f"in expectation, if the new {self.unit} is exchangeable with those that hold the "
                "guarantee"
            )
        else:
            promise = (
                f"{risk} is at most {self.alpha:g} in the long run, with probability "
                f"{1 - self.delta:g} over independent {self.unit}s that hold the guarantee"
            )
        return promise + _WEAKER[self.unit]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, the exchangeable unit and the guarantee in words, ready for JSON."""
        return {
            "method": self.method,
            "control": self.control,
            "alpha": self.alpha,
            "delta": self.delta,
            "exchangeable_unit": self.unit,
            "n_groups": self.n_groups,
            "min_confidence": self.min_confidence,
            "guarantee": self.guarantee,
        }

    @classmethod
    def from_dict(cls, document: object) -> Self:
        """Return what `to_dict` described; UserError names a missing or wrong key."""
        fields = ("method", "control", "alpha", "delta", "n_groups", "min_confidence")
        values = check_keys(document, {*fields, "exchangeable_unit", "guarantee"}, "abstention")
        found = cls(**{name: values[name] for name in fields}, unit=values["exchangeable_unit"])
        if values["guarantee"] != found.guarantee:
            raise UserError(
                f"abstention.guarantee is {values['guarantee']!r}, but the other keys promise "
                f"{found.guarantee!r}"
            )
        return found


class Answers(NamedTuple):
    """Deployed probability, label 0 or 1 and group of each image, [N]."""

    probability: FloatArray
    labels: NDArray[Any]
    groups: NDArray[Any]


def fit_abstention(
    fitted: Answers,
    held: Answers,
    weights: tuple[float, float],
    *,
    method: Method,
    control: Control,
    alpha: float,
    delta: float,
    unit: Unit = "group",
) -> tuple[Abstention, Mapping[str, Any]]:
    """Return the band, and what it accepts and could promise.

    Parameters
    ----------
    fitted
        Of the groups that the policy was fitted on: they choose which thresholds to try.
    held
        Of other groups, which choose among these thresholds and hold the guarantee.
    weights
        Of a negative and of a positive image (`scrc.class_weights`).
    method, control, alpha, delta
        As in `Abstention`; `delta` is not used by `scrc_t`.
    unit
        What `groups` of both are.

    Returns
    -------
    abstention, report
        The report holds `promised`, `alpha`, `delta` (of `scrc_i`), `groups` and `images` that hold
        the guarantee, `acceptance` and `risk` among them (in sample; no `risk` where nothing is
        accepted), `smallest_alpha`, `alpha_limit` and `groups_needed`: see `scrc`. There is no
        `groups_needed` where no number would do.
    """
    thresholds = candidate_thresholds(*fitted, weights, control)
    risks = group_risks(*held, thresholds, weights, control)
    used = None if method == "scrc_t" else delta
    chosen = scrc_t(risks, alpha) if used is None else scrc_i(risks, alpha, used)
    least = None if chosen is None else float(thresholds[chosen])
    abstention = Abstention(method, control, alpha, used, risks.n_groups, least, unit)
    accepted, wrong = risks.accepted.sum(axis=0), risks.wrong.sum(axis=0)
    needed = groups_needed(risks, alpha, used)
    return abstention, {
        "promised": chosen is not None,
        "alpha": alpha,
        **({} if used is None else {"delta": used}),
        "groups": risks.n_groups,
        "images": int(held.probability.size),
        "acceptance": 0.0 if chosen is None else float(accepted[chosen] / accepted[-1]),
        **({} if chosen is None else {"risk": float(wrong[chosen] / accepted[chosen])}),
        "smallest_alpha": smallest_alpha(risks, used),
        "alpha_limit": alpha_limit(risks, used),
        **({} if needed is None else {"groups_needed": needed}),
    }
