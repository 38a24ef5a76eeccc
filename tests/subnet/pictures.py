"""Pictures for the tests of this room."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def picture(width: int = 128, height: int = 96, seed: int = 0) -> Image.Image:
    """Smooth colours with a few sharp edges."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 120, 10)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()
