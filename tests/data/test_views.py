"""Views: where tiles lie, that they show the image and nothing else, and what each says of itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from streetvision.core.params import ViewGrid
from streetvision.data.transforms import Preprocessing
from streetvision.data.views import content_box, view_names, views_of

# A border that no picture below contains: blue 0.
MEAN, STD = (0.9, 0.9, 0.0), (0.2, 0.2, 0.2)
BASE = Preprocessing(48, 64, "letterbox", mean=MEAN, std=STD)
sides = st.integers(12, 160)


def positions(width: int, height: int) -> Image.Image:
    """Red is the horizontal and green the vertical position, 0 … 250; blue is full."""
    x = (np.arange(width) + 0.5)[None].repeat(height, 0) / width
    y = (np.arange(height) + 0.5)[:, None].repeat(width, 1) / height
    return Image.fromarray(
        np.stack([x * 250, y * 250, np.full_like(x, 250)], 2).round().astype(np.uint8)
    )


def shown(view: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pixels of an input show the picture."""
    mask: NDArray[np.bool_] = view[:, :, 2] > 125
    return mask


def test_names_and_order() -> None:
    assert view_names(ViewGrid()) == ("global",)
    assert view_names(ViewGrid(grid=2)) == (
        "global", "tile_0_0", "tile_0_1", "tile_1_0", "tile_1_1",
    )  # fmt: skip
    assert view_names(ViewGrid(grid=1, flip=True)) == ("global", "global_flip")
    both = view_names(ViewGrid(grid=3, flip=True))
    assert len(both) == 20
    assert both[10:] == tuple(f"{name}_flip" for name in both[:10])


@settings(max_examples=60, deadline=None)
@given(
    sides, sides, st.integers(1, 4), st.floats(0, 1), st.booleans(),
    st.sampled_from(["letterbox", "crop"]),
)  # fmt: skip
@example(80, 60, 2, 0.4375, False, "crop")  # rounding put an edge outside the image
def test_every_view_shows_the_part_that_it_says(
    width: int, height: int, n: int, growth: float, flip: bool, fit: str
) -> None:
    preprocessing = replace(BASE, fit=fit)
    image = positions(width, height)
    views = views_of(image, preprocessing, ViewGrid(grid=n, growth=growth, flip=flip))
    count = (1 + (n * n if n > 1 else 0)) * (2 if flip else 1)
    assert views.inputs.shape == (count, 48, 64, 3)
    assert views.inputs.dtype == np.uint8
    assert len(views.names) == len(views.boxes) == len(views.content) == count
    # The global view is the classifier's own input, to the bit.
    np.testing.assert_array_equal(views.inputs[0], preprocessing.apply(image))
    for view, box, content, name in zip(
        views.inputs, views.boxes, views.content, views.names, strict=True
    ):
        straight = view[:, ::-1] if name.endswith("_flip") else view
        mask = shown(straight)
        assert content == mask.sum()
        assert (box >= 0).all()
        assert (box <= 1).all()
        assert (box[:2] < box[2:]).all()
        # The colours at the edges of the content tell which part of the picture it is.
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        inner = straight[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(float)
        assert shown(inner).all(), "border between the pixels of the picture"
        for axis, side in ((0, width), (1, height)):
            low, high = box[axis], box[axis + 2]
            line = inner[:, :, axis].mean(axis=axis) / 250
            step = (high - low) / len(line)
            tolerance = 1.5 / side + step + 0.03
            assert abs(line[0] - step / 2 - low) < tolerance
            assert abs(line[-1] + step / 2 - high) < tolerance


def test_the_default_tiles_by_hand() -> None:
    views = views_of(positions(600, 600), BASE, ViewGrid(grid=3, growth=0.15))
    pixels = views.boxes * 600
    # A cell is 200 pixels, grown by 15 on each side that is not the image's edge.
    np.testing.assert_allclose(pixels[0], [0, 0, 600, 600])
    np.testing.assert_allclose(pixels[1], [0, 0, 215, 215])
    np.testing.assert_allclose(pixels[5], [185, 185, 415, 415])
    np.testing.assert_allclose(pixels[9], [385, 385, 600, 600])


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(2, 5), st.floats(0, 1))
def test_tiles_cover_the_image(width: int, height: int, n: int, growth: float) -> None:
    views = views_of(positions(width, height), BASE, ViewGrid(grid=n, growth=growth))
    pixels = np.round(views.boxes[1:] * [width, height, width, height]).astype(int)
    covered = np.zeros((height, width), bool)
    for left, top, right, bottom in pixels:
        covered[top:bottom, left:right] = True
    assert covered.all()


def test_content_of_a_letterbox() -> None:
    assert content_box(BASE, 64, 48) == (0, 0, 64, 48)
    assert content_box(BASE, 48, 48) == (8, 0, 56, 48)
    assert content_box(BASE, 128, 48) == (0, 12, 64, 36)
    assert content_box(replace(BASE, fit="crop"), 128, 48) == (0, 0, 64, 48)


def test_a_challenge_image_has_views_too() -> None:
    views = views_of(positions(224, 224), BASE, ViewGrid(grid=3))
    assert views.inputs.shape == (10, 48, 64, 3)
    # A square in a 4:3 input: three quarters are content, in square tiles as in the whole.
    assert views.content[0] == 48 * 48
    assert views.content[views.names.index("tile_1_1")] == 48 * 48


def test_a_mirrored_view_is_the_view_mirrored() -> None:
    views = views_of(positions(90, 60), BASE, ViewGrid(grid=2, flip=True))
    half = len(views.names) // 2
    np.testing.assert_array_equal(views.inputs[half:], views.inputs[:half, :, ::-1])
    np.testing.assert_array_equal(views.boxes[half:], views.boxes[:half])
    np.testing.assert_array_equal(views.content[half:], views.content[:half])


def test_an_image_smaller_than_the_grid() -> None:
    views = views_of(positions(3, 2), BASE, ViewGrid(grid=8, growth=0.0))
    assert len(views.inputs) == 65
    assert (views.boxes[:, 2:] > views.boxes[:, :2]).all()
    assert (views.content > 0).all()


@pytest.mark.parametrize("size", [(224, 224), (128, 96), (97, 331)])
def test_views_do_not_depend_on_each_other(size: tuple[int, int]) -> None:
    image = positions(*size)
    one = views_of(image, BASE, ViewGrid(grid=3))
    flipped = views_of(image, BASE, ViewGrid(grid=3, flip=True))
    np.testing.assert_array_equal(one.inputs, flipped.inputs[:10])
