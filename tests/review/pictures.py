"""Pictures for the tests of review, splits that hold them, and scenes by their features alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from streetvision.core.schema import SPLIT_SCHEMA
from streetvision.data.store import read_arrow, write_arrow
from streetvision.review.leakage import Looked


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


def scenes(
    rng: np.random.Generator,
    name: str,
    n_groups: int,
    size: int = 8,
    within: float = 0.7,
    *,
    equal: bool = True,
    width: int = 12,
) -> Looked:
    """Groups with a place of their own in feature space, thumbnails of noise.

    `within` is the deviation of a group's images around its place, of that between places; groups have
    `size` images, or if not `equal` so many on average.
    """
    sizes = np.full(n_groups, size) if equal else rng.geometric(1 / size, n_groups)
    place = rng.normal(size=(n_groups, width)).repeat(sizes, axis=0)
    features = (place + within * rng.normal(size=place.shape)).astype(np.float32)
    of_group = np.arange(n_groups).repeat(sizes)
    groups = np.array([f"{name}{group}" for group in of_group], dtype=object)
    ids = np.array([f"{name}-{row}" for row in range(len(place))], dtype=object)
    thumbnails = rng.integers(0, 256, (len(place), 16, 16), dtype=np.uint8)
    return Looked(name, ids, groups, features, thumbnails)
