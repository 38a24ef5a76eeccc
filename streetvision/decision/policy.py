"""The deployed policy: calibrate, move to the served prior, decide at p > 0.5.

The order is fixed (`fit_policy`). The calibrator is fitted at the prior of its own split; that its
mean is that prior is checked; only then are the log-odds shifted to the served prior: a calibrator
fitted after the shift would undo it. The last shift moves an MCC-optimal threshold to 0.5, and is 0
unless the group-bootstrap interval of that threshold excludes 0.5.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError
from streetvision.decision.abstention import Abstention, Answers, fit_abstention
from streetvision.decision.calibrators import CalibrationMap, check_mean_is_prior
from streetvision.decision.choice import (
    AUTO,
    DEPLOYABLE,
    MULTI_OBJECTIVE,
    calibration_map_from_dict,
    check_deployable,
    choose_calibrator,
    choose_multi_objective,
    estimate_all,
    fit_kind,
)
from streetvision.decision.ensemble import TIERS
from streetvision.decision.folds import OutOfFold, group_folds, out_of_fold
from streetvision.decision.hard_images import HardImages
from streetvision.decision.inputs import (
    check_groups,
    check_keys,
    check_logits,
    check_number,
    check_prior,
    check_scores,
    prior_shift,
    sigmoid,
)
from streetvision.decision.scrc import Control, Method, Unit, class_weights, guarantee_groups
from streetvision.decision.threshold import BaggedThreshold, bagged_median_threshold
from streetvision.stats.metrics import all_metrics, prior_weights

FloatArray = NDArray[np.float64]

# What the subnet's validator rounds at; np.round(0.5) is 0, so positive is p > 0.5.
DECISION_THRESHOLD = 0.5
REPORTED = ("log_loss", "brier", "ece")
FitOn = Literal["served", "clean"]
FIT_ON: tuple[FitOn, ...] = ("served", "clean")
# A threshold of 0 or 1 has no finite log-odds.
THRESHOLD_CLIP = 1e-6

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """The map from a logit to the deployed probability, and the decision p > 0.5.

    `calibration_prior` and `served_prior` are shares of positives in (0, 1); `threshold_shift` is
    in log-odds. The whole is strictly increasing in the logit. Without `abstention` every image is
    accepted; it never changes a probability or a decision. `fit_on` says whether the images that
    all this was fitted on were distorted as a challenge is. With `hard_images` its logits are those
    of that two-pass rule. UserError if a field is unusable.
    """

    calibrator: CalibrationMap
    calibration_prior: float
    served_prior: float
    threshold_shift: float = 0.0
    abstention: Abstention | None = None
    fit_on: FitOn = "clean"
    hard_images: HardImages | None = None

    def __post_init__(self) -> None:
        if not self.calibrator.strictly_increasing:
            raise UserError(
                f"the calibrator {self.calibrator.kind} is not strictly increasing; "
                "it may be reported but not deployed"
            )
        if not self.calibrator.keeps_prior:
            raise UserError(
                f"the calibrator {self.calibrator.kind} does not keep the mean at the prior of its "
                "split; it may be reported but not deployed"
            )
        check_prior(self.calibration_prior, "calibration_prior")
        check_prior(self.served_prior, "served_prior")
        check_number(self.threshold_shift, "threshold_shift")
        if self.fit_on not in FIT_ON:
            raise UserError(f"fit_on is {self.fit_on!r}; it must be one of {', '.join(FIT_ON)}")

    def calibrated_logit(self, logits: ArrayLike, prior: float | None = None) -> FloatArray:
        """Return calibrated log-odds [N] at `prior` (the served one by default), threshold not in."""
        prior = self.served_prior if prior is None else check_prior(prior, "prior")
        return self.calibrator(check_logits(logits)) + prior_shift(self.calibration_prior, prior)

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

    def accepts(self, logits: ArrayLike) -> NDArray[np.bool_]:
        """Return whether each image [N] is confident enough to be answered for."""
        probability = self.deployed_probability(logits)
        if self.abstention is None:
            return np.ones(probability.shape, dtype=np.bool_)
        return self.abstention.accepts(probability)


def fit_policy(
    logits: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    served_prior: float,
    n_resamples: int,
    seed: int,
    calibrator: str = "platt",
    *,
    compare_tiers: bool = False,
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
    calibrator
        A deployable one of `CALIBRATORS` or of `TIERS`; auto: the lowest out-of-fold log loss among
        the former (`choose_calibrator`); or multi_objective (`choose_multi_objective`).
    compare_tiers
        Whether the tiers are candidates of the report even if none of them may be chosen: nested
        folds make them dearer than all others.

    Returns
    -------
    policy, report
        The report holds `n`, `n_groups`, `calibration_prior`, `served_prior`; `threshold`: the
        bagged MCC-optimal threshold of the calibrated probabilities at the served prior, its
        interval (None below 4.5 effective groups, widened below 60: `bagged_median_threshold`) and `shifted`;
        `metrics`: `before` (sigmoid of the logit) and `after` (calibrated out of group folds,
        threshold not in), each at the `natural` and the `served` prior, both moved from the former to the
        latter, so that they differ by the calibrator alone; a choice (auto,
        multi_objective) is made anew in each fold, so that it does not flatter itself. `candidates`: of every
        calibrator `log_loss`, `brier` and `ece` out of group folds at the natural prior,
        `deployable`, and `deployed` for the one that the policy uses. `after` and `candidates` are
        None if `n_folds` is 0: some fold would leave a single class to fit on.

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

    check_deployable(calibrator)
    folds = group_folds(truth, codes, seed)
    tiers = compare_tiers or calibrator in {MULTI_OBJECTIVE, *TIERS}
    estimates = estimate_all(values, truth, codes, folds, tiers=tiers)
    kind = calibrator
    if calibrator == AUTO:
        kind = choose_calibrator(truth, estimates)
    elif calibrator == MULTI_OBJECTIVE:
        kind = choose_multi_objective(values, truth, estimates, served_prior)

    policy, bagged = fit_rule(values, truth, codes, served_prior, n_resamples, seed, kind)
    shifted = bagged.excludes(DECISION_THRESHOLD)
    if shifted:
        _log.info("threshold %.4f moved to 0.5: its interval excludes 0.5", bagged.median)

    after = estimates.get(kind)
    if kind != calibrator:
        choose = partial(fit_kind, calibrator, seed=seed, served_prior=served_prior)
        after = out_of_fold(choose, values, truth, codes, folds)
    return policy, {
        "n": int(values.size),
        "n_groups": n_groups,
        "calibration_prior": policy.calibration_prior,
        "served_prior": served_prior,
        "threshold": asdict(bagged) | {"shifted": shifted},
        "n_folds": len(folds),
        "metrics": _before_and_after(values, truth, after, served_prior),
        "candidates": _candidates(truth, estimates, kind) if folds else None,
    }


def fit_rule(
    logits: FloatArray,
    truth: NDArray[np.bool_],
    groups: ArrayLike,
    served_prior: float,
    n_resamples: int,
    seed: int,
    calibrator: str,
) -> tuple[Policy, BaggedThreshold]:
    """Return the policy of checked logits [N] and truth [N], and the threshold that it moves to 0.5.

    Arguments and errors are those of `fit_policy`, which reports on it besides.
    """
    fitted = fit_kind(calibrator, logits, truth, groups, seed, served_prior)
    check_mean_is_prior(fitted, logits, truth)
    at_half = Policy(fitted, float(truth.mean()), served_prior)
    bagged = bagged_median_threshold(
        at_half.calibrated_logit(logits), truth, groups, n_resamples, seed, served_prior
    )
    if not bagged.excludes(DECISION_THRESHOLD):
        return at_half, bagged
    threshold = float(np.clip(bagged.median, THRESHOLD_CLIP, 1 - THRESHOLD_CLIP))
    return replace(at_half, threshold_shift=-_log_odds(threshold)), bagged


def fit_abstaining_policy(
    logits: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    served_prior: float,
    n_resamples: int,
    seed: int,
    calibrator: str = "platt",
    *,
    method: Method,
    control: Control,
    alpha: float,
    delta: float,
    guarantee_fraction: float,
    unit: Unit = "group",
    compare_tiers: bool = False,
) -> tuple[Policy, dict[str, Any]]:
    """Fit the policy on some groups, and its abstention on all others, which hold the guarantee.

    Parameters are those of `fit_policy` and of `fit_abstention`; `guarantee_fraction`, in (0, 1), is
    the share of the groups that hold the guarantee. The report is that of `fit_policy` on the other
    groups, with that of `fit_abstention` under `abstention`.

    Raises
    ------
    UserError
        As `fit_policy`; if the groups to fit on hold a single class.
    """
    values, truth = check_scores(logits, labels)
    names = np.asarray(groups)
    held = guarantee_groups(names, guarantee_fraction, seed)
    rest = ~held
    if truth[rest].all() or not truth[rest].any():
        raise UserError(
            f"the {len(np.unique(names[rest]))} groups left to fit the map on hold one class; "
            "lower decision.guarantee_fraction, or decision.abstention none"
        )
    policy, report = fit_policy(
        values[rest], truth[rest], names[rest], served_prior, n_resamples, seed, calibrator,
        compare_tiers=compare_tiers,
    )  # fmt: skip
    probability = policy.deployed_probability(values)
    fitted, kept = (Answers(probability[part], truth[part], names[part]) for part in (rest, held))
    abstention, found = fit_abstention(
        fitted, kept, class_weights(policy.calibration_prior, served_prior),
        method=method, control=control, alpha=alpha, delta=delta, unit=unit,
    )  # fmt: skip
    if not found["promised"]:
        _log.warning("abstention: %s", abstention.guarantee)
    return replace(policy, abstention=abstention), report | {"abstention": found}


def _measure(
    truth: NDArray[np.bool_], probability: FloatArray, weight: FloatArray | None
) -> dict[str, float]:
    values = all_metrics(truth, probability, weight)
    return {name: values[name] for name in REPORTED}


def _before_and_after(
    logits: FloatArray, truth: NDArray[np.bool_], after: OutOfFold | None, served_prior: float
) -> dict[str, Any]:
    """Return the metrics of the raw logits and of the calibrated ones, at both priors.

    Both get the same shift to the served prior: most of what would else pass for the calibrator's gain.
    """
    weights = prior_weights(truth, served_prior)

    def both(natural: FloatArray, served: FloatArray) -> dict[str, dict[str, float]]:
        return {
            "natural": _measure(truth, natural, None),
            "served": _measure(truth, served, weights),
        }

    moved = logits + prior_shift(float(truth.mean()), served_prior)
    before = both(sigmoid(logits), sigmoid(moved))
    if after is None:
        return {"before": before, "after": None}
    shift = _log_odds(served_prior) - after.prior_log_odds
    natural = sigmoid(after.log_odds)
    return {"before": before, "after": both(natural, sigmoid(after.log_odds + shift))}


def _candidates(
    truth: NDArray[np.bool_], estimates: Mapping[str, OutOfFold], deployed: str
) -> dict[str, Any]:
    """Return what each calibrator scores out of fold, at the natural prior."""
    return {
        name: _measure(truth, sigmoid(estimate.log_odds), None)
        | {"deployable": name in {*DEPLOYABLE, *TIERS}, "deployed": name == deployed}
        for name, estimate in estimates.items()
    }


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
            "abstention": None if policy.abstention is None else policy.abstention.to_dict(),
            "fit_on": policy.fit_on,
            "hard_images": None if policy.hard_images is None else policy.hard_images.to_dict(),
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
    params = top["scrc_params"]
    if isinstance(params, Mapping):
        # What older documents were fitted on.
        params = {"fit_on": "clean", "hard_images": None} | dict(params)
    params = check_keys(params, wanted | {"fit_on", "hard_images"}, "scrc_params")
    if check_number(params["decision_threshold"], "decision_threshold") != DECISION_THRESHOLD:
        raise UserError(
            f"decision_threshold is {params['decision_threshold']!r}; it must be "
            f"{DECISION_THRESHOLD}: another threshold is a threshold_shift"
        )
    calibrator = calibration_map_from_dict(params["calibrator"])
    stored = params["abstention"]
    abstention = None if stored is None else Abstention.from_dict(stored)
    calibration_prior, served_prior, shift = (check_number(params[name], name) for name in numbers)
    hard = params["hard_images"]
    # What policies called it until the validator was a parameter.
    fit_on: Any = "served" if params["fit_on"] == "challenge" else params["fit_on"]
    return Policy(
        calibrator, calibration_prior, served_prior, shift, abstention, fit_on,
        None if hard is None else HardImages.from_dict(hard),
    )  # fmt: skip


def _log_odds(probability: float) -> float:
    return float(np.log(probability) - np.log1p(-probability))
