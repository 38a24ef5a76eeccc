"""A second pass for hard images: those that the global view alone leaves unsure get all views.

The rule, word for word the same where it is fitted and where it is served: z is the logit of the global
view. If low < z < high, the image's logit is that of all views, fused; otherwise it is z. Low and high are
where a policy fitted on z alone deploys the probabilities 0.5 - margin and 0.5 + margin. The policy that
ships is fitted on the logits so composed, and only those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError
from streetvision.decision.inputs import check_keys, check_number

FloatArray = NDArray[np.float64]
# No logit is larger.
_FURTHEST = 1e6


@dataclass(frozen=True)
class HardImages:
    """Images with low < logit of the global view < high get a second pass; UserError if there are none."""

    low: float
    high: float

    def __post_init__(self) -> None:
        low, high = (check_number(getattr(self, n), f"hard_images.{n}") for n in ("low", "high"))
        if low >= high:
            raise UserError(f"hard_images.low is {low}; it must be below high, {high}")

    def chosen(self, single: ArrayLike) -> NDArray[np.bool_]:
        """Return whether images get a second pass, from the logits [N] of their global views."""
        logits = np.asarray(single, dtype=np.float64)
        return np.asarray((self.low < logits) & (logits < self.high))

    def compose(self, single: FloatArray, fused: FloatArray) -> FloatArray:
        """Return the logits [N] that ship, of those of the global view and of all views."""
        return np.where(self.chosen(single), fused, single)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {"low": self.low, "high": self.high}

    @classmethod
    def from_dict(cls, document: object) -> Self:
        """Return what `to_dict` described; UserError names a missing or wrong key."""
        values = check_keys(document, {"low", "high"}, "hard_images")
        return cls(values["low"], values["high"])


def unsure_between(deployed_logit: Any, margin: float) -> HardImages:
    """Return the logits of the global view that a strictly increasing map leaves within `margin` of ½.

    `deployed_logit` maps logits [N] to deployed log-odds [N]; `margin` is in (0, 0.5).
    """
    from scipy.optimize import brentq

    edge = float(np.log(0.5 + margin) - np.log(0.5 - margin))

    def where(wanted: float) -> float:
        def above(logit: float) -> float:
            return float(deployed_logit([logit])[0]) - wanted

        if above(-_FURTHEST) >= 0:
            return -_FURTHEST
        if above(_FURTHEST) <= 0:
            return _FURTHEST
        return float(brentq(above, -_FURTHEST, _FURTHEST, xtol=1e-9))

    return HardImages(where(-edge), where(edge))
