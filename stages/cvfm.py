"""Phase 4c, how the views of an image become one logit: `python -m stages.cvfm`."""

from __future__ import annotations

from stages.common import Stage, run_stage
from streetvision.core.artifacts import write_bytes_atomic, write_json_atomic


def cvfm(stage: Stage) -> None:
    """Embeddings of TRAIN's fusion part and VAL_SELECT → `models/cvfm`; each mode is reported.

    Fitted on and chosen by the images that `decision.fit_on` names, clean or as served.
    """
    from streetvision.core.schema import CONDITIONS
    from streetvision.data.embeddings import read_embeddings
    from streetvision.decision.threshold import read_threshold
    from streetvision.fusion.fitting import LabelledViews, choose_fusion
    from streetvision.fusion.fusion import save_fusion
    from streetvision.models.classifier import load_head
    from streetvision.plots.pictures import plot_fusion

    params, paths = stage.params, stage.paths
    fit_on = params.decision.fit_on

    def views(name: str, condition: str) -> LabelledViews:
        found = read_embeddings(paths.embeddings(name, condition), features=True)
        return LabelledViews(found.scores, found.labels, found.groups)

    select = {condition: views("val_select", condition) for condition in CONDITIONS}
    threshold = read_threshold(paths.threshold)
    fusion, report = choose_fusion(
        params.cvfm, params.views, views("train", fit_on), select, fit_on,
        load_head(paths.classifier), threshold, params.seed,
    )  # fmt: skip
    outputs = save_fusion(fusion, paths.cvfm)
    outputs.append(write_json_atomic(paths.metric("cvfm"), report))
    rows = {mode: {"views": row["views"], **row[fit_on]} for mode, row in report["modes"].items()}
    picture = plot_fusion(rows, report["mode"], fit_on)
    outputs.append(write_bytes_atomic(paths.plot("fusion.png"), picture))
    sources = [
        paths.embeddings(name, each) for name in ("train", "val_select") for each in CONDITIONS
    ]
    inputs = [*sources, paths.threshold, paths.classifier]
    metrics = {"mode": report["mode"], **rows[report["mode"]]}
    stage.write_manifest(stage.config(), inputs, outputs, metrics)


if __name__ == "__main__":
    run_stage("cvfm", __doc__, cvfm)
