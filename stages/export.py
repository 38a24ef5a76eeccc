"""Phase 6, the deployable bundle: `python -m stages.export`."""

from __future__ import annotations

from stages.common import Stage, run_stage
from streetvision.artifacts import write_json_atomic


def export(stage: Stage) -> None:
    """Classifier, fusion and policy → `models/bundle`."""
    from streetvision.bundle.export import export_bundle

    params, paths = stage.params, stage.paths
    metrics = export_bundle(
        paths.classifier, paths.scrc_params, paths.scrc_pickle, paths.bundle,
        cvfm=paths.cvfm, batch_size=params.embed.batch_size, make_tar=params.export.make_tar,
    )  # fmt: skip
    write_json_atomic(paths.metric("export"), metrics)
    inputs = [paths.classifier, paths.cvfm, paths.scrc_params, paths.scrc_pickle]
    stage.write_manifest(stage.config(), inputs, [paths.bundle, paths.metric("export")], metrics)


if __name__ == "__main__":
    run_stage("export", __doc__, export)
