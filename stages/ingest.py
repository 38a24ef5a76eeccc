"""Read all sources into Parquet shards in the NATIX schema: `python -m stages.ingest`."""

from __future__ import annotations

from stages.common import Stage, run_stage


def ingest(stage: Stage) -> None:
    """`data.sources` → `data/raw/*.parquet`."""
    from streetvision.core.progress import progress
    from streetvision.sources.ingest import ingest_sources

    data = stage.params.data
    local_root = stage.paths.root / data.local_root
    config = stage.config()
    with stage.scratch(config, {}) as scratch:
        report = ingest_sources(
            list(data.sources),
            local_root,
            stage.paths.raw,
            scratch,
            shard_images=data.shard_images,
            seed=stage.params.seed,
            workers=stage.params.hardware.workers,
            progress=progress,
        )
        stage.write_manifest(config, [], [stage.paths.raw], report)


if __name__ == "__main__":
    run_stage("ingest", __doc__, ingest)
