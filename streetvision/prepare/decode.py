"""From the bytes of an image file to an upright RGB image at training size, and back.

Every size is (width, height) in pixels. What is read, and what it may cost, is `pixels`' to say: colour
profiles are ignored, transparency lies on black, 16-bit grey keeps its high byte, and of an animation the
first frame counts.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from streetvision.data.pixels import (
    PREPARE_DECODE_SECONDS,
    decoding,
    image_parts,
    load_whole,
    opened,
    to_rgb,
    turned,
)


@dataclass(frozen=True)
class DecodedImage:
    """An upright RGB image at training size."""

    image: Image.Image
    # Size of the source, upright.
    original_width: int
    original_height: int
    # The source without metadata, where it is an upright RGB JPEG of this very size: to be stored as it is.
    jpeg: bytes | None


def decode_image(data: bytes, *, side_px: int, max_pixels: int) -> DecodedImage:
    """Decode an image so that its shorter side is exactly `side_px`, enlarging it if need be.

    A JPEG is decoded at the smallest of the DCT scales 1, 1/2, 1/4, 1/8 that is not below twice the
    wanted size, so a 12-megapixel photograph is not there in full where small copies are stored. (At the
    wanted size itself the DCT would be the filter, which is sharper than the bicubic one that the bundle
    reduces a served picture with: decisions differed.) Other formats cannot be scaled
    while decoding and need 4 bytes for each of at most `max_pixels` pixels. Limits are checked
    before any pixel is decoded; Pillow's global one plays no part.

    Parameters
    ----------
    data
        The file's content.
    side_px
        Shorter side of the result, pixels.
    max_pixels
        Images with more pixels are refused.

    Raises
    ------
    UnusableImageError
        With one of `REASONS`.
    """
    parts = image_parts(data, max_pixels, PREPARE_DECODE_SECONDS)
    image = opened(parts)
    width, height = parts.size
    target = _target_size(parts.size, side_px)
    image.draft(None, (2 * target[0], 2 * target[1]))  # only JPEG follows
    load_whole(image, parts)
    as_is = parts.kind == "JPEG" and image.mode == "RGB" and parts.size == target
    with decoding():
        upright = turned(_resized(to_rgb(image), target), parts.orientation)
    if parts.orientation >= 5:
        width, height = height, width
    as_is = as_is and parts.orientation == 1 and upright.size == (width, height)
    return DecodedImage(upright, width, height, parts.data if as_is else None)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode as baseline JPEG with full colour resolution.

    At 96 pixels a cone is a few pixels wide: halving the chroma (4:2:0) would wash its orange out.
    """
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _target_size(size: tuple[int, int], side_px: int) -> tuple[int, int]:
    """Scale so that the shorter side is `side_px`."""
    scale = side_px / min(size)
    return max(side_px, round(size[0] * scale)), max(side_px, round(size[1] * scale))


def _resized(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Bicubic, antialiased."""
    if image.size == target:
        return image
    # Pillow's filter, in a sixth of its time; imported where there is something to resize.
    import torch
    from torch.nn import functional

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels, target[::-1], mode="bicubic", antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).numpy())
