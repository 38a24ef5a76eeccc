"""Training batches whose content depends on seed, epoch and row alone, not on workers or interruptions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing
from streetvision.processes import usable_cores

# Decoded images are kept while all of them take less than this.
CACHE_BYTES = 2 * 1024**3


class EpochSampler(Sampler[tuple[int, int]]):
    """A fresh seeded permutation each epoch; yields (epoch, row), so that a row knows its epoch.

    Lightning calls `set_epoch` before each epoch but the first of a resumed run, where it calls it too late.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        return iter([(self.epoch, int(row)) for row in order])


class TrainingImages(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Augmented uint8 inputs [3, H, W] with labels as float32; decoded images are cached where they fit."""

    def __init__(self, split: Split, preprocessing: Preprocessing, augment: Any, seed: int) -> None:
        self.split = split
        self.preprocessing = preprocessing
        self.augment = augment
        self.seed = seed
        self.labels = torch.from_numpy(split.labels.astype(np.float32))
        size = len(split) * preprocessing.height * preprocessing.width * 3
        self.cache = (
            torch.stack([self._decode(row) for row in range(len(split))])
            if size <= CACHE_BYTES
            else None
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, row = key
        image = self._decode(row) if self.cache is None else self.cache[row]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(((self.seed * 1_000_003 + epoch) * 1_000_003 + row) % 2**63)
            image = self.augment(image)
        return image, self.labels[row]

    def _decode(self, row: int) -> torch.Tensor:
        array = self.preprocessing.apply(self.split.image(row))
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


class EvaluationImages(Dataset[torch.Tensor]):
    """Inputs uint8 [3, H, W] of a split in its order; no augmentation."""

    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.split = split
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> torch.Tensor:
        array = self.preprocessing.apply(self.split.image(row))
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def training_loader(
    images: TrainingImages, batch_size: int, seed: int, workers: int
) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled batches; the last partial one is dropped unless it is the only one."""
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=EpochSampler(len(images), seed),
        drop_last=len(images) >= batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers > 0 else None,
    )


def loader_workers(wanted: int) -> int:
    """Worker processes beside the training process: on two cores or fewer none pays."""
    cores = usable_cores()
    if wanted > 0:
        return wanted
    return 0 if cores <= 2 else min(cores - 1, 16)
