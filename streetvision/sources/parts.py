"""What every source is turned into: rows, the parts that yield them, and their common values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from streetvision.core.errors import UserError
from streetvision.core.escaping import escaped
from streetvision.sources.labels import denies_roadwork
from streetvision.sources.values import key, text

Row = dict[str, Any]  # columns of RAW_SCHEMA; a missing one is null

KEY_COLUMNS = ("group", "drive")
TEXT_COLUMNS = ("scene_description", "weather", "daytime", "scene")
# Our column → its names in the wild, without case and without what separates words (`gps_latitude`).
ALIASES = {
    "label": ("label", "labels"),
    "scene_description": ("scenedescription",),
    "latitude": ("latitude", "lat", "gpslatitude"),
    "longitude": ("longitude", "lon", "lng", "gpslongitude"),
    "latitude_ref": ("latituderef", "latref", "gpslatituderef"),
    "longitude_ref": ("longituderef", "lonref", "lngref", "gpslongituderef"),
    "gps": ("gps", "gpscoordinates", "gpsposition"),
    "weather": ("weather", "weathercondition", "weatherconditions"),
    "daytime": ("daytime", "timeofday"),
    "scene": ("scene", "scenetype"),
    "group": ("group",),
    "drive": ("drive",),
    "evidence_box": ("evidencebox",),
}


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


# --------------------------------------------------------------------------- columns


def known_columns(names: Iterable[str], place: str) -> dict[str, str]:
    """Map our columns to the names they have in a table, of those that it has.

    Raises
    ------
    UserError
        Two names differ only in case or in what separates their words.
    """
    names = list(names)
    bare = {name: re.sub(r"[\s_-]", "", name).lower() for name in names}
    found = {}
    for column, aliases in ALIASES.items():
        for alias in aliases:
            same = [name for name in names if bare[name] == alias]
            if len(same) > 1:
                raise UserError(f"{place} names a column twice: {', '.join(same)}")
            if same:
                found[column] = same[0]
                break
    return found


def context(values: Mapping[str, object]) -> Row:
    """Group, drive and texts of one row, by our names.

    Raises
    ------
    ValueError
        A group or drive is none; says why.
    """
    row: Row = {name: text(values.get(name)) for name in TEXT_COLUMNS}
    if denies_roadwork(row["scene_description"] or ""):
        row["scene_description"] = None  # there is nothing to describe, as validators have it
    for name in KEY_COLUMNS:
        try:
            row[name] = key(values.get(name))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
    return row


def extra_json(columns: dict[str, Any]) -> str | None:
    """Columns that have no place of their own, as a JSON object; None when there are none."""
    if not columns:
        return None
    return json.dumps(columns, sort_keys=True, ensure_ascii=False, allow_nan=False)
