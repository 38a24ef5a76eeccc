"""Phase 5, from logits to the deployed probability: `python -m stages.calibrate`."""

from __future__ import annotations

from typing import Any

from stages.common import Stage, run_stage
from streetvision.artifacts import read_json, write_bytes_atomic, write_json_atomic


def calibrate(stage: Stage) -> None:
    """Fused VAL_CALIB logits → `scrc_params.json` and `.pkl`, with the phase-2 threshold as baseline."""
    from streetvision.data.embeddings import read_embeddings
    from streetvision.decision.inputs import sigmoid
    from streetvision.decision.pickling import dump_policy_pickle
    from streetvision.decision.policy import fit_abstaining_policy, fit_policy, scrc_document
    from streetvision.decision.report import calibration_metrics
    from streetvision.decision.validator import PolicyValidator
    from streetvision.evaluation.metrics import prior_weights
    from streetvision.evaluation.plots import plot_reliability
    from streetvision.models.fusion import load_fusion

    params, paths = stage.params, stage.paths

    def head() -> Any:
        from streetvision.models.classifier import load_classifier  # torch, for one mode only

        return load_classifier(paths.classifier)[0].head

    source = paths.embeddings("val_calib")
    fusion = load_fusion(paths.cvfm, head)
    calib = read_embeddings(source, features=fusion.needs_features)
    logits = fusion.fuse(*calib.scores)
    baseline = read_json(paths.thresholds, "sweep")
    validator = PolicyValidator()
    validator.validate(baseline)
    decision = params.decision
    if decision.abstention == "none":
        policy, report = fit_policy(
            logits, calib.labels, calib.groups, decision.served_prior, decision.n_resamples,
            params.seed, decision.calibrator, compare_tiers=True,
        )  # fmt: skip
    else:
        policy, report = fit_abstaining_policy(
            logits, calib.labels, calib.groups, decision.served_prior, decision.n_resamples,
            params.seed, decision.calibrator, compare_tiers=True,
            method=decision.abstention, control=decision.control, alpha=decision.alpha,
            delta=decision.delta, guarantee_fraction=decision.guarantee_fraction,
        )  # fmt: skip
    document = scrc_document(policy, report)
    validator.validate(document)
    write_json_atomic(paths.scrc_params, document)
    write_bytes_atomic(paths.scrc_pickle, dump_policy_pickle(document))
    metrics = calibration_metrics(
        report, policy, logits, calib.labels, baseline["threshold"], calib.logits
    )
    write_json_atomic(paths.metric("calibrate"), metrics)
    weights = prior_weights(calib.labels, decision.served_prior)
    plots = {
        "reliability_before.png": (sigmoid(logits), "VAL_CALIB, before"),
        "reliability_after.png": (
            policy.calibrated_probability(logits),
            "VAL_CALIB, after, in sample",
        ),
    }
    outputs = [paths.scrc_params, paths.scrc_pickle, paths.metric("calibrate")]
    for name, (probabilities, title) in plots.items():
        picture = plot_reliability(calib.labels, probabilities, weights, title)
        outputs.append(write_bytes_atomic(paths.plot(name), picture))
    stage.write_manifest(
        stage.config(),
        [source, paths.thresholds, paths.cvfm, paths.classifier],
        outputs,
        metrics["decision"]["deployed"],
    )


if __name__ == "__main__":
    run_stage("calibrate", __doc__, calibrate)
