"""Sources that are image files: class folders, and a CSV that lists files."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from streetvision.data.labels import ClassNames, LabelReader
from streetvision.data.parts import (
    Plan,
    Row,
    context,
    extra_json,
    input_stat,
    known_columns,
    local_path,
    slices,
)
from streetvision.data.positions import read_position
from streetvision.data.values import key
from streetvision.errors import UserError
from streetvision.params import CsvSource, FolderSource

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class FilePart:
    """Image files, each with its other columns; the files are relative to `folder`."""

    folder: Path
    entries: tuple[tuple[str, Row], ...]

    @property
    def n_rows(self) -> int:
        """Number of files."""
        return len(self.entries)

    def read(self) -> Iterator[Row]:
        """Read file after file; bytes that are no image pass, `prepare` sorts them out."""
        for file, columns in self.entries:
            path = self.folder / file
            try:
                data = path.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error
            yield {**columns, "image": {"bytes": data, "path": file}}


def _plan_files(
    source: FolderSource | CsvSource,
    folder: Path,
    entries: Sequence[tuple[str, Row]],
    shard_images: int,
) -> list[FilePart]:
    """Cut the entries into shards and give each row its id, the source's name and the file's."""
    rows = [
        (file, {**columns, "id": f"{source.name}/{file}", "source": source.name})
        for file, columns in entries
    ]
    shards = slices(len(rows), shard_images)
    return [FilePart(folder, tuple(rows[start:stop])) for start, stop in shards]


def plan_folder(source: FolderSource, local_root: Path, shard_images: int) -> Plan:
    """Class sub-folders; the first folder below one, if any, is the group."""
    place = f'source "{source.name}"'
    folder = local_path(local_root, source.path, place)
    if not folder.is_dir():
        raise UserError(f"{place}: folder {folder} is missing")
    present = sorted(path.name for path in folder.iterdir() if path.is_dir())
    classes: dict[str, int] = {}
    for label, names in ((1, source.positive_folders), (0, source.negative_folders)):
        chosen = next((name for name in names if name in present), None)
        if chosen is None:
            raise UserError(
                f"{place}: {folder} has no folder named {' or '.join(names)}; "
                f"it has {', '.join(present) or 'no folders'}"
            )
        classes[chosen] = label
    unused = [name for name in present if name not in classes and not name.startswith(".")]
    if unused:
        logger.warning("%s: folders not used: %s", place, ", ".join(unused))
    entries, ignored = [], 0
    for name, label in classes.items():
        for parent, _, files in os.walk(folder / name, followlinks=True):
            inside = Path(parent).relative_to(folder)
            group = key(inside.parts[1]) if len(inside.parts) > 1 else None
            for file in files:
                # `._x.jpg` is what macOS leaves beside x.jpg on foreign file systems.
                if file.startswith(".") or not file.lower().endswith(IMAGE_SUFFIXES):
                    ignored += 1
                else:
                    entries.append(((inside / file).as_posix(), {"label": label, "group": group}))
    entries.sort(key=lambda entry: entry[0])
    inputs = [input_stat(folder / file) for file, _ in entries]
    return Plan(_plan_files(source, folder, entries, shard_images), inputs, ignored)


def plan_csv(source: CsvSource, local_root: Path, shard_images: int) -> Plan:
    """One row an image: file, label, and any of the context columns; the rest goes to `extra`."""
    place = f'source "{source.name}"'
    path = local_path(local_root, source.path, place)
    images = local_path(local_root, source.images, place)
    entries: dict[str, Row] = {}
    lines: dict[str, int] = {}
    table = list(_read_csv(path, place))
    classes = ClassNames(source.positive_classes, source.negative_classes)
    labels = LabelReader.learn([(Counter(cells["label"] for _, cells in table), ())], classes)
    for line, cells in table:
        place = f"{path} line {line}"
        if not cells["file"]:
            raise UserError(f"{place}: the column file is empty")
        file = local_path(images, cells["file"], place).relative_to(images).as_posix()
        if file in lines:
            raise UserError(f"{place}: {file} is already in line {lines[file]}")
        lines[file] = line
        entries[file] = _csv_columns(cells, place, labels)
    missing = [file for file in entries if not (images / file).is_file()]
    if missing:
        raise UserError(
            f"{path} line {lines[missing[0]]}: image {images / missing[0]} is missing "
            f"({len(missing)} of {len(entries)} are)"
        )
    inputs = [input_stat(path), *(input_stat(images / file) for file in entries)]
    return Plan(_plan_files(source, images, list(entries.items()), shard_images), inputs)


def _read_csv(path: Path, place: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line number and cells by column; every row has every column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for required in ("file", "label"):
                if required not in header:
                    raise UserError(
                        f"{path} has no column {required}; "
                        f"its columns are {', '.join(header) or 'none'}"
                    )
            if len(set(header)) < len(header):
                raise UserError(f"{path} names a column twice: {', '.join(header)}")
            for cells in reader:
                if len(cells) not in {0, len(header)}:
                    raise UserError(
                        f"{path} line {reader.line_num}: {len(cells)} cells, "
                        f"but the header names {len(header)} columns"
                    )
                if cells:
                    values = (cell.strip() for cell in cells)
                    yield reader.line_num, dict(zip(header, values, strict=True))
    except OSError as error:
        raise UserError(f"{place}: cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{place}: {path} is not a UTF-8 CSV file: {error}") from error


def _csv_columns(cells: dict[str, str], place: str, labels: LabelReader) -> Row:
    """Columns of one CSV row; what is wrong is an error here, not a null."""
    names = known_columns(cells, place)
    values = {ours: cells[theirs] for ours, theirs in names.items()}
    if labels.unknown(values["label"]):
        raise UserError(f'{place}: label "{values["label"]:.60}": {labels.explain()}')
    try:
        columns = {"label": labels.read(values["label"])} | context(values)
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
