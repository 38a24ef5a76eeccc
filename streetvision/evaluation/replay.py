"""Logged challenges through a bundle: what the validator's windows would have shown, and when to worry.

A log is a CSV file (`.csv`, with a header) or JSON lines (`.jsonl`), oldest challenge first:

- `image`: path of the image file, absolute or from the log's folder;
- `prediction`, may be absent: what was answered; −1 is no answer, empty or null unknown;
- `label`, may be absent: 1 roadwork, 0 none; empty, null or −1 (what the subnet sends) unknown.

Case of these names and blanks around them do not matter. Other columns are ignored; a log without
predictions says so. Only challenges with a label enter the windows.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from streetvision.bundle.inputs import upright_image
from streetvision.core.artifacts import write_bytes_atomic, write_csv_atomic
from streetvision.core.errors import UserError
from streetvision.core.escaping import escaped
from streetvision.core.progress import progress
from streetvision.data.walk import Finder
from streetvision.sources.csv_table import decode_text, read_csv, read_table_file
from streetvision.sources.files import FILE_ALIASES
from streetvision.sources.labels import read_labels
from streetvision.subnet.profiles import PROFILES
from streetvision.subnet.reward import (
    ACCURACY_WINDOW,
    MCC_WINDOW,
    NO_ANSWER,
    rewards,
    rolling_metrics,
)

Floats = NDArray[np.float64]
COLUMNS = ("image", "prediction", "label")
CSV_SUFFIX, JSON_SUFFIX = ".csv", ".jsonl"
NO_LABEL = -1  # what the subnet sends where it does not know
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Challenge:
    """One row of a log; what is None is not known."""

    image: Path
    prediction: float | None
    label: int | None


@dataclass(frozen=True)
class Series:
    """Answers to labelled challenges, and the windows after each.

    Attributes
    ----------
    rows : their rows in the log [T]
    mcc : over the last 100, not clipped [T]
    accuracy : over the last 10 [T]
    reward : [T]
    unanswered : how many of the predictions are −1
    """

    rows: NDArray[np.intp]
    mcc: Floats
    accuracy: Floats
    reward: Floats
    unanswered: int


def read_log(path: Path) -> list[Challenge]:
    """Read and check a log.

    Raises
    ------
    UserError
        Names the line that is wrong, and what is allowed; or no image or label is there at all.
    """
    readers = {CSV_SUFFIX: _csv_rows, ".tsv": _csv_rows, JSON_SUFFIX: _json_rows}
    place = escaped(path)
    if path.suffix.lower() not in readers:
        raise UserError(f"{place} is neither CSV ({CSV_SUFFIX}) nor JSON lines ({JSON_SUFFIX})")
    rows = list(readers[path.suffix.lower()](path))
    finder = Finder((path.parent,))
    given = [row.get("label") for _, row in rows]
    labels = read_labels(
        [None if _number(label) == NO_LABEL else label for label in given],
        lambda at, _: (
            f"{place} line {rows[at][0]}: label is {given[at]!r}; it must be 0, 1, or empty or -1 if unknown"
        ),
    )
    challenges, missing = [], []
    for (line, row), label in zip(rows, labels, strict=True):
        challenge = _challenge(row, label, f"{place} line {line}")
        found = finder.find(str(challenge.image))
        if found is None:
            missing.append((line, path.parent / challenge.image))
        else:
            challenges.append(replace(challenge, image=found))
    if missing:
        line, image = missing[0]
        raise UserError(
            f"{place} line {line}: image {escaped(image)} is missing ({len(missing)} of {len(rows)} are)"
        )
    others = sorted({name for _, row in rows for name in row} - set(COLUMNS))
    seen = f"; not read: {', '.join(others)}" if others else ""
    if all(challenge.label is None for challenge in challenges):
        raise UserError(f"{place} has no challenge with a label: there is nothing to measure{seen}")
    if all(challenge.prediction is None for challenge in challenges):
        _log.warning("%s has no predictions: what was answered is not measured%s", place, seen)
    return challenges


def replay(
    log: Path,
    score: Callable[[Iterable[Image.Image]], Floats],
    stem: Path,
    min_mcc: float,
    min_accuracy: float,
) -> tuple[list[str], list[str]]:
    """Score a log's images, write `<stem>.csv` and `<stem>.png`, and say where both answerers stand.

    Parameters
    ----------
    log
        See the module.
    score
        Images to probabilities [N], as `Predictor.probabilities`.
    stem
        Of what is written.
    min_mcc, min_accuracy
        Bounds on the last 100 and the last 10 labelled challenges, for the bundle and for the log.

    Returns
    -------
    lines, alarms
        What there is to say; and what is below a bound, nothing if all is well.

    Raises
    ------
    UserError
        As `read_log`.
    """
    challenges = read_log(log)
    bundle = answers(score, challenges)
    given = {"bundle": bundle.tolist(), "log": [one.prediction for one in challenges]}
    found = {name: windows(predictions, challenges) for name, predictions in given.items()}
    series = {name: one for name, one in found.items() if one is not None}
    written = write_replay(stem, challenges, bundle, series, min_mcc, min_accuracy)
    lines = [describe(name, one) for name, one in series.items()]
    lines.append(f"written: {', '.join(map(str, written))}")
    bounds = (min_mcc, min_accuracy)
    return lines, [line for name, one in series.items() for line in alarms(name, one, *bounds)]


def answers(
    score: Callable[[Iterable[Image.Image]], Floats], challenges: Sequence[Challenge]
) -> Floats:
    """Probabilities [N] that `score` gives the images, read as it takes them; −1 where one is unusable."""
    found = np.full(len(challenges), NO_ANSWER)
    read: list[int] = []
    sizes: list[tuple[int, int]] = []

    def images() -> Iterator[Image.Image]:
        for row in progress(range(len(challenges)), len(challenges), "replay"):
            try:
                image = upright_image(challenges[row].image)
            except UserError as error:
                _log.warning("%s", error)
                continue
            read.append(row)
            sizes.append(image.size)
            yield image

    probabilities = score(images())
    found[read] = probabilities
    _warn_of_mixed_eras(sizes)
    return found


def _warn_of_mixed_eras(sizes: Sequence[tuple[int, int]]) -> None:
    """Say it where some pictures have the size of one era of the validator, and others that of another."""
    reduced = {each.side: each.name for each in PROFILES.values() if each.side is not None}
    squares = sum(width == height and width in reduced for width, height in sizes)
    if 0 < squares < len(sizes):
        names = ", ".join(each.name for each in PROFILES.values() if each.side in reduced)
        _log.warning(
            "the log mixes eras: %d of %d pictures are squares of %s pixels, as validators %s sent them, and "
            "the others are whole; windows over both say little of either",
            squares, len(sizes), ", ".join(map(str, reduced)), names,
        )  # fmt: skip


def windows(predictions: Sequence[float | None], challenges: Sequence[Challenge]) -> Series | None:
    """The validator's windows over the challenges that have a label and a prediction; None without any."""
    pairs = [
        (row, prediction, challenge.label)
        for row, (prediction, challenge) in enumerate(zip(predictions, challenges, strict=True))
        if prediction is not None and challenge.label is not None
    ]
    if not pairs:
        return None
    rows, values, labels = (np.array(column) for column in zip(*pairs, strict=True))
    mcc, accuracy = rolling_metrics(values, labels)
    unanswered = int((values == NO_ANSWER).sum())
    return Series(rows, mcc, accuracy, rewards(values, labels), unanswered)


def describe(name: str, series: Series) -> str:
    """One line on where a series stands at its end."""
    return (
        f"{name}: {len(series.rows)} labelled; MCC over the last {MCC_WINDOW} {series.mcc[-1]:.3f}, "
        f"accuracy over the last {ACCURACY_WINDOW} {series.accuracy[-1]:.2f}, mean reward "
        f"{series.reward.mean():.3f}, unanswered {series.unanswered}"
    )


def alarms(name: str, series: Series, min_mcc: float, min_accuracy: float) -> list[str]:
    """One line for each window that stands below its bound; a window that is not full raises none."""
    found = []
    for text, values, window, bound in (
        ("MCC", series.mcc, MCC_WINDOW, min_mcc),
        ("accuracy", series.accuracy, ACCURACY_WINDOW, min_accuracy),
    ):
        if len(values) >= window and values[-1] < bound:
            found.append(
                f"ALARM: {name}: {text} over the last {window} is {values[-1]:.3f}, below {bound:g}"
            )
    return found


def write_replay(
    stem: Path,
    challenges: Sequence[Challenge],
    bundle: Floats,
    series: Mapping[str, Series],
    min_mcc: float,
    min_accuracy: float,
) -> list[Path]:
    """Write `<stem>.csv`, a row a challenge, and `<stem>.png`; series are `bundle` and perhaps `log`."""
    from streetvision.plots.pictures import plot_replay

    columns: dict[str, list[Any]] = {
        "image": [escaped(challenge.image) for challenge in challenges],
        "label": [_cell(challenge.label) for challenge in challenges],
        "log": [_cell(challenge.prediction) for challenge in challenges],
        "bundle": bundle.tolist(),
    }
    for name, one in series.items():
        for metric, values in (
            ("mcc", one.mcc),
            ("accuracy", one.accuracy),
            ("reward", one.reward),
        ):
            cells: list[Any] = [""] * len(challenges)
            for row, value in zip(one.rows, values, strict=True):
                cells[row] = float(value)
            columns[f"{name}_{metric}"] = cells
    picture = plot_replay(
        {name: (one.rows, one.mcc, one.accuracy) for name, one in series.items()},
        min_mcc,
        min_accuracy,
    )
    return [
        write_csv_atomic(stem.with_name(f"{stem.name}.csv"), columns),
        write_bytes_atomic(stem.with_name(f"{stem.name}.png"), picture),
    ]


def _cell(value: float | None) -> float | str:
    return "" if value is None else value


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    names = dict.fromkeys(COLUMNS[1:], ())
    table = read_csv(path, {"image": FILE_ALIASES}, names)
    for (line, row), image in zip(table.records(), table.column("image"), strict=True):
        yield line, {**row, "image": image}


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    place = escaped(path)
    for line, text in enumerate(io.StringIO(decode_text(read_table_file(path), place)), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} line {line} is not JSON: {error}") from error
        columns = [_column(name) for name in row] if isinstance(row, dict) else []
        if "image" not in columns:
            raise UserError(f'{place} line {line} is no object with the key "image"')
        if any(columns.count(name) > 1 for name in COLUMNS):
            raise UserError(f"{place} line {line} names a key twice: {', '.join(columns)}")
        yield line, dict(zip(columns, row.values(), strict=True))


def _column(name: str) -> str:
    """A key's name as it is looked up."""
    return name.strip().casefold()


def _challenge(row: Mapping[str, Any], label: int | None, place: str) -> Challenge:
    name = row["image"]
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{place}: image is {name!r}; the path of a file is needed")
    given = row.get("prediction")
    prediction = _number(given)
    if prediction is not None and not math.isfinite(prediction):
        raise UserError(
            f"{place}: prediction is {given!r}; it must be a finite number, -1 for no answer, "
            "or empty if unknown"
        )
    return Challenge(Path(name), prediction, label)


def _number(value: Any) -> float | None:
    """A cell's number, None if it is empty, NaN if it is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan
