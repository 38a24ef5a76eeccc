"""The classifier on the views of images: one forward pass an image, whatever else is scored with it.

Whatever runs the network: nothing here needs torch until a torch model is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from streetvision.core.params import ViewGrid
from streetvision.core.processes import in_threads
from streetvision.core.progress import progress
from streetvision.data.transforms import Preprocessing
from streetvision.data.views import Views, ViewScores, view_names, views_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from streetvision.data.store import Split
    from streetvision.models.classifier import RoadworkClassifier

T = TypeVar("T")
# Model inputs, uint8 [H, W, 3] each → their logits [B], and features [B, D] where fusion needs them.
Network = Callable[
    [list[NDArray[np.uint8]]], tuple[NDArray[np.float32], NDArray[np.float16] | None]
]


def score_views(
    model: RoadworkClassifier,
    preprocessing: Preprocessing,
    images: Iterable[Image],
    grid: ViewGrid,
    batch_size: int,
    device: torch.device,
) -> Iterator[ViewScores]:
    """What `network_scores` yields, of a classifier in torch."""
    from streetvision.models.classifier import score

    def network(
        inputs: list[NDArray[np.uint8]],
    ) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
        return score(model, preprocessing, inputs, len(inputs), device)

    views = in_threads(lambda image: views_of(image, preprocessing, grid), images)
    return network_scores(network, views, grid, batch_size)


def network_scores(
    network: Network, made: Iterable[Views], grid: ViewGrid, batch_size: int
) -> Iterator[ViewScores]:
    """Yield the scores of images, some at a time; their views in `grid` are made as needed.

    With several views an image is a batch of its own, so that its scores, and the fusion of its features
    in float16, are the same to the bit whichever images come with it. Single views pass in batches.
    """
    per_pass = batch_size if len(view_names(grid)) == 1 else 1
    for chunk in batched(made, per_pass):
        inputs = [view for views in chunk for view in views.inputs]
        logits, features = network(inputs)
        shape = (len(chunk), len(chunk[0].names))
        yield ViewScores(
            logits.reshape(shape).astype(np.float64),
            features.reshape(*shape, -1) if features is not None else None,
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
    images = in_threads(split.image, progress(range(len(split)), len(split), split.name))
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


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items in their order; the last may be shorter."""
    chunk: list[T] = []
    for one in items:
        chunk.append(one)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
