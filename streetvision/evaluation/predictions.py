"""Tables of predictions (`predictions.csv`): reading them, and which images two of them can be compared on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from streetvision.core.errors import UserError
from streetvision.evaluation.evaluate import PICTURE, SLICES
from streetvision.sources.csv_table import parse_csv
from streetvision.sources.labels import read_labels
from streetvision.sources.values import key
from streetvision.stats.metrics import Floats, Integers, check_sample

_COLUMNS = ("id", "group", "label", "probability")
# Two test sets that share fewer images, of the smaller one, are two: what they happen to share is no test set
# of either. A test set that grew keeps all of the smaller one, one without doubtful images nearly all.
MIN_SHARED = 0.5
_HASH = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Predictions:
    """One model's answers: ids, groups (str), labels in {0, 1}, probabilities in [0, 1]; all [N].

    Attributes
    ----------
    pictures
        `evaluate.picture_hash` of the images [N]; None in tables from before there was one.
    slices
        By name of a slice the part an image belongs to [N], empty where it belongs to none.
    """

    ids: NDArray[np.str_]
    groups: NDArray[np.str_]
    labels: Integers
    probabilities: Floats
    pictures: NDArray[np.str_] | None = None
    slices: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)


@dataclass(frozen=True)
class Matching:
    """Which images are compared: those that both sides have, with one label.

    Attributes
    ----------
    n_base, n_head, n_common
        Images of each side and of both: one id with one picture.
    conflicts
        Ids that both have with different labels; they are left out.
    others
        Ids that both have with different pictures; they are left out.
    """

    n_base: int
    n_head: int
    n_common: int
    conflicts: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether both test sets are one."""
        return self.n_base == self.n_head == self.n_common and not self.conflicts


def parse_predictions(text: str, origin: str) -> Predictions:
    """Read the content of `predictions.csv`; UserError names `origin` and what is wrong."""
    table = parse_csv(
        text, origin, dict.fromkeys(_COLUMNS, ()), dict.fromkeys((PICTURE, *SLICES), ())
    )
    columns = {name: table.column(name) for name in _COLUMNS}
    labels = read_labels(
        columns["label"],
        lambda _, shown: f"{origin}: labels must be 0 or 1, not {shown}",
    )
    if None in labels:
        raise UserError(f"{origin}: labels must be 0 or 1, not empty")
    try:
        # Without a group an image is one by itself, as in `prepare`.
        groups = [
            key(group) or f"image:{name}"
            for group, name in zip(columns["group"], columns["id"], strict=True)
        ]
        probabilities = np.array([float(value) for value in columns["probability"]])
    except (ValueError, OverflowError) as error:
        raise UserError(f"{origin} is not a table of predictions: {error}") from error
    twice = [name for name, count in Counter(columns["id"]).items() if count > 1]
    if twice:
        raise UserError(f"{origin}: id {twice[0]} is there more than once")
    try:
        y, p = check_sample(np.array(labels), probabilities)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    pictures = table.column(PICTURE) if PICTURE in table.header else None
    if pictures is not None and not all(map(_HASH.fullmatch, pictures)):
        raise UserError(f"{origin}: {PICTURE} must be 16 hexadecimal digits in each row")
    slices = {name: np.array(table.column(name)) for name in SLICES if name in table.header}
    hashes = None if pictures is None else np.array(pictures)
    return Predictions(np.array(columns["id"]), np.array(groups), y, p, hashes, slices)


def match_predictions(base: Predictions, head: Predictions) -> tuple[Matching, Integers, Integers]:
    """Rows of both sides [N] that are compared, sorted by id.

    An image is one id with one picture; by its id alone where a side does not have the pictures' hashes.

    Raises
    ------
    UserError
        The sides share less than half of the images of the smaller one, or none with the same label.
    """
    common, rows_a, rows_b = np.intersect1d(
        base.ids, head.ids, assume_unique=True, return_indices=True
    )
    same = np.ones(len(common), bool)
    if base.pictures is not None and head.pictures is not None:
        same = base.pictures[rows_a] == head.pictures[rows_b]
    others = tuple(str(name) for name in common[~same])
    common, rows_a, rows_b = common[same], rows_a[same], rows_b[same]
    agreed = base.labels[rows_a] == head.labels[rows_b]
    conflicts = tuple(str(name) for name in common[~agreed])
    matching = Matching(len(base.ids), len(head.ids), len(common), conflicts, others)
    if len(common) < MIN_SHARED * min(matching.n_base, matching.n_head):
        by_id = f", {len(others):,} more only an id" if others else ""
        raise UserError(
            f"the test sets differ: of {matching.n_base:,} and {matching.n_head:,} images they share "
            f"{len(common):,}{by_id}, less than half; what tells two models apart is one test set: "
            "`streetvision evaluate BUNDLE DATA` takes both on one"
        )
    if not agreed.any():
        raise UserError(
            f"nothing to compare: all {len(common):,} images that both have are labelled otherwise in each"
        )
    return matching, rows_a[agreed].astype(np.int64), rows_b[agreed].astype(np.int64)


def joined_groups(groups_a: NDArray[np.str_], groups_b: NDArray[np.str_]) -> Integers:
    """Group index [N]: images are together if either side has them in one group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = (np.unique(groups, return_inverse=True)[1] for groups in (groups_a, groups_b))
    n_a, n = int(a.max()) + 1, int(a.max()) + int(b.max()) + 2
    links = coo_array((np.ones(len(a)), (a, n_a + b)), shape=(n, n))
    component = connected_components(links, directed=False)[1][a]
    return np.unique(component, return_inverse=True)[1].astype(np.int64)
