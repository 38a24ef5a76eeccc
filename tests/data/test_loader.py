"""What a training batch holds depends on seed, epoch and row; not on workers, order or interruptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streetvision.data import loader
from streetvision.data.loader import (
    EpochSampler,
    EvaluationImages,
    TrainingImages,
    loader_workers,
    training_loader,
)
from streetvision.data.store import Split, open_split
from streetvision.data.transforms import Preprocessing, training_transform
from streetvision.params import Train

HALF = (0.5, 0.5, 0.5)
PREPROCESSING = Preprocessing(32, 48, "letterbox", square_crop=False, mean=HALF, std=HALF)
AUGMENT = training_transform(Train(height_px=32, width_px=48))


@pytest.fixture(scope="module")
def split(tiny_splits: dict[str, Path]) -> Split:
    return open_split("train", "train", tiny_splits["train"])


def images(split: Split, seed: int = 7) -> TrainingImages:
    return TrainingImages(split, PREPROCESSING, AUGMENT, seed)


def epoch_of(split: Split, epoch: int, workers: int, seed: int = 7) -> list[torch.Tensor]:
    """All batches of one epoch: images, then labels."""
    batches = training_loader(images(split, seed), 16, seed, workers)
    assert isinstance(batches.sampler, EpochSampler)
    batches.sampler.set_epoch(epoch)
    return [part for batch in batches for part in batch]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31 - 1), st.integers(0, 100))
def test_an_epoch_is_a_permutation_of_its_seed(size: int, seed: int, epoch: int) -> None:
    def rows() -> list[int]:
        sampler = EpochSampler(size, seed)
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert {number for number, _ in found} == {epoch}
        assert len(sampler) == size
        return [row for _, row in found]

    assert sorted(rows()) == list(range(size))
    assert rows() == rows()


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = set()
    for seed in range(4):
        for epoch in range(4):
            sampler = EpochSampler(50, seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(row for _, row in sampler))
    assert len(orders) == 16


def test_an_image_depends_on_seed_epoch_and_row_alone(split: Split) -> None:
    data = images(split)
    keys = [(epoch, row) for epoch in range(2) for row in range(10)]
    forward = {key: data[key][0] for key in keys}
    torch.manual_seed(123)
    backward = {key: images(split)[key][0] for key in reversed(keys)}
    for key in keys:
        assert torch.equal(forward[key], backward[key])
    assert not torch.equal(forward[0, 3], forward[1, 3])
    assert not torch.equal(forward[0, 3], images(split, seed=8)[0, 3][0])


def test_augmentation_leaves_the_global_generator_alone(split: Split) -> None:
    data = images(split)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    _ = data[0, 0]
    assert torch.equal(torch.rand(3), wanted)


def test_workers_change_nothing(split: Split) -> None:
    for epoch in (0, 3):
        alone, helped = epoch_of(split, epoch, 0), epoch_of(split, epoch, 2)
        assert len(alone) == len(helped)
        for one, other in zip(alone, helped, strict=True):
            assert torch.equal(one, other)


def test_the_cache_changes_nothing(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = images(split)
    monkeypatch.setattr(loader, "CACHE_BYTES", 0)
    direct = images(split)
    assert cached.cache is not None
    assert direct.cache is None
    for row in (0, 5):
        assert torch.equal(cached[2, row][0], direct[2, row][0])


def test_labels_follow_their_images(split: Split) -> None:
    plain = TrainingImages(split, PREPROCESSING, torch.nn.Identity(), 7)
    evaluation = EvaluationImages(split, PREPROCESSING)
    assert len(plain) == len(evaluation) == len(split)
    for row in range(len(split)):
        image, label = plain[0, row]
        assert torch.equal(image, evaluation[row])
        assert label == split.labels[row]
        pixels = torch.from_numpy(np.asarray(split.image(row)).copy())
        assert torch.equal(image, pixels.permute(2, 0, 1))
    assert plain[0, 0][1].dtype == torch.float32


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(48, 16, [16, 16, 16]), (40, 16, [16, 16]), (10, 16, [10]), (16, 16, [16]), (2, 4, [2])],
)
def test_a_partial_batch_counts_only_where_it_is_the_only_one(
    n: int, batch_size: int, sizes: list[int], tmp_path: Path, write_split: Callable[..., Path]
) -> None:
    split = open_split("train", "train", write_split(tmp_path / "train.arrow", n))
    batches = training_loader(images(split), batch_size, 7, 0)
    assert [len(labels) for _, labels in batches] == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize(
    ("wanted", "cores", "workers"),
    [(0, 1, 0), (0, 2, 0), (0, 4, 3), (0, 128, 16), (3, 1, 3)],
)
def test_worker_count(
    wanted: int, cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "usable_cores", lambda: cores)
    assert loader_workers(wanted) == workers
