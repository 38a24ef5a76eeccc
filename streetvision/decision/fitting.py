"""The whole of phase 5 on VAL_CALIB, as `decision` in `params.yaml` has it: what ships, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streetvision.core.params import Decision
from streetvision.decision.conditions import Condition, conditions_report, fit_hard_images
from streetvision.decision.hard_images import HardImages
from streetvision.decision.policy import Policy, fit_abstaining_policy, fit_policy
from streetvision.decision.scrc import guarantee_groups


class Passes(NamedTuple):
    """Images under one condition: logits of the global view and of all views, labels and units [N]."""

    single: NDArray[np.float64]
    fused: NDArray[np.float64]
    labels: NDArray[np.int64]
    units: NDArray[Any]

    def condition(self, hard: HardImages | None) -> Condition:
        """The logits that ship: fused ones, or fused ones for hard images only."""
        logits = self.fused if hard is None else hard.compose(self.single, self.fused)
        return Condition(logits, self.labels, self.units)


def fit_decision(
    passes: Mapping[str, Passes], decision: Decision, seed: int, *, several_views: bool
) -> tuple[Policy, dict[str, Any], Condition]:
    """Fit the policy on the condition `decision.fit_on`, and report on all conditions.

    Parameters
    ----------
    passes
        Of VAL_CALIB's images by condition, `clean` and `challenge`; units of both are the same.
    decision
        What to fit.
    seed
        Seed of resampling, folds and the division for a guarantee.
    several_views
        Whether fusion takes more than the global view; a second pass has nothing to see otherwise.

    Returns
    -------
    policy, report, fitted
        The report is that of `fit_policy` or `fit_abstaining_policy`, with `exchangeable_unit`,
        `conditions` (of `conditions_report`) and, with a second pass, `hard_images`: its band, and
        the share of images in it by condition. `fitted` is what all this was fitted on.

    Raises
    ------
    UserError
        As `fit_policy` and `fit_abstaining_policy`.
    """
    # Units that hold a guarantee fit nothing, and are in no other number.
    fits = {name: _fits(each.units, decision, seed) for name, each in passes.items()}
    settings = (decision.served_prior, decision.n_resamples, seed, decision.calibrator)
    hard = None
    if decision.hard_image_views == "all" and several_views:
        single, _, labels, units = passes[decision.fit_on]
        first = Condition(single, labels, units)
        hard = fit_hard_images(
            first.part(fits[decision.fit_on]), *settings, decision.hard_image_margin
        )
    conditions = {name: each.condition(hard) for name, each in passes.items()}
    logits, labels, units = fitted = conditions[decision.fit_on]
    if decision.abstention == "none":
        policy, report = fit_policy(logits, labels, units, *settings, compare_tiers=True)
    else:
        policy, report = fit_abstaining_policy(
            logits, labels, units, *settings, compare_tiers=True, method=decision.abstention,
            control=decision.control, alpha=decision.alpha, delta=decision.delta,
            guarantee_fraction=decision.guarantee_fraction, unit=decision.exchangeable_unit,
        )  # fmt: skip
    seen = {name: each.part(fits[name]) for name, each in conditions.items()}
    report |= {
        "exchangeable_unit": decision.exchangeable_unit,
        "conditions": conditions_report(seen, decision.fit_on, *settings),
    }
    if hard is not None:
        shares = {f"share_{n}": float(hard.chosen(p.single).mean()) for n, p in passes.items()}
        report["hard_images"] = hard.to_dict() | shares
    return replace(policy, fit_on=decision.fit_on, hard_images=hard), report, fitted


def _fits(units: NDArray[Any], decision: Decision, seed: int) -> NDArray[np.bool_]:
    if decision.abstention == "none":
        return np.ones(len(units), dtype=np.bool_)
    return ~guarantee_groups(units, decision.guarantee_fraction, seed)
