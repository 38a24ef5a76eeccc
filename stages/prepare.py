"""Decode, check, group and split the images: `python -m stages.prepare`."""

from __future__ import annotations

from stages.common import Stage, run_stage
from streetvision.core.artifacts import write_json_atomic
from streetvision.core.schema import SPLITS


def prepare(stage: Stage) -> None:
    """`data/raw` → four split files, `data/quarantine.csv`, `metrics/data.json`."""
    from streetvision.core.progress import progress
    from streetvision.prepare.prepare import prepare_splits

    paths = stage.paths
    splits = {name: paths.split(name) for name in SPLITS}
    config = stage.config()
    with stage.scratch(config, stage.upstream("ingest")) as scratch:
        report = prepare_splits(
            paths.raw,
            splits,
            paths.originals,
            paths.quarantine,
            scratch,
            data=stage.params.data,
            seed=stage.params.data.split_seed,
            workers=stage.params.hardware.workers,
            progress=progress,
        )
        write_json_atomic(paths.metric("data"), report)
        outputs = [*splits.values(), paths.originals, paths.quarantine, paths.metric("data")]
        stage.write_manifest(config, [paths.raw], outputs, {"rows_kept": report["rows_kept"]})


if __name__ == "__main__":
    run_stage("prepare", __doc__, prepare)
