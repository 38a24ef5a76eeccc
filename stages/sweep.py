"""Phase 2, the threshold with the best MCC on single-view logits: `python -m stages.sweep`."""

from __future__ import annotations

from dataclasses import asdict

from stages.common import Stage, run_stage
from streetvision.core.artifacts import write_bytes_atomic, write_csv_atomic, write_json_atomic

PLOTTED = 101  # points of the curve that is in Git, for revisions to be laid over each other


def sweep(stage: Stage) -> None:
    """VAL_CALIB logits → `thresholds.json`, its threshold alone, curve (full and thinned out), picture."""
    from streetvision.data.embeddings import read_embeddings
    from streetvision.decision.report import sweep_thresholds
    from streetvision.plots.curves import evenly
    from streetvision.plots.pictures import plot_threshold_sweep

    params, paths = stage.params, stage.paths
    source = paths.embeddings("val_calib")
    calib = read_embeddings(source)
    document, curve = sweep_thresholds(
        calib.logits, calib.labels, calib.groups,
        n_thresholds=params.sweep.n_thresholds, selection=params.sweep.selection,
        n_resamples=params.decision.n_resamples, seed=params.seed, split_used="val_calib",
    )  # fmt: skip
    metrics = {"threshold": document["threshold"], **document["metrics"]}
    write_json_atomic(paths.thresholds, document)
    write_json_atomic(paths.threshold, {"threshold": document["threshold"]})
    write_json_atomic(paths.metric("sweep"), metrics)
    picture = plot_threshold_sweep(
        curve.threshold, curve.mcc, curve.tp, curve.tn, curve.fp, curve.fn, document["threshold"]
    )
    write_bytes_atomic(paths.plot("mcc_curve.png"), picture)
    outputs = [
        paths.thresholds, paths.threshold, paths.metric("sweep"), paths.plot("mcc_curve.png"),
    ]  # fmt: skip
    columns = asdict(curve) if params.sweep.save_curve else {key: [] for key in asdict(curve)}
    outputs.append(write_csv_atomic(paths.plot("threshold_sweep.csv"), columns))
    rows = evenly(len(curve.threshold), PLOTTED)
    thin = {"threshold": curve.threshold[rows].tolist(), "mcc": curve.mcc[rows].tolist()}
    outputs.append(write_csv_atomic(paths.plot("mcc_curve.csv"), thin))
    stage.write_manifest(stage.config(), [source], outputs, metrics)


if __name__ == "__main__":
    run_stage("sweep", __doc__, sweep)
