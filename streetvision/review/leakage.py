"""Images of one split that are too near to one of another: nearest neighbours by what the backbone sees.

The last features of a classifier forget what does not matter for the label, and with it which image it was: of
40 planted copies (a crop of 90 %, brighter, encoded again) they found one in twenty as the nearest neighbour,
an early layer's maps, pooled to 4 × 4 and whitened, found all. So early maps are compared.

How near is too near, the data say themselves. An image's distance to its nearest neighbour is divided by that
to the nearest image of any other group (Lowe 2004, International Journal of Computer Vision 60, §7.1): a copy
is far nearer than the next scene, a dull scene has many that are as near. How small this ratio gets by chance
is seen within a split, between its groups; its smallest values fall off as a power, which is fitted. Frames of
one drive look alike, so not images are counted but groups, each by its smallest ratio: hundreds of frames of
five drives tell no more of chance than five. So each pair gets the number of unrelated groups as near as this
that all comparisons together would bring. Beside it stand the rule by which `prepare` joins near-duplicates,
and groups that two splits share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from streetvision.core.errors import UserError
from streetvision.core.progress import progress
from streetvision.data.store import Split
from streetvision.prepare.duplicates import (
    candidate_pairs,
    make_thumbnail,
    normalised_thumbnails,
    perceptual_hashes,
    pixel_error,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetvision.bundle.predictor import Predictor

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
MAX_EXPECTED = 0.05  # unrelated groups as near as this: fewer are a leak
MIN_BASELINE = 20  # groups; the power needs a tail to be fitted to
_TAIL = 0.05  # share of the baseline's smallest ratios that the power is fitted to
_MIN_TAIL = 10  # groups in it
_GRID, _MAX_WIDTH = 4, 4096  # a map is pooled to at most 4 × 4 cells and about so many numbers
_COMPONENTS, _FITTED_IMAGES, _SHRINKAGE = 256, 5000, 0.1  # of the whitening
_CHUNK = 1024  # images compared with all others at once


@dataclass(frozen=True)
class Looked:
    """What is known of N images of one split: ids, groups [N], features [N, D], thumbnails [N, 16, 16]."""

    name: str
    ids: NDArray[np.object_]
    groups: NDArray[np.object_]
    features: NDArray[np.float32]
    thumbnails: NDArray[np.uint8]


class Pair(NamedTuple):
    """An image and its neighbour in a later split, each as number of the split and row.

    `ratio` is its distance over that of the next group; `expected` unrelated groups would reach it by chance;
    `hash_bits` differ of 63, `pixel_error` is of 1, `duplicate` is `prepare`'s verdict on both.
    """

    first: tuple[int, int]
    second: tuple[int, int]
    similarity: float
    ratio: float
    expected: float
    hash_bits: int
    pixel_error: float
    duplicate: bool

    @property
    def leak(self) -> bool:
        """Whether the pair is nearer than chance brings, or a near-duplicate."""
        return self.duplicate or self.expected < MAX_EXPECTED


class Neighbours(NamedTuple):
    """Of each of N images: row of the nearest other one, its distance, and that of the next group's nearest.

    Distances are infinite where there is no such image.
    """

    rows: Rows
    distance: Floats
    next_group: Floats

    @property
    def ratio(self) -> Floats:
        """Distance over that of the next group [N]; infinite where there is none."""
        known = np.isfinite(self.next_group)
        floor = np.where(known, np.maximum(self.next_group, 1e-9), 1.0)
        return np.where(known, self.distance / floor, np.inf)


@dataclass(frozen=True)
class Leakage:
    """What `find_leakage` found.

    Attributes
    ----------
    splits : as given
    pairs : of every image and its neighbour, leaks first, then the least expected
    ratios : by number of the earlier and the later split, the smallest of each of the later's groups [G]
    baselines : by number of a split, the smallest of each of its groups to the others, ascending [G]
    shared : groups in both splits, by their numbers
    """

    splits: tuple[Looked, ...]
    pairs: list[Pair]
    ratios: dict[tuple[int, int], Floats]
    baselines: dict[int, Floats]
    shared: dict[tuple[int, int], list[str]]

    @property
    def leaks(self) -> list[Pair]:
        """Pairs that should not be in two splits."""
        return [pair for pair in self.pairs if pair.leak]

    @property
    def alarm(self) -> bool:
        """Whether a pair is too near, or a group in two splits."""
        return bool(self.leaks) or any(self.shared.values())


def look_at(predictor: Predictor, split: Split, name: str) -> Looked:
    """Early features and thumbnails of a split's images; its labels are not read."""
    thumbnails: list[NDArray[np.uint8]] = []

    def images() -> Iterator[Image]:
        for row in progress(range(len(split)), len(split), name):
            image = split.image(row)
            thumbnails.append(make_thumbnail(image))
            yield image

    features = early_features(predictor, images())
    return Looked(name, split.ids, split.groups, features, np.stack(thumbnails))


@torch.inference_mode()
def early_features(predictor: Predictor, images: Iterable[Image]) -> NDArray[np.float32]:
    """Maps of the layer at a quarter of the backbone's depth, pooled to a grid and flattened [N, D].

    Raises
    ------
    UserError
        The architecture gives no maps.
    """
    backbone, preprocessing = predictor.model.backbone, predictor.config.preprocessing
    found: list[NDArray[np.float32]] = []
    batch: list[NDArray[np.uint8]] = []

    def flush() -> None:
        stacked = torch.from_numpy(np.stack(batch)).to(predictor.device).permute(0, 3, 1, 2)
        try:
            maps = backbone.forward_intermediates(  # type: ignore[operator]
                preprocessing.normalise(stacked), intermediates_only=True
            )
        except (AttributeError, NotImplementedError) as error:
            name = predictor.config.backbone
            raise UserError(f"leakage: timm's {name} gives no maps of its layers") from error
        early = maps[len(maps) // 4].float()
        side = max(1, min(_GRID, int((_MAX_WIDTH / early.shape[1]) ** 0.5)))
        pooled = torch.nn.functional.adaptive_avg_pool2d(early, side)
        found.append(pooled.flatten(1).cpu().numpy())
        batch.clear()

    for image in images:
        batch.append(preprocessing.apply(image))
        if len(batch) == predictor.batch_size:
            flush()
    if batch:
        flush()
    return np.concatenate(found)


def find_leakage(splits: Sequence[Looked], hash_bits: int, max_pixel_error: float) -> Leakage:
    """Compare every image with all images of the splits before its own.

    Parameters
    ----------
    splits
        What was fitted first comes first: chance is measured within the earlier split of a pair.
    hash_bits, max_pixel_error
        Of the rule by which `prepare` joins near-duplicates.

    Raises
    ------
    UserError
        Fewer than two splits.
    """
    if len(splits) < 2:
        raise UserError("leakage is between splits; at least 2 are needed")
    units = whitened([each.features for each in splits])
    codes = np.unique(np.concatenate([each.groups for each in splits]), return_inverse=True)[1]
    groups = np.split(codes.astype(np.int64), np.cumsum([len(each.ids) for each in splits])[:-1])
    prints = [_Prints.of(each.thumbnails) for each in splits]
    both = list(combinations(range(len(splits)), 2))
    sizes = [np.bincount(each) for each in groups]  # by code; 0 where a group is elsewhere
    compared = sum(int(np.count_nonzero(sizes[later])) for _, later in both)
    found = Leakage(tuple(splits), [], {}, {}, {})
    for a, b in both:
        if a not in found.baselines:
            chance = nearest(units[a], units[a], groups[a], groups[a]).ratio
            smallest = smallest_of_groups(chance, groups[a])
            found.baselines[a] = smallest[np.isfinite(smallest)]
        near = nearest(units[b], units[a], groups[a])
        found.ratios[a, b] = smallest_of_groups(near.ratio, groups[b])
        copies = prints[a].duplicates(prints[b], hash_bits, max_pixel_error)
        rows = {(int(near.rows[j]), j) for j in range(len(near.rows))} | copies
        first, second = np.array(sorted(rows)).T
        distance = np.linalg.norm(units[a][first].astype(np.float64) - units[b][second], axis=1)
        ratio = near._replace(distance=distance, next_group=near.next_group[second]).ratio
        # Of more images than the groups of the baseline have, one comes as near so much more often.
        larger = sizes[b][groups[b][second]] / sizes[a][sizes[a] > 0].mean()
        expected = expected_by_chance(ratio, found.baselines[a], compared) * np.maximum(larger, 1)
        for row, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            bits, error = prints[a].compare(i, prints[b], j)
            found.pairs.append(
                Pair(
                    (a, i), (b, j), 1 - float(distance[row]) ** 2 / 2, float(ratio[row]),
                    float(expected[row]), bits, error, (i, j) in copies,
                )
            )  # fmt: skip
        names = set(splits[a].groups.tolist()) & set(splits[b].groups.tolist())
        found.shared[a, b] = sorted(map(str, names))
    found.pairs.sort(key=lambda p: (not p.leak, p.expected, -p.similarity, p.first, p.second))
    return found


def whitened(features: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Features [N, D] of several splits, each of length 1, whose directions weigh about the same.

    Standardised and rotated to the largest 256 principal components of all together, each divided by its
    deviation, the variance a tenth of the mean larger: directions of noise stay small.
    """
    from sklearn.decomposition import PCA

    pooled = np.concatenate(features)
    mean, deviation = pooled.mean(axis=0), pooled.std(axis=0)
    used = deviation > 1e-6
    if not used.any():
        raise UserError("all images are alike: there is nothing to compare")
    drawn = np.random.default_rng(0).permutation(len(pooled))[:_FITTED_IMAGES]
    fitted = (pooled[drawn][:, used] - mean[used]) / deviation[used]
    count = min(_COMPONENTS, *fitted.shape)
    pca = PCA(count, svd_solver="randomized", random_state=0).fit(fitted)
    variance = pca.explained_variance_
    scale = pca.components_.T / np.sqrt(variance + _SHRINKAGE * variance.mean())
    made = []
    for each in features:
        turned = ((each[:, used] - mean[used]) / deviation[used] - pca.mean_) @ scale
        length = np.linalg.norm(turned, axis=1, keepdims=True)
        made.append((turned / np.maximum(length, 1e-12)).astype(np.float32))
    return made


def nearest(
    queries: NDArray[np.float32],
    pool: NDArray[np.float32],
    pool_groups: Rows,
    query_groups: Rows | None = None,
) -> Neighbours:
    """Neighbours of `queries` [N, D] in `pool` [M, D], all of length 1, with groups [M].

    With `query_groups` [N] an image of the same group is no neighbour.
    """
    rows = np.zeros(len(queries), np.int64)
    distances = np.full((2, len(queries)), np.inf)
    others = torch.from_numpy(pool).T
    for start in range(0, len(queries), _CHUNK):
        part = slice(start, start + _CHUNK)
        similarity = (torch.from_numpy(queries[part]) @ others).numpy()
        if query_groups is not None:
            similarity[query_groups[part, None] == pool_groups] = -np.inf
        best = rows[part] = similarity.argmax(axis=1)
        # Of the difference itself: 1 − cosine has no digits left for copies.
        exact = np.linalg.norm(queries[part].astype(np.float64) - pool[best], axis=1)
        distances[0, part] = np.where(np.isfinite(similarity.max(axis=1)), exact, np.inf)
        similarity[pool_groups[best, None] == pool_groups] = -np.inf
        cosine = similarity.max(axis=1).astype(np.float64)
        distances[1, part] = np.sqrt(np.maximum(2 - 2 * cosine, 0))
    return Neighbours(rows, distances[0], distances[1])


def smallest_of_groups(ratio: Floats, groups: Rows) -> Floats:
    """The smallest ratio [N] of each group [N], ascending [G]."""
    order = np.lexsort((ratio, groups))
    first = np.unique(groups[order], return_index=True)[1]
    return np.sort(ratio[order][first])


def expected_by_chance(ratio: Floats, known: Floats, compared: int) -> Floats:
    """How many of `compared` unrelated groups would reach each ratio [N], by ascending `known` ones [G].

    Below the smallest 5 % the probability is a power of the ratio that fits those (cf. Hill 1975, Annals of
    Statistics 3; by the 80 % quantile of the logarithms, which duplicates within the split do not move),
    the smallest power that is likely, so as not to see leaks in noise. Of fewer than 20 known ones nothing
    is concluded: infinity.
    """
    if len(known) < MIN_BASELINE:
        return np.full(len(ratio), np.inf)
    tail = max(_MIN_TAIL, round(_TAIL * len(known)))
    edge = max(float(known[tail]), 1e-9)
    logs = np.log(edge / np.clip(known[:tail], 1e-9, edge))
    power = -np.log(0.2) / max(float(np.quantile(logs, 0.8)), 1e-9)
    # That quantile's standard error is 1.24 / sqrt(tail) of an exponential's mean; 95 % one-sided.
    power /= 1 + 1.645 * 1.24 / np.sqrt(tail)
    below = tail / len(known) * np.minimum(ratio / edge, 1) ** power
    above = np.searchsorted(known, ratio, side="right") / len(known)
    return np.asarray(compared * np.where(ratio < edge, below, above))


@dataclass(frozen=True)
class _Prints:
    """What `prepare` compares of N images."""

    thumbnails: NDArray[np.uint8]
    hashes: NDArray[np.uint64]
    normalised: NDArray[np.uint8]
    contrast: NDArray[np.bool_]

    @classmethod
    def of(cls, thumbnails: NDArray[np.uint8]) -> _Prints:
        flat = thumbnails.reshape(len(thumbnails), -1)
        return cls(flat, perceptual_hashes(thumbnails), *normalised_thumbnails(thumbnails))

    def compare(self, i: int, other: _Prints, j: int) -> tuple[int, float]:
        """Bits that differ and pixel error of two images."""
        error = pixel_error(self.normalised[i : i + 1], other.normalised[j : j + 1])
        return int(np.bitwise_count(self.hashes[i] ^ other.hashes[j])), float(error[0])

    def duplicates(
        self, other: _Prints, hash_bits: int, max_pixel_error: float
    ) -> set[tuple[int, int]]:
        """Rows here and there that `prepare` would join."""
        n = len(self.hashes)
        found: set[tuple[int, int]] = set()
        for a, b in candidate_pairs(np.concatenate([self.hashes, other.hashes]), hash_bits):
            low, high = np.minimum(a, b), np.maximum(a, b)
            across = (low < n) & (high >= n)
            i, j = low[across], high[across] - n
            same = (self.thumbnails[i] == other.thumbnails[j]).all(axis=1)
            near = pixel_error(self.normalised[i], other.normalised[j]) <= max_pixel_error
            good = same | (near & self.contrast[i] & other.contrast[j])
            found |= set(zip(i[good].tolist(), j[good].tolist(), strict=True))
        return found
