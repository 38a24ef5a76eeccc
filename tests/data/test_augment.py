"""Challenge views are what a validator would send, and mixtures of a batch are what they claim."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from streetvision.core.params import Subnet, Train
from streetvision.data import augment
from streetvision.data.augment import ServedAugmentation, mix_batch, served_view
from streetvision.data.transforms import Preprocessing
from streetvision.subnet.profiles import CROP, PROFILES, ValidatorProfile
from streetvision.subnet.served import served_jpeg

PREPROCESSING = Preprocessing(32, 48, "letterbox", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
alphas, seeds = st.floats(0.05, 5), st.integers(0, 10**6)


def picture(width: int = 64, height: int = 48) -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def augmentation(**changes: Any) -> ServedAugmentation:
    train = Train(**{"served_probability": 1.0} | changes)
    return ServedAugmentation(train, Subnet(validator="crop"), PREPROCESSING)


# --------------------------------------------------------------------------- challenge


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("sender", PROFILES.values(), ids=str)
def test_the_view_is_the_served_jpeg_as_the_model_reads_it(
    sender: ValidatorProfile, level: int
) -> None:
    if level not in sender.levels:
        pytest.skip("the validator has no such level")
    shares = tuple(float(i == level) for i in sender.levels)
    sender = dataclasses.replace(sender, level_shares=shares)
    rng, twin = np.random.default_rng(5), np.random.default_rng(5)
    found = served_view(picture(), PREPROCESSING, sender, 0.0, rng)
    twin.random()  # the draw of the level
    with Image.open(io.BytesIO(served_jpeg(sender, picture(), level, twin))) as served:
        wanted = PREPROCESSING.apply(served)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted)
    mirrored = served_view(picture(), PREPROCESSING, sender, 1.0, np.random.default_rng(5))
    np.testing.assert_array_equal(mirrored, wanted[:, ::-1])


def test_levels_and_flips_are_drawn_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[int] = []
    plain = served_jpeg(CROP, picture(), 0, np.random.default_rng(0))

    def recorded(_: object, image: Image.Image, level: int, rng: np.random.Generator) -> bytes:
        levels.append(level)
        return plain

    monkeypatch.setattr(augment, "served_jpeg", recorded)
    shares = (0.1, 0.0, 0.5, 0.4)
    sender = dataclasses.replace(CROP, level_shares=shares)
    views = [
        served_view(picture(), PREPROCESSING, sender, 0.3, np.random.default_rng(i))
        for i in range(1500)
    ]
    counts = np.bincount(levels, minlength=4)
    assert counts[1] == 0
    wanted = np.array(shares)[[0, 2, 3]] / sum(shares) * len(views)
    assert stats.chisquare(counts[[0, 2, 3]], wanted).pvalue > 1e-3
    upright = PREPROCESSING.apply(Image.open(io.BytesIO(plain)))
    flipped = [not np.array_equal(view, upright) for view in views]
    assert stats.binomtest(sum(flipped), len(views), 0.3).pvalue > 1e-3


def test_a_challenge_depends_on_its_seed_alone() -> None:
    def made(seed: int) -> NDArray[np.uint8]:
        ours = augmentation()
        rng = ours.chosen(seed)
        assert rng is not None
        return ours(picture(), rng)

    first = [made(seed) for seed in range(12)]
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    state, torch_state = np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    for seed in reversed(range(12)):
        np.testing.assert_array_equal(made(seed), first[seed])
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert len({view.tobytes() for view in first}) > 6
    assert {view.shape for view in first} == {(32, 48, 3)}


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_the_share_of_challenges(probability: float) -> None:
    ours = augmentation(served_probability=probability)
    chosen = sum(ours.chosen(seed) is not None for seed in range(2000))
    assert stats.binomtest(chosen, 2000, probability).pvalue > 1e-3


# --------------------------------------------------------------------------- mixtures


def mixed(images: torch.Tensor, targets: torch.Tensor, seed: int, **params: float) -> Any:
    mix = mix_batch(Train(**params))  # type: ignore[arg-type]
    assert mix is not None
    torch.manual_seed(seed)
    return mix(images, targets)


def test_nothing_to_mix() -> None:
    assert mix_batch(Train()) is None


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["mixup_alpha", "cutmix_alpha"]), alphas, st.integers(1, 9),
    st.booleans(), st.booleans(), seeds,
)  # fmt: skip
def test_each_image_and_target_lies_between_its_two(
    name: str, alpha: float, size: int, whole: bool, channels_last: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 16, 20), dtype=torch.uint8, generator=generator)
    images = images if whole else images.float() / 255 - 0.5
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.rand(size, generator=generator)
    before = images.clone(), targets.clone()
    found, found_targets = mixed(images, targets, seed, **{name: alpha})
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])
    assert found.dtype == images.dtype
    assert found.stride() == images.stride()
    assert found_targets.shape == (size,)
    assert found_targets.dtype == torch.float32
    for ours, own in ((found.float(), images.float()), (found_targets, targets)):
        other = own.roll(1, 0)
        assert (ours >= torch.minimum(own, other) - 1e-5).all()
        assert (ours <= torch.maximum(own, other) + 1e-5).all()
    if name == "mixup_alpha":
        assert float(found_targets.mean()) == pytest.approx(float(targets.mean()), abs=1e-5)
        tolerance = 0.5 if whole else 1e-5
        assert (found.float().mean(0) - images.float().mean(0)).abs().max() <= tolerance
    again, targets_again = mixed(images, targets, seed, **{name: alpha})
    assert torch.equal(again, found)
    assert torch.equal(targets_again, found_targets)


@settings(max_examples=60, deadline=None)
@given(alphas, st.booleans(), seeds)
def test_targets_are_shares_of_the_images(alpha: float, cut: bool, seed: int) -> None:
    """A white image before a black one: how white the second becomes is its share of the first."""
    images = torch.zeros(2, 3, 32, 48)
    images[0] = 1
    found, targets = mixed(
        images, torch.tensor([1.0, 0.0]), seed, **{"cutmix_alpha" if cut else "mixup_alpha": alpha}
    )
    torch.testing.assert_close(found.mean((1, 2, 3)), targets, rtol=0, atol=1e-5)
    if cut:
        assert set(found.unique().tolist()) <= {0.0, 1.0}
    else:
        assert (found[1] == found[1, 0, 0, 0]).all()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_mixups_weight_is_beta(alpha: float) -> None:
    mix = mix_batch(Train(mixup_alpha=alpha))
    assert mix is not None
    torch.manual_seed(0)
    targets = torch.tensor([1.0, 0.0], dtype=torch.float64)
    weights = [float(mix(torch.zeros(2, 3, 4, 4), targets)[1][0]) for _ in range(600)]
    assert stats.kstest(weights, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_both_are_drawn_evenly_by_batch() -> None:
    mix = mix_batch(Train(mixup_alpha=1.0, cutmix_alpha=1.0))
    assert mix is not None
    images, targets = torch.zeros(2, 3, 16, 16), torch.tensor([1.0, 0.0])
    images[0] = 1
    torch.manual_seed(1)
    blended = sum(
        bool(((x > 0) & (x < 1)).any()) for x, _ in (mix(images, targets) for _ in range(400))
    )
    assert stats.binomtest(blended, 400, 0.5).pvalue > 1e-3
