"""Parquet files in the NATIX schema as they are found in the wild, read row by row.

The image column is found as the subnet's validator finds it: a column whose name contains "image",
holding a struct with bytes, raw bytes or base64. Labels, position and context are found by their
usual names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streetvision.data.parts import (
    TEXT_COLUMNS,
    Plan,
    Row,
    extra_json,
    input_stat,
    position,
    slices,
    text,
)
from streetvision.data.payload import from_base64
from streetvision.data.schema import CLASS_NAMES
from streetvision.errors import UserError

# Our column → its names in the wild, in lower case with `_` for spaces and hyphens.
ALIASES = {
    "label": ("label", "labels"),
    "scene_description": ("scene_description",),
    "latitude": ("latitude", "lat", "gps_latitude"),
    "longitude": ("longitude", "lon", "lng", "gps_longitude"),
    "gps": ("gps", "gps_coordinates", "gps_position"),
    "weather": ("weather", "weather_condition", "weather_conditions"),
    "daytime": ("daytime", "time_of_day", "timeofday", "day_time"),
    "scene": ("scene", "scene_type"),
    "group": ("group",),
    "drive": ("drive",),
    "evidence_box": ("evidence_box",),
}
# Rows decoded at a time: at 1.2 MB an image, tens of megabytes.
BATCH_ROWS = 32


@dataclass(frozen=True)
class Segment:
    """Rows `start` … `stop - 1` of one Parquet file."""

    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class ParquetPart:
    """Rows of one or more Parquet files; `first` is the index of the first one in its source."""

    name: str
    first: int
    segments: tuple[Segment, ...]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return sum(segment.stop - segment.start for segment in self.segments)

    def read(self) -> Iterator[Row]:
        """Translate row after row."""
        index = self.first
        for segment in self.segments:
            for row in _read_segment(segment):
                yield {**row, "id": f"{self.name}-{index:06d}", "source": self.name}
                index += 1


def find_parquet(path: Path, place: str) -> list[Path]:
    """Return the file itself, or all `*.parquet` below a folder in order of their paths."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{place}: {path} is missing")
    found = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith("."))
    if not found:
        raise UserError(f"{place}: folder {path} holds no .parquet files")
    return found


def plan_parquet(name: str, files: Sequence[Path], shard_images: int) -> Plan:
    """Cut the concatenated rows of the files into shards.

    Raises
    ------
    UserError
        A file that is no Parquet file, has no image column, or nothing that tells a label.
    """
    counts = []
    for file in files:
        with _open(file) as parquet:
            find_columns(parquet.schema_arrow, str(file))
            counts.append(parquet.metadata.num_rows)
    ends = list(accumulate(counts))
    parts = []
    for start, stop in slices(sum(counts), shard_images):
        segments = [
            Segment(file, max(start - end + count, 0), min(stop - end + count, count))
            for file, count, end in zip(files, counts, ends, strict=True)
            if count and start < end and stop > end - count
        ]
        parts.append(ParquetPart(name, start, tuple(segments)))
    return Plan(parts, [input_stat(file) for file in files])


# --------------------------------------------------------------------------- columns


def find_columns(schema: pa.Schema, place: str) -> dict[str, str]:
    """Map our columns, and `image`, to the names they have in a file.

    Raises
    ------
    UserError
        No usable image column; neither a label nor a scene description.
    """
    simple = {name.lower().replace(" ", "_").replace("-", "_"): name for name in schema.names}
    found = {}
    for column, aliases in ALIASES.items():
        match = next((simple[alias] for alias in aliases if alias in simple), None)
        if match is not None:
            found[column] = match
    listing = ", ".join(f"{field.name} ({field.type})" for field in schema)
    ranked = [(_image_rank(f.type), f.name.lower() != "image", i) for i, f in enumerate(schema)]
    images = [key for key in ranked if key[0] < 3 and "image" in schema.names[key[2]].lower()]
    if not images:
        raise UserError(
            f'{place}: no image column (a name with "image", holding bytes, base64 or a struct '
            f"with bytes); columns: {listing}"
        )
    found["image"] = schema.names[min(images)[2]]
    if "label" not in found and "scene_description" not in found:
        raise UserError(f"{place}: no label, labels or scene_description; columns: {listing}")
    if "label" in found and not _is_scalar(schema.field(found["label"]).type):
        raise UserError(
            f"{place}: column {found['label']} must hold numbers, booleans or class names; "
            f"columns: {listing}"
        )
    return found


def _image_rank(kind: pa.DataType) -> int:
    """0 struct with bytes, 1 bytes, 2 text (base64 or, at worst, a name), 3 unusable."""
    kind = _value_type(kind)
    if pa.types.is_struct(kind):
        return 0 if _bytes_field([field.name for field in kind]) else 3
    if _is_text(kind):
        return 2
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return 1 if any(check(kind) for check in binary) else 3


def _bytes_field(names: Sequence[str]) -> str | None:
    """Field of an image struct that holds the bytes."""
    marks = ("bytes", "image")
    return next((n for mark in marks for n in names if mark in n.lower()), None)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks)


def _is_scalar(kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    checks = (_is_text, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(check(kind) for check in (*checks, pa.types.is_null))


def _class_order(schema: pa.Schema, column: str) -> tuple[int, int]:
    """Our labels of the file's 0 and 1: `datasets` stores the class names beside the columns."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = [str(name).lower() for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return 0, 1
    return (1, 0) if names == [name.lower() for name in reversed(CLASS_NAMES)] else (0, 1)


# --------------------------------------------------------------------------- rows


def _open(file: Path) -> Any:
    try:
        # With the defaults a whole row group is loaded at once, with these a page of each column;
        # many writers make one page of a row group of images, which is then the least.
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is not a readable Parquet file: {reason}") from error


def _read_segment(segment: Segment) -> Iterator[Row]:
    """Yield translated rows, without id and source; reads only the row groups it needs."""
    with _open(segment.file) as parquet:
        schema = parquet.schema_arrow
        columns = find_columns(schema, str(segment.file))
        used = set(columns.values())
        other = [f.name for f in schema if f.name not in used and _is_scalar(f.type)]
        order = _class_order(schema, columns["label"]) if "label" in columns else (0, 1)
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        ends = list(accumulate(sizes))
        groups = [
            i
            for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
            if segment.start < end and segment.stop > end - size
        ]
        index = ends[groups[0]] - sizes[groups[0]]
        try:
            for batch in parquet.iter_batches(
                BATCH_ROWS, row_groups=groups, columns=[*used, *other], use_threads=False
            ):
                start, stop = segment.start - index, segment.stop - index
                index += batch.num_rows
                for row in batch.slice(max(start, 0), max(stop, 0) - max(start, 0)).to_pylist():
                    yield translate(row, columns, other, order)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{segment.file} is damaged: {reason}") from error


def translate(
    row: Row, columns: dict[str, str], other: Sequence[str] = (), order: tuple[int, int] = (0, 1)
) -> Row:
    """Bring one row into our columns.

    Parameters
    ----------
    row : values by the file's column names
    columns : our column → the file's, from `find_columns`
    other : columns of the file that go to `extra`
    order : our labels of the file's 0 and 1
    """
    values = {ours: row[theirs] for ours, theirs in columns.items()}
    found: Row = {name: text(values.get(name)) for name in TEXT_COLUMNS}
    if "label" in columns:
        found["label"] = _label(values["label"], order)
    else:
        found["label"] = int(found["scene_description"] is not None)
    found |= position(values.get("latitude"), values.get("longitude")) or _gps(values.get("gps"))
    found["image"] = _image(values["image"])
    found["evidence_box"] = _box(values.get("evidence_box"))
    extra = {name: row[name] for name in other if _is_value(row[name])}
    return found | {"extra": extra_json(extra)}


def _is_value(value: object) -> bool:
    """Whether a scalar says something: not null, empty, NaN or infinite."""
    return math.isfinite(value) if isinstance(value, float) else text(value) is not None


def _label(value: object, order: tuple[int, int]) -> int | None:
    """Label 0 or 1; None for null, NaN and whatever is neither."""
    if isinstance(value, str):
        names = [name.lower() for name in CLASS_NAMES]
        name = value.strip().lower()
        return names.index(name) if name in names else {"0": 0, "1": 1}.get(name)
    return order[int(value)] if isinstance(value, int | float) and value in {0, 1} else None


def _image(value: object) -> Row:
    """Image struct; bytes that cannot be told stay as they are, `prepare` sorts them out."""
    path = None
    if isinstance(value, dict):
        path = text(value.get("path"))
        value = value.get(_bytes_field(list(value)))
    return {"bytes": from_base64(value) if isinstance(value, bytes | str) else None, "path": path}


def _gps(value: object) -> Row:
    """Position of one value: "lat,lon", [lat, lon], or a struct with lat… and lon… or lng."""
    if isinstance(value, str):
        value = value.strip("()[] ").split(",")
    if isinstance(value, dict):
        names = {name.lower(): part for name, part in value.items()}
        lat = next((part for name, part in names.items() if name.startswith("lat")), None)
        value = [lat, next((p for n, p in names.items() if n.startswith(("lon", "lng"))), None)]
    return position(*value) if isinstance(value, list) and len(value) == 2 else {}


def _box(value: object) -> list[float] | None:
    """Return four finite numbers in [0, 1], else None."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = all(isinstance(v, int | float) and 0 <= v <= 1 for v in value)
    return value if numbers else None
