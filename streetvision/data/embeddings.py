"""Cached logits and features of a split's views, so that everything after `embed` takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streetvision.core.errors import UserError
from streetvision.data.store import Split, check_columns, numbers, read_arrow, write_arrow
from streetvision.data.views import ViewScores


@dataclass(frozen=True)
class Embeddings:
    """Ids, groups, drives and labels [N] of one split's images and the scores of their V views, named in order.

    A drive's name holds its group's: where drives are not known, the group is one drive.
    Distorted images have `served_id`s: several may be of one image, in its group.
    """

    ids: NDArray[np.object_]
    groups: NDArray[np.object_]
    drives: NDArray[np.object_]
    labels: NDArray[np.int64]
    views: tuple[str, ...]
    scores: ViewScores

    def units(self, kind: Literal["group", "drive"]) -> NDArray[np.object_]:
        """Unit of each image [N] that counts as exchangeable or independent: its group or its drive."""
        return self.groups if kind == "group" else self.drives

    @property
    def logits(self) -> NDArray[np.float64]:
        """Logits [N] of the global views."""
        return self.scores.logits[:, 0]


def served_id(image_id: str, repeat: int) -> str:
    """Id of one distorted version of an image."""
    return f"{image_id}#{repeat}"


def _columns(width: int) -> dict[str, pa.DataType]:
    """Columns of the file and their types; `width`: numbers of an image's features."""
    return {
        "id": pa.string(),
        "group": pa.string(),
        "drive": pa.string(),
        "view": pa.string(),
        "label": pa.int8(),
        "logit": pa.float32(),
        "content": pa.int64(),
        "box": pa.list_(pa.float64(), 4),
        "features": pa.list_(pa.float16(), width),
    }


def _list_size(table: pa.Table, name: str) -> int:
    """Numbers of each list of a column, 0 if it has no such lists."""
    kinds = [field.type for field in table.schema if field.name == name]
    return next((kind.list_size for kind in kinds if pa.types.is_fixed_size_list(kind)), 0)


def write_embeddings(
    path: Path, split: Split, views: tuple[str, ...], scores: ViewScores, repeats: int | None = None
) -> Path:
    """Write one row an image and view: id, group, drive, view, label, logit, content, box, features.

    `scores` are of `split`'s images or, with `repeats`, of so many distorted versions of each.
    """
    if scores.features is None:
        raise ValueError("embeddings hold features")
    n, count, width = scores.features.shape
    ids = split.ids
    if repeats is not None:
        split = split.select(np.repeat(np.arange(len(split)), repeats))
        ids = np.array([served_id(str(name), k) for name in ids for k in range(repeats)], object)

    kinds = _columns(width)

    def each(name: str, values: NDArray[np.generic]) -> pa.Array:
        return pa.array(np.repeat(values, count), kinds[name])

    def lists(name: str, values: NDArray[np.generic]) -> pa.Array:
        flat = pa.array(values.ravel(), kinds[name].value_type)
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[-1])

    columns = {
        "id": each("id", ids),
        "group": each("group", split.groups),
        "drive": each("drive", split.column("drive")),
        "view": pa.array(views * n, kinds["view"]),
        "label": each("label", split.labels),
        "logit": pa.array(scores.logits.ravel().astype(np.float32), kinds["logit"]),
        "content": pa.array(scores.content.ravel(), kinds["content"]),
        "box": lists("box", scores.boxes),
        "features": lists("features", scores.features.reshape(-1, width)),
    }
    return write_arrow(path, columns)


def read_embeddings(path: Path, *, features: bool = False) -> Embeddings:
    """Read what `write_embeddings` wrote; without `features` unless they are asked for.

    Raises
    ------
    UserError
        The file is missing or broken, lacks a column, or its images do not all have the same views.
    """
    table = read_arrow(path, "embed")
    kinds = _columns(_list_size(table, "features"))
    fields = [
        pa.field(name, kind, nullable=name == "drive")
        for name, kind in kinds.items()
        if features or name in table.column_names or name != "features"
    ]
    check_columns(table, pa.schema(fields), f"{path} holds no embeddings")
    names = np.array(table.column("view").to_pylist(), dtype=object)
    ids = np.array(table.column("id").to_pylist(), dtype=object)
    count = int(np.argmax(ids != ids[0])) or len(ids) if len(ids) else 1
    views = tuple(names[:count].tolist()) if len(ids) else ("global",)
    whole = len(ids) % count == 0
    if not whole or (ids.reshape(-1, count) != ids[::count, None]).any() or (
        names.reshape(-1, count) != np.array(views, dtype=object)
    ).any():  # fmt: skip
        raise UserError(f"{path}: images differ in their views; rerun `embed`")
    n = len(ids) // count

    def column(name: str) -> NDArray[np.generic]:
        kind = table.schema.field(name).type
        size = (kind.list_size,) if pa.types.is_fixed_size_list(kind) else ()
        return numbers(table.column(name)).reshape(n, count, *size)

    scores = ViewScores(
        logits=column("logit").astype(np.float64),
        features=column("features").astype(np.float16) if features else None,
        content=column("content").astype(np.int64),
        boxes=column("box").astype(np.float64),
    )
    groups, drives = (table.column(name).to_pylist()[::count] for name in ("group", "drive"))
    drives = [
        group if drive is None else f"{group}/{drive}"
        for group, drive in zip(groups, drives, strict=True)
    ]
    by_group, by_drive = (np.array(names, dtype=object) for names in (groups, drives))
    labels = column("label")[:, 0].astype(np.int64)
    return Embeddings(ids[::count], by_group, by_drive, labels, views, scores)
