"""Geometry of letterbox and crop, normalisation against torchvision, and augmentation's shape."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from streetvision.data.transforms import Preprocessing, central_crop, training_transform
from streetvision.errors import UserError
from streetvision.params import Train

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE = Preprocessing(32, 48, "letterbox", square_crop=False, mean=MEAN, std=STD)
sizes = st.integers(8, 200)


def gradient(width: int, height: int) -> Image.Image:
    """Red is the horizontal and green the vertical position, 50 … 250, so that a pixel tells its place."""
    x = np.linspace(50, 250, width)[None].repeat(height, 0)
    y = np.linspace(50, 250, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, np.full_like(x, 250)], 2).round().astype(np.uint8))


def bounds(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """First and last+1 of the columns, then of the rows, that hold some of `mask`."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(columns[-1]) + 1, int(rows[0]), int(rows[-1]) + 1


@settings(max_examples=150, deadline=None)
@given(sizes, sizes, st.integers(16, 96), st.integers(16, 96), st.booleans())
def test_letterbox_keeps_all_and_its_proportions(
    width: int, height: int, out_width: int, out_height: int, square: bool
) -> None:
    preprocessing = replace(BASE, height=out_height, width=out_width, square_crop=square)
    image = gradient(width, height)
    output = preprocessing.apply(image)
    assert output.shape == (out_height, out_width, 3)
    assert output.dtype == np.uint8
    if square:
        width = height = min(width, height)
    # The mean colour of the border has much less blue than the picture.
    left, right, top, bottom = bounds(output[:, :, 2] > 180)
    scale = min(out_width / width, out_height / height)
    assert abs((right - left) - max(1, width * scale)) <= 0.5 + 1e-9
    assert abs((bottom - top) - max(1, height * scale)) <= 0.5 + 1e-9
    assert right - left == out_width or bottom - top == out_height
    # In the middle of the canvas.
    assert abs(left - (out_width - right)) <= 1
    assert abs(top - (out_height - bottom)) <= 1
    inside = np.zeros(output.shape[:2], bool)
    inside[top:bottom, left:right] = True
    border = np.array([round(255 * value) for value in MEAN])
    assert (output[~inside] == border).all()
    if not square and min(right - left, bottom - top) >= 8:
        # All of the picture is there: its edges' positions show at the edges.
        content = output[top:bottom, left:right].astype(int)
        for channel, axis in ((0, 1), (1, 0)):
            line = content[:, :, channel].mean(1 - axis)
            step = 200 / len(line)
            assert abs(line[0] - 50) <= step + 6
            assert abs(line[-1] - 250) <= step + 6


@settings(max_examples=150, deadline=None)
@given(sizes, sizes, st.integers(16, 96), st.integers(16, 96))
def test_crop_fills_the_input_with_the_middle_undistorted(
    width: int, height: int, out_width: int, out_height: int
) -> None:
    preprocessing = replace(BASE, height=out_height, width=out_width, fit="crop")
    output = preprocessing.apply(gradient(width, height)).astype(int)
    assert output.shape == (out_height, out_width, 3)
    assert (output[:, :, 2] > 240).all(), "border in a crop"
    scale = max(out_width / width, out_height / height)
    for channel, axis, size, out in ((0, 1, width, out_width), (1, 0, height, out_height)):
        line = output[:, :, channel].mean(1 - axis)
        # Positions of the source that the first and last pixel show, one output pixel of tolerance.
        shown = out / scale / size
        first, last = 150 - 100 * shown, 150 + 100 * shown
        tolerance = 200 / (size * scale) * 1.5 + 200 / size + 4
        assert abs(line[0] - first) <= tolerance
        assert abs(line[-1] - last) <= tolerance


@pytest.mark.parametrize("fit", ["letterbox", "crop"])
def test_an_image_of_the_inputs_size_is_not_touched(fit: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    preprocessing = replace(BASE, fit=fit)
    np.testing.assert_array_equal(preprocessing.apply(image), np.asarray(image))


def test_square_crop_takes_the_middle() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 72, 3), dtype=np.uint8)
    preprocessing = replace(BASE, width=32, square_crop=True)
    np.testing.assert_array_equal(preprocessing.apply(Image.fromarray(pixels)), pixels[:, 20:52])
    upright = Image.fromarray(pixels.transpose(1, 0, 2))
    np.testing.assert_array_equal(preprocessing.apply(upright), pixels[:, 20:52].transpose(1, 0, 2))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert BASE.apply(gradient(48, 32).convert(mode)).shape == (32, 48, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize("fit", ["letterbox", "crop"])
def test_extreme_shapes(size: tuple[int, int], fit: str) -> None:
    assert replace(BASE, fit=fit).apply(Image.new("RGB", size)).shape == (32, 48, 3)


def test_central_crop() -> None:
    pixels = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    found = np.asarray(central_crop(Image.fromarray(pixels), 2, 3))
    np.testing.assert_array_equal(found, pixels[1:4, 2:4])


def test_normalise_is_torchvisions() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 9), dtype=torch.uint8)
    wanted = v2.Normalize(MEAN, STD)(v2.functional.to_dtype(images, torch.float32, scale=True))
    found = BASE.normalise(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_preprocessing_survives_json() -> None:
    for preprocessing in (BASE, replace(BASE, fit="crop", square_crop=True, height=7)):
        document = json.loads(json.dumps(preprocessing.to_dict()))
        assert Preprocessing.from_dict(document) == preprocessing


@pytest.mark.parametrize("key", list(BASE.to_dict()))
def test_an_incomplete_preprocessing_is_one_line(key: str) -> None:
    document = BASE.to_dict()
    del document[key]
    with pytest.raises(UserError, match=f"preprocessing is incomplete.*{key}"):
        Preprocessing.from_dict(document)
    with pytest.raises(UserError, match=r"unknown keys.*colour"):
        Preprocessing.from_dict(BASE.to_dict() | {"colour": 1})


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.05, 1), st.floats(0, 1), st.floats(0, 1),
    st.integers(16, 64), st.integers(16, 64), st.integers(0, 10**6),
)  # fmt: skip
def test_augmentation_keeps_shape_and_type(
    area: float, flip: float, jitter: float, height: int, width: int, seed: int
) -> None:
    train = Train(
        crop_min_area=area, flip_probability=flip, colour_jitter=jitter,
        height_px=height, width_px=width,
    )  # fmt: skip
    torch.manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    output = training_transform(train)(image)
    assert output.shape == image.shape
    assert output.dtype == torch.uint8


def test_each_part_of_the_augmentation_is_its_own_switch() -> None:
    off = {"crop_min_area": 1.0, "flip_probability": 0.0, "colour_jitter": 0.0}
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)

    def outcome(**changes: float) -> torch.Tensor:
        torch.manual_seed(3)
        found = training_transform(Train(height_px=32, width_px=48, **(off | changes)))(image)  # type: ignore[arg-type]
        assert isinstance(found, torch.Tensor)
        return found

    assert torch.equal(outcome(), image)
    assert torch.equal(outcome(flip_probability=1.0), image.flip(2))
    cropped, jittered = outcome(crop_min_area=0.3), outcome(colour_jitter=0.5)
    assert not torch.equal(cropped, image)
    # Jitter changes colours pixel by pixel and monotonically enough to keep what is where.
    correlation = np.corrcoef(jittered.flatten().numpy(), image.flatten().numpy())[0, 1]
    assert 0.7 < correlation < 0.99999
