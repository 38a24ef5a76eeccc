"""Sources that are image files: class folders, a CSV that lists files, a folder of images without labels."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from streetvision.core.errors import UserError
from streetvision.core.escaping import escaped
from streetvision.core.params import CsvSource, FolderSource
from streetvision.data.pixels import MAX_FILE_BYTES
from streetvision.data.walk import (
    IMAGE_SUFFIXES,
    TOO_LARGE,
    Finder,
    image_files,
    left_out_line,
    names_at_top,
    read_image,
    sub_folders,
)
from streetvision.sources.csv_table import read_csv
from streetvision.sources.labels import ClassNames, LabelReader
from streetvision.sources.parts import (
    Plan,
    Row,
    context,
    extra_json,
    file_stat,
    input_stat,
    known_columns,
    local_path,
    slices,
)
from streetvision.sources.positions import read_position
from streetvision.sources.values import key

logger = logging.getLogger(__name__)

# What a column of file names is called in the wild.
FILE_ALIASES = (
    "file", "filename", "file_path", "path", "image", "image_path", "image_name", "image_file", "img",
    "img_path",
)  # fmt: skip


class FileEntry(NamedTuple):
    """An image file: where it is, what its source calls it, its other columns."""

    path: str
    name: str
    columns: Row


@dataclass(frozen=True)
class FilePart:
    """Image files, each with its other columns."""

    entries: tuple[FileEntry, ...]

    @property
    def n_rows(self) -> int:
        """Number of files."""
        return len(self.entries)

    def read(self) -> Iterator[Row]:
        """Read file after file; of one that is no image no content is taken, `prepare` sorts it out."""
        for path, name, columns in self.entries:
            data = read_image(Path(path), MAX_FILE_BYTES, TOO_LARGE)
            yield {**columns, "image": {"bytes": data, "path": escaped(name)}}


def _plan_files(
    source: str, entries: Sequence[FileEntry], shard_images: int, left_out: Counter[str]
) -> Plan:
    """Cut the entries into shards and give each row its id, the source's name and the file's."""
    place = f'source "{source}"'
    kept: list[FileEntry] = []
    inputs = []
    labels: dict[tuple[int, int], dict[int, str]] = {}  # of each real file
    for path, name, columns in entries:
        stat, real = file_stat(Path(path))
        if stat[1] > MAX_FILE_BYTES:
            left_out[f"larger than {TOO_LARGE}"] += 1
            continue
        inputs.append(stat)
        if columns["label"] is not None:
            labels.setdefault(real, {}).setdefault(columns["label"], name)
        own = {"id": f"{source}/{escaped(name)}", "source": source}
        kept.append(FileEntry(path, name, {**columns, **own}))
    both = [names for names in labels.values() if len(names) > 1]
    if both:
        example = " and ".join(escaped(both[0][label]) for label in (1, 0))
        logger.warning(
            "%s: %d images are linked under both classes and kept with both labels: %s%s",
            place, len(both), example, " and others" if len(both) > 1 else "",
        )  # fmt: skip
    if left_out:
        logger.warning("%s", left_out_line(place, left_out))
    shards = slices(len(kept), shard_images)
    parts = [FilePart(tuple(kept[start:stop])) for start, stop in shards]
    return Plan(parts, inputs, left_out.total())


def plan_folder(
    source: FolderSource, local_root: Path, shard_images: int, *, one_class: bool = False
) -> Plan:
    """Class sub-folders; the first folder below one, if any, is the group.

    With `one_class` the folder of one class may be missing, if there is none that might be it.
    """
    place = f'source "{source.name}"'
    folder = local_path(local_root, source.path, place)
    if not folder.is_dir():
        raise UserError(f"{place}: folder {escaped(folder)} is missing")
    present = sub_folders(folder)
    classes = _class_folders(source, present)
    for label, names in ((1, source.positive_folders), (0, source.negative_folders)):
        alone = one_class and len(present) == len(classes) == 1
        if label not in classes.values() and not alone:
            raise UserError(
                f"{place}: {escaped(folder)} has no folder named {' or '.join(map(escaped, names))}; "
                f"it has {', '.join(map(escaped, present)) or 'no folders'}"
            )
    unused = [name for name in present if name not in classes]
    if unused:
        logger.warning("%s: folders not used: %s", place, ", ".join(map(escaped, unused)))
    found = image_files(folder, tuple(classes))
    loose = names_at_top(folder, IMAGE_SUFFIXES)
    if loose:
        found.left_out["images outside of the class folders"] += len(loose)
    entries = [
        _entry(folder, file, classes[file.partition("/")[0]], file.split("/")[1:-1])
        for file in found.files
    ]
    return _plan_files(source.name, entries, shard_images, found.left_out)


def has_classes(source: FolderSource, folder: Path, *, one: bool = False) -> bool:
    """Whether a folder has a sub-folder of each class; with `one` that of one and no others will do."""
    present = sub_folders(folder)
    found = _class_folders(source, present)
    return len(found) == 2 or (one and len(found) == len(present) == 1)


def _class_folders(source: FolderSource, present: Sequence[str]) -> dict[str, int]:
    """Label by folder: of each class the first of its names that is there."""
    found = {}
    for label, names in ((1, source.positive_folders), (0, source.negative_folders)):
        spelled = [unicodedata.normalize("NFC", name) for name in present]
        for name in names:
            if unicodedata.normalize("NFC", name) in spelled:
                found[present[spelled.index(unicodedata.normalize("NFC", name))]] = label
                break
    return found


def plan_images(name: str, folder: Path, shard_images: int) -> Plan:
    """All images below a folder, without labels (all 0); the first folder below it, if any, is the group."""
    found = image_files(folder)
    entries = [_entry(folder, file, 0, file.split("/")[:-1]) for file in found.files]
    return _plan_files(name, entries, shard_images, found.left_out)


def _entry(folder: Path, file: str, label: int, folders: Sequence[str]) -> FileEntry:
    """An image, `folders` those that it lies in, the first of which is the group."""
    name = escaped(folders[0]) if folders else None
    group = key(name) or name  # a folder called "none" is a folder all the same
    return FileEntry(f"{folder}/{file}", file, {"label": label, "group": group})


def plan_csv(source: CsvSource, local_root: Path, shard_images: int) -> Plan:
    """One row an image: file, label, and any of the context columns; the rest goes to `extra`.

    A file is looked for in the folder of images, beside the CSV and in a folder `images` there.
    """
    place = f'source "{source.name}"'
    path = local_path(local_root, source.path, place)
    images = local_path(local_root, source.images, place)
    table = read_csv(path, {"file": FILE_ALIASES, "label": ("labels",)})
    beside = (path.parent, path.parent / "images", path.resolve().parent)
    finder = Finder((images, *beside))
    classes = ClassNames(source.positive_classes, source.negative_classes)
    labels = LabelReader.learn([(Counter(map(str.strip, table.column("label"))), ())], classes)
    entries: list[FileEntry] = []
    lines: dict[str, int] = {}
    missing: list[tuple[int, str]] = []
    for (line, cells), spelled in zip(table.records(), table.column("file"), strict=True):
        place = f"{table.place} line {line}"
        if not cells["file"]:
            raise UserError(f"{place}: the column file is empty")
        name = PurePosixPath(cells["file"].replace("\\", "/")).as_posix()
        wanted = local_path(images, name, place)
        file = finder.find(spelled)
        real = str(file or wanted)
        if real in lines:
            raise UserError(f"{place}: {escaped(name)} is already in line {lines[real]}")
        lines[real] = line
        if file is None:
            missing.append((line, escaped(wanted)))
        entries.append(FileEntry(real, name, _csv_columns(cells, place, labels)))
    if missing:
        line, wanted_name = missing[0]
        raise UserError(
            f"{table.place} line {line}: image {wanted_name} is missing "
            f"({len(missing)} of {len(entries)} are)"
        )
    plan = _plan_files(source.name, entries, shard_images, Counter())
    return Plan(plan.parts, [input_stat(path), *plan.inputs], plan.ignored_files)


def _csv_columns(cells: dict[str, str], place: str, labels: LabelReader) -> Row:
    """Columns of one CSV row; what is wrong is an error here, not a null."""
    names = known_columns(cells, place)
    values = {ours: cells[theirs] for ours, theirs in names.items()}
    if labels.unknown(values["label"]):
        raise UserError(f'{place}: label "{values["label"]:.60}": {labels.explain()}')
    try:
        columns: Row = {"label": labels.read(values["label"])} | context(values)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    try:
        point = read_position(values)
    except ValueError as error:
        raise UserError(f'{place}: "{error}" is not a latitude and a longitude') from error
    if point:
        columns |= {"latitude": point[0], "longitude": point[1]}
    known = {"file", *names.values()}
    other = {name: value for name, value in cells.items() if value and name not in known}
    return columns | {"extra": extra_json(other)}
