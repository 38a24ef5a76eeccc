"""Phase 4c, how the views of an image become one logit: `python -m stages.cvfm`."""

from __future__ import annotations

from stages.common import Stage, run_stage
from streetvision.artifacts import read_json, write_bytes_atomic, write_json_atomic


def cvfm(stage: Stage) -> None:
    """Embeddings of TRAIN's fusion part and VAL_SELECT → `models/cvfm`; each mode is reported."""
    from streetvision.data.embeddings import read_embeddings
    from streetvision.evaluation.plots import plot_fusion
    from streetvision.models.classifier import load_classifier
    from streetvision.models.fusion import save_fusion
    from streetvision.models.fusion_training import LabelledViews, choose_fusion

    params, paths = stage.params, stage.paths
    sources = {name: paths.embeddings(name) for name in ("train", "val_select")}
    parts = {}
    for name, source in sources.items():
        found = read_embeddings(source, features=True)
        parts[name] = LabelledViews(found.scores, found.labels, found.groups)
    threshold = read_json(paths.thresholds, "sweep")["threshold"]
    model, _ = load_classifier(paths.classifier)
    fusion, report = choose_fusion(
        params.cvfm, params.views, parts["train"], parts["val_select"], model.head, threshold,
        params.seed,
    )  # fmt: skip
    outputs = save_fusion(fusion, paths.cvfm)
    outputs.append(write_json_atomic(paths.metric("cvfm"), report))
    picture = plot_fusion(report["modes"], report["mode"])
    outputs.append(write_bytes_atomic(paths.plot("fusion.png"), picture))
    inputs = [*sources.values(), paths.thresholds, paths.classifier]
    metrics = {"mode": report["mode"], **report["modes"][report["mode"]]}
    stage.write_manifest(stage.config(), inputs, outputs, metrics)


if __name__ == "__main__":
    run_stage("cvfm", __doc__, cvfm)
