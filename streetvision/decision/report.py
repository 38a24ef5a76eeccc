"""What `sweep` and `calibrate` report: documents with scalar leaves and fixed keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import ArrayLike

from streetvision.decision.policy import Policy
from streetvision.decision.threshold import (
    ThresholdCurve,
    bagged_median_threshold,
    metrics_at_threshold,
    select_threshold_max_mcc,
    thresholds_document,
)
from streetvision.stats.metrics import prior_weights


def sweep_thresholds(
    logits: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    *,
    n_thresholds: int,
    selection: str,
    n_resamples: int,
    seed: int,
    split_used: str,
) -> tuple[dict[str, Any], ThresholdCurve]:
    """Return the content of `thresholds.json` and the curve over `n_thresholds` thresholds.

    `selection` is `exact` (the optimum over all cut points) or `bagged_median` (of that optimum over
    resamples of groups). See `streetvision.decision.threshold` for arguments and errors.
    """
    threshold, _, metrics, curve = select_threshold_max_mcc(
        logits, labels, n_thresholds, return_curve=True
    )
    bagged = bagged_median_threshold(logits, labels, groups, n_resamples, seed)
    if selection == "bagged_median":
        threshold = bagged.median
        metrics = metrics_at_threshold(logits, labels, threshold)
    return thresholds_document(threshold, metrics, curve, bagged, split_used), curve


def calibration_metrics(
    report: Mapping[str, Any],
    policy: Policy,
    logits: ArrayLike,
    labels: ArrayLike,
    baseline_threshold: float,
    single_logits: ArrayLike | None = None,
) -> dict[str, Any]:
    """Return the content of `metrics/calibrate.json`.

    `before` (the logits as they are) and `after` differ by the calibrator alone: both are moved from the
    natural to the served prior. `after` and `candidates` (every calibrator at the natural prior) are out of
    group folds, and left out where folds were impossible. `abstention` is there if the
    policy has one: `n`, `groups` and what is out of fold are then of the groups that it was fitted on.
    `hard_images` is there if the policy has a second pass: its band of logits, and the share that gets it.
    `groups` counts units of the kind `exchangeable_unit`.
    `fit_on` says which images `logits` are of: clean ones, or distorted ones. `on_clean` and
    `on_served` (`report["conditions"]`, of `conditions_report`) are what to expect of the deployed
    rule on either. `decision` compares it with the phase-2 threshold on `single_logits` (for None on
    `logits`), at the served prior; it was chosen on these very images, and so was that threshold if
    they are clean, so this shows agreement and is no estimate.
    """
    weights = prior_weights(labels, policy.served_prior)
    decided = metrics_at_threshold(policy.deployed_logit(logits), labels, 0.5, weights)
    single = logits if single_logits is None else single_logits
    baseline = metrics_at_threshold(single, labels, baseline_threshold, weights)
    wanted = ("mcc", "accuracy", "fnr", "fpr")
    threshold = {k: v for k, v in report["threshold"].items() if v is not None}
    return {
        "n": report["n"],
        "groups": report["n_groups"],
        "exchangeable_unit": report.get("exchangeable_unit", "group"),
        "folds": report["n_folds"],
        "calibration_prior": report["calibration_prior"],
        "served_prior": report["served_prior"],
        "fit_on": policy.fit_on,
        "threshold": threshold,
        **{name: values for name, values in report["metrics"].items() if values is not None},
        **({"candidates": report["candidates"]} if report["candidates"] else {}),
        **report.get("conditions", {}),
        **({"hard_images": report["hard_images"]} if "hard_images" in report else {}),
        **({"abstention": report["abstention"]} if "abstention" in report else {}),
        "decision": {
            "deployed": {name: decided[name] for name in wanted},
            "phase_2_threshold": {name: baseline[name] for name in wanted},
        },
    }
