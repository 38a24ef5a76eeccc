"""Phase 5, from logits to the deployed probability: `python -m stages.calibrate`."""

from __future__ import annotations

from typing import Any

from stages.common import Stage, run_stage
from streetvision.core.artifacts import (
    write_bytes_atomic,
    write_csv_atomic,
    write_json_atomic,
)


def calibrate(stage: Stage) -> None:
    """Fused VAL_CALIB logits → `scrc_params.json` and `.pkl`, with the phase-2 threshold as baseline.

    Fitted on the images that `decision.fit_on` names, clean or as served, and reported on both.
    """
    from streetvision.core.schema import CONDITIONS
    from streetvision.data.embeddings import read_embeddings
    from streetvision.decision.fitting import Passes, fit_decision
    from streetvision.decision.inputs import prior_shift, sigmoid
    from streetvision.decision.pickling import dump_policy_pickle
    from streetvision.decision.policy import scrc_document
    from streetvision.decision.report import calibration_metrics
    from streetvision.decision.threshold import read_threshold
    from streetvision.decision.validator import PolicyValidator
    from streetvision.fusion.fusion import load_fusion
    from streetvision.plots.curves import reliability_table

    params, paths = stage.params, stage.paths

    def head() -> Any:
        from streetvision.models.classifier import load_head  # torch, for one mode only

        return load_head(paths.classifier)

    sources = {name: paths.embeddings("val_calib", name) for name in CONDITIONS}
    fusion = load_fusion(paths.cvfm, head)
    found = {
        name: read_embeddings(source, features=fusion.needs_features)
        for name, source in sources.items()
    }
    decision = params.decision
    passes = {
        name: Passes(
            each.logits, fusion.fuse(*each.scores), each.labels,
            each.units(decision.exchangeable_unit),
        )
        for name, each in found.items()
    }  # fmt: skip
    baseline = read_threshold(paths.threshold)
    policy, report, (logits, labels, _) = fit_decision(
        passes, decision, params.seed, several_views=fusion.n_views > 1
    )
    document = scrc_document(policy, report)
    PolicyValidator().validate(document)
    write_json_atomic(paths.scrc_params, document)
    write_bytes_atomic(paths.scrc_pickle, dump_policy_pickle(document))
    single = found[decision.fit_on].logits
    metrics = calibration_metrics(report, policy, logits, labels, baseline, single)
    write_json_atomic(paths.metric("calibrate"), metrics)
    moved = logits + prior_shift(policy.calibration_prior, policy.served_prior)
    before, after = (
        reliability_table(labels, probabilities, decision.served_prior, panel)
        for probabilities, panel in (
            (sigmoid(moved), "before, at the served prior"),
            (policy.calibrated_probability(logits), "after, in sample"),
        )
    )
    table = {column: [*before[column], *after[column]] for column in before}
    outputs = [paths.scrc_params, paths.scrc_pickle, paths.metric("calibrate")]
    outputs.append(write_csv_atomic(paths.plot("calibration.csv"), table))
    stage.write_manifest(
        stage.config(),
        [*sources.values(), paths.threshold, paths.cvfm, paths.classifier],
        outputs,
        metrics["decision"]["deployed"],
    )


if __name__ == "__main__":
    run_stage("calibrate", __doc__, calibrate)
