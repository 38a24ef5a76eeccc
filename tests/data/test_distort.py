"""The distortion levels against their documented parameters, torchvision and slow obvious versions."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from streetvision.core.errors import UserError
from streetvision.data.distort import (
    LEVELS,
    MAX_STRENGTHS,
    SIDE,
    Distortion,
    Task,
    add_noise,
    apply,
    blur,
    challenge_jpeg,
    challenge_jpegs,
    challenge_rng,
    distort,
    down_and_up,
    draw,
    mixed_jpegs,
    mixed_levels,
    saturate,
)

STRENGTHS = ("saturation", "contrast", "resampling", "noise", "blur")
N = 3000


def picture(width: int = 128, height: int = 96, seed: int = 0) -> Image.Image:
    """Smooth colours with a few sharp edges."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 120, 10)
    return Image.fromarray(pixels)


def draws(level: int, size: tuple[int, int] = (200, 200), flips: float = 0.0) -> list[Distortion]:
    return [draw(level, size, challenge_rng(1, str(i), level), flips) for i in range(N)]


def square(seed: int = 0) -> NDArray[np.uint8]:
    return np.asarray(picture(SIDE, SIDE, seed))


def apart(found: object, wanted: object) -> NDArray[np.int64]:
    """Grey levels between two images."""
    return np.abs(np.asarray(found).astype(np.int64) - np.asarray(wanted).astype(np.int64))


def tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


# --------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("size", [(200, 120), (90, 161), (50, 50), (500, 300)])
def test_level_0_is_the_central_square(size: tuple[int, int]) -> None:
    image = picture(*size)
    short = min(size)
    found = distort(image, 0, np.random.default_rng(0))
    square = functional.center_crop(image, [short, short])
    wanted = functional.resize(square, [SIDE, SIDE], antialias=True)
    assert apart(found, wanted).max() <= 1


@pytest.mark.parametrize("level", [1, 2, 3])
def test_angle_area_and_place_are_uniform(level: int) -> None:
    size = (2000, 2000)
    found = draws(level, size)
    angles = [d.angle for d in found]
    assert stats.kstest(angles, stats.uniform(-20, 40).cdf).pvalue > 1e-3
    sides = np.array([d.crop[2] for d in found])
    areas = sides**2 / (size[0] * size[1])
    assert stats.kstest(areas, stats.uniform(0.2, 0.8).cdf).pvalue > 1e-3
    assert 0.2 <= areas.min() + 1e-3 < 0.21
    assert 0.99 < areas.max() <= 1
    for axis in (0, 1):
        place = np.array([d.crop[axis] for d in found]) / (size[axis] - sides + 1e-9)
        assert stats.kstest(place[sides < 1900], stats.uniform(0, 1).cdf).pvalue > 1e-3


def test_a_wide_image_is_cropped_by_the_sizes_that_fit() -> None:
    """Of 4:3 no square covers more than three quarters: as torchvision, draw again."""
    areas = np.array([d.crop[2] ** 2 for d in draws(1, (2000, 1500))]) / 3e6
    assert stats.kstest(areas, stats.uniform(0.2, 0.55).cdf).pvalue > 1e-3
    # No square of a fifth of the area fits into 10:1: the largest central one.
    assert {d.crop for d in draws(1, (1000, 100))} == {(450, 0, 100)}


def test_crop_is_distributed_as_torchvisions() -> None:
    image = torch.zeros(3, 150, 200)
    torch.manual_seed(0)
    crops = [v2.RandomResizedCrop(SIDE, (0.2, 1), (1, 1)).make_params([image]) for _ in range(N)]
    ours = np.array([d.crop for d in draws(1, (200, 150))])
    for column, key in enumerate(("left", "top", "height")):
        theirs = [crop[key] for crop in crops]
        assert stats.ks_2samp(ours[:, column], theirs).pvalue > 1e-3


@pytest.mark.parametrize("level", LEVELS)
def test_strengths_are_uniform_and_independent(level: int) -> None:
    found = np.array([[getattr(d, name) for name in STRENGTHS] for d in draws(level)])
    for column, most in enumerate(MAX_STRENGTHS[level]):
        counts = np.bincount(found[:, column], minlength=3)
        assert counts[most + 1 :].sum() == 0
        if most:
            assert stats.chisquare(counts[: most + 1]).pvalue > 1e-3
    moving = found[:, [most > 0 for most in MAX_STRENGTHS[level]]]
    for a in range(moving.shape[1]):
        for b in range(a):
            table = stats.contingency.crosstab(moving[:, a], moving[:, b]).count
            assert stats.chi2_contingency(table).pvalue > 1e-3


def test_the_documented_strengths() -> None:
    assert MAX_STRENGTHS == {0: (0,) * 5, 1: (0,) * 5, 2: (1, 1, 1, 0, 0), 3: (2,) * 5}


def test_flips_are_off_unless_asked_for() -> None:
    assert not any(d.flip_horizontal or d.flip_vertical for level in LEVELS for d in draws(level))
    found = draws(2, flips=0.3)
    for name in ("flip_horizontal", "flip_vertical"):
        assert np.mean([getattr(d, name) for d in found]) == pytest.approx(0.3, abs=0.04)
    assert not any(d.flip_horizontal for d in draws(0, flips=1.0))
    # Turning them on changes nothing else.
    plain = [(d.angle, d.crop, *(getattr(d, name) for name in STRENGTHS)) for d in draws(2)]
    assert plain == [(d.angle, d.crop, *(getattr(d, name) for name in STRENGTHS)) for d in found]


@pytest.mark.parametrize("level", [-1, 4])
def test_an_unknown_level_is_refused(level: int) -> None:
    with pytest.raises(UserError, match="distortion level must be one of"):
        draw(level, (10, 10), np.random.default_rng(0))


# --------------------------------------------------------------------------- what is done


@pytest.mark.parametrize("scale", [1, 5])  # enlarged, and reduced, where a filter acts
def test_rotation_crop_and_flips_are_those_of_torchvision(scale: int) -> None:
    image = picture(128 * scale, 96 * scale)
    left, top, side = 20 * scale, 10 * scale, 70 * scale
    drawn = Distortion(17.0, (left, top, side), True, True)
    found = apply(image, drawn, np.random.default_rng(0))
    turned = functional.rotate(image, 17.0)
    wanted = functional.resized_crop(turned, top, left, side, side, [SIDE, SIDE], antialias=True)
    wanted = functional.vertical_flip(functional.horizontal_flip(wanted))
    assert apart(found, wanted).max() <= 1
    # The tensor version that a validator runs, but for a few pixels on the edges of the rotation.
    theirs = functional.rotate(tensor(np.asarray(image)), 17.0).permute(1, 2, 0).numpy()
    assert (np.asarray(turned) != theirs).any(axis=2).mean() < 0.02
    assert tuple(np.asarray(turned)[0, -1]) == (0, 0, 0)


def broadcast(red_green_blue: NDArray[np.float32]) -> NDArray[np.float32]:
    """Y, Cb, Cr [H, W, 3] at broadcast scale, as the validator makes them of whole levels with OpenCV."""
    y, cr, cb = np.moveaxis(cv2.cvtColor(red_green_blue, cv2.COLOR_RGB2YCrCb), -1, 0)
    return np.stack([y * 219 + 16, cb * 224 + 16, cr * 224 + 16], axis=-1) / np.float32(255)


def seen(ycbcr: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of `broadcast`."""
    y, cb, cr = np.moveaxis(ycbcr * 255 - 16, -1, 0) / np.array([219, 224, 224])[:, None, None]
    stacked = np.stack([y, cr, cb], axis=-1).astype(np.float32)
    return np.asarray(cv2.cvtColor(stacked, cv2.COLOR_YCrCb2RGB))


@pytest.mark.parametrize("factor", [0.4, 0.3])
def test_saturation_scales_chroma_and_keeps_luma(factor: float) -> None:
    pixels = square()
    ycbcr = broadcast(pixels.astype(np.float32))
    ycbcr[..., 1:] = 0.5 + factor * (ycbcr[..., 1:] - 0.5)
    assert apart(saturate(pixels, factor), np.floor(seen(ycbcr))).max() <= 1
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    assert np.array_equal(saturate(grey, factor), grey)


@pytest.mark.parametrize(("strength", "factor"), [(1, 0.85), (2, 0.725)])
def test_contrast_multiplies_and_cuts(strength: int, factor: float) -> None:
    image = Image.fromarray(square())
    rng = np.random.default_rng(0)
    found = np.asarray(apply(image, Distortion(0.0, (0, 0, SIDE), contrast=strength), rng))
    wanted = (np.asarray(image).astype(np.float32) * np.float32(factor)).astype(np.uint8)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("factor", [2, 3])
def test_down_and_up_is_bilinear_without_a_filter(factor: int) -> None:
    pixels = square()
    small = SIDE // factor
    resized = tensor(pixels).float()  # torchvision rounds bytes after each axis
    for side in (small, SIDE):
        resized = functional.resize(resized, [side, side], antialias=False).round()
    difference = apart(down_and_up(pixels, factor), resized.permute(1, 2, 0).numpy())
    assert difference.max() <= 2
    assert difference.mean() < 0.3
    filtered = functional.resize(tensor(pixels), [small, small])
    filtered = functional.resize(filtered, [SIDE, SIDE])
    assert apart(resized.numpy(), filtered.numpy()).max() > 10


@pytest.mark.parametrize("variance", [0.001, 0.002])
def test_noise_has_its_variance_in_ycbcr(variance: float) -> None:
    pixels = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
    noise = add_noise(pixels, variance, np.random.default_rng(0)) - 127.5  # cut, not rounded
    # ITU-R BT.601 luma and chroma at broadcast scale, of a range of 1.
    luma = noise @ [0.299, 0.587, 0.114]
    chroma = ((noise[..., 2] - luma) * 0.564, (noise[..., 0] - luma) * 0.713)
    for channel, steps in ((luma, 219), *((c, 224) for c in chroma)):
        scaled = channel * steps / 255 / 255
        assert scaled.var() == pytest.approx(variance, rel=0.03)
        assert abs(scaled.mean()) < 2e-3
    assert abs(np.corrcoef(luma.ravel(), chroma[0].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(luma[:-1].ravel(), luma[1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("variance", [0.001, 0.002])
def test_noise_is_distributed_as_the_validators(variance: float) -> None:
    """Each channel, in the dark where values are cut at 0 and in the light; and how channels go together."""
    rng = np.random.default_rng(1)
    for level in (4, 128, 250):
        pixels = np.full((SIDE, SIDE, 3), level, dtype=np.uint8)
        drawn = rng.standard_normal(pixels.shape).astype(np.float32)
        theirs = (broadcast(pixels.astype(np.float32)) / 255 + np.sqrt(variance) * drawn) * 255
        theirs = np.clip(seen(theirs.astype(np.float32)), 0, 255).astype(np.uint8)
        ours = add_noise(pixels, variance, rng)
        for channel in range(3):
            pair = ours[..., channel].ravel(), theirs[..., channel].ravel()
            assert stats.ks_2samp(*pair).pvalue > 1e-3
        correlations = [np.corrcoef(found.reshape(-1, 3).T) for found in (ours, theirs)]
        assert np.abs(correlations[0] - correlations[1]).max() < 0.03


def test_noise_is_clipped() -> None:
    rng = np.random.default_rng(0)
    for level in (0, 255):
        found = add_noise(np.full((64, 64, 3), level, dtype=np.uint8), 0.002, rng)
        assert np.abs(found.astype(int) - level).max() < 120


def test_noise_depends_on_the_generator_alone_in_any_thread() -> None:
    pixels = square()

    def noisy(seed: int) -> NDArray[np.uint8]:
        return add_noise(pixels, 0.002, np.random.default_rng(seed))

    alone = [noisy(seed) for seed in range(16)]
    assert len({found.tobytes() for found in alone}) == 16
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(noisy, range(16)))
    assert np.array_equal(alone, together)


@pytest.mark.parametrize("kernel", [7, 9])
def test_blur_is_a_gaussian_kernel(kernel: int) -> None:
    pixels = square()
    x = np.arange(kernel) - kernel // 2
    line = np.exp(-(x**2) / (2 * (kernel / 6) ** 2))
    weights = np.outer(line, line)[..., None] / line.sum() ** 2
    wanted = ndimage.convolve(pixels.astype(float), weights, mode="mirror")
    assert apart(blur(pixels, kernel), np.rint(wanted)).max() <= 1
    theirs = functional.gaussian_blur(tensor(pixels), [kernel] * 2, [kernel / 6] * 2)
    assert apart(blur(pixels, kernel), theirs.permute(1, 2, 0).numpy()).max() <= 1


def test_distortions_follow_in_order() -> None:
    image, rng = Image.fromarray(square()), np.random.default_rng
    every = Distortion(0.0, (0, 0, SIDE), False, False, 2, 2, 2, 2, 2)
    pixels = saturate(square(), 0.3)
    pixels = (pixels.astype(np.float32) * np.float32(0.725)).astype(np.uint8)
    pixels = blur(add_noise(down_and_up(pixels, 3), 0.002, rng(5)), 9)
    assert np.array_equal(np.asarray(apply(image, every, rng(5))), pixels)


# --------------------------------------------------------------------------- challenges


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(LEVELS), st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_any_image_becomes_224_rgb(level: int, width: int, height: int, seed: int) -> None:
    image = Image.new("L", (width, height), 99)
    data = challenge_jpeg(image, level, np.random.default_rng(seed), 0.5)
    with Image.open(io.BytesIO(data)) as found:
        assert (found.format, found.mode, found.size) == ("JPEG", "RGB", (SIDE, SIDE))


def test_the_jpeg_is_of_pillows_default_quality() -> None:
    image = picture()
    plain = io.BytesIO()
    distort(image, 0, np.random.default_rng(0)).save(plain, "JPEG")
    assert challenge_jpeg(image, 0, np.random.default_rng(0)) == plain.getvalue()


def test_a_challenge_depends_on_no_order_and_no_workers() -> None:
    tasks = []
    for number in range(40):
        data = io.BytesIO()
        picture(48, 36, number).save(data, "JPEG")
        tasks.append(Task(f"image-{number}", data.getvalue()))
    found = list(challenge_jpegs(tasks, LEVELS, 2, 7))
    assert len(set(found)) == len(found) - 40  # level 0 alone repeats itself
    assert list(challenge_jpegs(tasks, LEVELS, 2, 7, workers=2)) == found
    backwards = list(challenge_jpegs(tasks[::-1], LEVELS, 2, 7))
    assert [backwards[8 * n : 8 * n + 8] for n in range(39, -1, -1)] == [
        found[8 * n : 8 * n + 8] for n in range(40)
    ]
    # One level alone is what it is among all; another seed is another challenge.
    assert list(challenge_jpegs(tasks, [2], 2, 7)) == [
        data for n in range(40) for data in found[8 * n + 4 : 8 * n + 6]
    ]
    assert list(challenge_jpegs(tasks[:1], [3], 1, 8)) != [found[6]]


@pytest.mark.parametrize(
    ("shares", "repeats"),
    [((0.25,) * 4, 1), ((0.25,) * 4, 4), ((0.1, 0.6, 0, 0.3), 3), ((0, 0, 0, 1), 2)],
)
def test_levels_are_mixed_by_their_shares(shares: tuple[float, ...], repeats: int) -> None:
    drawn = np.array([mixed_levels(str(i), shares, repeats, 3) for i in range(N)])
    assert drawn.shape == (N, repeats)
    for level, share in enumerate(shares):
        counts = (drawn == level).sum(axis=1)
        # No image has one more or less than its share of the repeats.
        assert (np.abs(counts - share * repeats) < 1).all()
        deviation = np.sqrt(share * (1 - share) / (N * repeats))
        assert abs((drawn == level).mean() - share) <= 4 * deviation
    assert mixed_levels("7", shares, repeats, 3) == tuple(drawn[7])


def test_a_mixture_draws_from_the_challenges_of_its_levels() -> None:
    data = io.BytesIO()
    picture(48, 36).save(data, "JPEG")
    tasks = [Task(f"image-{number}", data.getvalue()) for number in range(40)]
    shares = (0.1, 0.2, 0.3, 0.4)
    found = list(mixed_jpegs(tasks, shares, 2, 7))
    assert list(mixed_jpegs(tasks, shares, 2, 7, workers=2)) == found
    every = list(challenge_jpegs(tasks, LEVELS, 2, 7))
    for number, task in enumerate(tasks):
        for repeat, level in enumerate(mixed_levels(task.id, shares, 2, 7)):
            assert found[2 * number + repeat] == every[8 * number + 2 * level + repeat]
