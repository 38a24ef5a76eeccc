"""What a user may point `evaluate` at, opened as one split."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streetvision.data.ingest import ingest_sources
from streetvision.data.prepare import prepare_whole
from streetvision.data.store import Split, open_split
from streetvision.data.transforms import Preprocessing
from streetvision.errors import UserError
from streetvision.params import CsvSource, Data, FolderSource, ParquetSource
from streetvision.progress import progress


@contextmanager
def labelled_images(
    data: Path, preprocessing: Preprocessing, side_px: int | None = None
) -> Iterator[Split]:
    """Open what a user may point at: a split file, Parquet, a CSV, or a folder of classes.

    All but a split file go through the code of `ingest` and `prepare` into one temporary split; unusable
    rows are left out and logged. Their shorter side becomes `side_px`, by default twice what the model sees.

    Raises
    ------
    UserError
        Nothing there, or not in one of these forms.
    """
    if data.suffix == ".arrow":
        yield open_split("evaluate", "val_test", data)
        return

    with tempfile.TemporaryDirectory(prefix="streetvision-") as name:
        folder = Path(name)
        root, source = _as_source(data)
        ingest_sources(
            [source], root, folder / "raw", folder / "ingest", shard_images=1000, seed=0, workers=0,
            progress=progress,
        )  # fmt: skip
        preparation = Data(
            side_px=side_px or 2 * max(preprocessing.height, preprocessing.width),
            square_crop=preprocessing.square_crop,
        )
        (folder / "prepare").mkdir()
        prepare_whole(
            folder / "raw", folder / "all.arrow", folder / "prepare", preparation, 0, progress
        )
        yield open_split("evaluate", "val_test", folder / "all.arrow")


def _as_source(data: Path) -> tuple[Path, Any]:
    """Return the local root and the source that describe `data`."""
    if not data.exists():
        raise UserError(f"{data} does not exist")
    root, name = data.resolve().parent, data.resolve().name
    if data.suffix == ".parquet" or (data.is_dir() and any(data.glob("*.parquet"))):
        return root, ParquetSource(kind="parquet", path=name)
    if data.suffix == ".csv":
        images = "images" if (root / "images").is_dir() else "."
        return root, CsvSource(kind="csv", path=name, images=images)
    if data.is_dir():
        return root, FolderSource(kind="folder", path=name)
    raise UserError(f"{data} is not a split (.arrow), Parquet, a CSV or a folder of class folders")
