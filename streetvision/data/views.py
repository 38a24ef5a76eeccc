"""Views of one image: the whole of it and an n × n grid of overlapping tiles, each a model input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streetvision.data.transforms import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetvision.core.params import ViewGrid

# Pixels: left, top, right, bottom; right and bottom are the first ones outside.
PixelBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class Views:
    """V views of one image.

    Attributes
    ----------
    inputs : model inputs before normalisation, uint8 [V, H, W, 3]
    boxes : part of the image that each view shows: left, top, right, bottom as fractions of the
        image's width and height [V, 4]
    content : pixels of each input that show the image and not the letterbox's border [V]
    names : `global`, `tile_0_0` (row, column), …; a mirrored view ends in `_flip`
    """

    inputs: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    content: NDArray[np.int64]
    names: tuple[str, ...]


class ViewScores(NamedTuple):
    """What fusion reads of N images with V views each, the global view first.

    Attributes
    ----------
    logits : [N, V]
    features : [N, V, D], or None where no mode needs them
    content : pixels that show the image [N, V]; 0 says that there is no such view
    boxes : see `Views` [N, V, 4]
    """

    logits: NDArray[np.float64]
    features: NDArray[np.float16] | None
    content: NDArray[np.int64]
    boxes: NDArray[np.float64]


def view_names(grid: ViewGrid) -> tuple[str, ...]:
    """Names of the views in their order; a grid of 1 is the global view alone."""
    cells = product(range(grid.grid), repeat=2) if grid.grid > 1 else ()
    plain = ("global", *(f"tile_{row}_{column}" for row, column in cells))
    return plain + tuple(f"{name}_flip" for name in plain) if grid.flip else plain


def views_of(image: Image, preprocessing: Preprocessing, grid: ViewGrid) -> Views:
    """Cut all views from an upright image and fit each to the model input.

    Tiles are cut from the image itself, so that they cover its own pixels, at its own resolution, and
    never a letterbox's border. The global view is exactly `preprocessing.apply(image)`.
    """
    inputs, boxes, content = [], [], []
    for box in _pixel_boxes(*image.size, grid.grid, grid.growth):
        inputs.append(preprocessing.apply(image.crop(box)))
        left, top, right, bottom = content_box(preprocessing, box[2] - box[0], box[3] - box[1])
        content.append((right - left) * (bottom - top))
        boxes.append(_visible(box, preprocessing) / np.tile(image.size, 2))
    stacked = np.stack(inputs)
    if grid.flip:
        stacked = np.concatenate([stacked, stacked[:, :, ::-1]])
    repeats = 2 if grid.flip else 1
    return Views(
        inputs=stacked,
        boxes=np.tile(np.stack(boxes), (repeats, 1)),
        content=np.tile(np.array(content, dtype=np.int64), repeats),
        names=view_names(grid),
    )


@lru_cache(maxsize=4096)
def content_box(preprocessing: Preprocessing, width: int, height: int) -> PixelBox:
    """Where `preprocessing` puts an image of this size in the input; all around is border."""
    from PIL import Image as PILImage

    # White on black through the real code: no second copy of its geometry to keep equal.
    on_black = replace(preprocessing, mean=(0.0, 0.0, 0.0))
    shown = on_black.apply(PILImage.new("RGB", (width, height), "white"))[:, :, 0] > 0
    columns, rows = np.flatnonzero(shown.any(0)), np.flatnonzero(shown.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _pixel_boxes(width: int, height: int, n: int, growth: float) -> Iterator[PixelBox]:
    """The global view's box, then those of the tiles row by row, grown about their centres and clipped."""
    yield (0, 0, width, height)
    if n == 1:
        return
    for row, column in product(range(n), repeat=2):
        left, right = _span(column, n, growth, width)
        top, bottom = _span(row, n, growth, height)
        yield (left, top, right, bottom)


def _span(index: int, n: int, growth: float, length: int) -> tuple[int, int]:
    """First and last+1 pixel of a cell grown by `growth` of its length, inside [0, length]."""
    margin = growth / 2
    start = max(0, round((index - margin) / n * length))
    stop = min(length, round((index + 1 + margin) / n * length))
    start = min(start, length - 1)
    return start, max(stop, start + 1)


def _visible(box: PixelBox, fit: Preprocessing) -> NDArray[np.float64]:
    """What `fit` shows of a box, in pixels: with `crop` the middle part of the input's proportions."""
    edges = np.array(box, dtype=np.float64)
    if fit.fit == "letterbox":
        return edges
    size = edges[2:] - edges[:2]
    scale = max(fit.width / size[0], fit.height / size[1])
    # Rounding must not put an edge that is not cut outside the box.
    cut = np.maximum(size - np.array([fit.width, fit.height]) / scale, 0) / 2
    visible: NDArray[np.float64] = edges + np.concatenate([cut, -cut])
    return visible
