"""Probabilities of many image files; one that cannot be read is reported and the rest goes on."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from streetvision.bundle.inputs import upright_image
from streetvision.core.artifacts import write_csv_atomic
from streetvision.core.errors import UserError
from streetvision.core.escaping import escaped
from streetvision.data.walk import image_files, is_left_by_tools, left_out_line, walk_files
from streetvision.decision.policy import DECISION_THRESHOLD

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetvision.bundle.base import BasePredictor

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """The answer for one file, or the reason why there is none."""

    path: Path
    probability: float | None
    error: str = ""

    @property
    def decision(self) -> int | None:
        """1 is roadwork: p > 0.5, strictly."""
        return None if self.probability is None else int(self.probability > DECISION_THRESHOLD)


def find_images(places: Sequence[str]) -> list[Path]:
    """Files as they are; the images below folders, as `image_files` finds them; what globs match.

    Each file once. A place where there is nothing stays in the list: reading it says what is wrong.
    """
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place)
        exists = os.path.lexists(path) or not glob.has_magic(place)
        matches = [path] if exists else _matches(path)
        for match in matches or [path]:
            found.update(dict.fromkeys(images_below(match) or [match]))
    return list(found)


def images_below(folder: Path) -> list[Path]:
    """The images below a folder, none if it is no folder; logs what is left out."""
    if not folder.is_dir():
        return []
    found = image_files(folder)
    if found.left_out:
        _log.warning("%s", left_out_line(escaped(folder), found.left_out))
    return [folder / file for file in found.files]


def _matches(pattern: Path) -> list[Path]:
    """What a glob matches, sorted; `**` walks as everything else does, so that links in a circle end."""
    if "**" not in pattern.parts:
        found = sorted(map(Path, glob.glob(str(pattern))))  # noqa: PTH207
        return [path for path in found if not is_left_by_tools(path.name)]
    start = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    root, wanted = Path(*pattern.parts[:start]), pattern.parts[start:]
    if not root.is_dir():
        return []
    return [root / file for file in walk_files(root).files if _fits(file.split("/"), wanted)]


def _fits(names: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the names of a path fit a glob's; `**` is any number of folders, at the end all below."""
    if not wanted:
        return not names
    if wanted[0] == "**":
        rest = wanted[1:]
        return not rest or any(_fits(names[start:], rest) for start in range(len(names)))
    return bool(names) and fnmatchcase(names[0], wanted[0]) and _fits(names[1:], wanted[1:])


def predict_files(predictor: BasePredictor, paths: Sequence[Path]) -> Iterator[Prediction]:
    """Yield the predictions in the order of `paths`, a batch at a time; one image is in memory at once."""
    for start in range(0, len(paths), predictor.batch_size):
        chunk = paths[start : start + predictor.batch_size]
        errors: dict[Path, str] = {}
        answers = iter(predictor.probabilities(_readable(chunk, predictor.max_pixels, errors)))
        for path in chunk:
            if path in errors:
                yield Prediction(path, None, errors[path])
            else:
                yield Prediction(path, float(next(answers)))


def write_predictions(predictions: Iterable[Prediction], path: Path) -> Path:
    """Write a CSV: path, probability, decision (1 is roadwork), error; the middle two or the last are empty."""
    rows = [
        (
            escaped(each.path),
            "" if each.probability is None else each.probability,
            "" if each.decision is None else each.decision,
            each.error,
        )
        for each in predictions
    ]
    columns = zip(*rows, strict=True) if rows else ([],) * 4
    names = ("path", "probability", "decision", "error")
    return write_csv_atomic(path, dict(zip(names, columns, strict=True)))


def _readable(paths: Iterable[Path], max_pixels: int, errors: dict[Path, str]) -> Iterator[Image]:
    """Yield the images that can be read; the reasons of the others go to `errors`."""
    for path in paths:
        try:
            image = upright_image(path, max_pixels)
        except UserError as error:
            errors[path] = str(error)
            continue
        yield image
