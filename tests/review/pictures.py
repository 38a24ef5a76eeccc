"""Pictures for the tests of review, and splits that hold them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from streetvision.data.schema import SPLIT_SCHEMA
from streetvision.data.store import read_arrow, write_arrow


def plain(rng: np.random.Generator, size: tuple[int, int], label: int) -> Image.Image:
    """Orange or grey all over, so that even a classifier of a second's training tells them apart."""
    colour = np.array([(110, 120, 130), (235, 125, 30)][label]) + rng.integers(-20, 21, 3)
    noise = rng.integers(-15, 16, (size[1], size[0], 3))
    return Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8))


def street(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A scene of its own: blocks of colour."""
    image = Image.new("RGB", size, tuple(rng.integers(60, 200, 3).tolist()))
    for _ in range(14):
        left, top = (int(rng.integers(0, side * 0.9)) for side in size)
        width, height = (int(rng.integers(side / 16, side / 2)) for side in size)
        box = (left, top, left + width, top + height)
        image.paste(tuple(rng.integers(0, 256, 3).tolist()), box)
    return image


def encoded(image: Image.Image, quality: int = 92) -> bytes:
    """The image as a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def rewrite(
    path: Path, images: Mapping[int, bytes], labels: Mapping[int, int] | None = None
) -> Path:
    """Give rows of a split file other images and labels."""
    table = read_arrow(path, "prepare")
    columns = {name: table.column(name) for name in SPLIT_SCHEMA.names}
    for name, new, kind in (("image", images, pa.binary()), ("label", labels or {}, pa.int8())):
        old = enumerate(columns[name].to_pylist())
        columns[name] = pa.array([new.get(row, value) for row, value in old], kind)
    return write_arrow(path, columns)
