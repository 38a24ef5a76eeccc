"""Inference from a bundle: the code that `evaluate` runs and a miner deploys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from streetvision.bundle.archive import bundle_folder
from streetvision.bundle.inputs import MAX_PIXELS, ImageInput, upright_image
from streetvision.bundle.validate import load_bundle
from streetvision.data.views import ViewScores
from streetvision.decision.policy import Policy
from streetvision.errors import UserError
from streetvision.models.classifier import ClassifierConfig, RoadworkClassifier, pick_device
from streetvision.models.fusion import Fusion
from streetvision.models.multiview import score_views
from streetvision.params import ViewGrid


class Predictor:
    """Probability of roadwork for street images, at the served prior; decide with p > 0.5, strictly.

    An image is whatever `bundle.inputs.upright_image` takes: a PIL image, encoded bytes, a path or a uint8
    array. A predictor never changes after it is loaded: any number of threads may call it at once, and each
    gets the answers that it would get alone. (A PIL image that is opened but not yet decoded belongs to one
    thread, as Pillow has it.)

    Examples
    --------
    >>> predictor = Predictor.load("models/bundle")  # doctest: +SKIP
    >>> predictor("street.jpg")  # doctest: +SKIP
    0.93
    """

    def __init__(
        self,
        model: RoadworkClassifier,
        config: ClassifierConfig,
        fusion: Fusion,
        policy: Policy,
        batch_size: int,
        device: torch.device,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.model = model.to(device).eval()
        self.config = config
        self.fusion = fusion
        self.policy = policy
        self.batch_size = batch_size
        self.device = device
        self.max_pixels = max_pixels

    @classmethod
    def load(
        cls, bundle: Path | str, device: str = "auto", max_pixels: int = MAX_PIXELS
    ) -> Predictor:
        """Load a bundle folder or `bundle.tar.gz` after every check of `BundleValidator`; runs no stored code.

        Parameters
        ----------
        bundle
            The folder or the archive, which is unpacked into a temporary folder and deleted.
        device
            auto (a GPU where there is one), cpu, cuda or cuda:1.
        max_pixels
            Larger images are refused.

        Raises
        ------
        UserError
            The bundle is incomplete, was changed or is not safe, or the device is not there.
        """
        with bundle_folder(Path(bundle)) as folder:
            parts = load_bundle(folder)
        try:
            return cls(
                parts.model, parts.config, parts.fusion, parts.policy,
                int(parts.document["batch_size"]), pick_device(device), max_pixels,
            )  # fmt: skip
        except (RuntimeError, AssertionError) as error:  # torch on a device that is not there
            reason = str(error).partition("\n")[0]
            raise UserError(f'device "{device}" cannot be used: {reason}') from error

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
        return score_views(
            self.model, self.config.preprocessing, images, grid, self.batch_size, self.device
        )
