"""What every source is turned into: rows, the parts that yield them, and their common values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from streetvision.errors import UserError, escaped

Row = dict[str, Any]  # columns of RAW_SCHEMA; a missing one is null

TEXT_COLUMNS = ("group", "drive", "scene_description", "weather", "daytime", "scene")


class Part(Protocol):
    """The rows of one shard, not yet read."""

    @property
    def n_rows(self) -> int:
        """Number of rows that `read` yields."""

    def read(self) -> Iterator[Row]:
        """Yield the rows, one image in memory at a time."""


@dataclass(frozen=True)
class Plan:
    """A source divided into shards.

    Attributes
    ----------
    parts : one a shard, in order
    inputs : path, bytes and modification time (ns) of every file that will be read
    ignored_files : files found beside the images that are no images
    """

    parts: Sequence[Part]
    inputs: Sequence[tuple[str, int, int]] = ()
    ignored_files: int = 0


def local_path(root: Path, relative: str, place: str) -> Path:
    """Join a user's path to `root`; absolute paths and `..` are refused, links are followed."""
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f'{place}: "{relative}" must be a path below {root}, neither absolute nor with ".."'
        )
    return root / path


def slices(n_rows: int, shard_rows: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of consecutive shards."""
    for start in range(0, n_rows, shard_rows):
        yield start, min(start + shard_rows, n_rows)


def input_stat(path: Path) -> tuple[str, int, int]:
    """Path, bytes and modification time (ns): what tells an input from a changed one."""
    return file_stat(path)[0]


def file_stat(path: Path) -> tuple[tuple[str, int, int], tuple[int, int]]:
    """The same, and device and number: which real file it is, whatever links lead to it."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {escaped(path)}: {error.strerror}") from error
    return (str(path), stat.st_size, stat.st_mtime_ns), (stat.st_dev, stat.st_ino)


# --------------------------------------------------------------------------- single values


def text(value: object) -> str | None:
    """Text without surrounding space; empty, null and NaN are None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(value).strip() or None


def position(latitude: object, longitude: object) -> Row:
    """Columns of a position in degrees; both null unless both are numbers in range."""
    try:
        point = float(str(latitude)), float(str(longitude))
    except ValueError:
        return {}
    if not (abs(point[0]) <= 90 and abs(point[1]) <= 180):  # also refuses NaN
        return {}
    return {"latitude": point[0], "longitude": point[1]}


def extra_json(columns: dict[str, Any]) -> str | None:
    """Columns that have no place of their own, as a JSON object; None when there are none."""
    if not columns:
        return None
    return json.dumps(columns, sort_keys=True, ensure_ascii=False, allow_nan=False)
