"""Which images may not be separated: the given group or the GPS cell, joined by near-duplicates.

A group name means the same in every source: two sources with a group `berlin` share it. A place is a
given group or a GPS cell. Near-duplicates join few places only: a chain of pairs from place to place
would make one group of all of them, and no split could be made of it.
"""

from __future__ import annotations

import hashlib
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
    joined: int  # places that near-duplicates merged into another one
    most_joined: int  # places in the group of most places; 0 without a place
    largest_joined_images: int  # images of the largest group of several places; 0 if there is none
    refused: int  # joins beyond the limits: there near-duplicates are in different groups


def assign_groups(
    ids: Sequence[str],
    given: Sequence[str | None],
    latitude: NDArray[np.float64],
    longitude: NDArray[np.float64],
    cluster: NDArray[np.int64],
    group_by: Literal["given", "gps"],
    gps_cell_m: float,
    max_places: int,
    max_images: int,
) -> tuple[NDArray[np.object_], GroupReport]:
    """Name the final group of every image.

    `group_by` says which comes first, the given group or the GPS cell; an image without the one
    falls back to the other, and without both is a group of its own, `image:<id>`. Groups that share
    a near-duplicate cluster become one, named like the first of them: given groups by name, then
    cells, then images. Two images either side of a cell's edge are in different groups unless they
    look alike.

    A cluster joins its groups with the one that has most of its images. Joins of many images come
    first, and one that would make a group of more than `max_places` places or `max_images` images
    is refused: so a chain is cut where it hangs by the fewest near-duplicates.

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
    max_places, max_images
        Most places and images of a group that near-duplicates join.

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
    is_place = np.array([kind < 2 for kind, _ in names], np.bool_)

    root, refused = _join(base, cluster, is_place, max_places, max_images)
    places = np.bincount(root[is_place], minlength=len(names))
    images = np.bincount(root[base], minlength=len(names))
    report = GroupReport(
        images_given=int(kinds[0]),
        images_by_gps=int(kinds[1]),
        images_alone=int(kinds[2]),
        joined=int(is_place.sum() - (places > 0).sum()),
        most_joined=int(places.max(initial=0)),
        largest_joined_images=int(images[places > 1].max(initial=0)),
        refused=refused,
    )
    return np.array([names[group][1] for group in root[base]], np.object_), report


def gps_cells(
    latitude: NDArray[np.float64], longitude: NDArray[np.float64], cell_m: float
) -> list[str | None]:
    """Name the cell of every position, `gps:<16 hex digits>`; None where there is no valid position.

    Group names get into reports and bundles, so a cell is named by a hash: the same place has the
    same name in all data, and the name does not spell where it is. It is no secret: who suspects a
    place can compute its name.

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
    cells = list(zip(rows.astype(int).tolist(), columns.astype(int).tolist(), strict=True))
    names = {
        cell: f"gps:{hashlib.sha256(f'{float(cell_m)} {cell}'.encode()).hexdigest()[:16]}"
        for cell in {cell for cell, good in zip(cells, valid, strict=True) if good}
    }
    return [names[cell] if good else None for cell, good in zip(cells, valid, strict=True)]


def _base_group(
    identifier: str, given: str | None, cell: str | None, gps_first: bool
) -> tuple[int, str]:
    """Kind (0 given, 1 GPS cell, 2 the image itself) and name; sorts in the order of the names."""
    if given and not (gps_first and cell):
        return 0, given
    return (1, cell) if cell else (2, f"image:{identifier}")


def _join(
    base: NDArray[np.int64],
    cluster: NDArray[np.int64],
    is_place: NDArray[np.bool_],
    max_places: int,
    max_images: int,
) -> tuple[NDArray[np.int64], int]:
    """For each of G base groups the first of those joined with it, [G], and how many joins were refused.

    `base` and `cluster` [N] are of the images, `is_place` [G] of the base groups.
    """
    pairs, counts = np.unique(cluster * len(is_place) + base, return_counts=True)
    of, group = pairs // len(is_place), pairs % len(is_place)
    order = np.lexsort((group, -counts, of))
    of, group, weight = of[order], group[order], counts[order]
    first = np.searchsorted(of, of)  # of each cluster: its group of most images
    linked = np.flatnonzero(first != np.arange(len(of)))
    linked = linked[np.lexsort((group[linked], group[first[linked]], -weight[linked]))]

    parent = list(range(len(is_place)))
    places, images = is_place.astype(int).tolist(), np.bincount(base).tolist()
    refused = 0

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for a, b in zip(group[first[linked]].tolist(), group[linked].tolist(), strict=True):
        low, high = sorted((root(a), root(b)))
        if low == high:
            continue
        if places[low] + places[high] > max_places or images[low] + images[high] > max_images:
            refused += 1
            continue
        parent[high] = low
        places[low] += places[high]
        images[low] += images[high]
    return np.array([root(number) for number in parent], np.int64), refused
