"""The deployed policy: calibrate, move to the served prior, decide at p > 0.5.

The order is fixed (`fit_policy`). The calibrator is fitted at the prior of its own split; that its
mean is that prior is checked; only then are the log-odds shifted to the served prior: a calibrator
fitted after the shift would undo it. The last shift moves an MCC-optimal threshold to 0.5, and is 0
unless the group-bootstrap interval of that threshold excludes 0.5.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.decision.calibrators import (
    CalibrationMap,
    Platt,
    calibration_map_from_dict,
    check_mean_is_prior,
)
from streetvision.decision.inputs import (
    check_groups,
    check_keys,
    check_logits,
    check_number,
    check_prior,
    check_scores,
    sigmoid,
)
from streetvision.decision.threshold import bagged_median_threshold
from streetvision.errors import UserError
from streetvision.evaluation.metrics import all_metrics, prior_weights

FloatArray = NDArray[np.float64]

# What the subnet's validator rounds at; np.round(0.5) is 0, so positive is p > 0.5.
DECISION_THRESHOLD = 0.5
MAX_FOLDS = 5
REPORTED = ("log_loss", "brier", "ece")
# A threshold of 0 or 1 has no finite log-odds.
THRESHOLD_CLIP = 1e-6

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """The map from a logit to the deployed probability, and the decision p > 0.5.

    `calibration_prior` and `served_prior` are shares of positives in (0, 1); `threshold_shift` is
    in log-odds. The whole is strictly increasing in the logit. UserError if a field is unusable.
    """

    calibrator: CalibrationMap
    calibration_prior: float
    served_prior: float
    threshold_shift: float = 0.0

    def __post_init__(self) -> None:
        if not self.calibrator.strictly_increasing:
            raise UserError(
                f"the calibrator {self.calibrator.kind} is not strictly increasing; "
                "it may be reported but not deployed"
            )
        check_prior(self.calibration_prior, "calibration_prior")
        check_prior(self.served_prior, "served_prior")
        check_number(self.threshold_shift, "threshold_shift")

    def calibrated_logit(self, logits: ArrayLike, prior: float | None = None) -> FloatArray:
        """Return calibrated log-odds [N] at `prior` (the served one by default), threshold not in.

        Saerens et al. (2002), doi 10.1162/089976602753284446: another prior moves the log-odds by
        the difference of the priors' log-odds.
        """
        prior = self.served_prior if prior is None else check_prior(prior, "prior")
        shift = _log_odds(prior) - _log_odds(self.calibration_prior)
        return self.calibrator(check_logits(logits)) + shift

    def calibrated_probability(self, logits: ArrayLike, prior: float | None = None) -> FloatArray:
        """Return probabilities [N] at `prior` (the served one by default), threshold not in."""
        return sigmoid(self.calibrated_logit(logits, prior))

    def deployed_logit(self, logits: ArrayLike) -> FloatArray:
        """Return the log-odds [N] whose sign is the decision; logits are [N] and finite."""
        return self.calibrated_logit(logits) + self.threshold_shift

    def deployed_probability(self, logits: ArrayLike) -> FloatArray:
        """Return the probabilities [N] that are answered."""
        return sigmoid(self.deployed_logit(logits))

    def decide(self, logits: ArrayLike) -> NDArray[np.bool_]:
        """Return whether each image [N] is roadwork: deployed probability > 0.5, strictly."""
        return self.deployed_probability(logits) > DECISION_THRESHOLD


def fit_policy(
    logits: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    served_prior: float,
    n_resamples: int,
    seed: int,
) -> tuple[Policy, dict[str, Any]]:
    """Fit the policy on VAL_CALIB and report what it gains out of fold.

    Parameters
    ----------
    logits
        Of the rule that ships (distorted, fused), finite, [N].
    labels
        0 or 1, both present, [N].
    groups
        Group of each image, [N].
    served_prior
        Share of positives where the policy is used, in (0, 1).
    n_resamples
        Group-bootstrap resamples for the interval of the threshold.
    seed
        Seed of resampling and folds.

    Returns
    -------
    policy, report
        The report holds `n`, `n_groups`, `calibration_prior`, `served_prior`; `threshold`: the
        bagged MCC-optimal threshold of the calibrated probabilities at the served prior, its
        interval (None below 5 groups, widened below 60: `bagged_median_threshold`) and `shifted`;
        `metrics`: `before` (sigmoid of the logit) and `after` (calibrated out of group folds,
        threshold not in), each at the `natural` and the `served` prior; None if `n_folds` is 0:
        some fold would leave a single class to fit on.

    Raises
    ------
    UserError
        If the input is not as described above.
    RuntimeError
        If the calibrator's mean is not the prior of the split.
    """
    served_prior = check_prior(served_prior, "served_prior")
    values, truth = check_scores(logits, labels)
    codes, n_groups = check_groups(groups, values.size)

    fitted = Platt().fit(values, truth, codes)
    check_mean_is_prior(fitted, values, truth)
    at_half = Policy(fitted, float(truth.mean()), served_prior)

    bagged = bagged_median_threshold(
        at_half.calibrated_logit(values), truth, codes, n_resamples, seed, served_prior
    )
    shifted = bagged.excludes(DECISION_THRESHOLD)
    policy = at_half
    if shifted:
        threshold = float(np.clip(bagged.median, THRESHOLD_CLIP, 1 - THRESHOLD_CLIP))
        policy = Policy(fitted, at_half.calibration_prior, served_prior, -_log_odds(threshold))
        _log.info("threshold %.4f moved to 0.5: its interval excludes 0.5", threshold)

    n_folds, metrics = _out_of_fold(values, truth, codes, served_prior, seed)
    return policy, {
        "n": int(values.size),
        "n_groups": n_groups,
        "calibration_prior": policy.calibration_prior,
        "served_prior": served_prior,
        "threshold": asdict(bagged) | {"shifted": shifted},
        "n_folds": n_folds,
        "metrics": metrics,
    }


def _out_of_fold(
    logits: FloatArray,
    truth: NDArray[np.bool_],
    codes: NDArray[np.intp],
    served_prior: float,
    seed: int,
) -> tuple[int, dict[str, Any]]:
    """Return the number of group folds and the metrics before and after calibration."""
    weights = prior_weights(truth, served_prior)

    def measure(probability: FloatArray, weight: FloatArray | None) -> dict[str, float]:
        values = all_metrics(truth, probability, weight)
        return {name: values[name] for name in REPORTED}

    raw = sigmoid(logits)
    before = {"natural": measure(raw, None), "served": measure(raw, weights)}
    folds = _group_folds(truth, codes, seed)
    if not folds:
        return 0, {"before": before, "after": None}
    natural, served = np.empty_like(logits), np.empty_like(logits)
    for held_out in folds:
        kept = ~held_out
        fitted = Platt().fit(logits[kept], truth[kept])
        fold = Policy(fitted, float(truth[kept].mean()), served_prior)
        natural[held_out] = sigmoid(fitted(logits[held_out]))
        served[held_out] = fold.calibrated_probability(logits[held_out])
    after = {"natural": measure(natural, None), "served": measure(served, weights)}
    return len(folds), {"before": before, "after": after}


def _group_folds(
    truth: NDArray[np.bool_], codes: NDArray[np.intp], seed: int
) -> list[NDArray[np.bool_]]:
    """Return masks [N] of up to 5 folds of whole groups; none if a rest would hold one class."""
    # No more folds than images of a class: every fold should hold some of both.
    n_folds = min(MAX_FOLDS, int(codes.max()) + 1, int(truth.sum()), int((~truth).sum()))
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


def scrc_document(policy: Policy, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `scrc_params.json`: the policy, and the report's metrics."""
    return {
        "policy_type": "scrc",
        "scrc_params": {
            "calibrator": policy.calibrator.to_dict(),
            "calibration_prior": policy.calibration_prior,
            "served_prior": policy.served_prior,
            "threshold_shift": policy.threshold_shift,
            "decision_threshold": DECISION_THRESHOLD,
            "abstention": None,
        },
        "metrics": {"before": report["metrics"]["before"], "after": report["metrics"]["after"]},
    }


def policy_from_document(document: object) -> Policy:
    """Return the policy of a `scrc_document`, equal to the bit.

    Raises
    ------
    UserError
        Names the key that is missing, unknown or unusable, and what is allowed.
    """
    top = check_keys(document, {"policy_type", "scrc_params", "metrics"}, "the policy document")
    if top["policy_type"] != "scrc":
        raise UserError(f"policy_type is {top['policy_type']!r}; scrc is needed")
    numbers = ("calibration_prior", "served_prior", "threshold_shift")
    wanted = {"calibrator", *numbers, "decision_threshold", "abstention"}
    params = check_keys(top["scrc_params"], wanted, "scrc_params")
    if check_number(params["decision_threshold"], "decision_threshold") != DECISION_THRESHOLD:
        raise UserError(
            f"decision_threshold is {params['decision_threshold']!r}; it must be "
            f"{DECISION_THRESHOLD}: another threshold is a threshold_shift"
        )
    if params["abstention"] is not None:
        raise UserError(f"abstention is {params['abstention']!r}; only null is supported")
    calibrator = calibration_map_from_dict(params["calibrator"])
    return Policy(calibrator, *(check_number(params[name], name) for name in numbers))


def _log_odds(probability: float) -> float:
    return float(np.log(probability) - np.log1p(-probability))
