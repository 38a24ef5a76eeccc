"""The distortion levels against their documented parameters, torchvision and slow obvious versions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from streetvision.subnet.distortions import (
    MAX_STRENGTHS,
    SIDE,
    Distortion,
    add_noise,
    apply_crop,
    apply_letterbox,
    blur,
    down_and_up,
    draw_crop,
    draw_letterbox,
    letterboxed,
    rotated,
    saturate,
)
from streetvision.subnet.profiles import CROP, LETTERBOX
from streetvision.subnet.served import challenge_rng, served_image
from tests.subnet.pictures import picture

STRENGTHS = ("saturation", "contrast", "resampling", "noise", "blur")
N = 3000


def draws(level: int, size: tuple[int, int] = (200, 200), flips: float = 0.0) -> list[Distortion]:
    return [draw_crop(level, size, challenge_rng(1, str(i), level), flips) for i in range(N)]


def crops(found: list[Distortion]) -> NDArray[np.int64]:
    """Left, top and side [N, 3] of what is cut."""
    return np.array([d.crop for d in found])


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
    found = served_image(CROP, image, 0, np.random.default_rng(0))
    square = functional.center_crop(image, [short, short])
    wanted = functional.resize(square, [SIDE, SIDE], antialias=True)
    assert apart(found, wanted).max() <= 1


@pytest.mark.parametrize("level", [1, 2, 3])
def test_angle_area_and_place_are_uniform(level: int) -> None:
    size = (2000, 2000)
    found = draws(level, size)
    angles = [d.angle for d in found]
    assert stats.kstest(angles, stats.uniform(-20, 40).cdf).pvalue > 1e-3
    sides = crops(found)[:, 2]
    areas = sides**2 / (size[0] * size[1])
    assert stats.kstest(areas, stats.uniform(0.2, 0.8).cdf).pvalue > 1e-3
    assert 0.2 <= areas.min() + 1e-3 < 0.21
    assert 0.99 < areas.max() <= 1
    for axis in (0, 1):
        place = crops(found)[:, axis] / (size[axis] - sides + 1e-9)
        assert stats.kstest(place[sides < 1900], stats.uniform(0, 1).cdf).pvalue > 1e-3


def test_a_wide_image_is_cropped_by_the_sizes_that_fit() -> None:
    """Of 4:3 no square covers more than three quarters: as torchvision, draw again."""
    areas = crops(draws(1, (2000, 1500)))[:, 2] ** 2 / 3e6
    assert stats.kstest(areas, stats.uniform(0.2, 0.55).cdf).pvalue > 1e-3
    # No square of a fifth of the area fits into 10:1: the largest central one.
    assert {d.crop for d in draws(1, (1000, 100))} == {(450, 0, 100)}


def test_crop_is_distributed_as_torchvisions() -> None:
    image = torch.zeros(3, 150, 200)
    torch.manual_seed(0)
    random_crop = v2.RandomResizedCrop(SIDE, (0.2, 1), (1, 1))
    theirs = [random_crop.make_params([image]) for _ in range(N)]
    ours = crops(draws(1, (200, 150)))
    for column, key in enumerate(("left", "top", "height")):
        assert stats.ks_2samp(ours[:, column], [crop[key] for crop in theirs]).pvalue > 1e-3


@pytest.mark.parametrize("level", CROP.levels)
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
    assert not any(
        d.flip_horizontal or d.flip_vertical for level in CROP.levels for d in draws(level)
    )
    found = draws(2, flips=0.3)
    for name in ("flip_horizontal", "flip_vertical"):
        assert np.mean([getattr(d, name) for d in found]) == pytest.approx(0.3, abs=0.04)
    assert not any(d.flip_horizontal for d in draws(0, flips=1.0))
    # Turning them on changes nothing else.
    plain = [(d.angle, d.crop, *(getattr(d, name) for name in STRENGTHS)) for d in draws(2)]
    assert plain == [(d.angle, d.crop, *(getattr(d, name) for name in STRENGTHS)) for d in found]


# --------------------------------------------------------------------------- what is done


@pytest.mark.parametrize("scale", [1, 5])  # enlarged, and reduced, where a filter acts
def test_rotation_crop_and_flips_are_those_of_torchvision(scale: int) -> None:
    image = picture(128 * scale, 96 * scale)
    left, top, side = 20 * scale, 10 * scale, 70 * scale
    drawn = Distortion(17.0, (left, top, side), True, True)
    found = apply_crop(image, drawn, np.random.default_rng(0))
    turned = functional.rotate(image, 17.0)
    wanted = functional.resized_crop(turned, top, left, side, side, [SIDE, SIDE], antialias=True)
    wanted = functional.vertical_flip(functional.horizontal_flip(wanted))
    assert apart(found, wanted).max() <= 1
    # The tensor version that a validator runs, but for a few pixels on the edges of the rotation.
    theirs = functional.rotate(tensor(np.asarray(image)), 17.0).permute(1, 2, 0).numpy()
    assert (np.asarray(turned) != theirs).any(axis=2).mean() < 0.02
    assert tuple(np.asarray(turned)[0, -1]) == (0, 0, 0)


def slow_mask_rule(
    left: int, top: int, side: int, size: tuple[int, int], point: tuple[int, int]
) -> tuple[int, int]:
    """The rule line by line; where it says width it holds the height, and the other way round."""
    (height, width), (x, y) = size, point
    if x < left:
        left = max(0, x - 10)
    elif x > left + side:
        left = min(width - side, x - side + 10)
    if y < top:
        top = max(0, y - 10)
    elif y > top + side:
        top = min(height - side, y - side + 10)
    return left, top


@pytest.mark.parametrize("size", [(200, 150), (150, 200), (180, 180)])
def test_a_crop_moves_to_the_point_that_was_painted_over(size: tuple[int, int]) -> None:
    moved = 0
    for seed in range(300):
        point = tuple(np.random.default_rng(seed).integers(0, size).tolist())
        plain, kept = (
            draw_crop(1, size, challenge_rng(1, str(seed), 1), 0.0, mask)
            for mask in (None, (point[0], point[1]))
        )
        assert plain.crop is not None
        assert kept.crop is not None
        left, top, side = plain.crop
        wanted = slow_mask_rule(left, top, side, size, (point[0], point[1]))
        assert kept == replace(plain, crop=(*wanted, side))
        moved += kept != plain
        if size == (180, 180):  # elsewhere the rule's confusion of the axes may lose the point
            assert kept.crop[0] <= point[0] <= kept.crop[0] + side
            assert kept.crop[1] <= point[1] <= kept.crop[1] + side
    assert moved > 30
    assert draw_crop(0, size, np.random.default_rng(0), 0.0, (0, 0)).crop == draw_crop(
        0, size, np.random.default_rng(0)
    ).crop  # fmt: skip


def test_what_a_moved_crop_has_beyond_the_picture_is_black() -> None:
    image = picture(200, 150)
    found = np.asarray(apply_crop(image, Distortion(0.0, (20, 60, 100)), np.random.default_rng(0)))
    theirs = functional.crop(tensor(np.asarray(image)), 60, 20, 100, 100)
    wanted = functional.resize(theirs, [SIDE, SIDE]).permute(1, 2, 0).numpy()
    assert apart(found, wanted).max() <= 1
    assert not found[-20:].any()
    assert found[:-30].any()


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
    found = np.asarray(apply_crop(image, Distortion(0.0, (0, 0, SIDE), contrast=strength), rng))
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


@pytest.mark.parametrize(
    "size", [(320, 180), (180, 320), (64, 48), (224, 224), (301, 97), (500, 50), (449, 300)]
)
def test_the_letterbox_is_that_of_torchvision(size: tuple[int, int]) -> None:
    """The whole frame, sides cut to whole pixels as the validator's arithmetic cuts them."""
    image = picture(*size)
    scale = min(224 / size[0], 224 / size[1])
    width, height = int(size[0] * scale), int(size[1] * scale)
    shrunk = functional.resize(image, [height, width])
    left, top = (224 - width) // 2, (224 - height) // 2
    padding = [left, top, 224 - width - left, 224 - height - top]
    wanted = functional.pad(shrunk, padding, fill=[0])
    assert np.array_equal(letterboxed(image), np.asarray(wanted))
    found = served_image(LETTERBOX, image, 0, np.random.default_rng(0))
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_a_side_of_the_letterbox_may_fall_short_by_rounding() -> None:
    short = [n for n in range(16, 3000) if int(n * (224 / n)) < 224]
    assert short  # 224 / n · n is 223.99…
    found = letterboxed(Image.new("RGB", (short[0], short[0]), (9, 9, 9)))
    assert found.any(axis=(0, 2)).sum() == 223


@pytest.mark.parametrize("angle", [-20.0, -7.3, 0.01, 3.0, 13.7, 20.0])
def test_a_letterbox_is_turned_as_torchvision_turns_tensors(angle: float) -> None:
    pixels = square()
    wanted = functional.rotate(tensor(pixels), angle).permute(1, 2, 0).numpy()
    # A pixel whose source lies between two is anybody's.
    assert (rotated(pixels, angle) != wanted).any(axis=2).sum() <= 2
    found = np.asarray(
        apply_letterbox(Image.fromarray(pixels), Distortion(angle, None), np.random.default_rng(0))
    )
    assert np.array_equal(found, rotated(pixels, angle))


def slow_letterbox(image: Image.Image, drawn: Distortion) -> NDArray[np.uint8]:
    """All steps but the noise, with torchvision and, as the validator, OpenCV in Y, Cb, Cr."""
    turned = functional.rotate(tensor(letterboxed(image)), drawn.angle)
    if drawn.flip_horizontal:
        turned = functional.horizontal_flip(turned)
    if drawn.flip_vertical:
        turned = functional.vertical_flip(turned)
    pixels = turned.permute(1, 2, 0).numpy()
    if drawn.saturation:
        ycbcr = broadcast(pixels.astype(np.float32))
        ycbcr[..., 1:] = 0.5 + (0.4, 0.3)[drawn.saturation - 1] * (ycbcr[..., 1:] - 0.5)
        pixels = seen(ycbcr).astype(np.uint8)
    if drawn.contrast:
        pixels = (pixels.astype(np.float32) * (0.85, 0.725)[drawn.contrast - 1]).astype(np.uint8)
    if drawn.resampling:
        small = 224 // (2, 3)[drawn.resampling - 1]
        pixels = cv2.resize(cv2.resize(pixels, (small, small)), (224, 224))
    if drawn.blur:
        kernel = (7, 9)[drawn.blur - 1]
        pixels = cv2.GaussianBlur(pixels, (kernel, kernel), kernel / 6)
    return np.asarray(pixels)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_letterbox_is_that_of_the_slow_version(level: int) -> None:
    for seed in range(40):
        image = picture(*((160, 90), (90, 160), (256, 192))[seed % 3], seed)
        drawn = draw_letterbox(level, challenge_rng(2, str(seed), level), 0.5)
        drawn = replace(drawn, noise=0)
        found = np.asarray(apply_letterbox(image, drawn, np.random.default_rng(0)))
        off = apart(found, slow_letterbox(image, drawn))
        assert (off > 1).any(axis=2).mean() < 1e-3
        assert off.mean() < 0.05


def test_a_letterbox_draws_angle_and_strengths_and_cuts_nothing() -> None:
    for level in LETTERBOX.levels:
        found = [draw_letterbox(level, challenge_rng(1, str(i), level)) for i in range(N)]
        assert {d.crop for d in found} == {None}
        assert not any(d.flip_horizontal or d.flip_vertical for d in found)
        angles = [d.angle for d in found]
        if level:
            assert stats.kstest(angles, stats.uniform(-20, 40).cdf).pvalue > 1e-3
        else:
            assert not any(angles)
        for name, most in zip(STRENGTHS, MAX_STRENGTHS[level], strict=True):
            counts = np.bincount([getattr(d, name) for d in found], minlength=3)
            assert counts[most + 1 :].sum() == 0
            if most:
                assert stats.chisquare(counts[: most + 1]).pvalue > 1e-3


def test_distortions_follow_in_order() -> None:
    image, rng = Image.fromarray(square()), np.random.default_rng
    every = Distortion(0.0, (0, 0, SIDE), False, False, 2, 2, 2, 2, 2)
    pixels = saturate(square(), 0.3)
    pixels = (pixels.astype(np.float32) * np.float32(0.725)).astype(np.uint8)
    pixels = blur(add_noise(down_and_up(pixels, 3), 0.002, rng(5)), 9)
    assert np.array_equal(np.asarray(apply_crop(image, every, rng(5))), pixels)
