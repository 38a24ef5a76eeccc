"""From the bytes of a JPEG, PNG or WebP file to an upright RGB image, at training size or its own, and back.

Every size is (width, height) in pixels. Colour profiles are ignored, transparency lies on black,
16-bit grey keeps its high byte, and of an animation the first frame counts.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

MIN_SIDE_PX = 16
# Bounds the stored image: the shorter side is exact, so the longer one grows with the aspect ratio.
MAX_ASPECT = 10

REASONS = (
    "no image",  # no bytes at all
    "not an image",  # neither JPEG, PNG nor WebP
    "truncated",
    "corrupt",
    "too many pixels",
    "too small",
    "too elongated",
)

_ORIENTATION_TAG = 0x0112
# Where Pillow reads an orientation from.
_ORIENTED_BY = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
# EXIF orientation -> what makes the image upright, as in `PIL.ImageOps.exif_transpose`.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnusableImageError(Exception):
    """The bytes give no usable image; `reason` is one of `REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class DecodedImage:
    """An upright RGB image at training size."""

    image: Image.Image
    # Size of the source, upright.
    original_width: int
    original_height: int
    # The source is an upright RGB JPEG of this very size: its bytes can be stored as they are.
    stored_as_is: bool


def decode_image(data: bytes, *, side_px: int, square_crop: bool, max_pixels: int) -> DecodedImage:
    """Decode an image so that its shorter side is exactly `side_px`, enlarging it if need be.

    A JPEG is decoded at the smallest of the DCT scales 1, 1/2, 1/4, 1/8 that is not below the
    wanted size, so a 12-megapixel photograph is never there in full. PNG and WebP cannot be scaled
    while decoding and need 4 bytes for each of at most `max_pixels` pixels. The size in the header
    is checked before any pixel is decoded; Pillow's global limit plays no part.

    Parameters
    ----------
    data
        The file's content.
    side_px
        Shorter side of the result, pixels.
    square_crop
        Keep only the central square.
    max_pixels
        Images with more pixels are refused.

    Raises
    ------
    UnusableImageError
        With one of `REASONS`.
    """
    image = _open(data, max_pixels)
    _check_size(image.size, max_pixels)
    target = _target_size(image.size, side_px)
    width, height = image.size
    is_jpeg = isinstance(image, JpegImageFile)
    with _decoding():
        image.draft(None, target)  # only JPEG follows
        image.load()
        orientation = _orientation(image)
        as_is = is_jpeg and image.mode == "RGB" and (width, height) == target
        upright = _turned(_resized(_to_rgb(image), target, square_crop), orientation)
    if orientation >= 5:
        width, height = height, width
    as_is = as_is and orientation == 1 and upright.size == (width, height)
    return DecodedImage(upright, width, height, as_is)


def decode_upright(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an image at its own size; limits and errors are those of `decode_image`."""
    return upright_rgb(_open(data, max_pixels), max_pixels)


def upright_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    """Turn an image of any mode upright, as its EXIF block says, and into RGB.

    The limits are those of `decode_image`, and are checked before a pixel of an image that Pillow has
    only opened is decoded. Needs up to 30 bytes a pixel for a while, 4 for the result. Mode I is taken
    as 16-bit grey, mode F as 0 to 255. The same object comes back if nothing is to be done.

    Raises
    ------
    UnusableImageError
        With one of `REASONS`.
    """
    _check_size(image.size, max_pixels)
    with _decoding():
        image.load()
        orientation = _orientation(image)
        if orientation == 1 and image.mode == "RGB" and not image.has_transparency_data:
            return image
        return _turned(_to_rgb(image), orientation)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode as baseline JPEG with full colour resolution.

    At 96 pixels a cone is a few pixels wide: halving the chroma (4:2:0) would wash its orange out.
    """
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def box_in_central_square(box: list[float], width: int, height: int) -> list[float] | None:
    """Express a box of the upright image relative to its central square.

    Parameters
    ----------
    box
        x0, y0, x1, y1, each in [0, 1] of the upright image.
    width, height
        Of the upright image; only their ratio matters.

    Returns
    -------
    list or None
        The part inside the square, in [0, 1] of it; None if nothing is inside.
    """
    side = min(width, height)

    def moved(value: float, length: int) -> float:
        return min(max((value * length - (length - side) / 2) / side, 0.0), 1.0)

    x0, x1 = moved(box[0], width), moved(box[2], width)
    y0, y1 = moved(box[1], height), moved(box[3], height)
    return [x0, y0, x1, y1] if x0 < x1 and y0 < y1 else None


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header; not by `Image.open`, which has a pixel limit of its own."""
    opener: type[ImageFile.ImageFile]
    if not data:
        raise UnusableImageError("no image")
    if data.startswith(b"\xff\xd8\xff"):
        opener = JpegImageFile
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        opener = PngImageFile
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        opener = WebPImageFile
        if len(data) < 8 + int.from_bytes(data[4:8], "little"):
            raise UnusableImageError("truncated")  # libwebp itself only says that it failed
        if data[12:16] == b"VP8X":  # the decoder makes room for the canvas when it is opened
            _check_size((_uint24(data, 24) + 1, _uint24(data, 27) + 1), max_pixels)
    else:
        raise UnusableImageError("not an image")
    with _decoding():
        return opener(io.BytesIO(data))


def _uint24(data: bytes, start: int) -> int:
    return int.from_bytes(data[start : start + 3], "little")


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn whatever a decoder raises on hostile bytes into a reason."""
    try:
        yield
    except MemoryError:
        raise  # says something about this machine, not about the image
    except Exception as error:
        raise _broken(error) from error


def _broken(error: Exception) -> UnusableImageError:
    """Tell data that end early from data that are wrong, by what Pillow says."""
    return UnusableImageError("truncated" if "truncated" in str(error).lower() else "corrupt")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise UnusableImageError("too many pixels")
    if min(size) < MIN_SIDE_PX:
        raise UnusableImageError("too small")
    if max(size) > MAX_ASPECT * min(size):
        raise UnusableImageError("too elongated")


def _target_size(size: tuple[int, int], side_px: int) -> tuple[int, int]:
    """Scale so that the shorter side is `side_px`."""
    scale = side_px / min(size)
    return max(side_px, round(size[0] * scale)), max(side_px, round(size[1] * scale))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or the EXIF block is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block raises anything and is no reason to lose the image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turn upright, and forget the orientation: whoever looks at the result shall not turn it again."""
    if orientation not in _UPRIGHT:
        return image
    upright = image.transpose(_UPRIGHT[orientation])
    upright.info = {key: value for key, value in image.info.items() if key not in _ORIENTED_BY}
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; the same object where nothing is to be done."""
    if image.mode.startswith("I"):
        # `convert` would clip 16-bit grey at 255 instead of scaling it.
        grey = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _resized(image: Image.Image, target: tuple[int, int], square_crop: bool) -> Image.Image:
    """Resize to `target`, or the central square to its shorter side."""
    side = min(image.size)
    if square_crop:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        target = (min(target), min(target))
    if image.size == target:
        return image
    # Pillow's filter, in a sixth of its time; imported where there is something to resize.
    import torch
    from torch.nn import functional

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels, target[::-1], mode="bicubic", antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).numpy())
