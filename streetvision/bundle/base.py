"""From an image to its answer, whatever runs the network: views, second passes, fusion and policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from streetvision.bundle.inputs import MAX_PIXELS, ImageInput, upright_image
from streetvision.core.params import ViewGrid
from streetvision.data.transforms import Preprocessing
from streetvision.data.views import ViewScores, views_of
from streetvision.decision.policy import Policy
from streetvision.fusion.fusion import Fusion
from streetvision.models.multiview import network_scores


class BasePredictor:
    """Probability of roadwork for street images, at the served prior; decide with p > 0.5, strictly.

    An image is whatever `bundle.inputs.upright_image` takes: a PIL image, encoded bytes, a path or a uint8
    array. A predictor never changes after it is loaded: any number of threads may call it at once, and each
    gets the answers that it would get alone. (A PIL image that is opened but not yet decoded belongs to one
    thread, as Pillow has it.)
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        fusion: Fusion,
        policy: Policy,
        batch_size: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.preprocessing = preprocessing
        self.fusion = fusion
        self.policy = policy
        self.batch_size = batch_size
        self.max_pixels = max_pixels

    def run_network(
        self, inputs: list[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float16] | None]:
        """Return logits [B], and features [B, D] where fusion needs them, of inputs [H, W, 3] in one pass."""
        raise NotImplementedError

    def __call__(self, image: ImageInput) -> float:
        """Deployed probability in [0, 1] of one image; UserError says why it is not one."""
        return float(self.probabilities([upright_image(image, self.max_pixels)])[0])

    def probabilities(self, images: Iterable[ImageInput]) -> NDArray[np.float64]:
        """Deployed probabilities [N]; UserError at the first that is no image."""
        logits = self.logits(images)
        return self.policy.deployed_probability(logits) if len(logits) else logits

    def logits(self, images: Iterable[ImageInput]) -> NDArray[np.float64]:
        """Logits [N] that the policy takes; images are read as they are needed.

        All views fused or, if the policy says so, the global view's logit and all views of hard images.
        """
        upright = (
            upright_image(image, self.max_pixels, f"image {number}")
            for number, image in enumerate(images)
        )
        hard, grid = self.policy.hard_images, self.fusion.config.grid
        if hard is None or self.fusion.n_views == 1:
            fused = (self.fusion.fuse(*scores) for scores in self._scores(upright, grid))
            return np.concatenate([np.zeros(0), *fused])
        found = [np.zeros(0)]
        for chunk in self._chunks(upright):
            first = self._scores(chunk, ViewGrid(grid=1, flip=False))
            logits = np.concatenate([scores.logits[:, 0] for scores in first])
            rows = np.flatnonzero(hard.chosen(logits))
            second = self._scores([chunk[row] for row in rows], grid)
            for row, scores in zip(rows, second, strict=True):  # an image a pass
                logits[row] = self.fusion.fuse(*scores)[0]
            found.append(logits)
        return np.concatenate(found)

    def _chunks(self, images: Iterable[Image]) -> Iterator[list[Image]]:
        """At most a batch of images, and of pixels little more than one image may have."""
        chunk: list[Image] = []
        pixels = 0
        for image in images:
            chunk.append(image)
            pixels += image.width * image.height
            if len(chunk) == self.batch_size or pixels > self.max_pixels:
                yield chunk
                chunk, pixels = [], 0
        if chunk:
            yield chunk

    def _scores(self, images: Iterable[Image], grid: ViewGrid) -> Iterator[ViewScores]:
        # One after the other: photographs may be large, and only one is in memory.
        made = (views_of(image, self.preprocessing, grid) for image in images)
        return network_scores(self.run_network, made, grid, self.batch_size)
