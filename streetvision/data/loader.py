"""Training batches whose content depends on seed, epoch and row alone, not on workers or interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from streetvision.core.errors import UserError
from streetvision.core.processes import in_threads, usable_cores
from streetvision.data.augment import ServedAugmentation
from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing

# Decoded images are kept while all of them take less than this.
CACHE_BYTES = 2 * 1024**3
# epoch, row, and how often the row has been drawn in this epoch before
Key = tuple[int, int, int]
Transform = Callable[[torch.Tensor], torch.Tensor]


class EpochSampler(Sampler[list[Key]]):
    """The batches of an epoch: a fresh seeded permutation, or draws that balance the classes.

    A batch is that of the whole job; each rank gets its part of it, so that the ranks together see what one
    alone would. The last partial batch is dropped unless it is the only one.

    Parameters
    ----------
    size: images
    batch_size: images of a batch, over all ranks
    labels: with labels [size], rows are drawn with replacement, both classes equally often in expectation
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, labels: NDArray[np.int64] | None = None
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.labels = labels
        self.epoch = 0
        self.start = 0
        self.rank, self.ranks = 0, 1

    def shard(self, rank: int, ranks: int) -> None:
        """Yield the part of `rank` out of `ranks` from now on.

        Raises
        ------
        UserError
            A batch cannot be divided equally.
        """
        if self.batch_size % ranks or (ranks > 1 and self.size < self.batch_size):
            raise UserError(
                f"a batch of {min(self.size, self.batch_size)} images cannot be divided among {ranks} "
                f"devices; batch_size must be a multiple of {ranks} and not exceed the "
                f"{self.size} images"
            )
        self.rank, self.ranks = rank, ranks

    def seek(self, epoch: int, batches: int = 0) -> None:
        """Let the next iteration be that of `epoch`, without its first `batches`."""
        self.epoch, self.start = epoch, batches

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever it is entered: so Lightning counts."""
        return max(1, self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        rows = self._rows()
        seen: dict[int, int] = {}
        keys = []
        for row in rows.tolist():
            seen[row] = seen.get(row, -1) + 1
            keys.append((self.epoch, row, seen[row]))
        part = self.batch_size // self.ranks
        for batch in range(self.start, len(self)):
            first = batch * self.batch_size + self.rank * part
            yield keys[first : first + part]

    def _rows(self) -> NDArray[np.int64]:
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.labels is None:
            return generator.permutation(self.size)
        counts = np.bincount(self.labels, minlength=2)
        chances = 1 / (counts[self.labels] * np.count_nonzero(counts))
        return generator.choice(self.size, self.size, p=chances)


class _Images:
    """Inputs uint8 [3, H, W] of a split; decoded images are cached where they fit."""

    def __init__(self, split: Split, preprocessing: Preprocessing, seed: int) -> None:
        self.split = split
        self.preprocessing = preprocessing
        self.seed = seed
        size = len(split) * preprocessing.height * preprocessing.width * 3
        self.cache = (
            torch.stack(
                list(in_threads(lambda row: _decode(split, preprocessing, row), range(len(split))))
            )
            if size <= CACHE_BYTES
            else None
        )

    def __len__(self) -> int:
        return len(self.split)

    def input(self, row: int) -> torch.Tensor:
        """The input of one row before augmentation."""
        if self.cache is None:
            return _decode(self.split, self.preprocessing, row)
        return self.cache[row]

    def key_seed(self, key: Key) -> int:
        """Seed of whatever is random about the image drawn as `key`."""
        epoch, row, repeat = key
        # torch's generator on a CPU takes the lowest 32 bits alone, so `repeat` must reach them.
        number = (self.seed * 1_000_003 + epoch) * 1_000_003 + row
        return (number + repeat * 2_654_435_761) % 2**63

    def seeded(self, key: Key, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Call `make` with torch's generator seeded by `key`; the generator is put back."""
        with torch.random.fork_rng(devices=[]):
            # Not `torch.manual_seed`, which also looks for devices: a quarter of an image's time.
            torch.default_generator.manual_seed(self.key_seed(key))
            return make()


class TrainingImages(_Images, Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Augmented uint8 inputs [3, H, W] with labels as float32.

    Parameters
    ----------
    augment: input [3, H, W] → the same shape; random by torch's generator
    challenge: made from the stored image, for a share of the draws, instead of any augmentation
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        augment: Transform,
        seed: int,
        challenge: ServedAugmentation | None = None,
    ) -> None:
        super().__init__(split, preprocessing, seed)
        self.augment = augment
        self.challenge = challenge
        self.labels = torch.from_numpy(split.labels.astype(np.float32))

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        row = key[1]
        generator = self.challenge and self.challenge.chosen(self.key_seed(key))
        if self.challenge and generator:
            image = _tensor(self.challenge(self.split.image(row), generator))
        else:
            image = self.seeded(key, lambda: self.augment(self.input(row)))
        return image, self.labels[row]


class PairImages(_Images, Dataset[torch.Tensor]):
    """Two random views of each image, uint8 [2, 3, H, W]; no labels.

    Parameters
    ----------
    view: input [3, H, W] → one view [3, H, W]; random by torch's generator
    """

    def __init__(
        self, split: Split, preprocessing: Preprocessing, view: Transform, seed: int
    ) -> None:
        super().__init__(split, preprocessing, seed)
        self.view = view

    def __getitem__(self, key: Key) -> torch.Tensor:
        image = self.input(key[1])
        return self.seeded(key, lambda: torch.stack([self.view(image), self.view(image)]))


class EvaluationImages(Dataset[torch.Tensor]):
    """Inputs uint8 [3, H, W] of a split in its order; no augmentation."""

    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.split = split
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> torch.Tensor:
        return _decode(self.split, self.preprocessing, row)


def _decode(split: Split, preprocessing: Preprocessing, row: int) -> torch.Tensor:
    return _tensor(preprocessing.apply(split.image(row)))


def _tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    """Input [H, W, 3] as a tensor [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def training_loader(
    images: Dataset[Any],
    batch_size: int,
    seed: int,
    workers: int,
    *,
    balance: NDArray[np.int64] | None = None,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Batches in the order of an `EpochSampler`, which is the loader's `batch_sampler`.

    `images` has a length and is asked by `Key`. `batch_size` counts the images of all ranks; `balance` are
    the labels to balance by.
    """
    return DataLoader(
        images,
        batch_sampler=EpochSampler(len(images), batch_size, seed, balance),  # type: ignore[arg-type]
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers > 0 else None,
        pin_memory=pin_memory,
    )


def loader_workers(wanted: int) -> int:
    """Worker processes beside the training process: on two cores or fewer none pays."""
    cores = usable_cores()
    if wanted > 0:
        return wanted
    return 0 if cores <= 2 else min(cores - 1, 16)
