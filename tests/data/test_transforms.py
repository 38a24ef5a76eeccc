"""Geometry of letterbox and crop, normalisation against torchvision, and augmentation's shape."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from streetvision.core.errors import UserError
from streetvision.core.params import Explora, Train
from streetvision.data.transforms import (
    Preprocessing,
    central_crop,
    contrastive_transform,
    training_transform,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE = Preprocessing(32, 48, "letterbox", mean=MEAN, std=STD)
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


def cubic(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """A row resized to `length` by Keys' cubic convolution with a = -1/2, widened where it shrinks (1981)."""
    scale = len(values) / length
    support = max(scale, 1.0)
    places = np.arange(len(values)) + 0.5
    found = []
    for i in range(length):
        x = np.abs(places - (i + 0.5) * scale) / support
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
        found.append((weights * values).sum() / weights.sum())
    return np.clip(found, 0, 255)


@pytest.mark.parametrize("fit", ["letterbox", "crop"])
@pytest.mark.parametrize("length", [16, 32, 96, 160])
def test_resizing_is_bicubic(fit: Any, length: int) -> None:
    row = np.random.default_rng(length).integers(0, 256, 64).astype(float)
    image = Image.fromarray(np.tile(row.astype(np.uint8)[None, :, None], (64, 1, 3)))
    made = replace(BASE, height=length, width=length, fit=fit).apply(image)
    expected = cubic(row, length)
    assert np.abs(made[length // 2, :, 0] - expected).max() <= 1
    linear = image.resize((length, length), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(linear)[length // 2, :, 0] - expected).max() > 5, "any filter would do"


@settings(max_examples=150, deadline=None)
@given(sizes, sizes, st.integers(16, 96), st.integers(16, 96))
def test_letterbox_keeps_all_and_its_proportions(
    width: int, height: int, out_width: int, out_height: int
) -> None:
    preprocessing = replace(BASE, height=out_height, width=out_width)
    image = gradient(width, height)
    output = preprocessing.apply(image)
    assert output.shape == (out_height, out_width, 3)
    assert output.dtype == np.uint8
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
    if min(right - left, bottom - top) >= 8:
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


def test_a_crop_to_a_square_takes_the_middle() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 72, 3), dtype=np.uint8)
    preprocessing = replace(BASE, width=32, fit="crop")
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
    for preprocessing in (BASE, replace(BASE, fit="crop", height=7)):
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


def textured(height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (1, 3, 8, 8), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (0.9 * smooth + 25 * torch.rand(smooth.shape, generator=generator)).to(torch.uint8)


def seeded(transform: Callable[[Any], Any], image: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    found = transform(image)
    assert isinstance(found, torch.Tensor)
    return found


def test_the_default_augmentation_is_torchvisions() -> None:
    train = Train(height_px=32, width_px=48, crop_min_area=0.5, colour_jitter=0.3)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop((32, 48), scale=(0.5, 1), ratio=(1.5 * 3 / 4, 1.5 * 4 / 3)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3),
        ]
    )
    ours, image = training_transform(train), textured()
    for seed in range(20):
        assert torch.equal(seeded(ours, image, seed), seeded(theirs, image, seed))


STRONG: dict[str, dict[str, Any]] = {
    "trivial_augment": {"augmentation": "trivial_augment"},
    "two bins": {"augmentation": "trivial_augment", "trivial_augment_bins": 2},
    "augmix": {"augmentation": "augmix"},
    "wide augmix": {
        "augmentation": "augmix", "augmix_severity": 10, "augmix_width": 1, "augmix_alpha": 0.2,
    },
    "erasing": {"erasing_probability": 1.0},
    "all": {"augmentation": "trivial_augment", "erasing_probability": 0.5, "colour_jitter": 0.5},
}  # fmt: skip


def transforms() -> dict[str, Any]:
    made = {
        name: training_transform(Train(height_px=32, width_px=48, **changes))
        for name, changes in STRONG.items()
    }
    return made | {"contrastive": contrastive_transform(Explora(), 32, 48)}


@pytest.mark.parametrize("name", [*STRONG, "contrastive"])
def test_augmentation_is_a_function_of_torchs_seed_alone(name: str) -> None:
    transform, image = transforms()[name], textured()
    before = image.clone()
    outputs = []
    for seed in range(40):
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        states = np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
        output = seeded(transform, image, seed)
        assert (np.random.get_state()[1].tolist(), random.getstate()) == states  # type: ignore[index]  # noqa: NPY002
        np.random.seed(seed + 1)  # noqa: NPY002
        random.seed(seed + 1)
        assert torch.equal(seeded(transforms()[name], image, seed), output)
        assert output.shape == image.shape
        assert output.dtype == torch.uint8
        outputs.append(output)
    assert torch.equal(image, before)
    assert len({tuple(output.flatten().tolist()) for output in outputs}) > 35


def test_erasing_blackens_a_rectangle_and_comes_last() -> None:
    train = Train(
        height_px=32, width_px=48, crop_min_area=1.0, flip_probability=0.0, colour_jitter=0.3,
        erasing_probability=1.0,
    )  # fmt: skip
    plain = training_transform(train.model_copy(update={"erasing_probability": 0.0}))
    for seed in range(20):
        image = textured() // 2 + 100
        output = seeded(training_transform(train), image, seed)
        changed = (output != seeded(plain, image, seed)).any(0)
        left, right, top, bottom = bounds(changed.numpy())
        assert (output[:, top:bottom, left:right] == 0).all()
        assert 0.015 < (right - left) * (bottom - top) / (32 * 48) < 0.36


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 64), st.integers(16, 64), st.integers(16, 64), st.integers(0, 10**6))
def test_a_contrastive_view_has_the_size_asked_for(
    height: int, width: int, side: int, seed: int
) -> None:
    view = seeded(contrastive_transform(Explora(), height, width), textured(side, side), seed)
    assert view.shape == (3, height, width)
    assert view.dtype == torch.uint8


OFF: dict[str, Any] = {
    "crop_min_area": 1.0, "flip_probability": 0.0, "jitter_probability": 0.0,
    "grey_probability": 0.0, "blur_probability": 0.0,
}  # fmt: skip


def view(image: torch.Tensor, seed: int = 0, **changes: Any) -> torch.Tensor:
    _, height, width = image.shape
    return seeded(contrastive_transform(Explora(**OFF | changes), height, width), image, seed)


def test_each_part_of_the_contrastive_view_is_its_own_switch() -> None:
    image = textured(40, 40)
    plain = view(image)
    assert torch.equal(view(image, flip_probability=1.0), plain.flip(2))
    grey = view(image, grey_probability=1.0)
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[1], grey[2])
    assert not torch.equal(plain[0], plain[1])
    jittered = view(image, jitter_probability=1.0, colour_jitter=0.8)
    assert not torch.equal(jittered, plain)
    assert torch.equal(view(image, jitter_probability=1.0, colour_jitter=0.0), plain)
    assert view(image, blur_probability=1.0).float().diff().abs().mean() < 0.8 * (
        plain.float().diff().abs().mean()
    )


@pytest.mark.parametrize(("size", "kernel"), [((16, 16), 3), ((96, 128), 11), ((224, 224), 23)])
def test_contrastive_view_is_the_same_as_of_torchvisions_own_parts(
    size: tuple[int, int], kernel: int
) -> None:
    aspect = size[1] / size[0]
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1), ratio=(aspect * 3 / 4, aspect * 4 / 3)),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5),
        ]
    )
    ours, image = contrastive_transform(Explora(), *size), textured(*size)
    for seed in range(12):
        difference = seeded(ours, image, seed).int() - seeded(theirs, image, seed).int()
        assert difference.abs().max() <= 4
        assert (difference != 0).float().mean() < 0.02


def test_preprocessing_of_a_bundle_that_still_names_the_square_is_read() -> None:
    assert Preprocessing.from_dict(BASE.to_dict() | {"square_crop": False}) == BASE
