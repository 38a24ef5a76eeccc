"""Hashes against SciPy's DCT, candidates and clusters against all pairs, caps, flat frames."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from streetvision.prepare import duplicates
from streetvision.prepare.duplicates import (
    candidate_pairs,
    duplicated_elsewhere,
    make_thumbnail,
    near_duplicate_clusters,
    normalised_thumbnails,
    perceptual_hashes,
    pixel_error,
)


def scenes(n: int, seed: int = 0, side: int = 16) -> NDArray[np.uint8]:
    """Smooth random grey images, all different."""
    rng = np.random.default_rng(seed)
    noise = scipy.ndimage.gaussian_filter(rng.standard_normal((n, side, side)), (0, 1.5, 1.5))
    return np.clip(128 + 200 * noise, 0, 255).astype(np.uint8)


def clusters(
    thumbnails: NDArray[np.uint8], bits: int = 6, error: float = 0.04, cap: int = 200
) -> tuple[NDArray[np.int64], duplicates.DuplicateReport]:
    return near_duplicate_clusters(perceptual_hashes(thumbnails), thumbnails, bits, error, cap)


def test_hash_is_the_dct_against_its_median() -> None:
    thumbnails = scenes(50)
    for thumbnail, value in zip(thumbnails, perceptual_hashes(thumbnails), strict=True):
        low = scipy.fft.dctn(thumbnail.astype(float), norm="ortho")[:8, :8].ravel()
        bits = np.unpackbits(np.array([value]).view(np.uint8))
        assert bits.tolist() == (low > np.median(low[1:])).tolist()


def test_thumbnail_is_the_mean_of_its_area() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128), dtype=np.uint8)
    expected = pixels.reshape(16, 6, 16, 8).mean(axis=(1, 3))
    # Pillow rounds after each of two passes.
    assert np.abs(make_thumbnail(Image.fromarray(pixels).convert("RGB")) - expected).max() <= 1.01


@pytest.mark.parametrize("bits", [0, 1, 3, 6, 9, 10, 32])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_candidates_are_all_close_pairs_once(
    bits: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_MAX_CANDIDATES", block)
    rng = np.random.default_rng(bits)
    centres = rng.integers(0, 2**63, 8, dtype=np.uint64)
    hashes = centres[rng.integers(0, 8, 120)]
    for _ in range(4):  # up to four flips each
        flips = np.uint64(1) << rng.integers(0, 64, 120, dtype=np.uint64)
        hashes ^= np.where(rng.random(120) < 0.4, flips, np.uint64(0))
    found = [
        tuple(sorted(pair))
        for left, right in candidate_pairs(hashes, bits)
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    ]
    expected = [
        (a, b)
        for a, b in itertools.combinations(range(120), 2)
        if int(hashes[a] ^ hashes[b]).bit_count() <= bits
    ]
    assert sorted(found) == expected
    assert expected


def test_candidate_blocks_are_bounded_when_all_hashes_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duplicates, "_MAX_CANDIDATES", 5000)
    sizes = [len(left) for left, _ in candidate_pairs(np.zeros(1000, np.uint64), 6)]
    assert max(sizes) <= 5000
    assert sum(sizes) == 1000 * 999 // 2


def test_pixel_error_ignores_brightness_and_contrast() -> None:
    thumbnail = (scenes(1) // 2 + 40).astype(np.uint8)
    altered = (thumbnail * 0.7 + 30).astype(np.uint8)
    normalised, contrast = normalised_thumbnails(np.concatenate([thumbnail, altered, scenes(1, 9)]))
    assert contrast.all()
    assert pixel_error(normalised[:1], normalised[1:2])[0] < 0.01
    assert pixel_error(normalised[:1], normalised[2:])[0] > 0.15
    assert np.abs(normalised[0].mean() / 255 - 0.5) < 0.02
    assert np.abs(normalised[0].std() / 255 - 0.25) < 0.03


def photo(seed: int) -> Image.Image:
    """A picture with edges: random rectangles on a gradient."""
    rng = np.random.default_rng(seed)
    pixels = np.linspace(200, 60, 192)[:, None, None] * np.ones((1, 256, 3))
    for _ in range(25):
        x, y = rng.integers(0, 220), rng.integers(0, 160)
        pixels[y : y + rng.integers(8, 70), x : x + rng.integers(8, 80)] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def test_altered_copies_are_found_and_other_pictures_are_not() -> None:
    originals = [photo(seed) for seed in range(40)]
    copies = []
    for image in originals:
        buffer = io.BytesIO()
        image.resize((128, 96)).save(buffer, "JPEG", quality=40)
        copies.append(Image.open(buffer))
    brighter = [ImageEnhance.Brightness(image).enhance(1.15) for image in originals]
    thumbnails = np.stack([make_thumbnail(image) for image in [*originals, *copies, *brighter]])
    cluster, report = clusters(thumbnails)
    assert cluster.reshape(3, 40).tolist() == [list(range(40))] * 3
    assert (report.clusters, report.images, report.largest, report.capped) == (40, 120, 3, 0)
    assert 80 <= report.pairs <= 120


def slow_clusters(thumbnails: NDArray[np.uint8], bits: int, error: float) -> NDArray[np.int64]:
    """All pairs, labels spread until nothing changes."""
    hashes = perceptual_hashes(thumbnails)
    normalised, contrast = normalised_thumbnails(thumbnails)
    n = len(thumbnails)
    cluster = np.arange(n)
    linked = [
        (a, b)
        for a, b in itertools.combinations(range(n), 2)
        if (thumbnails[a] == thumbnails[b]).all()
        or (
            contrast[a]
            and contrast[b]
            and int(hashes[a] ^ hashes[b]).bit_count() <= bits
            and np.abs(normalised[a].astype(int) - normalised[b]).mean() / 255 <= error
        )
    ]
    while True:
        before = cluster.copy()
        for a, b in linked:
            cluster[[a, b]] = min(cluster[a], cluster[b])
        if (cluster == before).all():
            return cluster


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 6, 12]), st.sampled_from([0.02, 0.04, 0.1]))
def test_clusters_are_the_connected_components(seed: int, bits: int, error: float) -> None:
    rng = np.random.default_rng(seed)
    base = scenes(6, seed)[rng.integers(0, 6, 60)].astype(np.int16)
    wobble = rng.integers(0, 30, (60, 1, 1)) * rng.standard_normal((60, 16, 16))
    thumbnails = np.clip(base + wobble, 0, 255).astype(np.uint8)
    thumbnails[50:] = rng.integers(100, 102, (10, 1, 1))  # flat ones, some identical
    cluster, report = clusters(thumbnails, bits, error)
    assert cluster.tolist() == slow_clusters(thumbnails, bits, error).tolist()
    sizes = np.unique(cluster, return_counts=True)[1]
    assert report.clusters == (sizes > 1).sum()
    assert report.images == sizes[sizes > 1].sum()
    assert report.largest == sizes.max()


def chain(n: int) -> NDArray[np.uint8]:
    """Frames that turn slowly into others: neighbours are near-duplicates, the ends are not."""
    ends = scenes(2, 3).astype(np.float64)
    share = np.linspace(0, 1, n)[:, None, None]
    return np.round(ends[0] * (1 - share) + ends[1] * share).astype(np.uint8)


def test_a_chain_is_cut_at_the_cap() -> None:
    thumbnails = chain(300)
    assert clusters(thumbnails, cap=10**6)[1].largest == 300
    cluster, report = clusters(thumbnails, cap=40)
    sizes = np.unique(cluster, return_counts=True)[1]
    assert sizes.max() == report.largest <= 40
    assert report.capped >= 300 // 40
    # The first row names the cluster, and members of a piece are neighbours.
    for name in np.unique(cluster):
        members = np.flatnonzero(cluster == name)
        assert members[0] == name
        assert np.ptp(members) < 60


def test_the_result_does_not_depend_on_when_edges_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thumbnails = chain(200)
    expected, report = clusters(thumbnails, cap=30)
    monkeypatch.setattr(duplicates, "_MAX_CANDIDATES", 50)
    monkeypatch.setattr(duplicates, "_BLOCK", 64)
    cluster, again = clusters(thumbnails, cap=30)
    assert cluster.tolist() == expected.tolist()
    assert again == report


def test_identical_images_are_capped_too() -> None:
    thumbnails = np.repeat(scenes(1), 50, axis=0)
    cluster, report = clusters(thumbnails, cap=20)
    assert np.unique(cluster, return_counts=True)[1].max() == 20
    assert report.pairs == 49
    assert report.capped == 30


@pytest.mark.parametrize("seed", range(5))
def test_what_is_set_aside_leaves_no_pair_in_two_groups(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = [chain(60), scenes(40, seed), scenes(40, seed), np.repeat(scenes(2, 9), 12, axis=0)]
    thumbnails = rng.permutation(np.concatenate(frames))
    groups = rng.integers(0, 9, len(thumbnails))
    elsewhere = duplicated_elsewhere(perceptual_hashes(thumbnails), thumbnails, 6, 0.04, groups)

    normalised, contrast = normalised_thumbnails(thumbnails)
    hashes = perceptual_hashes(thumbnails)
    n = len(thumbnails)
    alike = np.zeros((n, n), np.bool_)
    for a, b in itertools.permutations(range(n), 2):
        near = pixel_error(normalised[[a]], normalised[[b]])[0] <= 0.04
        near &= int(hashes[a] ^ hashes[b]).bit_count() <= 6 and bool(contrast[a] and contrast[b])
        alike[a, b] = near or (thumbnails[a] == thumbnails[b]).all()
    earlier = groups[:, None] > groups
    assert elsewhere.tolist() == (alike & earlier).any(axis=1).tolist()
    assert 20 < elsewhere.sum() < n
    kept = ~elsewhere
    apart = groups[:, None] != groups
    assert (alike & apart).any()
    assert not (alike & apart)[np.ix_(kept, kept)].any()


def test_fog_and_night_do_not_merge() -> None:
    rng = np.random.default_rng(0)
    fog = 180 - 2.0 * np.arange(16)[:, None] + rng.normal(0, 1.5, (150, 16, 16))
    flat = 20 + rng.normal(0, 0.7, (150, 16, 16))
    night = np.abs(rng.normal(4, 2, (150, 16, 16)))
    for frame in night:
        frame[tuple(rng.integers(0, 16, (2, 8)))] = 220  # lamps
    thumbnails = np.clip(np.concatenate([fog, flat, night]), 0, 255).round().astype(np.uint8)
    report = clusters(thumbnails)[1]
    assert report.images <= 4
    # The same frame stored twice is still found.
    twice = np.concatenate([thumbnails, thumbnails])
    assert clusters(twice)[1].clusters >= 440


def test_black_and_white_frames_are_different() -> None:
    levels = np.array([0, 255, 0, 255, 128], np.uint8)
    cluster = clusters(np.broadcast_to(levels[:, None, None], (5, 16, 16)).copy())[0]
    assert cluster.tolist() == [0, 1, 0, 1, 4]


@pytest.mark.parametrize("n", [1, 2])
def test_few_images(n: int) -> None:
    cluster, report = clusters(scenes(n))
    assert cluster.tolist() == list(range(n))
    assert report == duplicates.DuplicateReport(0, 0, 0, 1, 0)


def test_copies_with_the_other_label_against_all_pairs() -> None:
    rng = np.random.default_rng(3)
    pictures = rng.integers(0, 256, (12, 16, 16), dtype=np.uint8)
    pictures[0] = 200  # fog: no picture to have a copy of
    thumbnails = pictures[rng.integers(0, 12, 60)]
    labels = rng.integers(0, 2, 60)
    wanted = [
        any((a == b).all() and x != y for b, y in zip(thumbnails, labels, strict=True))
        and bool(a.std() > 0)
        for a, x in zip(thumbnails, labels, strict=True)
    ]
    assert 0 < sum(wanted) < 60
    assert duplicates.contradicted(thumbnails, labels).tolist() == wanted
