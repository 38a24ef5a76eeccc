"""The quicker colour jitter and blur against torchvision's own, on the same draws."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from streetvision.data.colour import ColourJitter, GaussianBlur, shift_hue

sizes, seeds, factors = st.integers(16, 48), st.integers(0, 10**6), st.floats(0, 1)


def noise(height: int, width: int, seed: int) -> torch.Tensor:
    """Random colours, with some greys, blacks and whites among them."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    image[:, 0] = image[:1, 0]
    image[:, 1], image[:, 2] = 0, 255
    return image


def both(ours: Any, theirs: Any, image: torch.Tensor, seed: int) -> tuple[Any, Any]:
    """Results as integers, of one seed; also says that both drew as much."""
    found = []
    for transform in (ours, theirs):
        torch.manual_seed(seed)
        before = image.clone()
        output = transform(image)
        assert torch.equal(image, before), "changed its input"
        assert output.dtype == torch.uint8
        found.append((output.int(), torch.rand(())))
    assert found[0][1] == found[1][1]
    return found[0][0], found[1][0]


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, factors, factors, factors, seeds)
def test_jitter_without_hue_is_torchvisions(
    height: int, width: int, brightness: float, contrast: float, saturation: float, seed: int
) -> None:
    strengths = (brightness, contrast, saturation)
    image = noise(height, width, seed)
    ours, theirs = both(ColourJitter(*strengths), v2.ColorJitter(*strengths), image, seed)
    assert torch.equal(ours, theirs)


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, st.floats(0, 0.5), seeds)
def test_hue_is_torchvisions_within_one_level(
    height: int, width: int, hue: float, seed: int
) -> None:
    image = noise(height, width, seed)
    ours, theirs = both(ColourJitter(hue=hue), v2.ColorJitter(hue=hue), image, seed)
    difference = (ours - theirs).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def test_full_jitter_is_torchvisions_but_for_few_values() -> None:
    differing = []
    for seed in range(60):
        image = noise(32, 48, seed)
        strengths = (0.4, 0.4, 0.4, 0.1)
        ours, theirs = both(ColourJitter(*strengths), v2.ColorJitter(*strengths), image, seed)
        assert (ours - theirs).abs().max() <= 4
        differing.append(float((ours != theirs).float().mean()))
    assert np.mean(differing) < 1e-3


def test_hue_is_that_of_the_standard_library() -> None:
    image = noise(16, 16, 3)
    for shift in (-0.5, -0.2, 0.0, 0.07, 0.5):
        found = shift_hue(image.float(), shift)
        for y in range(4):
            for x in range(16):
                hue, saturation, value = colorsys.rgb_to_hsv(*(image[:, y, x] / 255).tolist())
                wanted = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
                assert np.abs(found[:, y, x].numpy() - 255 * np.array(wanted)).max() <= 1


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.sampled_from([3, 5, 9, 15]), seeds)
def test_blur_is_torchvisions_within_one_level(
    height: int, width: int, kernel: int, seed: int
) -> None:
    image = noise(height, width, seed)
    pair = GaussianBlur(kernel, (0.1, 2.0)), v2.GaussianBlur(kernel, (0.1, 2.0))
    ours, theirs = both(*pair, image, seed)
    difference = (ours - theirs).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.1


def test_blur_takes_width_before_height() -> None:
    image = noise(24, 40, 0)
    kernel = (3, 9)
    params = {"sigma": [0.4, 1.7]}
    ours = GaussianBlur(kernel).transform(image, params).int()
    theirs = v2.GaussianBlur(kernel).transform(image, params).int()
    assert (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_blur_keeps_a_plain_image(sigma: float) -> None:
    image = torch.full((3, 20, 30), 255, dtype=torch.uint8)
    assert torch.equal(GaussianBlur(9, (sigma, sigma))(image), image)
