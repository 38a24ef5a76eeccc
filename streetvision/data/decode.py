"""From the bytes of a JPEG, PNG or WebP file to an upright RGB image at training size, and back.

Every size is (width, height) in pixels. Colour profiles are ignored, transparency lies on black,
16-bit grey keeps its high byte, and of an animation the first frame counts.
"""

from __future__ import annotations

import io
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
    image = _open(data)
    _check_size(image.size, max_pixels)
    target = _target_size(image.size, side_px)
    width, height = image.size
    is_jpeg = isinstance(image, JpegImageFile)
    try:
        image.draft(None, target)  # only JPEG follows
        image.load()
        orientation = _orientation(image)
        as_is = is_jpeg and image.mode == "RGB" and (width, height) == target
        upright = _resized(_to_rgb(image), target, square_crop)
    except MemoryError:
        raise  # says something about this machine, not about the image
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        raise _broken(error) from error
    if orientation in _UPRIGHT:
        upright = upright.transpose(_UPRIGHT[orientation])
    if orientation >= 5:
        width, height = height, width
    as_is = as_is and orientation == 1 and upright.size == (width, height)
    return DecodedImage(upright, width, height, as_is)


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


def _open(data: bytes) -> ImageFile.ImageFile:
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
    else:
        raise UnusableImageError("not an image")
    try:
        return opener(io.BytesIO(data))
    except MemoryError:
        raise
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


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode that JPEG, PNG and WebP files have to RGB."""
    if image.mode.startswith("I"):
        # `convert` would clip 16-bit grey at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def _resized(image: Image.Image, target: tuple[int, int], square_crop: bool) -> Image.Image:
    """Resize to `target`, or the central square to its shorter side."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side) if square_crop else (0, 0, *image.size)
    size = (min(target), min(target)) if square_crop else target
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
