"""Parquet files in the NATIX schema as they are found in the wild, read row by row.

The image column is found as the subnet's validator finds it: a column whose name contains "image",
holding a struct with bytes, raw bytes or base64. Labels, position and context are found by their
usual names.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streetvision.core.errors import UserError
from streetvision.core.escaping import escaped
from streetvision.core.schema import UNREAD_LABEL, UNREAD_POSITION
from streetvision.data.payload import from_base64
from streetvision.data.pixels import MAX_FILE_BYTES
from streetvision.data.walk import walk_files
from streetvision.sources.labels import (
    MAX_LABEL_CHARACTERS,
    MAX_LABEL_VALUES,
    SURE_NAMES,
    ClassNames,
    LabelReader,
    class_label,
    denies_roadwork,
)
from streetvision.sources.parquet_bounds import (
    MAX_REPEATED_BYTES,
    MAX_REPETITION,
    MAX_TEXT_CHARACTERS,
    check_claims,
    check_footer,
    rows_at_once,
)
from streetvision.sources.parts import (
    KEY_COLUMNS,
    Plan,
    Row,
    context,
    extra_json,
    input_stat,
    known_columns,
    slices,
)
from streetvision.sources.positions import POSITION_COLUMNS, read_position
from streetvision.sources.values import EXACT_IN_FLOAT64, is_missing, key, text

logger = logging.getLogger(__name__)

# Whole numbers that a column of this type holds exactly, and with them ids.
_EXACT_BELOW = {"halffloat": 2**11, "float": 2**24}
_NEGATION = re.compile(r"(there (is|are) )?(no|not|none|nothing|without|never)\b", re.IGNORECASE)
_LOOK_ROWS = 4096  # rows of the light columns decoded at a time
_MAX_SHOWN, _MAX_LISTED = 100, 30  # characters of a position, columns that an error lists
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
    labels: LabelReader

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return sum(segment.stop - segment.start for segment in self.segments)

    def read(self) -> Iterator[Row]:
        """Translate row after row."""
        index = self.first
        for segment in self.segments:
            for row in _read_segment(segment, self.labels):
                yield {**row, "id": f"{self.name}-{index:06d}", "source": self.name}
                index += 1


def find_parquet(path: Path, place: str) -> list[Path]:
    """Return the file itself, or all `*.parquet` below a folder in order of their paths, links followed."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{place}: {escaped(path)} is missing")
    found = [path / file for file in walk_files(path).files if file.lower().endswith(".parquet")]
    if not found:
        raise UserError(f"{place}: folder {escaped(path)} holds no .parquet files")
    return found


def plan_parquet(
    name: str, files: Sequence[Path], shard_images: int, classes: ClassNames = SURE_NAMES
) -> Plan:
    """Cut the concatenated rows of the files into shards; looks at all labels and positions, at no image.

    Positions that are given but not understood stay in `extra` and are counted; those rows have no place.

    Raises
    ------
    UserError
        A file that is no Parquet file, claims or unpacks to more than it can hold (`parquet_bounds`), has no
        image column, or nothing that tells a label; labels whose meaning is not sure; positions of which
        hardly any is understood where no group is given.
    """
    looks = [_look(file) for file in files]
    place = str(files[0]) if len(files) == 1 else f'source "{name}" ({len(files)} files)'
    _check_names(files, looks)
    labels = LabelReader.learn([(look.labels, look.names) for look in looks], classes)
    labels.check(place)
    _report_positions(looks, place)
    counts = [look.rows for look in looks]
    ends = list(accumulate(counts))
    parts = []
    for start, stop in slices(sum(counts), shard_images):
        segments = [
            Segment(file, max(start - end + count, 0), min(stop - end + count, count))
            for file, count, end in zip(files, counts, ends, strict=True)
            if count and start < end and stop > end - count
        ]
        parts.append(ParquetPart(name, start, tuple(segments), labels))
    return Plan(parts, [input_stat(file) for file in files])


# --------------------------------------------------------------------------- before any image is read


@dataclass(frozen=True)
class _Look:
    """What the labels and positions of one file are.

    Attributes
    ----------
    rows : number of rows
    labels : rows by value, of a description's where there is no label
    names : what the file calls 0, 1, …; empty if it does not say
    unread : number of positions that are given but not understood, and the first of them
    alone : of these, how many are of rows without a group
    """

    rows: int
    labels: Counter[Any]
    names: tuple[str, ...]
    unread: tuple[int, str]
    alone: int


def _look(file: Path) -> _Look:
    """Read what says what the labels mean and where the images are."""
    with _open(file) as parquet:
        schema = parquet.schema_arrow
        columns = find_columns(schema, str(file))
        wanted = {"label", "scene_description", *KEY_COLUMNS, *POSITION_COLUMNS}
        if "label" in columns:
            wanted.remove("scene_description")
        light = {ours: theirs for ours, theirs in columns.items() if ours in wanted}
        exact = {
            ours: _EXACT_BELOW.get(str(schema.field(theirs).type), EXACT_IN_FLOAT64)
            for ours, theirs in light.items()
        }
        labels: Counter[Any] = Counter()
        unread, example, alone = 0, "", 0
        for row in _rows(file, parquet, range(parquet.num_row_groups), light.values(), _LOOK_ROWS):
            values = {ours: row[theirs] for ours, theirs in light.items()}
            labels[_short(_given_label(values))] += 1
            if len(labels) > MAX_LABEL_VALUES:
                raise UserError(
                    f"{file}: more than {MAX_LABEL_VALUES} different labels are no classes; "
                    f"columns: {_listing(schema)}"
                )
            try:
                for name in KEY_COLUMNS:
                    key(values.get(name), exact.get(name, EXACT_IN_FLOAT64))
            except ValueError as error:
                raise UserError(f"{file}: column {columns[name]}: {error}") from error
            try:
                read_position(values)
            except ValueError as error:
                unread, example = unread + 1, example or str(error)[:_MAX_SHOWN]
                alone += is_missing(values.get("group"))
        names = _class_names(schema, columns["label"]) if "label" in columns else ()
        return _Look(parquet.metadata.num_rows, labels, names, (unread, example), alone)


def _short(value: Any) -> Any:
    """A label as a key of a table of counts: hostile ones may be long."""
    return value[:MAX_LABEL_CHARACTERS] if isinstance(value, str | bytes) else value


def _check_names(files: Sequence[Path], looks: Sequence[_Look]) -> None:
    """Refuse files of which some say what 0 and 1 are and say it otherwise than usual, and some don't."""
    named = [number for number, look in enumerate(looks) if look.names]
    unusual = [n for n in named if [class_label(name) for name in looks[n].names] != [0, 1]]
    bare = [
        number
        for number, look in enumerate(looks)
        if not look.names and any(isinstance(value, int | float) for value in look.labels)
    ]
    if unusual and bare:
        raise UserError(
            f"{files[unusual[0]]} calls its labels {', '.join(looks[unusual[0]].names)}, "
            f"{files[bare[0]]} does not say what its 0 and 1 mean: write both in one way"
        )


def _report_positions(looks: Sequence[_Look], place: str) -> None:
    unread = sum(look.unread[0] for look in looks)
    if unread:
        example = next(look.unread[1] for look in looks if look.unread[0])
        alone = sum(look.alone for look in looks)
        logger.warning(
            '%s: %d of %d positions are given but not understood, such as "%s"; %d of these images have no '
            "group either, so near ones may lie in different splits",
            place, unread, sum(look.rows for look in looks), example, alone,
        )  # fmt: skip


# --------------------------------------------------------------------------- columns


def find_columns(schema: pa.Schema, place: str) -> dict[str, str]:
    """Map our columns, and `image`, to the names they have in a file.

    Raises
    ------
    UserError
        No usable image column; neither a label nor a scene description.
    """
    found = known_columns(schema.names, place)
    listing = _listing(schema)
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
    for name in ("label", *KEY_COLUMNS):
        if name in found and pa.types.is_nested(_value_type(schema.field(found[name]).type)):
            raise UserError(
                f"{place}: column {found[name]} must hold numbers, booleans or names; columns: {listing}"
            )
    return found


def _listing(schema: pa.Schema) -> str:
    found = [f"{field.name:.60} ({field.type!s:.60})" for field in list(schema)[:_MAX_LISTED]]
    more = f" and {len(schema) - _MAX_LISTED} more" * (len(schema) > _MAX_LISTED)
    return ", ".join(found) + more


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


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """What 0, 1, … of a column are called: `datasets` stores its features beside the columns.

    They are a mapping by column or, as in a data set's card, a list; the names of a class label are a list
    or a mapping by number.
    """
    try:
        document = json.loads((schema.metadata or {})[b"huggingface"])
        features = document.get("info", document)["features"]
        if isinstance(features, list):
            features = {feature["name"]: feature for feature in features}
        feature = features[column]
        while isinstance(feature, dict) and "names" not in feature:
            feature = next(
                feature[inner] for inner in ("dtype", "class_label", "feature") if inner in feature
            )
        names = feature["names"]
        if isinstance(names, dict):
            names = [names[number] for number in sorted(names, key=int)]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RecursionError):
        return ()


# --------------------------------------------------------------------------- rows


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Open a file whose claims are believable; what goes wrong in the block is an error of the file."""
    try:
        check_footer(file)
        # With the defaults a whole row group is loaded at once, with these a page of each column;
        # many writers make one page of a row group of images, which is then the least.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as parquet:
            check_claims(file, parquet.metadata)
            yield parquet
    except (
        pa.ArrowException,
        OSError,
        UnicodeDecodeError,
    ) as error:  # also a name that is no UTF-8
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is not a readable Parquet file: {reason}") from error


def _rows(
    file: Path, parquet: Any, row_groups: Iterable[int], columns: Iterable[str], limit: int
) -> Iterator[Row]:
    """Yield the rows of some row groups, at most `limit` of them decoded at a time."""
    counts = {number: parquet.metadata.row_group(number).num_rows for number in row_groups}
    row_groups, columns = [number for number in counts if counts[number]], list(columns)
    left = sum(counts.values())
    size = rows_at_once(file, row_groups, columns, limit)
    batches = parquet.iter_batches(size, row_groups=row_groups, columns=columns, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else _microseconds(batch).to_pylist()
        # ValueError: text that is not UTF-8, a date out of range.
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file} is damaged: {reason}") from error
        if batch is None:
            break
        left -= len(rows)
        yield from rows
    if left:
        raise UserError(f"{file} is damaged: it holds {left} rows less than it claims")


def _microseconds(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Times in microseconds: Python has no nanoseconds, and names no drive by them."""
    for number, kind in enumerate(batch.schema.types):
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            values = batch.column(number).cast(pa.timestamp("us", kind.tz), safe=False)
            batch = batch.set_column(number, batch.schema.names[number], values)
    return batch


def _read_segment(segment: Segment, labels: LabelReader) -> Iterator[Row]:
    """Yield translated rows, without id and source; reads only the row groups it needs."""
    file = segment.file
    with _open(file) as parquet:
        schema = parquet.schema_arrow
        columns = find_columns(schema, str(file))
        used = set(columns.values())
        other = [f.name for f in schema if f.name not in used and _is_scalar(f.type)]
        names = _class_names(schema, columns["label"]) if "label" in columns else ()
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        ends = list(accumulate(sizes))
        groups = [
            i
            for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
            if segment.start < end and segment.stop > end - size
        ]
        rows = _rows(file, parquet, groups, [*used, *other], BATCH_ROWS)
        first = ends[groups[0]] - sizes[groups[0]]
        room = max(MAX_REPEATED_BYTES, MAX_REPETITION * file.stat().st_size)
        for number, row in enumerate(rows, first):
            if number >= segment.stop:
                break
            if number < segment.start:
                continue
            try:
                made = translate(row, columns, labels, other, names)
            except ValueError as error:
                raise UserError(f"{file} row {number}: {error}") from error
            room -= len(made["image"]["bytes"] or b"")
            if room < 0:
                raise UserError(
                    f"{file} repeats images: rows to {number} have {MAX_REPETITION} times the bytes of the file"
                )
            yield made


def translate(
    row: Row,
    columns: dict[str, str],
    labels: LabelReader,
    other: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Row:
    """Bring one row into our columns.

    Parameters
    ----------
    row : values by the file's column names
    columns : our column → the file's, from `find_columns`
    labels : reads them
    other : columns of the file that go to `extra`, where a label and a position that are not understood
        are kept, too
    names : what the file calls its labels 0, 1, …

    Raises
    ------
    ValueError
        A group or drive that is none; more bytes or characters than a row may have.
    """
    values = {ours: row[theirs] for ours, theirs in columns.items()}
    extra = {name: row[name] for name in other if _is_value(row[name])}
    found = context(values)
    given = _given_label(values)
    found["label"] = labels.read(given, names)
    if (unknown := labels.unknown(given, names)) is not None:
        extra[UNREAD_LABEL] = unknown
    try:
        if point := read_position(values):
            found["latitude"], found["longitude"] = point
    except ValueError as error:
        extra[UNREAD_POSITION] = str(error)[:_MAX_SHOWN]
    found["image"] = _image(values["image"])
    found["evidence_box"] = _box(values.get("evidence_box"))
    found["extra"] = extra_json(extra)
    if len(found["image"]["bytes"] or b"") > MAX_FILE_BYTES:
        raise ValueError(f"its image has more than {MAX_FILE_BYTES:,} bytes")
    if sum(len(each) for each in found.values() if isinstance(each, str)) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"its texts have more than {MAX_TEXT_CHARACTERS:,} characters")
    return found


def _given_label(values: Row) -> Any:
    """The label of a row; without that column, 1 if there is a description, and 0 if there is none.

    A description that begins with "no" or the like is no label: it may deny roadwork, or mention a lack of
    something beside it.
    """
    if "label" in values:
        return values["label"]
    description = text(values["scene_description"])
    if description is None or denies_roadwork(description):
        return 0
    return description if _NEGATION.match(description) else 1


def _is_value(value: object) -> bool:
    """Whether a scalar says something: not null, empty, NaN or infinite."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and (not isinstance(value, float) or math.isfinite(value))


def _image(value: object) -> Row:
    """Image struct; bytes that cannot be told stay as they are, `prepare` sorts them out."""
    path = None
    if isinstance(value, dict):
        path = text(value.get("path"))
        value = value.get(_bytes_field(list(value)))
    return {"bytes": from_base64(value) if isinstance(value, bytes | str) else None, "path": path}


def _box(value: object) -> list[float] | None:
    """Return four finite numbers in [0, 1], else None."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = all(isinstance(v, int | float) and 0 <= v <= 1 for v in value)
    return value if numbers else None
