"""The classifier on the views of images: one forward pass an image, whatever else is scored with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing
from streetvision.data.views import Views, ViewScores, view_names, views_of
from streetvision.models.classifier import RoadworkClassifier, score
from streetvision.params import ViewGrid
from streetvision.progress import progress

if TYPE_CHECKING:
    from PIL.Image import Image


def score_views(
    model: RoadworkClassifier,
    preprocessing: Preprocessing,
    images: Iterable[Image],
    grid: ViewGrid,
    batch_size: int,
    device: torch.device,
) -> Iterator[ViewScores]:
    """Yield the scores of images in their order, some images at a time; images are read as needed.

    With several views an image is a batch of its own, so that its scores, and the fusion of its features
    in float16, are the same to the bit whichever images come with it. Single views pass in batches.
    """
    per_pass = batch_size if len(view_names(grid)) == 1 else 1
    made = (views_of(image, preprocessing, grid) for image in images)
    for chunk in _batched(made, per_pass):
        inputs = [view for views in chunk for view in views.inputs]
        logits, features = score(model, preprocessing, inputs, len(inputs), device)
        shape = (len(chunk), len(chunk[0].names))
        yield ViewScores(
            logits.reshape(shape).astype(np.float64),
            features.reshape(*shape, -1),
            np.stack([views.content for views in chunk]),
            np.stack([views.boxes for views in chunk]),
        )


def score_split_views(
    model: RoadworkClassifier,
    preprocessing: Preprocessing,
    split: Split,
    grid: ViewGrid,
    batch_size: int,
    device: torch.device,
) -> ViewScores:
    """Scores of all images of a split, in its order."""
    images = (split.image(row) for row in progress(range(len(split)), len(split), split.name))
    return score_all_views(model, preprocessing, images, grid, batch_size, device)


def score_all_views(
    model: RoadworkClassifier,
    preprocessing: Preprocessing,
    images: Iterable[Image],
    grid: ViewGrid,
    batch_size: int,
    device: torch.device,
) -> ViewScores:
    """What `score_views` yields, in one piece."""
    parts = list(score_views(model, preprocessing, images, grid, batch_size, device))
    if not parts:
        count = len(view_names(grid))
        width = int(model.backbone.num_features)  # type: ignore[arg-type]
        return ViewScores(
            np.zeros((0, count)),
            np.zeros((0, count, width), np.float16),
            np.zeros((0, count), np.int64),
            np.zeros((0, count, 4)),
        )
    features = [part.features for part in parts if part.features is not None]
    return ViewScores(
        np.concatenate([part.logits for part in parts]),
        np.concatenate(features),
        np.concatenate([part.content for part in parts]),
        np.concatenate([part.boxes for part in parts]),
    )


def _batched(views: Iterable[Views], size: int) -> Iterator[list[Views]]:
    chunk: list[Views] = []
    for one in views:
        chunk.append(one)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
