"""Pass 1 of `prepare`: each row group of each raw shard becomes a part file, in parallel.

A part that is there is not made again, which is how an interrupted run resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streetvision.core.artifacts import write_atomic
from streetvision.core.errors import UserError
from streetvision.core.params import Data
from streetvision.core.processes import in_processes
from streetvision.core.progress import Progress
from streetvision.core.schema import RAW_SCHEMA, SPLIT_SCHEMA, UNREAD_LABEL, unread_value
from streetvision.data.pixels import UnusableImageError
from streetvision.prepare import decode, duplicates

log = logging.getLogger(__name__)

_READ_ROWS = 8  # raw images in memory at once, a worker

# All rows of a raw row group: a quarantined row has a reason and no image.
PART_SCHEMA = pa.schema(
    [
        *[field.with_nullable(True) for field in SPLIT_SCHEMA if field.name != "fusion"],
        pa.field("thumbnail", pa.binary(duplicates.THUMBNAIL_SIDE**2)),
        pa.field("reason", pa.string()),
    ]
)
_COPIED = [name for name in RAW_SCHEMA.names if name not in {"image", "label"}]


@dataclass(frozen=True)
class Part:
    """One row group of a raw shard and the file it becomes."""

    shard: Path
    row_group: int
    first_row: int  # of the row group, counted in the shard
    path: Path


def make_parts(
    raw_folder: Path, scratch: Path, data: Data, workers: int, progress: Progress
) -> list[Part]:
    """Make the missing parts; returns all in raw order."""
    shards = sorted(raw_folder.glob("*.parquet"))
    if not shards:
        raise UserError(f"{raw_folder} holds no *.parquet file; the stage `ingest` makes them")
    parts = [part for shard in shards for part in _plan(shard, scratch)]
    missing = [part for part in parts if not part.path.exists()]
    if len(missing) < len(parts):
        log.info("resuming: %d of %d parts are there", len(parts) - len(missing), len(parts))
    done = in_processes(partial(_make_part, data=data), missing, workers)
    for _ in progress(done, len(missing), "decoding"):
        pass
    return parts


def _plan(shard: Path, scratch: Path) -> Iterator[Part]:
    """List the parts of one shard from its footer."""
    try:
        footer = pq.read_metadata(shard)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(shard, error) from error
    if not schema.remove_metadata().equals(RAW_SCHEMA):
        wrong = [field.name for field in RAW_SCHEMA if field not in schema]
        raise UserError(
            f"{shard} is not in the raw schema (missing or of another type: "
            f"{', '.join(wrong) or 'none, but columns are added or reordered'}); rerun `ingest`"
        )
    first_row = 0
    for number in range(footer.num_row_groups):
        yield Part(shard, number, first_row, scratch / f"{shard.stem}-{number:05d}.arrow")
        first_row += footer.row_group(number).num_rows


def _unreadable(shard: Path, error: Exception) -> UserError:
    return UserError(f"{shard} cannot be read ({' '.join(str(error).split())}); rerun `ingest`")


def read_raw(part: Part, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the raw rows of a part, a few at a time; all columns by default."""
    # Without a buffer Arrow reads whole column chunks: gigabytes of large photographs.
    with pq.ParquetFile(part.shard, buffer_size=1 << 20) as file:
        yield from file.iter_batches(
            _READ_ROWS, row_groups=[part.row_group], columns=columns, use_threads=False
        )


def _make_part(part: Part, data: Data) -> None:
    """Decode one row group into its part file."""

    def write(path: Path) -> None:
        with pa.ipc.new_file(path, PART_SCHEMA) as writer:
            for batch in read_raw(part):
                writer.write_batch(_prepare_batch(batch, data))

    try:
        write_atomic(part.path, write)
    except pa.ArrowException as error:
        raise _unreadable(part.shard, error) from error


def _prepare_batch(batch: pa.RecordBatch, data: Data) -> pa.RecordBatch:
    """Decode a batch of raw rows into `PART_SCHEMA`."""
    images = batch.column("image").flatten()[0]  # the bytes; null where the struct is
    columns = [batch.column(name) for name in ("label", "extra")]
    rows = [
        _prepare_row(image, label.as_py(), extra, data)
        for image, label, extra in zip(images, *columns, strict=True)
    ]
    made = pa.Table.from_pylist(rows, PART_SCHEMA)
    columns = [
        batch.column(name) if name in _COPIED else made.column(name).combine_chunks()
        for name in PART_SCHEMA.names
    ]
    return pa.record_batch(columns, schema=PART_SCHEMA)


def _prepare_row(image: Any, label: int | None, extra: Any, data: Data) -> dict[str, Any]:
    """Return the new columns of one row, or only the reason why it cannot be used."""
    if label is None:
        unread = unread_value(extra.as_py(), UNREAD_LABEL)
        if unread is None:
            return {"reason": "label missing"}
        return {"reason": f'label "{unread:.60}" not understood'}
    if label not in {0, 1}:
        return {"reason": "label not 0 or 1"}
    content = image.as_py() or b""
    try:
        decoded = decode.decode_image(
            content, side_px=data.side_px, max_pixels=data.max_source_pixels
        )
    except UnusableImageError as error:
        return {"reason": error.reason}
    return {
        "image": decoded.jpeg or decode.encode_jpeg(decoded.image, data.jpeg_quality),
        "label": label,
        "width": decoded.image.width,
        "height": decoded.image.height,
        "original_width": decoded.original_width,
        "original_height": decoded.original_height,
        "thumbnail": duplicates.make_thumbnail(decoded.image).tobytes(),
    }
