"""The data of the comparisons: split files made once, one folder a fold, and their distorted versions."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streetvision.core.artifacts import config_hash, write_atomic
from streetvision.core.errors import UserError
from streetvision.core.params import Data
from streetvision.core.progress import progress
from streetvision.core.schema import SPLITS
from streetvision.data.store import Split, open_split, read_arrow
from streetvision.data.transforms import Preprocessing
from streetvision.studies.leave_out import balanced_parts, mixed_groups, write_parts

log = logging.getLogger(__name__)

SEED = 7  # of everything about the data: runs differ in training alone
READ = ("val_select", "val_test")
# Name, split and a stage that may read it so.
PARTS = (
    ("TRAIN", "train", "train"),
    ("VAL_SELECT", "val_select", "train"),
    ("VAL_TEST", "val_test", "evaluate"),
)
WHOLE = "whole.arrow"


@dataclass(frozen=True)
class Fold:
    """A folder with `train.arrow`, `val_select.arrow` and `val_test.arrow`, opened by role."""

    folder: Path

    def open(self, name: str, stage: str) -> Split:
        """A split with the rights of a stage: `explora` gets no labels, VAL_TEST is `evaluate`'s."""
        return open_split(stage, name, self.folder / f"{name}.arrow")

    def read(self, name: str) -> Split:
        """A split that is scored."""
        return self.open(name, "train" if name == "val_select" else "evaluate")

    def distorted(self, name: str, preprocessing: Preprocessing) -> Path:
        """File of a scored split's distorted inputs for one preprocessing: uint8 [4, N, H, W, 3]."""
        return self.folder / f"{name}-{config_hash(preprocessing.to_dict())[:16]}.npy"


def plan_folds(
    data: Data, folds: int, root: Path, home: Path, seed: int = SEED, *, calibrated: bool = False
) -> tuple[Fold, ...]:
    """Where `prepare_folds` puts them below `home`, a function of `data`, its sources' files and the seed.

    `calibrated` folds have a VAL_CALIB and a fusion part besides; a single fold has what `data` says.

    Raises
    ------
    UserError
        A source is missing.
    """
    from streetvision.sources.sources import plan_source

    inputs = [
        repr(
            plan_source(
                source, root / data.local_root, shard_images=data.shard_images, seed=seed
            ).inputs
        )
        for source in data.sources
    ]
    content = data.model_dump(mode="json", exclude={"local_root"})
    parts = {"data": content, "folds": folds, "seed": seed, "inputs": inputs}
    key = config_hash(parts | ({"calibrated": True} if calibrated else {}))
    return tuple(Fold(home / key[:16] / str(number)) for number in range(folds))


def prepare_folds(
    folds: Sequence[Fold],
    data: Data,
    root: Path,
    workers: int,
    seed: int = SEED,
    *,
    calibrated: bool = False,
) -> None:
    """Ingest, prepare and split `data` into planned folds, unless that is done.

    Raises
    ------
    UserError
        Too few groups with both classes for so many folds.
    """
    folder = folds[0].folder.parent
    if folder.is_dir():
        return
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "scratch").mkdir(parents=True)
    _prepare(data, len(folds), root / data.local_root, unfinished, workers, seed, calibrated)
    for name in ("raw", "scratch", "ingest"):
        shutil.rmtree(unfinished / name, ignore_errors=True)
    unfinished.replace(folder)


def _prepare(
    data: Data,
    folds: int,
    local_root: Path,
    folder: Path,
    workers: int,
    seed: int,
    calibrated: bool,
) -> None:
    from streetvision.prepare.prepare import prepare_splits, prepare_whole
    from streetvision.sources.ingest import ingest_sources

    ingest_sources(
        list(data.sources), local_root, folder / "raw", folder / "ingest",
        shard_images=data.shard_images, seed=seed, workers=workers, progress=progress,
    )  # fmt: skip
    if folds == 1:
        paths = {name: folder / "0" / f"{name}.arrow" for name in SPLITS}
        prepare_splits(
            folder / "raw", paths, folder / "originals.arrow", folder / "quarantine.csv",
            folder / "scratch", data, seed,
            workers, progress,
        )  # fmt: skip
        return
    prepare_whole(
        folder / "raw", folder / WHOLE, folder / "scratch", data, workers, progress, divided=True
    )
    whole = open_split("crossval", "whole", folder / WHOLE)
    table = read_arrow(folder / WHOLE, "prepare")
    for number, rows in enumerate(rotate(whole, folds, calibrated=calibrated)):
        fusion = rows.pop("fusion", np.empty(0, np.int64))
        write_parts(table, rows, fusion, folder / str(number))
    (folder / WHOLE).unlink()


def prepare_all(data: Data, root: Path, folder: Path, workers: int, seed: int) -> Path:
    """Ingest and prepare `data` as one file without a split, unless that is done; returns its path."""
    from streetvision.prepare.prepare import prepare_whole
    from streetvision.sources.ingest import ingest_sources

    path = folder / WHOLE
    if path.is_file():
        return path
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    ingest_sources(
        list(data.sources), root / data.local_root, folder / "raw", folder / "ingest",
        shard_images=data.shard_images, seed=seed, workers=workers, progress=progress,
    )  # fmt: skip
    prepare_whole(folder / "raw", path, scratch, data, workers, progress, divided=True)
    for name in ("raw", "ingest", "scratch"):
        shutil.rmtree(folder / name)
    return path


def rotate(
    whole: Split, folds: int, *, calibrated: bool = False
) -> list[dict[str, NDArray[np.int64]]]:
    """Rows of TRAIN, VAL_SELECT and VAL_TEST in each fold.

    The groups with both classes are divided into `folds` parts of about equal size. In fold k part k is
    VAL_TEST, part k + 1 VAL_SELECT and the rest TRAIN, with the groups of one class: over the folds,
    each group is VAL_SELECT once and VAL_TEST once. Where `calibrated`, part k + 2 is VAL_CALIB, and
    the smallest group of part k + 3 TRAIN's fusion part, whose rows are `fusion`.

    Raises
    ------
    UserError
        Too few groups with both classes, or too few folds for all these parts.
    """
    groups, least = mixed_groups(whole), 5 if calibrated else 3
    if len(groups) < folds or folds < least:
        raise UserError(
            f"{folds} folds, of at least {least}, need as many groups with both classes; "
            f"there are {len(groups)}"
        )
    parts = balanced_parts({name: int((whole.groups == name).sum()) for name in groups}, folds)
    part_of = {name: number for number, part in enumerate(parts) for name in part}
    number = np.array([part_of.get(str(name), -1) for name in whole.groups])
    made = []
    for fold in range(folds):
        roles = {"val_test": fold, "val_select": (fold + 1) % folds}
        if calibrated:
            roles["val_calib"] = (fold + 2) % folds
        rows = {name: np.flatnonzero(number == part) for name, part in roles.items()}
        rows["train"] = np.flatnonzero(~np.isin(number, list(roles.values())))
        if calibrated:
            rows["fusion"] = np.flatnonzero(whole.groups == parts[(fold + 3) % folds][-1])
        made.append(rows)
    return made


def make_distorted(work: tuple[Fold, str, Preprocessing]) -> None:
    """Distort a scored split as the validator does, at its four levels, unless that is done."""
    from PIL import Image

    from streetvision.subnet.profiles import CROP
    from streetvision.subnet.served import Task, served_jpegs

    fold, name, preprocessing = work
    path = fold.distorted(name, preprocessing)
    if path.is_file():
        return
    split = fold.read(name)
    tasks = [Task(str(each), split.image_bytes(row)) for row, each in enumerate(split.ids)]
    shape = (len(CROP.levels), len(split), preprocessing.height, preprocessing.width, 3)
    inputs = np.empty(shape, np.uint8)
    for number, jpeg in enumerate(served_jpegs(CROP, tasks, CROP.levels, 1, SEED)):
        row, level = divmod(number, len(CROP.levels))
        with Image.open(io.BytesIO(jpeg)) as image:
            inputs[level, row] = preprocessing.apply(image)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, inputs)

    write_atomic(path, write)


def counts(
    folds: Sequence[Fold], parts: Sequence[tuple[str, str, str]] = PARTS
) -> dict[str, tuple[float, float]]:
    """Images and groups of each part (its name, split and a stage that reads it), mean over the folds."""
    found = {}
    for label, name, stage in parts:
        splits = [fold.open(name, stage) for fold in folds]
        images = [len(split) for split in splits]
        groups = [len(set(split.groups)) for split in splits]
        found[label] = (float(np.mean(images)), float(np.mean(groups)))
    return found
