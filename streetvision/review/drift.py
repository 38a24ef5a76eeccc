"""How far two samples of images are apart, and how often chance alone brings them as far.

Frames of one drive are not independent, so whole groups are shuffled between the samples: if both are of one
distribution, every shuffle is as likely as what is there, and p is the share of shuffles that differ as much.
That holds for groups of equal size: `match_groups` makes them so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
PSI_BINS = 10
_MEDIAN_IMAGES = 1000


class Finding(NamedTuple):
    """A statistic, what 95 % of shuffles stay below, and the share of shuffles that reach it."""

    value: float
    chance: float
    p: float


class Shuffles(NamedTuple):
    """Whole groups dealt anew to two samples.

    `codes` [N] are the groups 0..G-1 of the pooled images, the reference first; `new` [P, G] says which
    groups a shuffle takes for new ones.
    """

    codes: NDArray[np.int64]
    new: NDArray[np.bool_]


def psi(reference: Floats, new: Floats) -> float:
    """Population stability index: the sum over bins of (q − p) ln(q / p), shares of both samples.

    Bins are the tenths of the reference, or its values and what lies between them where there are at most
    ten. Half an image is added to each bin, so that an empty one has a logarithm. Without drift the
    expectation is about (bins − 1)(1/n + 1/m) for independent images (Yurdakul & Naranjo 2020).
    """
    values = np.unique(reference)
    if len(values) <= PSI_BINS:
        places = [
            np.searchsorted(values, x) + np.searchsorted(values, x, side="right")
            for x in (reference, new)
        ]
    else:
        edges = np.unique(np.quantile(reference, np.arange(1, PSI_BINS) / PSI_BINS))
        places = [np.searchsorted(edges, x) for x in (reference, new)]
    n_bins = max(int(place.max()) for place in places) + 1
    counts = np.array([np.bincount(place, minlength=n_bins) for place in places], dtype=np.float64)
    counts = counts[:, counts.sum(axis=0) > 0] + 0.5
    p, q = counts / counts.sum(axis=1, keepdims=True)
    return float(((q - p) * np.log(q / p)).sum())


def ks_distance(reference: Floats, new: Floats) -> float:
    """Largest distance between the two empirical distribution functions, in [0, 1]."""
    a, b = np.sort(reference), np.sort(new)
    both = np.concatenate([a, b])
    first, second = (np.searchsorted(x, both, side="right") / len(x) for x in (a, b))
    return float(np.abs(first - second).max())


def match_groups(
    reference: NDArray[np.object_], new: NDArray[np.object_], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of both samples, of groups [N], [M], whose groups are equally large.

    Groups of 10 images scatter more than groups of 50: shuffled as they are, small new groups would look
    like drift. So the groups of each sample are ordered by size, and one at a share u of them keeps, drawn
    at random, as many images as the smaller of both samples has there. Every group keeps one at least.
    """
    codes = [np.unique(groups, return_inverse=True)[1] for groups in (reference, new)]
    sizes = [np.bincount(each) for each in codes]
    kept = []
    for own, other, code in zip(sizes, reversed(sizes), codes, strict=True):
        share = (np.argsort(np.argsort(own, kind="stable")) + 0.5) / len(own)
        wanted = np.minimum(own, np.quantile(other, share, method="inverted_cdf"))
        order = rng.permutation(len(code))
        order = order[np.argsort(code[order], kind="stable")]  # by group, at random within
        place = np.arange(len(code)) - (np.cumsum(own) - own)[code[order]]
        kept.append(np.sort(order[place < wanted[code[order]]]))
    return kept[0], kept[1]


def shuffle_groups(
    reference: NDArray[np.object_], new: NDArray[np.object_], n: int, rng: np.random.Generator
) -> Shuffles:
    """Deal the groups of both samples [N], [M] anew `n` times, as many new ones each time.

    A group that is in both samples counts as two.
    """
    first, second = (np.unique(x, return_inverse=True)[1] for x in (reference, new))
    n_reference, n_new = int(first.max()) + 1, int(second.max()) + 1
    codes = np.concatenate([first, second + n_reference]).astype(np.int64)
    keys = rng.random((n, n_reference + n_new))
    taken = np.zeros(keys.shape, dtype=np.bool_)
    chosen = np.argpartition(keys, n_new - 1, axis=1)[:, :n_new]
    np.put_along_axis(taken, chosen, values=True, axis=1)
    return Shuffles(codes, taken)


def shuffle_test(
    statistic: Callable[[Floats, Floats], float], reference: Floats, new: Floats, shuffles: Shuffles
) -> Finding:
    """Judge a statistic of two samples [N], [M] by what it is after each shuffle."""
    pooled = np.concatenate([reference, new])
    found = []
    for groups in shuffles.new:
        taken = groups[shuffles.codes]
        found.append(statistic(pooled[~taken], pooled[taken]))
    return judged(statistic(reference, new), np.array(found))


def judged(value: float, shuffled: Floats) -> Finding:
    """Place a value among the shuffled ones [P]; it counts as one of them, so p is never 0."""
    reached = (shuffled >= value - 1e-12 * abs(value)).sum()
    p = float((1 + reached) / (1 + len(shuffled)))
    return Finding(value, float(np.quantile(shuffled, 0.95)), p)


def mmd_test(
    reference: NDArray[np.float32],
    new: NDArray[np.float32],
    shuffles: Shuffles,
    rng: np.random.Generator,
) -> Finding:
    """MMD² of features [N, D], [M, D] by a Gaussian kernel, judged by shuffles.

    Gretton et al. (2012), Journal of Machine Learning Research 13, eq. 3 (unbiased), with the median
    distance of the pooled sample as bandwidth, which no shuffle changes. Images of one group are not
    independent, so only pairs of different groups count (unless a sample has a single group):
    with groups of one image each this is the estimate as published.
    """
    pooled = np.concatenate([reference, new])
    sums, own = kernel_sums(pooled, shuffles.codes, median_distance(pooled, rng))
    sizes = np.bincount(shuffles.codes).astype(np.float64)
    observed = np.zeros((1, len(sizes)), dtype=np.bool_)
    observed[0, shuffles.codes[len(reference) :]] = True
    value, shuffled = (mmd2(sums, own, sizes, each) for each in (observed, shuffles.new))
    return judged(float(value[0]), shuffled)


def median_distance(features: NDArray[np.float32], rng: np.random.Generator) -> float:
    """Median Euclidean distance between images, of at most 1,000 drawn ones; 1 if they are all alike."""
    from scipy.spatial.distance import pdist

    rows = rng.permutation(len(features))[:_MEDIAN_IMAGES]
    return float(np.median(pdist(features[rows]))) or 1.0


def kernel_sums(
    features: NDArray[np.float32], codes: NDArray[np.int64], bandwidth: float
) -> tuple[Floats, Floats]:
    """Sum exp(−‖x − y‖² / 2σ²) over all pairs of images of two groups.

    Returns
    -------
    sums [G, G], own [G]
        `own` is the diagonal of `sums` without the pairs of an image with itself.
    """
    order = np.argsort(codes, kind="stable")
    x = features[order].astype(np.float64)
    starts = np.searchsorted(codes[order], np.arange(codes.max() + 1))
    squares = (x**2).sum(axis=1)
    rows = []
    for start in range(0, len(x), 512):
        part = slice(start, start + 512)
        distances = squares[part, None] + squares - 2 * x[part] @ x.T
        kernel = np.exp(-np.maximum(distances, 0) / (2 * bandwidth**2))
        rows.append(np.add.reduceat(kernel, starts, axis=1))
    sums: Floats = np.add.reduceat(np.concatenate(rows), starts, axis=0)
    return sums, np.diag(sums) - np.bincount(codes)


def mmd2(sums: Floats, own: Floats, sizes: Floats, new: NDArray[np.bool_]) -> Floats:
    """MMD² [P] for each choice of new groups [P, G], from `kernel_sums` and the groups' sizes [G]."""
    between, counts = sums - np.diag(np.diag(sums)), np.outer(sizes, sizes)
    np.fill_diagonal(counts, 0)

    def means(taken: Floats) -> Floats:
        """Mean kernel of pairs within the samples `taken` [P, G]."""
        if taken[0].sum() > 1:
            total, pairs = (((taken @ m) * taken).sum(axis=1) for m in (between, counts))
        else:
            total, pairs = taken @ own, taken @ (sizes * (sizes - 1))
        # A group of one image, taken alone, is as like itself as can be.
        return np.asarray(np.divide(total, pairs, out=np.ones(len(total)), where=pairs > 0))

    z = new.astype(np.float64)
    rest = 1 - z
    across = ((z @ sums) * rest).sum(axis=1) / ((z @ sizes) * (rest @ sizes))
    return np.asarray(means(z) + means(rest) - 2 * across)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return [float(x) for x in adjusted]
