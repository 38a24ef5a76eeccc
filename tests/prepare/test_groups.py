"""Groups against a slow union, GPS cells against distances on the sphere."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streetvision.prepare.groups import GroupReport, assign_groups, gps_cells


def assign(
    given_groups: list[str | None],
    cluster: list[int],
    positions: list[tuple[float, float]] | None = None,
    group_by: str = "given",
    cell: float = 500,
    max_places: int = 10**6,
    max_images: int = 10**6,
) -> tuple[list[str], GroupReport]:
    n = len(cluster)
    where = np.array(positions or [(math.nan, math.nan)] * n, np.float64)
    names, report = assign_groups(
        [f"i{row}" for row in range(n)],
        given_groups,
        where[:, 0],
        where[:, 1],
        np.array(cluster),
        "gps" if group_by == "gps" else "given",
        cell,
        max_places,
        max_images,
    )
    return names.tolist(), report


def test_given_then_gps_then_alone() -> None:
    berlin, nowhere = (52.52, 13.4), (math.nan, 13.4)
    names, report = assign(["a", None, "", "b"], [0, 1, 2, 3], [berlin, berlin, nowhere, nowhere])
    assert names == ["a", gps_cells(np.array([52.52]), np.array([13.4]), 500)[0], "image:i2", "b"]
    assert report == GroupReport(
        images_given=2, images_by_gps=1, images_alone=1,
        joined=0, most_joined=1, largest_joined_images=0, refused=0,
    )  # fmt: skip
    names, report = assign(["a", None, "", "b"], [0, 1, 2, 3], [berlin] * 2 + [nowhere] * 2, "gps")
    assert names[0] == names[1]
    assert names[0].startswith("gps:")
    assert names[3] == "b"
    assert (report.images_given, report.images_by_gps) == (1, 2)


def test_clusters_join_groups_under_the_first_name() -> None:
    names, report = assign(["c", "b", "c", "d", None, None, None], [0, 0, 1, 2, 2, 5, 5])
    assert names == ["b", "b", "b", "d", "d", "image:i5", "image:i5"]
    assert (report.joined, report.most_joined, report.largest_joined_images) == (1, 2, 3)
    # A given group gives the name even if `image:…` sorts before it.
    assert assign(["zoo", None], [0, 0])[0] == ["zoo", "zoo"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), min_size=1, max_size=25))
def test_images_share_a_group_if_and_only_if_they_are_connected(
    rows: list[tuple[int, int]],
) -> None:
    given_groups = [f"g{group}" if group else None for group, _ in rows]
    names, report = assign(given_groups, [cluster for _, cluster in rows])
    n = len(rows)
    linked = np.eye(n, dtype=bool)
    for a in range(n):
        for b in range(n):
            same_group = rows[a][0] == rows[b][0] != 0
            linked[a, b] |= same_group or rows[a][1] == rows[b][1]
    for _ in range(n):
        linked = (linked @ linked) > 0
    together = np.array([[a == b for b in names] for a in names])
    assert (together == linked).all()
    present = {group for group in given_groups if group}
    assert report.joined == len(present) - len({name for name in names if name[0] == "g"})
    assert report.refused == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(1, 30),
)
def test_near_duplicates_join_no_more_than_they_may(
    rows: list[tuple[int, int]], max_places: int, max_images: int
) -> None:
    given_groups = [f"g{group}" if group else None for group, _ in rows]
    cluster = [cluster for _, cluster in rows]
    free, _ = assign(given_groups, cluster)
    names, report = assign(given_groups, cluster, max_places=max_places, max_images=max_images)
    apart, _ = assign(given_groups, list(range(len(rows))))
    places = {group for group in given_groups if group}
    for name in set(names):
        members = [row for row, each in enumerate(names) if each == name]
        inside = {apart[row] for row in members}
        assert len(inside & places) <= max_places
        assert len(members) <= max_images or len(inside) == 1
        assert len({free[row] for row in members}) == 1  # nothing is joined that was not alike
    for group in places:
        assert (
            len({name for name, each in zip(names, given_groups, strict=True) if each == group})
            == 1
        )
    assert (report.refused == 0) == (names == free)
    real = [name for name in set(names) if name in places]
    assert report.joined == len(places) - len(real)


def test_a_chain_of_pairs_does_not_swallow_the_places() -> None:
    """60 places of 20 images; place k shares one near-duplicate with place k + 1."""
    given_groups: list[str | None] = [f"place{k // 20:02d}" for k in range(1200)]
    cluster = list(range(1200))
    for k in range(59):
        cluster[20 * k + 19] = cluster[20 * k + 20]
    assert len(set(assign(given_groups, cluster)[0])) == 1
    names, report = assign(given_groups, cluster, max_places=4)
    sizes = np.unique(names, return_counts=True)[1] // 20
    assert sizes.max() == report.most_joined == 4
    assert report.joined + len(sizes) == 60
    assert report.refused == len(sizes) - 1
    assert report.largest_joined_images == 80
    names, report = assign(given_groups, cluster, max_images=50)
    assert (report.most_joined, report.largest_joined_images) == (2, 40)


def test_a_chain_is_cut_where_it_hangs_by_the_fewest_images() -> None:
    """a and b share three images, c and d two; b and c, and d and a, one."""
    given_groups: list[str | None] = [*"abababcdcdbcda"]
    cluster = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    names, report = assign(given_groups, cluster, max_places=2)
    assert names == [*"aaaaaaccccacca"]
    assert (report.joined, report.refused) == (2, 2)
    # Within a cluster it is the group of most images that others join.
    names, report = assign(["a", "b", "b", "b", "c", None], [0] * 6, max_places=2)
    assert names == ["a", "a", "a", "a", "c", "a"]
    assert report.refused == 1


def test_a_cell_is_the_same_in_all_data_and_does_not_spell_where_it_is() -> None:
    lat, lon = np.array([52.5163, 52.5163, 48.1]), np.array([13.3777, 13.3777, 11.6])
    cells = gps_cells(lat, lon, 500)
    assert cells[0] == cells[1] == gps_cells(lat[:1], lon[:1], 500)[0]
    assert len({cells[0], cells[2], gps_cells(lat[:1], lon[:1], 400)[0]}) == 3
    near = gps_cells(lat[:1] + 500 / 111_195, lon[:1], 500)[0]
    for name in (cells[0], near):
        assert name is not None
        assert re.fullmatch("gps:[0-9a-f]{16}", name)
    # Neighbours have nothing in common: rows and columns would.
    same = [a == b for a, b in zip(str(cells[0])[4:], str(near)[4:], strict=True)]
    assert sum(same) < 6


def metres(lat_a: float, lon_a: float, lat_b: float, lon_b: float) -> float:
    """Great-circle distance (haversine), sphere of 6,371 km."""
    a, b = math.radians(lat_a), math.radians(lat_b)
    half = math.radians(lon_b - lon_a) / 2
    square = math.sin((b - a) / 2) ** 2 + math.cos(a) * math.cos(b) * math.sin(half) ** 2
    return 2 * 6_371_000 * math.asin(math.sqrt(square))


@pytest.mark.parametrize("latitude", [0.3, -33.9, 52.5, 69.6])
@pytest.mark.parametrize("cell", [50.0, 500.0, 5000.0])
def test_cells_have_the_wanted_size(latitude: float, cell: float) -> None:
    step = cell / 50 / 111_195
    line = np.arange(500) * step

    def run_lengths(lat: NDArray[np.float64], lon: NDArray[np.float64]) -> list[float]:
        """Extents of all cells that the line crosses entirely."""
        names = gps_cells(lat, lon, cell)
        cuts = [k for k in range(1, 500) if names[k] != names[k - 1]]
        return [metres(lat[a], lon[a], lat[b], lon[b]) for a, b in itertools.pairwise(cuts)]

    north = run_lengths(latitude + line, np.full(500, 13.4))
    lengthened = line / math.cos(math.radians(latitude))
    east = run_lengths(np.full(500, latitude), 13.4 + lengthened)
    assert len(north) >= 7
    assert len(east) >= 7
    assert np.abs(np.array(north) / cell - 1).max() < 0.03
    assert np.abs(np.array(east) / cell - 1).max() < 0.03


def test_positions_at_the_edges_of_the_map() -> None:
    lat = np.array([10.0, 10.0, 90.0, -90.0, 91.0, 0.0, math.nan, 10.0, math.inf, 0.0])
    lon = np.array([180.0, -180.0, 5.0, 5.0, 5.0, 0.0, 5.0, 181.0, 5.0, 7.0])
    cells = gps_cells(lat, lon, 500)
    assert cells[0] == cells[1]
    assert all(cells[k] is not None for k in (2, 3, 9))
    assert [cells[k] for k in (4, 5, 6, 7, 8)] == [None] * 5
