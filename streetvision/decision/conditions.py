"""The deployed policy on images as they are and as they are served: distorted. Both out of fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.decision.folds import group_folds
from streetvision.decision.hard_images import HardImages, unsure_between
from streetvision.decision.inputs import check_scores, sigmoid
from streetvision.decision.policy import fit_rule
from streetvision.stats.metrics import all_metrics, prior_weights

REPORTED = ("mcc", "accuracy", "fnr", "fpr", "log_loss", "ece")


class Condition(NamedTuple):
    """Logits, labels and groups [N] of the images of VAL_CALIB under one condition."""

    logits: NDArray[np.float64]
    labels: NDArray[np.int64]
    groups: NDArray[Any]

    def part(self, chosen: ArrayLike) -> Condition:
        """The images that a mask or index [N] chooses."""
        return Condition(*(values[np.asarray(chosen)] for values in self))


def fit_hard_images(
    first: Condition,
    served_prior: float,
    n_resamples: int,
    seed: int,
    calibrator: str,
    margin: float,
) -> HardImages:
    """Return which images get a second pass, by a policy fitted on the first: see `HardImages`.

    `first` holds the logits of global views; the other arguments are those of `fit_policy`, and
    `margin`, in (0, 0.5), of `unsure_between`.
    """
    values, truth = check_scores(first.logits, first.labels)
    rule, _ = fit_rule(values, truth, first.groups, served_prior, n_resamples, seed, calibrator)
    return unsure_between(rule.deployed_logit, margin)


def conditions_report(
    conditions: Mapping[str, Condition],
    fit_on: str,
    served_prior: float,
    n_resamples: int,
    seed: int,
    calibrator: str,
) -> dict[str, dict[str, float]]:
    """Return what policies fitted on the condition `fit_on` answer under each condition.

    One policy a fold, fitted as `fit_policy` does, threshold and choice of calibrator included, answers
    for the groups that it did not see, whatever the condition. (Which images are hard is decided before,
    on all of them.) All at the served prior, decided at 0.5.

    Returns
    -------
    report
        `on_<condition>` with `n`, `mcc`, `accuracy`, `fnr`, `fpr`, `log_loss` and `ece` of the deployed
        probability. Empty if some fold would leave one class to fit on.

    Raises
    ------
    UserError
        As `fit_policy`.
    """
    fitted = conditions[fit_on]
    values, truth = check_scores(fitted.logits, fitted.labels)
    folds = group_folds(truth, fitted.groups, seed)
    answers = {name: np.full(len(each.labels), np.nan) for name, each in conditions.items()}
    for fold in folds:
        kept = ~fold
        rule, _ = fit_rule(
            values[kept], truth[kept], fitted.groups[kept], served_prior, n_resamples, seed,
            calibrator,
        )  # fmt: skip
        unseen = np.unique(fitted.groups[fold])
        for name, each in conditions.items():
            rows = np.isin(each.groups, unseen)
            if rows.any():
                answers[name][rows] = rule.deployed_logit(each.logits[rows])
    report = {}
    for name, each in conditions.items() if folds else ():
        weights = prior_weights(each.labels, served_prior)
        found = all_metrics(each.labels, sigmoid(answers[name]), weights)
        report[f"on_{name}"] = {"n": len(each.labels)} | {key: found[key] for key in REPORTED}
    return report
