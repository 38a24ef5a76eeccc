"""Cached logits and features of a split, so that everything after `embed` takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streetvision.data.store import Split, read_arrow, write_arrow


@dataclass(frozen=True)
class Embeddings:
    """Logits [N] (float64), labels [N], groups [N] and ids [N] of one split's global views."""

    ids: NDArray[np.object_]
    groups: NDArray[np.object_]
    labels: NDArray[np.int64]
    logits: NDArray[np.float64]


def write_embeddings(
    path: Path, split: Split, logits: NDArray[np.float32], features: NDArray[np.float16]
) -> Path:
    """Write one row a view: id, group, drive, view, label, logit, features."""
    width = features.shape[1]
    columns = {
        "id": pa.array(split.ids, pa.string()),
        "group": pa.array(split.groups, pa.string()),
        "drive": pa.array(split.column("drive"), pa.string()),
        "view": pa.array(["global"] * len(split), pa.string()),
        "label": pa.array(split.labels, pa.int8()),
        "logit": pa.array(logits, pa.float32()),
        "features": pa.FixedSizeListArray.from_arrays(
            pa.array(features.ravel(), pa.float16()), width
        ),
    }
    return write_arrow(path, columns)


def read_embeddings(path: Path) -> Embeddings:
    """Read what `write_embeddings` wrote, features left out."""
    table = read_arrow(path, "embed").drop_columns(["features"])
    return Embeddings(
        ids=np.array(table.column("id").to_pylist(), dtype=object),
        groups=np.array(table.column("group").to_pylist(), dtype=object),
        labels=table.column("label").to_numpy().astype(np.int64),
        logits=table.column("logit").to_numpy().astype(np.float64),
    )
