"""Probabilities of many image files; one that cannot be read is reported and the rest goes on."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streetvision.artifacts import write_csv_atomic
from streetvision.bundle.inputs import upright_image
from streetvision.data.files import IMAGE_SUFFIXES
from streetvision.decision.policy import DECISION_THRESHOLD
from streetvision.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetvision.bundle.base import BasePredictor


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
    """Files as they are; the JPEG, PNG and WebP files below folders, sorted; what globs match.

    Each file once. A place where there is nothing stays in the list: reading it says what is wrong.
    """
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place)
        exists = path.exists() or not glob.has_magic(place)
        matches = [path] if exists else sorted(map(Path, glob.glob(place, recursive=True)))  # noqa: PTH207
        for match in matches or [path]:
            inside = _images_below(match) if match.is_dir() else []
            found.update(dict.fromkeys(inside or [match]))
    return list(found)


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
            str(each.path).encode("utf-8", "backslashreplace").decode(),
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


def _images_below(folder: Path) -> list[Path]:
    # `._x.jpg` is what macOS leaves beside x.jpg on foreign file systems.
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
    )
