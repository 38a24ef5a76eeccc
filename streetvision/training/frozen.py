"""A backbone that nothing changes sees each image once: only its head is trained, on kept features."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import Dataset

from streetvision.core.params import Train
from streetvision.core.progress import progress
from streetvision.data.loader import CACHE_BYTES, EvaluationImages, Key
from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing
from streetvision.models.classifier import RoadworkClassifier

log = logging.getLogger(__name__)

# The features of an image are the same in each epoch if all these are so and the head alone is trained.
CONSTANT = {
    "trainable": "head",
    "layer_decay": 1.0,  # its blocks would be asked for, and they are no longer there
    "crop_min_area": 1.0,
    "flip_probability": 0.0,
    "colour_jitter": 0.0,
    "augmentation": "none",
    "erasing_probability": 0.0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "served_probability": 0.0,
}


class KeptFeatures(Dataset[torch.Tensor]):
    """Features [D] of a split's images, in its order; stands in for `EvaluationImages`."""

    def __init__(self, split: Split, features: torch.Tensor) -> None:
        self.split = split
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.features[row]


class TrainingFeatures(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Features [D] with labels as float32; stands in for `TrainingImages`."""

    def __init__(self, split: Split, features: torch.Tensor) -> None:
        self.features = features
        self.labels = torch.from_numpy(split.labels).float()

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        return self.features[key[1]], self.labels[key[1]]


class AsItIs(Preprocessing):
    """Of features, which are not to be normalised."""

    def normalise(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the batch."""
        return batch


def features_are_constant(train: Train, model: RoadworkClassifier, images: int) -> bool:
    """Whether each epoch would compute the same features, of so many images, and memory can keep them."""
    size = 4 * images * int(model.backbone.num_features)  # type: ignore[arg-type]
    constant = all(getattr(train, name) == value for name, value in CONSTANT.items())
    return constant and size <= CACHE_BYTES


def head_alone(model: RoadworkClassifier) -> RoadworkClassifier:
    """A classifier of features [B, D] that shares the head of `model`."""
    backbone = nn.Identity()
    backbone.num_features = model.backbone.num_features
    head = RoadworkClassifier(backbone)
    head.hidden, head.dropout, head.head = model.hidden, model.dropout, model.head
    return head


@torch.no_grad()
def features_of(
    backbone: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    batch_size: int,
    device: torch.device,
    *,
    bf16: bool,
) -> torch.Tensor:
    """Features [N, D] in evaluation mode, of the type in which the backbone gives them."""
    images = EvaluationImages(split, preprocessing)
    backbone.to(device).eval()

    def batches() -> Iterator[torch.Tensor]:
        starts = range(0, len(images), batch_size)
        for start in progress(starts, len(starts), f"features of {split.name}"):
            rows = range(start, min(start + batch_size, len(images)))
            batch = torch.stack([images[row] for row in rows]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                yield backbone(preprocessing.normalise(batch)).cpu()

    return torch.cat(list(batches()))
