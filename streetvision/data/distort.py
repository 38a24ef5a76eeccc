"""The images of a challenge: the four distortion levels of Subnet 72's validator, written anew.

Level 0 is a centre crop. Level 1 rotates and takes a random square crop. Levels 2 and 3 add colour and
sharpness distortions, each at a strength of its own. Source: behaviour of the public validator
(natixnetwork/streetvision-subnet, commit 28a1755), to within a grey level or two: sharpness is changed by
the same functions of OpenCV, but where it rotates and crops in floating point, here it is whole levels.

What is drawn for an image depends on seed, image id, level and repetition alone, never on order or workers.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from streetvision.core.errors import UserError
from streetvision.core.processes import in_threads

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels: TypeAlias = NDArray[np.uint8]  # [H, W, 3], RGB
SIDE = 224  # pixels of a challenge
LEVELS = (0, 1, 2, 3)
MAX_ANGLE = 20.0  # degrees
MIN_AREA = 0.2  # smallest crop, as a share of the image
JPEG_QUALITY = 75  # Pillow's default
# Parameter of each distortion by strength 1, 2; strength 0 leaves the image as it is.
SATURATION = (0.4, 0.3)  # factor on chroma
CONTRAST = (0.85, 0.725)  # factor on all channels
RESAMPLING = (2, 3)  # down and up again by
NOISE = (0.001, 0.002)  # variance, of a range of 1
BLUR = (7, 9)  # kernel in pixels, sigma a sixth of it
# Strengths are drawn evenly from 0 to this, by level; order: SATURATION, CONTRAST, RESAMPLING, NOISE, BLUR.
MAX_STRENGTHS = {0: (0,) * 5, 1: (0,) * 5, 2: (1, 1, 1, 0, 0), 3: (2,) * 5}
_CROP_TRIES = 10  # sizes drawn until one fits; then the largest central square
_LUMA = np.array([0.299, 0.587, 0.114])
# Noise is added to Y, Cb, Cr at broadcast scale (219 and 224 of 255 steps), then seen in R, G, B.
_NOISE_TO_RGB = (
    np.diag([255 / 219, 255 / 224, 255 / 224])
    @ np.array([[1, 1, 1], [0, -0.344, 1.773], [1.403, -0.714, 0]])
) * 255


@dataclass(frozen=True)
class Distortion:
    """What is drawn for one image.

    `angle` in degrees, counter-clockwise; `crop` is left, top and side in pixels of the rotated image;
    the last five are strengths 0, 1 or 2.
    """

    angle: float
    crop: tuple[int, int, int]
    flip_horizontal: bool = False
    flip_vertical: bool = False
    saturation: int = 0
    contrast: int = 0
    resampling: int = 0
    noise: int = 0
    blur: int = 0


class Task(NamedTuple):
    """A stored image to distort."""

    id: str
    data: bytes


def challenge_rng(seed: int, image_id: str, level: int, repeat: int = 0) -> np.random.Generator:
    """Generator of one challenge, a function of its arguments alone."""
    number = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big")
    return np.random.default_rng([seed, number, level, repeat])


def draw(
    level: int, size: tuple[int, int], rng: np.random.Generator, flip_probability: float = 0.0
) -> Distortion:
    """Draw the distortion of an image of `size` (width, height) pixels; UserError for an unknown level.

    The public validator lists flips but never makes them; `flip_probability`, for each axis and from
    level 1 on, is for those that do.
    """
    if level not in LEVELS:
        raise UserError(f"distortion level must be one of {LEVELS}, got {level}")
    width, height = size
    short = min(size)
    if level == 0:
        return Distortion(0.0, (round((width - short) / 2), round((height - short) / 2), short))
    angle = rng.uniform(-MAX_ANGLE, MAX_ANGLE)
    sides = np.round(np.sqrt(rng.uniform(MIN_AREA, 1, _CROP_TRIES) * width * height)).astype(int)
    fitting = sides[(sides > 0) & (sides <= short)]
    place = rng.random(2)
    crop = ((width - short) // 2, (height - short) // 2, short)
    if len(fitting):
        side = int(fitting[0])
        left, top = (int(u * (n - side + 1)) for u, n in zip(place, size, strict=True))
        crop = (left, top, side)
    flips = rng.random(2) < flip_probability
    strengths = rng.integers(0, np.array(MAX_STRENGTHS[level]) + 1)
    return Distortion(
        float(angle), crop, bool(flips[0]), bool(flips[1]), *(int(s) for s in strengths)
    )


def apply(image: Image, distortion: Distortion, rng: np.random.Generator) -> Image:
    """Distort an RGB image to 224 × 224 pixels; `rng` makes the noise."""
    from PIL import Image as PILImage

    if distortion.angle:
        image = image.rotate(distortion.angle, PILImage.Resampling.NEAREST)
    left, top, side = distortion.crop
    pixels = _resized(np.asarray(image)[top : top + side, left : left + side])
    if distortion.flip_horizontal:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    if distortion.flip_vertical:
        pixels = np.ascontiguousarray(pixels[::-1])
    if distortion.saturation:
        pixels = saturate(pixels, SATURATION[distortion.saturation - 1])
    if distortion.contrast:
        pixels = (pixels * np.float32(CONTRAST[distortion.contrast - 1])).astype(np.uint8)
    if distortion.resampling:
        pixels = down_and_up(pixels, RESAMPLING[distortion.resampling - 1])
    if distortion.noise:
        pixels = add_noise(pixels, NOISE[distortion.noise - 1], rng)
    if distortion.blur:
        pixels = blur(pixels, BLUR[distortion.blur - 1])
    return PILImage.fromarray(pixels)


def _resized(pixels: Pixels) -> Pixels:
    """A square [S, S, 3] at the size of a challenge, bilinear, with a filter where it is reduced."""
    from PIL import Image as PILImage

    if len(pixels) <= SIDE:  # the filter does nothing, and OpenCV takes a seventh of the time
        return _bilinear(pixels, SIDE, SIDE)
    image = PILImage.fromarray(pixels)
    return np.asarray(image.resize((SIDE, SIDE), PILImage.Resampling.BILINEAR))


def saturate(pixels: Pixels, factor: float) -> Pixels:
    """Scale the chroma of [H, W, 3] round grey; luma stays."""
    mixing = factor * np.eye(3) + (1 - factor) * _LUMA
    # Between the pixel and its grey, so in range; the margin keeps grey from being cut to one below.
    affine = np.column_stack([mixing, np.full(3, 1e-3)]).astype(np.float32)
    mixed: NDArray[np.float32] = _opencv().transform(pixels.astype(np.float32), affine)
    return mixed.astype(np.uint8)


def down_and_up(pixels: Pixels, factor: int) -> Pixels:
    """Resize [H, W, 3] to `1 / factor` and back, bilinear without a filter against aliasing."""
    height, width, _ = pixels.shape
    return _bilinear(_bilinear(pixels, width // factor, height // factor), width, height)


def _bilinear(pixels: Pixels, width: int, height: int) -> Pixels:
    resized: Pixels = _opencv().resize(pixels, (width, height))
    return resized


def add_noise(pixels: Pixels, variance: float, rng: np.random.Generator) -> Pixels:
    """Add white Gaussian noise to Y, Cb and Cr of [H, W, 3], each of `variance` (of a range of 1)."""
    cv2 = _opencv()
    height, width, channels = pixels.shape
    noise = np.empty((height, width * channels), dtype=np.float32)
    # Its normal numbers take a third of the time of NumPy's; the generator seeded is this thread's own.
    cv2.setRNGSeed(int(rng.integers(2**31)))
    cv2.randn(noise, 0, 1)
    # Values are cut to whole levels, and OpenCV rounds.
    affine = np.column_stack([_NOISE_TO_RGB.T * np.sqrt(variance), np.full(3, -0.5)])
    seen = cv2.transform(noise.reshape(pixels.shape), affine.astype(np.float32))
    noisy: Pixels = cv2.add(pixels, seen, dtype=cv2.CV_8U)
    return noisy


def blur(pixels: Pixels, kernel: int) -> Pixels:
    """Gaussian blur of [H, W, 3] with a kernel of odd size, sigma a sixth of it, borders mirrored."""
    blurred: Pixels = _opencv().GaussianBlur(pixels, (kernel, kernel), kernel / 6)
    return blurred


@cache
def _opencv() -> Any:
    """OpenCV in one thread: images are small, and callers work on several at once."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


def distort(
    image: Image, level: int, rng: np.random.Generator, flip_probability: float = 0.0
) -> Image:
    """Draw a distortion of `level` and apply it: RGB, 224 × 224 pixels."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    return apply(image, draw(level, image.size, rng, flip_probability), rng)


def challenge_jpeg(
    image: Image, level: int, rng: np.random.Generator, flip_probability: float = 0.0
) -> bytes:
    """The distorted image as a challenge carries it: a JPEG of Pillow's default quality."""
    buffer = io.BytesIO()
    distort(image, level, rng, flip_probability).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def challenge_jpegs(
    tasks: Sequence[Task],
    levels: Sequence[int],
    repeats: int,
    seed: int,
    flip_probability: float = 0.0,
    workers: int = 1,
) -> Iterator[bytes]:
    """Yield a JPEG for each task, in it for each level, in it for each repeat.

    `workers` as in `in_threads`; it changes no byte.
    """
    versions = [(level, repeat) for level in levels for repeat in range(repeats)]
    yield from _distort_all([(task, versions) for task in tasks], seed, flip_probability, workers)


def mixed_jpegs(
    tasks: Sequence[Task],
    shares: Sequence[float],
    repeats: int,
    seed: int,
    flip_probability: float = 0.0,
    workers: int = 1,
) -> Iterator[bytes]:
    """Yield `repeats` JPEGs for each task, their levels drawn by `mixed_levels`.

    `workers` as in `in_threads`; it changes no byte.
    """
    work = [
        (task, [(n, k) for k, n in enumerate(mixed_levels(task.id, shares, repeats, seed))])
        for task in tasks
    ]
    yield from _distort_all(work, seed, flip_probability, workers)


def mixed_levels(
    image_id: str, shares: Sequence[float], repeats: int, seed: int
) -> tuple[int, ...]:
    """Draw the levels [repeats] of one image, a function of the arguments alone.

    Systematic sampling: each level has its share of the draws in expectation, and among the repeats of
    one image less than one more or less than that. `shares` of the levels 0 to 3 add up to 1.
    """
    start = challenge_rng(seed, image_id, len(LEVELS)).random()  # a stream of no level's own
    places = (start + np.arange(repeats)) / repeats
    drawn = np.searchsorted(np.cumsum(shares), places, side="right")
    last = int(np.flatnonzero(shares)[-1])  # where rounding leaves the sum below 1
    return tuple(int(level) for level in np.minimum(drawn, last))


def open_jpeg(data: bytes) -> Image:
    """The RGB image of a JPEG."""
    from PIL import Image as PILImage

    with PILImage.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return image.convert("RGB")


# An image, and the level and repetition of each of its versions.
_Work = tuple[Task, list[tuple[int, int]]]


def _distort_all(
    work: Sequence[_Work], seed: int, flip_probability: float, workers: int
) -> Iterator[bytes]:
    def distorted(one: _Work) -> list[bytes]:
        task, versions = one
        image = open_jpeg(task.data)
        return [
            challenge_jpeg(
                image, level, challenge_rng(seed, task.id, level, repeat), flip_probability
            )
            for level, repeat in versions
        ]

    for made in in_threads(distorted, work, workers):
        yield from made
