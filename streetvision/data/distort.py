"""The images of a challenge: the four distortion levels of Subnet 72's validator, written anew.

Level 0 is a centre crop. Level 1 rotates and takes a random square crop. Levels 2 and 3 add colour and
sharpness distortions, each at a strength of its own. Source: behaviour of the public validator
(natixnetwork/streetvision-subnet, commit 28a1755), to within one grey level: it interpolates in
floating point and with OpenCV, here it is Pillow, NumPy and SciPy.

What is drawn for an image depends on seed, image id, level and repetition alone, never on order or workers.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streetvision.errors import UserError
from streetvision.processes import in_processes

if TYPE_CHECKING:
    from PIL.Image import Image

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
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# Noise is added to Y, Cb, Cr at broadcast scale (219 and 224 of 255 steps), then seen in R, G, B.
_NOISE_TO_RGB = (
    np.diag([255 / 219, 255 / 224, 255 / 224])
    @ np.array([[1, 1, 1], [0, -0.344, 1.773], [1.403, -0.714, 0]])
).astype(np.float32) * 255
_CHUNK = 32  # images a unit of work


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

    nearest, bilinear = PILImage.Resampling.NEAREST, PILImage.Resampling.BILINEAR
    if distortion.angle:
        image = image.rotate(distortion.angle, nearest)
    left, top, side = distortion.crop
    image = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), bilinear)
    if distortion.flip_horizontal:
        image = image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
    if distortion.flip_vertical:
        image = image.transpose(PILImage.Transpose.FLIP_TOP_BOTTOM)
    strengths = (
        distortion.saturation, distortion.contrast, distortion.resampling, distortion.noise,
        distortion.blur,
    )  # fmt: skip
    if not any(strengths):
        return image
    # Whole planes: loops over three interleaved channels cost several times the arithmetic.
    planes = np.stack([np.asarray(band) for band in image.split()])
    if distortion.saturation:
        planes = saturate(planes, SATURATION[distortion.saturation - 1])
    if distortion.contrast:
        planes = (planes * np.float32(CONTRAST[distortion.contrast - 1])).astype(np.uint8)
    if distortion.resampling:
        planes = down_and_up(planes, RESAMPLING[distortion.resampling - 1])
    if distortion.noise:
        planes = add_noise(planes, NOISE[distortion.noise - 1], rng)
    if distortion.blur:
        planes = blur(planes, BLUR[distortion.blur - 1])
    return PILImage.merge("RGB", [PILImage.fromarray(plane) for plane in planes])


def saturate(planes: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Scale the chroma of [3, H, W] round grey; luma stays."""
    mixed = planes.astype(np.float32)
    luma = mixed[0] * _LUMA[0]
    for plane, share in zip(mixed[1:], _LUMA[1:], strict=True):
        luma += plane * share
    # Between the pixel and its grey, so in range; the margin keeps grey from being cut to one below.
    mixed -= luma
    mixed *= np.float32(factor)
    mixed += luma
    mixed += np.float32(1e-3)
    return mixed.astype(np.uint8)


def down_and_up(planes: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Resize [3, H, W] to `1 / factor` and back, bilinear without a filter against aliasing."""
    _, height, width = planes.shape
    small = _bilinear(planes, height // factor, width // factor)
    return _bilinear(small, height, width)


def _bilinear(planes: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Sample [3, H, W] between its pixel centres; Pillow's resizing would filter when it reduces."""
    found = planes.astype(np.float32)
    for axis, wanted in ((1, height), (2, width)):
        n = planes.shape[axis]
        place = np.clip((np.arange(wanted, dtype=np.float32) + 0.5) * n / wanted - 0.5, 0, n - 1)
        below = np.minimum(place.astype(np.int64), max(n - 2, 0))
        above = np.minimum(below + 1, n - 1)
        weight = (place - below).astype(np.float32)
        # In range already: the mode spares `take` the copy that it makes in case an index is not.
        low, found = (found.take(index, axis, mode="clip") for index in (below, above))
        # In place: fresh memory of this size costs more than the arithmetic.
        found -= low
        found *= weight[:, None] if axis == 1 else weight
        found += low
    return np.rint(found, out=found).astype(np.uint8)


def add_noise(
    planes: NDArray[np.uint8], variance: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Add white Gaussian noise to Y, Cb and Cr of [3, H, W], each of `variance` (of a range of 1)."""
    _, height, width = planes.shape
    noise = rng.standard_normal((height * width, 3), dtype=np.float32)
    mixing = _NOISE_TO_RGB * np.float32(np.sqrt(variance))
    noisy: NDArray[np.float32] = (mixing.T @ noise.T).reshape(planes.shape)
    noisy += planes
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)


def blur(planes: NDArray[np.uint8], kernel: int) -> NDArray[np.uint8]:
    """Gaussian blur of [3, H, W] with a kernel of odd size, sigma a sixth of it, borders mirrored."""
    from scipy.ndimage import gaussian_filter1d

    found = planes.astype(np.float32)
    for axis in (1, 2):
        found = gaussian_filter1d(found, kernel / 6, axis=axis, mode="mirror", radius=kernel // 2)
    return np.rint(found, out=found).astype(np.uint8)


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
    """Yield a JPEG for each task, in it for each level, in it for each repeat; on all cores.

    `workers` as in `in_processes`; it changes no byte.
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
    """Yield `repeats` JPEGs for each task, their levels drawn by `mixed_levels`; on all cores."""
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
    chunks = [work[start : start + _CHUNK] for start in range(0, len(work), _CHUNK)]
    distort_chunk = partial(_distort_chunk, seed=seed, flip_probability=flip_probability)
    for made in in_processes(distort_chunk, chunks, workers):
        yield from made


def _distort_chunk(work: Sequence[_Work], seed: int, flip_probability: float) -> list[bytes]:
    made = []
    for task, versions in work:
        image = open_jpeg(task.data)
        made += [
            challenge_jpeg(
                image, level, challenge_rng(seed, task.id, level, repeat), flip_probability
            )
            for level, repeat in versions
        ]
    return made
