"""Write all sources as Parquet shards in the NATIX schema: in parallel, resumable, reproducible.

A shard depends on its rows alone, so neither the number of workers nor an interruption can change
a byte of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streetvision.core.artifacts import config_hash, move, write_atomic, write_bytes_atomic
from streetvision.core.params import Source
from streetvision.core.processes import in_processes
from streetvision.core.progress import Progress, no_progress
from streetvision.core.schema import RAW_SCHEMA
from streetvision.data.pixels import PREPARE_DECODE_SECONDS, UnusableImageError, without_metadata
from streetvision.sources.parts import Part, Plan, Row
from streetvision.sources.sources import plan_source

# A row group is what a reader loads at once: bounded in rows for small images, in bytes for large.
ROW_GROUP_ROWS = 250
ROW_GROUP_BYTES = 64 * 2**20


def ingest_sources(
    sources: Sequence[Source],
    local_root: Path,
    output: Path,
    scratch: Path,
    *,
    shard_images: int,
    seed: int,
    workers: int,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Fill `output` with the shards `<source number>-<name>-<shard number>.parquet`.

    Parameters
    ----------
    sources : in the order of the shards
    local_root : folder that the paths of local sources are relative to
    output : folder of the shards; other shards in it are deleted at the end
    scratch : folder of finished shards; a rerun with the same arguments and unchanged inputs goes on
        from it
    shard_images : rows of one shard
    seed : of the synthetic sources
    workers : processes, 0 = one a core
    progress : shows how far it is, `streetvision.core.progress.progress`

    Returns
    -------
    `sources`: rows, shards, bytes and ignored files by source name; `total`: their sums.

    Raises
    ------
    UserError
        A source is missing, empty or not in its format; a worker was killed.
    """
    plans = [plan_source(s, local_root, shard_images=shard_images, seed=seed) for s in sources]
    names = [source.name for source in sources]
    key = _fingerprint(sources, plans, shard_images, seed)
    return write_plans(names, plans, output, scratch, key, workers, progress)


def write_plans(
    names: Sequence[str],
    plans: Sequence[Plan],
    output: Path,
    scratch: Path,
    fingerprint: str,
    workers: int,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the shards of sources that are planned already; see `ingest_sources`.

    Shards that are in `scratch` with the same `fingerprint` are taken as they are.
    """
    shards = [
        {f"{index:02d}-{name}-{number:05d}.parquet": part for number, part in enumerate(plan.parts)}
        for index, (name, plan) in enumerate(zip(names, plans, strict=True))
    ]
    jobs = {name: part for parts in shards for name, part in parts.items()}
    _keep_valid_shards(scratch, fingerprint)
    _write_shards(jobs, scratch, workers, progress)

    output.mkdir(parents=True, exist_ok=True)
    for stale in output.glob("*.parquet"):
        if stale.name not in jobs:
            stale.unlink()
    for file in jobs:
        move(scratch / file, output / file)
    report: dict[str, Any] = {
        name: {
            "rows": sum(part.n_rows for part in parts.values()),
            "shards": len(parts),
            "bytes": sum((output / file).stat().st_size for file in parts),
            "ignored_files": plan.ignored_files,
        }
        for name, plan, parts in zip(names, plans, shards, strict=True)
    }
    keys = ("rows", "shards", "bytes", "ignored_files")
    return {
        "sources": report,
        "total": {key: sum(entry[key] for entry in report.values()) for key in keys},
    }


def write_shard(part: Part, path: Path) -> None:
    """Write one shard atomically, in row groups of at most 250 rows and about 64 MiB."""

    def write(temporary: Path) -> None:
        # JPEG bytes neither compress nor repeat; statistics of them would copy whole images.
        context = [name for name in RAW_SCHEMA.names if name not in {"id", "image"}]
        with pq.ParquetWriter(
            temporary,
            RAW_SCHEMA,
            compression="none",
            use_dictionary=context,
            write_statistics=False,
        ) as writer:
            for rows in _row_groups(part.read()):
                writer.write_table(pa.Table.from_pylist(rows, RAW_SCHEMA), ROW_GROUP_ROWS)

    write_atomic(path, write)


def _row_groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Collect rows until a row group is full."""
    group: list[Row] = []
    size = 0
    for row in rows:
        given = row["image"]["bytes"]
        data = _kept(given) if given else given
        group.append({**row, "image": {**row["image"], "bytes": data}})
        size += len(data or b"")
        if len(group) == ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _kept(data: bytes) -> bytes:
    """The image without metadata: where and by whom it was taken is nobody's to hand on.

    What is no usable image stays as it is; `prepare` says why.
    """
    try:
        return without_metadata(data, PREPARE_DECODE_SECONDS)
    except UnusableImageError:
        return data


# --------------------------------------------------------------------------- resuming


def _fingerprint(
    sources: Sequence[Source], plans: Sequence[Plan], shard_images: int, seed: int
) -> str:
    """Hash of everything that a shard's bytes depend on."""
    digest = hashlib.sha256(
        config_hash(
            {"sources": [s.model_dump() for s in sources], "rows": shard_images, "seed": seed}
        ).encode()
    )
    for plan in plans:
        for entry in plan.inputs:
            digest.update(repr(entry).encode())
    return digest.hexdigest()


def _keep_valid_shards(scratch: Path, fingerprint: str) -> None:
    """Delete what an earlier run left, except finished shards of the same inputs."""
    scratch.mkdir(parents=True, exist_ok=True)
    mark = scratch / ".inputs.sha256"
    same = mark.is_file() and mark.read_text() == fingerprint
    for pattern in (".*.tmp",) if same else (".*.tmp", "*.parquet"):
        for left in scratch.glob(pattern):
            left.unlink()
    if not same:
        write_bytes_atomic(mark, fingerprint.encode())


# --------------------------------------------------------------------------- workers


def _write_shards(
    jobs: Mapping[str, Part], scratch: Path, workers: int, progress: Progress
) -> None:
    """Write the shards that are not there yet."""
    todo = [(part, scratch / name) for name, part in jobs.items() if not (scratch / name).exists()]
    for _ in progress(in_processes(_write_job, todo, workers), len(todo), "shards"):
        pass


def _write_job(job: tuple[Part, Path]) -> None:
    write_shard(*job)
