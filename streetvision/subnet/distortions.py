"""What validators did to a picture before they sent it, written anew; pixels in, pixels out.

Two eras distorted, at four levels. `crop` cut squares out of the picture: the central one at level 0, a random
one of the turned picture from level 1 on. `letterbox` shrank the whole frame onto a black square and cut
nothing. Levels 2 and 3 of both change colour and sharpness, each at a strength of its own. Both start from the
whole frame as it lies in the file: EXIF is dropped, and nobody turns the picture upright.

Source: behaviour of the public validator; how near these come to it stands at `apply_crop` and
`apply_letterbox`, as measured by running both on a thousand drawn distortions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels: TypeAlias = NDArray[np.uint8]  # [H, W, 3], RGB
SIDE = 224  # pixels of what these two eras sent
MAX_ANGLE = 20.0  # degrees
MIN_AREA = 0.2  # smallest crop, as a share of the image
# Parameter of each distortion by strength 1, 2; strength 0 leaves the image as it is.
SATURATION = (0.4, 0.3)  # factor on chroma
CONTRAST = (0.85, 0.725)  # factor on all channels
RESAMPLING = (2, 3)  # down and up again by
NOISE = (0.001, 0.002)  # variance, of a range of 1
BLUR = (7, 9)  # kernel in pixels, sigma a sixth of it
# Strengths are drawn evenly from 0 to this, by level; order: SATURATION, CONTRAST, RESAMPLING, NOISE, BLUR.
MAX_STRENGTHS = {0: (0,) * 5, 1: (0,) * 5, 2: (1, 1, 1, 0, 0), 3: (2,) * 5}
_CROP_TRIES = 10  # sizes drawn until one fits; then the largest central square
_MASK_MARGIN = 10  # pixels between a crop's edge and the point that it was moved to keep
_LUMA = np.array([0.299, 0.587, 0.114])
# Noise is added to Y, Cb, Cr at broadcast scale (219 and 224 of 255 steps), then seen in R, G, B.
_NOISE_TO_RGB = (
    np.diag([255 / 219, 255 / 224, 255 / 224])
    @ np.array([[1, 1, 1], [0, -0.344, 1.773], [1.403, -0.714, 0]])
) * 255


@dataclass(frozen=True)
class Distortion:
    """What is drawn for one image.

    `angle` in degrees, counter-clockwise; `crop` is left, top and side in pixels of the turned image,
    None where nothing is cut; the last five are strengths 0, 1 or 2.
    """

    angle: float
    crop: tuple[int, int, int] | None
    flip_horizontal: bool = False
    flip_vertical: bool = False
    saturation: int = 0
    contrast: int = 0
    resampling: int = 0
    noise: int = 0
    blur: int = 0


def draw_crop(
    level: int,
    size: tuple[int, int],
    rng: np.random.Generator,
    flip_probability: float = 0.0,
    mask_center: tuple[int, int] | None = None,
) -> Distortion:
    """Draw what `crop` does at `level` 0 to 3 to an image of `size` (width, height) pixels.

    The public validator lists flips but never makes them; `flip_probability`, for each axis and from
    level 1 on, is for those that do. `mask_center` (x, y) is the point of an image-to-image challenge that
    was painted over, in pixels of the file's picture: a random crop that misses it is moved until it lies ten
    pixels inside, as far as the validator's rule comes (see the comment there).
    """
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
    if mask_center is not None:
        side = crop[2]
        # The validator takes height for width here: on a wide frame a crop at the right end stays short of the
        # point, and at an end of the other axis it sticks out by up to ten pixels, which are black.
        left = _keeping(mask_center[0], crop[0], side, height)
        top = _keeping(mask_center[1], crop[1], side, width)
        crop = (left, top, side)
    return _drawn(level, angle, crop, rng, flip_probability)


def _keeping(point: int, start: int, side: int, length: int) -> int:
    """Where a crop of `side` begins on an axis, so that it keeps the point but ends within `length`."""
    if point < start:
        return max(0, point - _MASK_MARGIN)
    if point > start + side:
        return min(length - side, point - side + _MASK_MARGIN)
    return start


def draw_letterbox(
    level: int, rng: np.random.Generator, flip_probability: float = 0.0
) -> Distortion:
    """Draw what `letterbox` does at `level` 0 to 3; flips as in `draw_crop`."""
    if level == 0:
        return Distortion(0.0, None)
    return _drawn(level, rng.uniform(-MAX_ANGLE, MAX_ANGLE), None, rng, flip_probability)


def _drawn(
    level: int,
    angle: float,
    crop: tuple[int, int, int] | None,
    rng: np.random.Generator,
    flip_probability: float,
) -> Distortion:
    flips = rng.random(2) < flip_probability
    strengths = rng.integers(0, np.array(MAX_STRENGTHS[level]) + 1)
    return Distortion(
        float(angle), crop, bool(flips[0]), bool(flips[1]), *(int(s) for s in strengths)
    )


def apply_crop(image: Image, distortion: Distortion, rng: np.random.Generator) -> Image:
    """Turn an RGB image, cut a square out of it, and distort that at 224 × 224 pixels; `rng` makes the noise.

    Against the validator's own code (28a1755), over 1,000 drawn distortions of pictures of eleven sizes from 97
    to 4,032 pixels, a third of them with a `mask_center`: 0.3 grey levels apart on average (0.6 in the worst
    picture), as it turns and crops in floating point and cuts the fraction where here it is rounded. More than
    one level apart are 0.6 % of the pixels (8 % in the worst picture), on edges, by up to 211 levels: there
    Pillow's rotation takes the neighbour of the pixel that torchvision's takes. Level 0 is within one level.
    """
    from PIL import Image as PILImage

    if distortion.crop is None:
        raise ValueError("a crop needs its square")
    if distortion.angle:
        image = image.rotate(distortion.angle, PILImage.Resampling.NEAREST)
    left, top, side = distortion.crop
    if left + side > image.width or top + side > image.height:
        image = image.crop((left, top, left + side, top + side))  # black outside
        left = top = 0
    pixels = _resized(np.asarray(image)[top : top + side, left : left + side])
    return PILImage.fromarray(_distorted(pixels, distortion, rng))


def apply_letterbox(image: Image, distortion: Distortion, rng: np.random.Generator) -> Image:
    """Fit an RGB image into a black square of 224 × 224 pixels, turn and distort that; `rng` makes the noise.

    Against the validator's own code (e02ce2c), over 1,000 drawn distortions of pictures of eleven sizes from 97
    to 4,032 pixels: levels 0 and 1 are its pixels exactly. At level 2 0.6 % and at level 3 1.2 % of the pixels
    differ, by one grey level, two at most; 0.004 on average at level 3.
    """
    from PIL import Image as PILImage

    pixels = letterboxed(image)
    if distortion.angle:
        pixels = rotated(pixels, distortion.angle)
    return PILImage.fromarray(_distorted(pixels, distortion, rng))


def _distorted(pixels: Pixels, distortion: Distortion, rng: np.random.Generator) -> Pixels:
    """Flip [H, W, 3], then change its colour and sharpness."""
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
    return pixels


def letterboxed(image: Image) -> Pixels:
    """The whole RGB image, shrunk or enlarged until it fits, in the middle of a black square [224, 224, 3].

    Bilinear with a filter against aliasing. Sides are cut to whole pixels after the division, as the validator
    does: where 224 / width · width falls short of 224 by rounding, a line stays black.
    """
    from PIL import Image as PILImage

    scale = min(SIDE / image.width, SIDE / image.height)
    width, height = (max(1, int(n * scale)) for n in image.size)
    square = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    left, top = (SIDE - width) // 2, (SIDE - height) // 2
    shrunk = image.resize((width, height), PILImage.Resampling.BILINEAR)
    square[top : top + height, left : left + width] = np.asarray(shrunk)
    return square


def rotated(pixels: Pixels, angle: float) -> Pixels:
    """Turn [H, W, 3] counter-clockwise by degrees about its middle, nearest neighbour, black outside.

    Which neighbour is nearest is computed in single precision, as torchvision does on tensors; Pillow, with
    its 16-bit fractions, takes another one for up to 2 % of the pixels.
    """
    height, width, _ = pixels.shape
    turn = np.radians(-angle)
    cosine, sine = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    x = np.arange(width, dtype=np.float32) - np.float32((width - 1) / 2)
    y = (np.arange(height, dtype=np.float32) - np.float32((height - 1) / 2))[:, None]
    half = np.float32(width / 2), np.float32(height / 2)
    # Coordinates from −1 to 1 first: the same roundings.
    across = x * (cosine / half[0]) + y * (sine / half[0])
    down = x * (-sine / half[1]) + y * (cosine / half[1])
    column = np.rint(((across + 1) * width - 1) / 2).astype(np.int64)
    row = np.rint(((down + 1) * height - 1) / 2).astype(np.int64)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = np.where(inside, row * width + column, 0)
    turned = pixels.reshape(-1, 3)[place]
    turned[~inside] = 0
    return turned


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
