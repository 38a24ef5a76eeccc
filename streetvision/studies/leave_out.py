"""Holding groups out in turn: which there are, in how many parts, and the split files of one part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streetvision.core.errors import UserError
from streetvision.data.store import Split, write_arrow
from streetvision.sources.values import is_missing, key


def mixed_groups(split: Split, units: NDArray[np.object_] | None = None) -> list[str]:
    """Names of the groups (or of other units [N]) with both classes, sorted."""
    groups = split.groups if units is None else units
    return sorted(
        str(group) for group in set(groups) if len(set(split.labels[groups == group].tolist())) == 2
    )


def held_out_units(split: Split, column: str) -> NDArray[np.object_]:
    """What is held out together [N]: `group`, or another column of the data that holds whole groups.

    A column is one of the context's (source, scene, …) or one that the source had besides.

    Raises
    ------
    UserError
        No image has the column, or a group has several values of it.
    """
    if column == "group":
        return split.groups
    try:
        values = split.column(column)
    except KeyError:
        extra = [json.loads(text) if text else {} for text in split.column("extra")]
        values = np.array([each.get(column) for each in extra], dtype=object)
    if all(is_missing(value) for value in values):
        raise UserError(f'--groups: the data have no column "{column}"')
    found: dict[str, str] = {}
    for group, value in zip(split.groups, values, strict=True):
        try:
            name = key(value) or str(group)
        except ValueError as error:
            raise UserError(f"--groups {column}: {error}") from error
        if found.setdefault(str(group), name) != name:
            raise UserError(
                f'--groups {column}: the group {group} has both "{found[str(group)]}" and "{name}"; '
                "what is held out must be whole groups, else its neighbours are trained on"
            )
    return np.array([found[str(group)] for group in split.groups], dtype=object)


def balanced_parts(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Divide names into parts of about as many images, the largest first, and of as many names."""
    found: list[list[str]] = [[] for _ in range(parts)]
    room = -(-len(sizes) // parts)
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        open_parts = [part for part in found if len(part) < room]
        min(open_parts, key=lambda part: sum(sizes[other] for other in part)).append(name)
    return found


def write_parts(
    table: pa.Table, rows: Mapping[str, NDArray[np.int64]], fusion: NDArray[np.int64], folder: Path
) -> None:
    """Write rows of a prepared file as one split file a name; TRAIN's rows in `fusion` are its fusion part."""
    for name, chosen in rows.items():
        part = table.take(pa.array(chosen)).combine_chunks()
        columns = {column: part.column(column) for column in part.column_names}
        columns["fusion"] = pa.array(np.isin(chosen, fusion))
        write_arrow(folder / f"{name}.arrow", columns)
