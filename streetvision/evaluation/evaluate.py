"""A bundle on labelled images: report, plots and predictions."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streetvision.core.artifacts import write_bytes_atomic, write_csv_atomic, write_json_atomic
from streetvision.core.processes import in_threads
from streetvision.core.progress import progress
from streetvision.data.store import Split

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetvision.bundle.predictor import Predictor

log = logging.getLogger(__name__)
# Columns of `predictions.csv` beside id, group, label and probability: what tells the image from others, and
# the part of each slice that it belongs to (columns of a split, and the class of the evidence's size).
PICTURE, EVIDENCE = "image_sha256", "evidence_size"
SLICES = ("source", "weather", "daytime", EVIDENCE)
# Upper bounds of the evidence's share of the image, and the names of the classes between them.
EVIDENCE_BOUNDS = (0.0025, 0.01, 0.04)
EVIDENCE_NAMES = ("below_0.25_percent", "0.25_to_1_percent", "1_to_4_percent", "above_4_percent")


@dataclass(frozen=True)
class Evaluation:
    """`report` is the content of `evaluation.json`; `plots` PNG bytes by name.

    `curves` are columns of tables by name, `predictions` the columns of a row for each image.
    """

    report: dict[str, Any]
    plots: dict[str, bytes]
    curves: dict[str, dict[str, list[Any]]]
    predictions: dict[str, NDArray[Any]]


def evaluate_split(
    predictor: Predictor,
    split: Split,
    served_prior: float,
    *,
    n_resamples: int,
    mistakes: int,
    seed: int,
) -> Evaluation:
    """Score every image of `split` through the bundle and report at the served and the natural prior.

    Of images of one class that is `one_class_report`, without the curves, which need both.

    Raises
    ------
    UserError
        `served_prior` outside (0, 1).
    """
    from streetvision.evaluation.report import evaluation_report, one_class_report
    from streetvision.plots import curves
    from streetvision.plots import pictures as plots
    from streetvision.stats.metrics import check_prior

    labels = split.labels
    one_class = len(set(labels.tolist())) == 1
    check_prior(served_prior)
    images = in_threads(split.image, progress(range(len(split)), len(split), "scoring"))
    probabilities = predictor.probabilities(images)
    slices = {name: split.column(name) for name in SLICES if name != EVIDENCE}
    sizes = evidence_size(split.evidence_area())
    sample = (labels, probabilities, split.groups, slices, served_prior, seed, n_resamples)
    tables: dict[str, dict[str, list[Any]]] = {}
    if one_class:
        report = one_class_report(*sample)
        log.warning(
            "all %d images are %s: %s is what can be said; MCC, ECE and curves need both classes",
            len(labels), *(("roadwork", "recall") if labels[0] else ("none", "the false alarm rate")),
        )  # fmt: skip
    else:
        slices[EVIDENCE] = sizes
        report = evaluation_report(*sample, against_all_negatives=[EVIDENCE])
        served = (labels, probabilities, served_prior)
        tables = {
            "roc.csv": curves.roc_curve(labels, probabilities),
            "precision_recall.csv": curves.precision_recall_curve(*served),
            "reliability.csv": curves.reliability_table(*served, "as served"),
        }
    pictures = {
        "confusion.png": plots.plot_confusion(**report["confusion"]),
        "mistakes.png": _mistakes(split, probabilities, mistakes),
    }
    hashes = np.array([picture_hash(split.image_bytes(row)) for row in range(len(split))])
    predictions = {
        "id": split.ids, "group": split.groups, "label": labels, "probability": probabilities,
        PICTURE: hashes, **slices, EVIDENCE: sizes,
    }  # fmt: skip
    return Evaluation(report, pictures, tables, predictions)


def write_evaluation(evaluation: Evaluation, report: Path, plots: Path) -> list[Path]:
    """Write the report, the plots, the curves and `predictions.csv`; returns the files."""
    written = [write_bytes_atomic(plots / name, data) for name, data in evaluation.plots.items()]
    written += [write_csv_atomic(plots / name, data) for name, data in evaluation.curves.items()]
    columns = {name: values.tolist() for name, values in evaluation.predictions.items()}
    written.append(write_csv_atomic(plots / "predictions.csv", columns))
    written.append(write_json_atomic(report, evaluation.report))
    return written


def picture_hash(data: bytes) -> str:
    """What tells an image from others: 16 hexadecimal digits (64 bits) of the SHA-256 of its stored bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def evidence_size(area: NDArray[np.float64]) -> NDArray[np.object_]:
    """Name the class of each evidence area [N] (share of the image); empty where there is none."""
    names = np.array([*EVIDENCE_NAMES, ""], dtype=object)
    index = np.searchsorted(EVIDENCE_BOUNDS, area, side="right")
    return np.asarray(names[np.where(np.isnan(area), len(EVIDENCE_NAMES), index)])


def _mistakes(split: Split, probabilities: NDArray[np.float64], count: int) -> bytes:
    """Contact sheet of the decisions that are wrong by most, worst first."""
    from streetvision.plots.pictures import plot_mistakes

    wrong = np.flatnonzero((probabilities > 0.5) != (split.labels == 1))
    order = np.argsort(-np.abs(probabilities[wrong] - split.labels[wrong]), kind="stable")
    rows = wrong[order][:count].tolist()
    images: list[Image] = [split.image(row) for row in rows]
    captions = [
        f"{'missed' if split.labels[row] else 'false alarm'}, p = {probabilities[row]:.3f}"
        for row in rows
    ]
    return plot_mistakes(images, captions)
