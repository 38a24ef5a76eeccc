"""Near-duplicates: perceptual hashes find candidates, pixels verify them, clusters are capped.

Where the caps leave near-duplicates in different groups, `duplicated_elsewhere` says which to set aside.

Both come from one 16×16 grey thumbnail an image (256 bytes). The pixel comparison is free of
brightness and contrast, so a copy that was re-encoded, resized or re-exposed is found. Frames
without contrast (fog, night, a covered lens) have nothing to compare but noise: they match
identical thumbnails only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL_SIDE = 16
# Below this standard deviation (grey levels of 255) a thumbnail is mostly rounding.
_MIN_CONTRAST = 2.0
_BLOCK = 1 << 11  # thumbnails worked on at once, 4 MiB as float64
_MAX_CANDIDATES = 1 << 20  # pairs examined, and edges kept, at once


@dataclass(frozen=True)
class DuplicateReport:
    """What `near_duplicate_clusters` found."""

    # Verified pairs; of k identical images k - 1 are counted, not all k (k - 1) / 2.
    pairs: int
    clusters: int  # of two images or more
    images: int  # in those clusters
    largest: int  # images in the largest cluster; 1 if there is none, 0 without images
    capped: int  # joins refused because the cluster would have grown beyond the cap


def make_thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """Area-averaged grey thumbnail of an image, [16, 16]; the aspect ratio is dropped."""
    grey = image.convert("L")
    return np.asarray(grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX))


def perceptual_hashes(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Which of the 8×8 lowest DCT-II coefficients exceed their median (pHash; Zauner 2010, §3.2.1).

    The median leaves out the mean's coefficient, so 63 of the 64 bits carry information.

    Parameters
    ----------
    thumbnails
        Grey levels, [N, 16, 16].

    Returns
    -------
    NDArray
        One hash an image, [N].
    """
    side = THUMBNAIL_SIDE
    positions = np.pi * (2 * np.arange(side) + 1) / (2 * side)
    basis = np.cos(np.arange(8)[:, None] * positions)  # [8, 16]
    basis[0] /= np.sqrt(2)
    bits = np.empty((len(thumbnails), 64), np.bool_)
    for start in range(0, len(thumbnails), _BLOCK):
        block = thumbnails[start : start + _BLOCK].astype(np.float64)
        # Rounding makes zeros of symmetric and flat images exact zeros, whatever the BLAS.
        low = np.round(basis @ block @ basis.T, 6).reshape(-1, 64)
        bits[start : start + _BLOCK] = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64).reshape(-1)


def pixel_error(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean absolute difference of normalised thumbnails, each [M, 256]; [M] in [0, 1]."""
    difference = np.maximum(a, b) - np.minimum(a, b)
    error: NDArray[np.float64] = difference.sum(axis=1, dtype=np.int64) / (255.0 * a.shape[1])
    return error


def normalised_thumbnails(
    thumbnails: NDArray[np.uint8],
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Bring thumbnails to mean 0.5 and standard deviation 0.25, clipped to [0, 1], as 0 to 255.

    Returns
    -------
    tuple
        The normalised thumbnails, [N, 256], and which of them have contrast, [N].
    """
    flat = thumbnails.reshape(len(thumbnails), THUMBNAIL_SIDE**2)
    result = np.empty_like(flat)
    contrast = np.empty(len(flat), np.bool_)
    for start in range(0, len(flat), _BLOCK):
        part = slice(start, start + _BLOCK)
        values = flat[part].astype(np.float32)
        values -= values.mean(axis=1, keepdims=True)
        spread = values.std(axis=1, keepdims=True)
        contrast[part] = spread[:, 0] >= _MIN_CONTRAST
        values = 127.5 + 63.75 * values / np.maximum(spread, _MIN_CONTRAST)
        result[part] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return result, contrast


def near_duplicate_clusters(
    hashes: NDArray[np.uint64],
    thumbnails: NDArray[np.uint8],
    hash_bits: int,
    max_pixel_error: float,
    max_cluster: int,
) -> tuple[NDArray[np.int64], DuplicateReport]:
    """Cluster images that are verified near-duplicates of one another.

    A pair is verified if its hashes differ in at most `hash_bits` bits and its normalised
    thumbnails by at most `max_pixel_error`. Of the verified pairs the minimum spanning forest is
    kept (by error, then by row) and joined in that order; a join that would make a cluster of more
    than `max_cluster` images is refused, so the cap cuts a chain at its weakest links.

    Parameters
    ----------
    hashes
        Of `perceptual_hashes`, [N].
    thumbnails
        Grey levels, [N, 16, 16].
    hash_bits
        Largest Hamming distance of a candidate pair, bits of 64.
    max_pixel_error
        Largest mean absolute difference of a verified pair, of 1.
    max_cluster
        Largest cluster, images.

    Returns
    -------
    tuple
        For every image the first row of its cluster, [N], and the report.
    """
    edges = _Edges(len(hashes))
    for left, right, error in _verified_pairs(hashes, thumbnails, hash_bits, max_pixel_error):
        edges.add(left, right, error)
    cluster, capped = edges.join(max_cluster)
    sizes = np.bincount(cluster, minlength=1)
    several = sizes[sizes > 1]
    report = DuplicateReport(
        edges.pairs, len(several), int(several.sum()), int(sizes.max()), capped
    )
    return cluster, report


def duplicated_elsewhere(
    hashes: NDArray[np.uint64],
    thumbnails: NDArray[np.uint8],
    hash_bits: int,
    max_pixel_error: float,
    groups: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Which images have a near-duplicate in a group before their own, [N].

    Without these no pair of near-duplicates is in two groups. `groups` [N] numbers the groups in
    the order in which they keep their images; the rest is as for `near_duplicate_clusters`.
    """
    identical = _first_identical(thumbnails)
    own = groups.copy()  # of the first of identical images: the first group of all of them
    np.minimum.at(own, identical, groups)
    earliest = own.copy()  # that of their near-duplicates, too
    for left, right, _ in _verified_pairs(hashes, thumbnails, hash_bits, max_pixel_error):
        np.minimum.at(earliest, left, own[right])
        np.minimum.at(earliest, right, own[left])
    result: NDArray[np.bool_] = earliest[identical] < groups
    return result


def contradicted(thumbnails: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images have a copy with the other label, [N]; frames without contrast are no copies.

    Parameters
    ----------
    thumbnails
        Grey levels, [N, 16, 16]; copies have the same.
    labels
        [N] in {0, 1}.
    """
    first = _first_identical(thumbnails)
    of_copies = np.zeros((len(first), 2), np.bool_)
    of_copies[first, labels] = True
    result: NDArray[np.bool_] = np.logical_and(of_copies[:, 0], of_copies[:, 1])[first]
    rows = np.flatnonzero(result)
    result[rows] = thumbnails[rows].std(axis=(1, 2)) >= _MIN_CONTRAST
    return result


def _verified_pairs(
    hashes: NDArray[np.uint64],
    thumbnails: NDArray[np.uint8],
    hash_bits: int,
    max_pixel_error: float,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
    """Yield near-duplicates, the smaller row first, with their pixel error, in blocks of bounded size.

    Of identical images only the first is compared with others; the others come as its pairs.
    """
    identical = _first_identical(thumbnails)
    copies = np.flatnonzero(identical != np.arange(len(identical)))
    yield identical[copies], copies, np.zeros(len(copies))

    normalised, contrast = normalised_thumbnails(thumbnails)
    searched = np.flatnonzero((identical == np.arange(len(identical))) & contrast)
    for left, right in candidate_pairs(hashes[searched], hash_bits):
        for start in range(0, len(left), _BLOCK):
            a, b = searched[left[start : start + _BLOCK]], searched[right[start : start + _BLOCK]]
            error = pixel_error(normalised[a], normalised[b])
            good = error <= max_pixel_error
            yield np.minimum(a, b)[good], np.maximum(a, b)[good], error[good]


def candidate_pairs(
    hashes: NDArray[np.uint64], hash_bits: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield every pair within `hash_bits` of one another once, in blocks of bounded size.

    By the pigeonhole principle two such hashes agree entirely in at least one of `hash_bits` + 1
    bands. Beyond ten bands a band is too narrow to sort anything out and all pairs are compared.
    """
    n_bands = hash_bits + 1 if hash_bits < 10 else 0
    # Neighbouring coefficients are correlated: every band takes bits from the whole range.
    masks = [
        np.uint64(sum(1 << bit for bit in range(band, 64, n_bands))) for band in range(n_bands)
    ] or [np.uint64(0)]
    for band, mask in enumerate(masks):
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        ends = np.searchsorted(ordered, ordered, side="right")
        partners = ends - np.arange(len(ordered)) - 1
        for first, last in _slices(partners, _MAX_CANDIDATES):
            counts = partners[first:last]
            starts = np.cumsum(counts) - counts
            at = np.repeat(np.arange(first, last), counts)
            offset = np.arange(len(at)) - np.repeat(starts, counts)
            left, right = order[at], order[at + 1 + offset]
            differing = hashes[left] ^ hashes[right]
            wanted = np.bitwise_count(differing) <= hash_bits
            left, right, differing = left[wanted], right[wanted], differing[wanted]
            seen = np.zeros(len(left), np.bool_)
            for earlier in masks[:band]:
                seen |= (differing & earlier) == 0
            yield left[~seen], right[~seen]


def _slices(counts: NDArray[np.int64], limit: int) -> Iterator[tuple[int, int]]:
    """Cut [0, N) into runs whose counts add up to at most `limit`, or single items beyond it."""
    total = np.cumsum(counts)
    first = 0
    while first < len(counts):
        done = total[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(total, done + limit, side="right")))
        yield first, last
        first = last


def _first_identical(thumbnails: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For every thumbnail the first row with the same pixels, [N]."""
    rows = np.ascontiguousarray(thumbnails).reshape(len(thumbnails), THUMBNAIL_SIDE**2)
    keys = rows.view(np.dtype((np.void, THUMBNAIL_SIDE**2))).reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


class _Edges:
    """Verified pairs, cut down to their minimum spanning forest whenever they get many.

    With a total order on the edges the forest is unique and independent of when it was cut down.
    """

    def __init__(self, n_images: int) -> None:
        self.n_images = n_images
        self.pairs = 0
        self._left: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        self._right: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        self._error: list[NDArray[np.float64]] = [np.zeros(0)]
        self._held = 0

    def add(
        self, left: NDArray[np.int64], right: NDArray[np.int64], error: NDArray[np.float64]
    ) -> None:
        """Add edges; `left` is the smaller row."""
        self.pairs += len(left)
        self._left.append(left)
        self._right.append(right)
        self._error.append(error)
        self._held += len(left)
        if self._held > _MAX_CANDIDATES + self.n_images:
            self._reduce()

    def join(self, max_cluster: int) -> tuple[NDArray[np.int64], int]:
        """Return the first row of every image's cluster and how many joins were refused."""
        self._reduce()
        parent = list(range(self.n_images))
        size = [1] * self.n_images
        refused = 0

        def root(row: int) -> int:
            while parent[row] != row:
                parent[row] = parent[parent[row]]
                row = parent[row]
            return row

        for left, right in zip(self._left[0].tolist(), self._right[0].tolist(), strict=True):
            low, high = sorted((root(left), root(right)))
            if size[low] + size[high] > max_cluster:
                refused += 1
            else:  # a forest has no cycles, so the roots always differ
                parent[high] = low
                size[low] += size[high]
        return np.array([root(row) for row in range(self.n_images)], np.int64), refused

    def _reduce(self) -> None:
        """Sort by (error, left, right) and drop every edge that closes a cycle."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import minimum_spanning_tree

        left, right = np.concatenate(self._left), np.concatenate(self._right)
        error = np.concatenate(self._error)
        order = np.lexsort((right, left, error))
        # Ranks as weights: a unique forest, and no weight is 0, which would mean "no edge".
        ranks = np.arange(1, len(order) + 1, dtype=np.float64)
        shape = (self.n_images, self.n_images)
        graph = coo_array((ranks, (left[order], right[order])), shape=shape).tocsr()
        kept = order[np.sort(minimum_spanning_tree(graph).data).astype(np.int64) - 1]
        self._left, self._right, self._error = [left[kept]], [right[kept]], [error[kept]]
        self._held = len(kept)
