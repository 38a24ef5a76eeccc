"""What a user may point `evaluate` at, opened as one split."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streetvision.core.errors import UserError
from streetvision.core.escaping import escaped
from streetvision.core.params import CsvSource, Data, FolderSource
from streetvision.core.progress import progress
from streetvision.data.store import Split, open_split
from streetvision.data.transforms import Preprocessing
from streetvision.data.walk import READ_FORMATS, names_at_top, walk_files
from streetvision.prepare.prepare import prepare_whole
from streetvision.sources.files import has_classes, plan_csv, plan_folder, plan_images
from streetvision.sources.ingest import write_plans
from streetvision.sources.labels import SURE_NAMES, ClassNames
from streetvision.sources.natix import find_parquet, plan_parquet
from streetvision.sources.parts import Plan

SPLIT_SUFFIX, PARQUET_SUFFIX = ".arrow", ".parquet"
CSV_SUFFIXES = (".csv", ".tsv")
SHARD_IMAGES = 1000
_SHOWN_FILES = 5
# As data sets of the hub name the files or folders of their splits.
_SPLIT = re.compile(r"(?:^|[/_-])(train|validation|valid|val|dev|test)(?=[/_.-])", re.IGNORECASE)
_log = logging.getLogger(__name__)


@contextmanager
def labelled_images(
    data: Path,
    preprocessing: Preprocessing,
    side_px: int | None = None,
    classes: ClassNames = SURE_NAMES,
    *,
    unlabelled: bool = False,
) -> Iterator[Split]:
    """Open what a user may point at: a split file, Parquet, a CSV, or a folder of classes or of Parquet.

    All but a split file go through the code of `ingest` and `prepare` into one temporary split; unusable
    rows are left out and logged. Their shorter side becomes `side_px`, by default twice what the model sees.
    With `unlabelled` a folder of images without classes is read, too: its first sub-folders are the groups,
    labels are 0 and mean nothing.

    Raises
    ------
    UserError
        Nothing there, or not in one of these forms.
    """
    if _suffix(data) == SPLIT_SUFFIX and (data.is_file() or not data.exists()):
        yield open_split("evaluate", "val_test", data)
        return

    name, plan = _plan(data, classes, unlabelled=unlabelled)
    if not plan.parts:
        raise UserError(f"{escaped(data)} holds no image; {READ_FORMATS} are read")
    with tempfile.TemporaryDirectory(prefix="streetvision-") as temporary:
        folder = Path(temporary)
        write_plans([name], [plan], folder / "raw", folder / "ingest", "", 0, progress)
        preparation = Data(
            side_px=side_px or 2 * max(preprocessing.height, preprocessing.width),
        )
        (folder / "prepare").mkdir()
        prepare_whole(
            folder / "raw", folder / "all.arrow", folder / "prepare", preparation, 0, progress
        )
        yield open_split("evaluate", "val_test", folder / "all.arrow")


def _suffix(data: Path) -> str:
    """Suffix of a file in lower case; a folder has none."""
    return "" if data.is_dir() else data.suffix.lower()


def _plan(data: Path, classes: ClassNames, *, unlabelled: bool) -> tuple[str, Plan]:
    """Name and plan of the source that `data` is."""
    if not data.exists():
        raise UserError(f"{escaped(data)} does not exist")
    suffix = _suffix(data)
    if suffix in CSV_SUFFIXES:
        table = CsvSource(
            kind="csv", path=data.name,
            positive_classes=list(classes.positive), negative_classes=list(classes.negative),
        )  # fmt: skip
        return "csv", plan_csv(table, data.parent, SHARD_IMAGES)
    if suffix == PARQUET_SUFFIX:
        return "parquet", plan_parquet("parquet", find_parquet(data, "data"), SHARD_IMAGES, classes)
    if not data.is_dir():
        raise UserError(
            f"{escaped(data)} is not a split (.arrow), Parquet, a CSV or a folder of class folders"
        )
    source = _class_folders(classes)
    if not names_at_top(data, (PARQUET_SUFFIX,)) and has_classes(source, data, one=not unlabelled):
        return "folder", plan_folder(source, data, SHARD_IMAGES, one_class=True)
    parquet = _parquet_below(data)
    if parquet:
        return "parquet", plan_parquet("parquet", parquet, SHARD_IMAGES, classes)
    if unlabelled:
        return "images", plan_images("images", data, SHARD_IMAGES)
    tables = names_at_top(data, CSV_SUFFIXES)
    if tables:
        raise UserError(
            f"{escaped(data)} has no folders of both classes; if {escaped(tables[0])} lists its images, "
            "give that file"
        )
    return "folder", plan_folder(source, data, SHARD_IMAGES)


def _class_folders(classes: ClassNames) -> FolderSource:
    """The source of class folders with these names, of a class without any with the usual ones."""
    usual = FolderSource(kind="folder")
    return FolderSource(
        kind="folder",
        positive_folders=list(classes.positive) or usual.positive_folders,
        negative_folders=list(classes.negative) or usual.negative_folders,
    )


def _parquet_below(folder: Path) -> list[Path]:
    """The Parquet files of a data set, in whichever folder; logs which they are."""
    names = [file for file in walk_files(folder).files if file.lower().endswith(PARQUET_SUFFIX)]
    if names:
        shown = ", ".join(map(escaped, names[:_SHOWN_FILES]))
        more = f" and {len(names) - _SHOWN_FILES} more" if len(names) > _SHOWN_FILES else ""
        _log.info("%s: read as Parquet: %s%s", escaped(folder), shown, more)
    splits = sorted({found[1].lower() for found in map(_SPLIT.search, names) if found})
    if len(splits) > 1:
        _log.warning(
            "%s: files of several splits (%s) are read together; give a file or a folder of one of them "
            "to look at it alone", escaped(folder), ", ".join(splits),
        )  # fmt: skip
    return [folder / name for name in names]
