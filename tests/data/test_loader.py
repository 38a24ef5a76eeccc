"""What a training batch holds depends on seed, epoch and row; not on workers, order or interruptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streetvision.core.errors import UserError
from streetvision.core.params import Subnet, Train
from streetvision.data import loader
from streetvision.data.augment import ServedAugmentation
from streetvision.data.loader import (
    EpochSampler,
    EvaluationImages,
    PairImages,
    TrainingImages,
    loader_workers,
    training_loader,
)
from streetvision.data.store import Split, open_split
from streetvision.data.transforms import Preprocessing, training_transform

HALF = (0.5, 0.5, 0.5)
PREPROCESSING = Preprocessing(32, 48, "letterbox", mean=HALF, std=HALF)
AUGMENT = training_transform(Train(height_px=32, width_px=48))


@pytest.fixture(scope="module")
def split(tiny_splits: dict[str, Path]) -> Split:
    return open_split("train", "train", tiny_splits["train"])


def images(split: Split, seed: int = 7) -> TrainingImages:
    return TrainingImages(split, PREPROCESSING, AUGMENT, seed)


def epoch_of(split: Split, epoch: int, workers: int, seed: int = 7) -> list[torch.Tensor]:
    """All batches of one epoch: images, then labels."""
    batches = training_loader(images(split, seed), 16, seed, workers)
    assert isinstance(batches.batch_sampler, EpochSampler)
    batches.batch_sampler.seek(epoch)
    return [part for batch in batches for part in batch]


def rows_of(sampler: EpochSampler, epoch: int) -> list[list[int]]:
    """Rows of each batch of an epoch."""
    sampler.seek(epoch)
    found = list(sampler)
    assert {key[0] for batch in found for key in batch} <= {epoch}
    assert len(sampler) == len(found)
    return [[row for _, row, _ in batch] for batch in found]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31 - 1), st.integers(0, 100))
def test_an_epoch_is_a_permutation_of_its_seed(
    size: int, batch_size: int, seed: int, epoch: int
) -> None:
    batches = rows_of(EpochSampler(size, batch_size, seed), epoch)
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows) == size - (size % batch_size if size > batch_size else 0)
    assert set(rows) <= set(range(size))
    assert {len(batch) for batch in batches} == {min(size, batch_size)}
    assert rows_of(EpochSampler(size, batch_size, seed), epoch) == batches


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {
        str(rows_of(EpochSampler(50, 10, seed), epoch)) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_see_the_batch_of_one(ranks: int, balance: bool) -> None:
    labels = np.arange(50) % 5 // 4 if balance else None
    whole = EpochSampler(50, 8, 7, labels)
    whole.seek(3)
    parts = []
    for rank in range(ranks):
        sampler = EpochSampler(50, 8, 7, labels)
        sampler.shard(rank, ranks)
        sampler.seek(3)
        parts.append(list(sampler))
    for number, batch in enumerate(whole):
        assert [key for part in parts for key in part[number]] == batch


@pytest.mark.parametrize(("size", "batch_size", "ranks"), [(50, 8, 3), (6, 8, 2)])
def test_a_batch_that_cannot_be_divided_is_refused(size: int, batch_size: int, ranks: int) -> None:
    with pytest.raises(UserError, match=f"cannot be divided among {ranks} devices"):
        EpochSampler(size, batch_size, 7).shard(0, ranks)


def test_an_epoch_is_entered_anywhere() -> None:
    sampler = EpochSampler(50, 8, 7, np.arange(50) % 2)
    sampler.seek(2)
    whole = list(sampler)
    for start in range(len(whole)):
        sampler.seek(2, start)
        assert list(sampler) == whole[start:]
        assert len(sampler) == len(whole)


def test_balanced_draws_have_both_classes_equally_often() -> None:
    labels = (np.arange(3000) % 10 == 0).astype(np.int64)
    sampler = EpochSampler(3000, 30, 7, labels)
    keys = [key for batch in sampler for key in batch]
    share = labels[[row for _, row, _ in keys]].mean()
    assert abs(share - 0.5) < 4 * 0.5 / 3000**0.5
    # Within a class all are drawn alike, each draw apart from the others: Pearson's statistic of k equally
    # likely rows has mean k - 1 and variance 2 (k - 1).
    times = np.bincount([row for _, row, _ in keys], minlength=3000)
    for label in (0, 1):
        own = times[labels == label]
        k, expected = len(own), own.sum() / len(own)
        statistic = float(((own - expected) ** 2 / expected).sum())
        assert abs(statistic - (k - 1)) < 4 * (2 * (k - 1)) ** 0.5
    # A row drawn again is another key: its repetitions count from 0.
    assert set(keys) == {(0, row, each) for row in range(3000) for each in range(times[row])}
    assert len(set(keys)) == len(keys)
    assert rows_of(EpochSampler(3000, 30, 7, labels), 1) != rows_of(sampler, 0)


def test_an_image_depends_on_seed_epoch_and_row_alone(split: Split) -> None:
    data = images(split)
    keys = [(epoch, row, repeat) for epoch in range(2) for row in range(10) for repeat in range(2)]
    forward = {key: data[key][0] for key in keys}
    torch.manual_seed(123)
    backward = {key: images(split)[key][0] for key in reversed(keys)}
    for key in keys:
        assert torch.equal(forward[key], backward[key])
    assert not torch.equal(forward[0, 3, 0], forward[1, 3, 0])
    assert not torch.equal(forward[0, 3, 0], forward[0, 3, 1])
    assert not torch.equal(forward[0, 3, 0], images(split, seed=8)[0, 3, 0][0])


def test_augmentation_leaves_the_global_generator_alone(split: Split) -> None:
    data = images(split)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    _ = data[0, 0, 0]
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
        assert torch.equal(cached[2, row, 0][0], direct[2, row, 0][0])


def test_labels_follow_their_images(split: Split) -> None:
    plain = TrainingImages(split, PREPROCESSING, torch.nn.Identity(), 7)
    evaluation = EvaluationImages(split, PREPROCESSING)
    assert len(plain) == len(evaluation) == len(split)
    for row in range(len(split)):
        image, label = plain[0, row, 0]
        assert torch.equal(image, evaluation[row])
        assert label == split.labels[row]
        pixels = torch.from_numpy(np.asarray(split.image(row)).copy())
        assert torch.equal(image, pixels.permute(2, 0, 1))
    assert plain[0, 0, 0][1].dtype == torch.float32


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


def test_pairs_are_two_views_without_labels(tiny_splits: dict[str, Path]) -> None:
    split = open_split("explora", "train", tiny_splits["train"])
    pairs = PairImages(split, PREPROCESSING, AUGMENT, 7)
    pair = pairs[1, 4, 0]
    assert pair.shape == (2, 3, 32, 48)
    assert pair.dtype == torch.uint8
    assert not torch.equal(pair[0], pair[1])
    torch.manual_seed(3)
    assert torch.equal(pairs[1, 4, 0], pair)
    assert not torch.equal(pairs[2, 4, 0], pair)
    batches = list(training_loader(pairs, 16, 7, 0))
    assert {batch.shape for batch in batches} == {torch.Size((16, 2, 3, 32, 48))}


def test_challenges_are_made_of_stored_images(
    tmp_path: Path, write_split: Callable[..., Path]
) -> None:
    path = write_split(tmp_path / "train.arrow", 40, size=(96, 64))
    split = open_split("train", "train", path)
    train = Train(height_px=32, width_px=48, served_probability=0.5)
    challenge = ServedAugmentation(train, Subnet(validator="crop"), PREPROCESSING)
    data = TrainingImages(split, PREPROCESSING, torch.nn.Identity(), 7, challenge)
    evaluation = EvaluationImages(split, PREPROCESSING)
    changed = 0
    for row in range(40):
        image, label = data[0, row, 0]
        assert image.shape == (3, 32, 48)
        assert image.dtype == torch.uint8
        assert label == split.labels[row]
        assert torch.equal(data[0, row, 0][0], image)
        changed += not torch.equal(image, evaluation[row])
    assert 8 <= changed <= 32


@pytest.mark.parametrize(
    ("wanted", "cores", "workers"),
    [(0, 1, 0), (0, 2, 0), (0, 4, 3), (0, 128, 16), (3, 1, 3)],
)
def test_worker_count(
    wanted: int, cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "usable_cores", lambda: cores)
    assert loader_workers(wanted) == workers
