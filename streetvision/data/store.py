"""Split files opened by role: a stage gets what it declared here, and nothing else.

`CONTRACT` is the split contract in code. A stage that asks for a split, for labels or for rows it did not
declare is refused; a test holds `CONTRACT` equal to the `deps` in `dvc.yaml`.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streetvision.core.errors import UserError
from streetvision.core.schema import ORIGINALS_SCHEMA, SPLIT_SCHEMA

if TYPE_CHECKING:
    from PIL.Image import Image

_MAGIC = b"ARROW1\0\0"
Rows = Literal["all", "fit", "fusion"]


class SplitAccessError(RuntimeError):
    """A stage reached for data that its declaration does not cover: a leak, so a bug."""


@dataclass(frozen=True)
class Access:
    """What a stage may see of one split: which rows, and whether with labels."""

    rows: Rows = "all"
    labels: bool = True


# stage → split → access. `fit` is TRAIN without its fusion part, `fusion` that part alone.
CONTRACT: dict[str, dict[str, Access]] = {
    "explora": {
        "train": Access("fit", labels=False),
        "val_select": Access(labels=False),
    },
    "probe": {"train": Access("fit"), "val_select": Access()},
    "train": {"train": Access("fit"), "val_select": Access()},
    "embed": {"train": Access("fusion"), "val_select": Access(), "val_calib": Access()},
    # Only with `export.onnx`: the same model in another format, or in int8. VAL_CALIB's images show that
    # the answers are the same, without labels; on VAL_SELECT it is chosen whether the int8 one ships.
    "export": {"val_select": Access(), "val_calib": Access(labels=False)},
    "evaluate": {"val_test": Access()},
    "challenge": {"val_test": Access(), "val_test_originals": Access(labels=False)},
    # No stage: `python -m streetvision crossval` divides all data anew in each of its folds.
    "crossval": {"whole": Access()},
}


class Split:
    """One opened split: memory-mapped, random access to an image costs one read.

    Attributes
    ----------
    ids, groups : arrays of str [N]
    rows : positions in the file [N]
    """

    def __init__(self, table: pa.Table, name: str, rows: NDArray[np.int64], labels: bool) -> None:
        self.name = name
        self.rows = rows
        self._images = table.column("image")  # stays on disk until an image is asked for
        self._context = table.drop_columns(["image", "label"])
        self._table, self._has_labels = table, labels
        self.ids = self.column("id")
        self.groups = self.column("group")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels [N], 1 = roadwork; refused where the stage declared images only."""
        if not self._has_labels:
            raise SplitAccessError(f"the labels of {self.name} were not declared by this stage")
        return numbers(self._table.column("label"))[self.rows].astype(np.int64)

    def column(self, name: str) -> NDArray[np.object_]:
        """A context column [N] as Python objects; missing values are None."""
        return np.array(self._context.column(name).to_pylist(), dtype=object)[self.rows]

    def evidence_area(self) -> NDArray[np.float64]:
        """Area of the evidence box [N], as a share of the image; NaN where there is no box."""
        boxes = self.column("evidence_box")
        return np.array(
            [np.nan if b is None else max(b[2] - b[0], 0) * max(b[3] - b[1], 0) for b in boxes]
        )

    def image_bytes(self, row: int) -> bytes:
        """The stored JPEG of one row."""
        data: bytes = self._images[int(self.rows[row])].as_py()
        return data

    def image(self, row: int) -> Image:
        """The decoded RGB image of one row."""
        from PIL import Image as PILImage

        try:
            with PILImage.open(io.BytesIO(self.image_bytes(row)), formats=("JPEG",)) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError) as error:
            raise UserError(
                f"{self.name}: the image {self.ids[row]} is damaged ({error}); rerun `prepare`"
            ) from error

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Split:
        """The same split with only these rows, in this order."""
        chosen = self.rows[np.asarray(rows, dtype=np.int64)]
        return Split(self._table, self.name, chosen, self._has_labels)

    def draw(self, count: int, seed: int) -> Split:
        """At most `count` rows, drawn at random without replacement, in the split's order.

        What is known of a split by a part of it is known by these: neighbouring rows are often frames of
        one drive, and evenly spaced ones may meet a period.
        """
        drawn = np.random.default_rng(seed).permutation(len(self))[:count]
        return self.select(np.sort(drawn))


def open_split(stage: str, split: str, path: Path) -> Split:
    """Open `path` as `split` for `stage`.

    Raises
    ------
    SplitAccessError
        The stage did not declare this split in `CONTRACT`.
    UserError
        The file is missing, broken, empty, or not in `SPLIT_SCHEMA`.
    """
    access = CONTRACT.get(stage, {}).get(split)
    if access is None:
        raise SplitAccessError(f"stage `{stage}` did not declare the split {split}")
    table = read_arrow(path, "prepare")
    check_columns(table, SPLIT_SCHEMA, f"{path} is not a split file")
    if access.labels and not set(np.unique(numbers(table.column("label")))) <= {0, 1}:
        raise UserError(f"{path} is not a split file: labels other than 0 and 1")
    rows = np.arange(len(table))
    if access.rows != "all":
        fusion = numbers(table.column("fusion").cast(pa.uint8()))
        rows = np.flatnonzero(fusion == (access.rows == "fusion"))
    if len(rows) == 0 and access.rows != "fusion":
        raise UserError(f"{path} holds no images for stage `{stage}`")
    return Split(table, split, rows, access.labels)


class Originals:
    """Image files of a split's images as they came, memory-mapped: those that `prepare` kept.

    Attributes
    ----------
    ids : array of str [N], in the split's order
    """

    def __init__(self, table: pa.Table) -> None:
        self.ids = np.array(table.column("id").to_pylist(), dtype=object)
        self._images = table.column("image")

    def __len__(self) -> int:
        return len(self.ids)

    def image_bytes(self, row: int) -> bytes:
        """The file of one row."""
        data: bytes = self._images[row].as_py()
        return data


def open_originals(stage: str, path: Path) -> Originals:
    """Open VAL_TEST's original files for `stage`; errors as `open_split`."""
    if "val_test_originals" not in CONTRACT.get(stage, {}):
        raise SplitAccessError(f"stage `{stage}` did not declare the split val_test_originals")
    table = read_arrow(path, "prepare")
    check_columns(table, ORIGINALS_SCHEMA, f"{path} holds no original files")
    return Originals(table)


def read_arrow(path: Path, made_by: str) -> pa.Table:
    """Memory-map an Arrow IPC file; `made_by` is the stage that writes it.

    Every offset is checked before it is followed, since a user may hand in any file: unchecked ones reach
    beyond the file. That reads offsets and texts, no image.

    Raises
    ------
    UserError
        The file is missing or no regular file, broken, or compressed: a kilobyte may unpack to gigabytes,
        and no stage compresses.
    """
    try:
        # A pipe would never be read to its end.
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a readable Arrow file: it is no regular file")
        with pa.memory_map(str(path)) as source:
            if source.read(8) != _MAGIC or source.read_at(6, source.size() - 6) != _MAGIC[:6]:
                raise pa.ArrowInvalid("no Arrow file")
            # The part before the footer is a stream; what is looked at is what is read.
            if any(_is_compressed(message) for message in pa.ipc.MessageReader.open_stream(source)):
                raise UserError(f"{path} is compressed; write it without compression")
            source.seek(8)
            table = pa.ipc.open_stream(source).read_all()
            table.validate(full=True)
            return table
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the stage `{made_by}` makes it") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable Arrow file; rerun `{made_by}`") from error


def _is_compressed(message: Any) -> bool:
    """Whether a message's buffers are compressed, by its flatbuffer: `compression` of `RecordBatch`.

    https://github.com/apache/arrow/blob/main/format/Message.fbs; Arrow has verified the offsets.
    """
    data = message.metadata.to_pybytes()

    def number(kind: str, at: int) -> int:
        return int(struct.unpack_from(f"<{kind}", data, at)[0])

    def field(table: int, index: int) -> int | None:
        """Where a table's field lies, None where it has none."""
        entries = table - number("i", table)
        if 4 + 2 * index >= number("H", entries):
            return None
        offset = number("H", entries + 4 + 2 * index)
        return table + offset if offset else None

    def follow(at: int | None) -> int:
        if at is None:
            raise pa.ArrowInvalid("a message without a header")
        return at + number("I", at)

    if message.type not in {"record batch", "dictionary"}:
        return False
    body = follow(field(follow(0), 2))
    if message.type == "dictionary":
        body = follow(field(body, 1))
    return field(body, 3) is not None


def check_columns(table: pa.Table, schema: pa.Schema, complaint: str) -> None:
    """Refuse a table that lacks columns of a schema, or has other types or nulls where it has none.

    Raises
    ------
    UserError
        Begins with `complaint`.
    """
    missing = sorted(set(schema.names) - set(table.column_names))
    if missing:
        raise UserError(f"{complaint}: no columns {', '.join(missing)}")
    for field in schema:
        if table.column_names.count(field.name) > 1:
            raise UserError(f"{complaint}: two columns {field.name}")
        column = table.column(field.name)
        if column.type != field.type:
            raise UserError(
                f"{complaint}: column {field.name} is {column.type!s:.60}, not {field.type}"
            )
        lists = pa.types.is_fixed_size_list(field.type)
        inside = any(chunk.flatten().null_count for chunk in column.chunks) if lists else False
        if inside or (column.null_count and not field.nullable):
            raise UserError(f"{complaint}: column {field.name} has missing values")


def numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """Values of a column of numbers without nulls, those of fixed-size lists one after the other.

    Not by Arrow's own `to_numpy`: it imports pandas, half a second.
    """
    values = column.combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        values = values.flatten()
    return np.from_dlpack(values)


def write_arrow(path: Path, columns: dict[str, Any]) -> Path:
    """Write columns atomically as one Arrow IPC file."""
    from streetvision.core.artifacts import write_atomic

    table = pa.table(columns)

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)

    return write_atomic(path, write)
