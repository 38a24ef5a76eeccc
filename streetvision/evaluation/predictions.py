"""Tables of predictions (`predictions.csv`): reading them, and which images two of them can be compared on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streetvision.data.csv_table import parse_csv
from streetvision.data.labels import read_labels
from streetvision.data.values import key
from streetvision.errors import UserError
from streetvision.evaluation.metrics import Floats, Integers, check_sample

_COLUMNS = ("id", "group", "label", "probability")


@dataclass(frozen=True)
class Predictions:
    """One model's answers: ids, groups (str), labels in {0, 1}, probabilities in [0, 1]; all [N]."""

    ids: NDArray[np.str_]
    groups: NDArray[np.str_]
    labels: Integers
    probabilities: Floats


@dataclass(frozen=True)
class Matching:
    """Which images are compared: those that both sides have, with one label.

    Attributes
    ----------
    n_base, n_head, n_common
        Images of each side and of both.
    conflicts
        Ids that both have with different labels; they are left out.
    """

    n_base: int
    n_head: int
    n_common: int
    conflicts: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both test sets are one."""
        return self.n_base == self.n_head == self.n_common and not self.conflicts


def parse_predictions(text: str, origin: str) -> Predictions:
    """Read the content of `predictions.csv`; UserError names `origin` and what is wrong."""
    table = parse_csv(text, origin, dict.fromkeys(_COLUMNS, ()))
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
    return Predictions(np.array(columns["id"]), np.array(groups), y, p)


def match_predictions(base: Predictions, head: Predictions) -> tuple[Matching, Integers, Integers]:
    """Rows of both sides [N] that are compared, sorted by id.

    Raises
    ------
    UserError
        No image in common, or none with the same label.
    """
    common, rows_a, rows_b = np.intersect1d(
        base.ids, head.ids, assume_unique=True, return_indices=True
    )
    same = base.labels[rows_a] == head.labels[rows_b]
    conflicts = tuple(str(name) for name in common[~same])
    matching = Matching(len(base.ids), len(head.ids), len(common), conflicts)
    if not same.any():
        raise UserError(
            f"nothing to compare: of {len(base.ids)} and {len(head.ids)} test images {len(common)} are in "
            f"both, {len(conflicts)} of them with another label"
        )
    return matching, rows_a[same].astype(np.int64), rows_b[same].astype(np.int64)


def joined_groups(groups_a: NDArray[np.str_], groups_b: NDArray[np.str_]) -> Integers:
    """Group index [N]: images are together if either side has them in one group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = (np.unique(groups, return_inverse=True)[1] for groups in (groups_a, groups_b))
    n_a, n = int(a.max()) + 1, int(a.max()) + int(b.max()) + 2
    links = coo_array((np.ones(len(a)), (a, n_a + b)), shape=(n, n))
    component = connected_components(links, directed=False)[1][a]
    return np.unique(component, return_inverse=True)[1].astype(np.int64)
