"""Which images may not be separated: the given group or the GPS cell, joined by near-duplicates.

A group name means the same in every source: two sources with a group `berlin` share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_METRES_PER_DEGREE = 111_195.0  # of latitude, on a sphere of 6,371 km


@dataclass(frozen=True)
class GroupReport:
    """How the groups came about."""

    images_given: int  # with a given group
    images_by_gps: int  # grouped by GPS cell
    images_alone: int  # with neither: each a group of its own
    joined: int  # groups that near-duplicates merged into another one, images of their own left out


def assign_groups(
    ids: Sequence[str],
    given: Sequence[str | None],
    latitude: NDArray[np.float64],
    longitude: NDArray[np.float64],
    cluster: NDArray[np.int64],
    group_by: Literal["given", "gps"],
    gps_cell_m: float,
) -> tuple[NDArray[np.object_], GroupReport]:
    """Name the final group of every image.

    `group_by` says which comes first, the given group or the GPS cell; an image without the one
    falls back to the other, and without both is a group of its own, `image:<id>`. Groups that share
    a near-duplicate cluster become one, named like the first of them: given groups by name, then
    cells, then images. Two images either side of a cell's edge are in different groups unless they
    look alike.

    Parameters
    ----------
    ids
        Unique names, [N].
    given
        Groups that the source gave; None or empty where it gave none, [N].
    latitude, longitude
        Degrees; NaN where unknown, [N].
    cluster
        Near-duplicate cluster, [N].
    group_by
        What comes first.
    gps_cell_m
        Edge of a GPS cell, metres.

    Returns
    -------
    tuple
        Group names, [N], and the report.
    """
    cells = gps_cells(latitude, longitude, gps_cell_m)
    ranked = [_base_group(*row, group_by == "gps") for row in zip(ids, given, cells, strict=True)]
    kinds = np.bincount([kind for kind, _ in ranked], minlength=3)
    names = sorted(set(ranked))
    index = {name: number for number, name in enumerate(names)}
    base = np.array([index[name] for name in ranked], np.int64)

    joined = _connected(base, cluster)  # [N], smallest base group connected to each image
    real = [number for number, (kind, _) in enumerate(names) if kind < 2]
    final = {int(root) for root, own in zip(joined, base, strict=True) if names[own][0] < 2}
    result = np.array([names[root][1] for root in joined], np.object_)
    report = GroupReport(
        images_given=int(kinds[0]),
        images_by_gps=int(kinds[1]),
        images_alone=int(kinds[2]),
        joined=len(real) - len(final),
    )
    return result, report


def gps_cells(
    latitude: NDArray[np.float64], longitude: NDArray[np.float64], cell_m: float
) -> list[str | None]:
    """Name the cell of every position, `gps:<row>:<column>`; None where there is no valid position.

    Rows are equally high; a row has the largest whole number of columns whose cells are at least
    `cell_m` wide in the row's middle. Latitude 0, longitude 0 is what devices without a fix report,
    and counts as unknown.

    Parameters
    ----------
    latitude, longitude
        Degrees; NaN where unknown, [N].
    cell_m
        Height of a cell, metres.
    """
    # Comparisons with NaN are false, so an unknown position is not valid.
    valid = (np.abs(latitude) <= 90) & (np.abs(longitude) <= 180)
    valid &= (latitude != 0) | (longitude != 0)
    height = cell_m / _METRES_PER_DEGREE
    rows = np.floor((np.where(valid, latitude, 0.0) + 90) / height)
    middle = np.radians(np.minimum((rows + 0.5) * height - 90, 90))
    n_columns = np.maximum(np.floor(360 * np.cos(middle) / height), 1)
    share = (np.where(valid, longitude, 0.0) + 180) % 360 / 360
    columns = np.minimum(np.floor(share * n_columns), n_columns - 1)
    return [
        f"gps:{int(row)}:{int(column)}" if good else None
        for row, column, good in zip(rows, columns, valid, strict=True)
    ]


def _base_group(
    identifier: str, given: str | None, cell: str | None, gps_first: bool
) -> tuple[int, str]:
    """Kind (0 given, 1 GPS cell, 2 the image itself) and name; sorts in the order of the names."""
    if given and not (gps_first and cell):
        return 0, given
    return (1, cell) if cell else (2, f"image:{identifier}")


def _connected(base: NDArray[np.int64], cluster: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every image the smallest base group reachable through groups and clusters, [N]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    _, cluster = np.unique(cluster, return_inverse=True)
    n_base = int(base.max(initial=-1)) + 1
    n = n_base + int(cluster.max(initial=-1)) + 1
    links = coo_array((np.ones(len(base)), (base, n_base + cluster)), shape=(n, n))
    _, component = connected_components(links, directed=False)
    smallest = np.full(n, n, np.int64)
    np.minimum.at(smallest, component[:n_base], np.arange(n_base))
    result: NDArray[np.int64] = smallest[component[base]]
    return result
