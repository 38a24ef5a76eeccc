"""Labels that look wrong: confident learning on probabilities of a model that did not see the image's group.

Northcutt, Jiang & Chuang (2021), Journal of Artificial Intelligence Research 70, through cleanlab. It ranks
what a person should look at; no label is ever changed here. A model that was trained on a wrong label may
have learned it by heart: the probabilities must come from outside of the image's group.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streetvision.core.artifacts import write_csv_atomic
from streetvision.core.errors import UserError
from streetvision.core.escaping import shortened, terminal
from streetvision.data.embeddings import read_embeddings
from streetvision.sources.csv_table import read_csv
from streetvision.sources.labels import read_labels
from streetvision.sources.values import key

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = NDArray[np.float64]
# Columns that may hold the probability: of `crossval`, of `evaluate`.
PROBABILITY_COLUMNS = ("pipeline", "probability")
# Firm enough not to learn wrong labels by heart where images are few: of one label in twenty turned, the first
# tenth of the ranking holds 83 % at 200 images with 0.01, 75 % with 1; at 4,758 it is 95 % and 93 %.
_INVERSE_L2 = 0.01


@dataclass(frozen=True)
class Labelled:
    """Images with a label and an out-of-group probability of roadwork, [N] each."""

    ids: NDArray[np.object_]
    groups: NDArray[np.object_]
    labels: NDArray[np.int64]
    probability: Floats


@dataclass(frozen=True)
class Doubts:
    """Every label judged.

    Attributes
    ----------
    labelled : what was judged
    quality : probability of the given label [N]
    issue : whether the other label is confidently the better one [N]
    order : rows, the most doubtful first; issues before all others [N]
    """

    labelled: Labelled
    quality: Floats
    issue: NDArray[np.bool_]
    order: NDArray[np.intp]


def out_of_group_probability(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    groups: NDArray[np.object_],
    seed: int = 0,
) -> Floats:
    """Probabilities [N] of logistic regression on frozen features [N, D], fitted without the image's group.

    Five folds of whole groups, classes balanced, firmly regularised.

    Raises
    ------
    UserError
        Too few groups for two folds that both hold both classes.
    """
    from streetvision.decision.folds import group_folds
    from streetvision.explora.probe import linear_probe

    folds = group_folds(labels == 1, groups, seed)
    if not folds:
        raise UserError(
            "folds of whole groups need at least 2 groups, and both classes without any one fold; "
            f"here are {len(set(groups))} groups, {int(labels.sum())} of {len(labels)} images roadwork"
        )
    found = np.empty(len(labels))
    for held_out in folds:
        found[held_out] = linear_probe(
            features[~held_out], labels[~held_out], features[held_out], _INVERSE_L2
        )
    return found


def find_doubts(labelled: Labelled) -> Doubts:
    """Judge every label by confident learning.

    A label is an issue where the probability of the other class is at least that class's threshold, the mean
    over the images labelled so, and larger than that of the given class, if that is above its own, too.

    Raises
    ------
    UserError
        cleanlab is not installed, or there is one class only.
    """
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError as error:
        raise UserError("label-noise needs cleanlab: pip install 'streetvision[review]'") from error

    labels = labelled.labels
    if len(set(labels.tolist())) < 2:
        raise UserError(f"all {len(labels)} labels are the same; both classes are needed")
    both = np.stack([1 - labelled.probability, labelled.probability], axis=1)
    quality = get_label_quality_scores(labels, both, method="self_confidence")
    issue = find_label_issues(labels, both, filter_by="confident_learning", n_jobs=1)
    order = np.lexsort((quality, ~issue))
    return Doubts(labelled, np.asarray(quality), np.asarray(issue, dtype=np.bool_), order)


def embedded_labels(paths: Sequence[Path], seed: int = 0) -> Labelled:
    """Images of several files of embeddings, with probabilities out of folds over all of their groups.

    Raises
    ------
    UserError
        A file is missing, or the groups are too few.
    """
    found = [read_embeddings(path, features=True) for path in paths]
    features = [each.scores.features[:, 0] for each in found if each.scores.features is not None]
    groups, labels = (
        np.concatenate([getattr(each, name) for each in found]) for name in ("groups", "labels")
    )
    probability = out_of_group_probability(
        np.concatenate(features).astype(np.float32), labels, groups, seed
    )
    return Labelled(np.concatenate([each.ids for each in found]), groups, labels, probability)


def read_predictions(path: Path) -> Labelled:
    """Read a CSV with the columns id, group, label and `pipeline` (of `crossval`) or `probability`.

    Raises
    ------
    UserError
        Names what is missing, or the line that is wrong.
    """
    names = dict.fromkeys(("id", "group", "label"), ())
    table = read_csv(path, names, dict.fromkeys(PROBABILITY_COLUMNS, ()))
    column = next((name for name in PROBABILITY_COLUMNS if name in table.header), None)
    if column is None or not table.rows:
        wanted = " or ".join(PROBABILITY_COLUMNS)
        raise UserError(f"{table.place} has no rows with a column {wanted}")
    lines, rows = [], []
    for line, row in table.records():
        lines.append(line)
        rows.append(row)

    def wrong(at: int, *_: str) -> str:
        row = rows[at]
        return (
            f"{table.place} line {lines[at]}: label must be 0 or 1 and {column} in [0, 1]; "
            f"got {row['label'][:40]!r} and {row[column][:40]!r}"
        )

    labels = read_labels([row["label"] for row in rows], wrong)
    probability = [_number(row[column]) for row in rows]
    for at, (label, value) in enumerate(zip(labels, probability, strict=True)):
        if label is None or not 0 <= value <= 1:
            raise UserError(wrong(at))
    try:
        groups = [key(row["group"]) or f"image:{row['id']}" for row in rows]
    except ValueError as error:
        raise UserError(f"{table.place}: group {error}") from error
    return Labelled(
        np.array([row["id"] for row in rows], dtype=object),
        np.array(groups, dtype=object),
        np.array(labels, dtype=np.int64),
        np.array(probability),
    )


def write_doubts(doubts: Doubts, path: Path) -> Path:
    """Write a CSV, the most doubtful label first: rank, id, group, label, probability, quality, issue."""
    rows, given = doubts.order, doubts.labelled
    return write_csv_atomic(
        path,
        {
            "rank": range(1, len(rows) + 1),
            "id": given.ids[rows].tolist(),
            "group": given.groups[rows].tolist(),
            "label": given.labels[rows].tolist(),
            "probability": given.probability[rows].tolist(),
            "quality": doubts.quality[rows].tolist(),
            "issue": doubts.issue[rows].astype(int).tolist(),
        },
    )


def contact_sheet(
    doubts: Doubts, picture: Callable[[str], Image | None], count: int
) -> tuple[bytes, int]:
    """Draw the `count` most doubtful images; `picture` finds one by its id, or None.

    Returns the PNG and how many pictures were not found.
    """
    from streetvision.plots.pictures import plot_mistakes

    given, images, captions = doubts.labelled, [], []
    rows = doubts.order[:count].tolist()
    for rank, row in enumerate(rows, 1):
        image = picture(str(given.ids[row]))
        if image is not None:
            name = "roadwork" if given.labels[row] else "none"
            images.append(image)
            captions.append(
                f"{rank}: labelled {name}, p = {given.probability[row]:.3f}\n{str(given.ids[row])[-26:]}"
            )
    title = "Labels to look at, the most doubtful first"
    return plot_mistakes(images, captions, title), len(rows) - len(images)


def describe(doubts: Doubts) -> list[str]:
    """What was found, in lines."""
    given, issue = doubts.labelled, doubts.issue
    roadwork = given.labels == 1
    classes = [
        f"{int((issue & rows).sum())} of {int(rows.sum()):,} {name}"
        for rows, name in ((roadwork, "roadwork"), (~roadwork, "none"))
    ]
    share = f"{int(issue.sum())} of {len(issue):,} labels ({issue.mean():.1%})"
    lines = [f"{share} are doubtful: {', '.join(classes)}"]
    worst = Counter(given.groups[issue].tolist()).most_common(3)
    sizes = Counter(given.groups.tolist())
    if worst:
        groups = ", ".join(
            f"{terminal(shortened(name))} ({count} of {sizes[name]})" for name, count in worst
        )
        lines.append(f"most in: {groups}")
    lines.append(
        "A doubt is a reason to look, not a mistake found: hard images are among them. Nothing was changed."
    )
    return lines


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
