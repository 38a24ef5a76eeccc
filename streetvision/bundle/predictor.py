"""Inference from a bundle: the code that `evaluate` runs and a miner deploys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from streetvision.artifacts import read_json
from streetvision.bundle.validate import read_bundle
from streetvision.data.views import ViewScores
from streetvision.decision.policy import Policy, policy_from_document
from streetvision.models.classifier import (
    ClassifierConfig,
    RoadworkClassifier,
    load_weights_into,
    pick_device,
)
from streetvision.models.fusion import Fusion, fusion_from
from streetvision.models.multiview import score_views
from streetvision.params import ViewGrid

if TYPE_CHECKING:
    from PIL.Image import Image


class Predictor:
    """Probability of roadwork for street images, at the served prior; decide with p > 0.5, strictly.

    Examples
    --------
    >>> predictor = Predictor.load("models/bundle")  # doctest: +SKIP
    >>> predictor(image)  # doctest: +SKIP
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
    ) -> None:
        self.model = model.to(device).eval()
        self.config = config
        self.fusion = fusion
        self.policy = policy
        self.batch_size = batch_size
        self.device = device

    @classmethod
    def load(cls, folder: Path | str, device: str = "auto") -> Predictor:
        """Load a bundle folder after checking every file against its SHA-256; runs no stored code.

        Raises
        ------
        UserError
            The bundle is incomplete, was changed, or the device is not there.
        """
        bundle = read_bundle(Path(folder))
        config = ClassifierConfig.from_dict(bundle.document["classifier"])
        model = load_weights_into(config, bundle.model_path)
        fusion = fusion_from(bundle.document["views"], bundle.fusion_path, lambda: model.head)
        policy = policy_from_document(read_json(bundle.policy_path, "export"))
        batch_size = int(bundle.document["batch_size"])
        return cls(model, config, fusion, policy, batch_size, pick_device(device))

    def __call__(self, image: Image) -> float:
        """Deployed probability in [0, 1] of one upright image."""
        return float(self.probabilities([image])[0])

    def probabilities(self, images: Iterable[Image]) -> NDArray[np.float64]:
        """Deployed probabilities [N]."""
        logits = self.logits(images)
        return self.policy.deployed_probability(logits) if len(logits) else logits

    def logits(self, images: Iterable[Image]) -> NDArray[np.float64]:
        """Logits [N] that the policy takes; images are read as they are needed.

        All views fused or, if the policy says so, the global view's logit and all views of hard images.
        """
        hard, grid = self.policy.hard_images, self.fusion.config.grid
        if hard is None or self.fusion.n_views == 1:
            fused = (self.fusion.fuse(*scores) for scores in self._scores(images, grid))
            return np.concatenate([np.zeros(0), *fused])
        found = [np.zeros(0)]
        remaining = iter(images)
        while chunk := list(islice(remaining, self.batch_size)):
            first = self._scores(chunk, ViewGrid(grid=1, flip=False))
            logits = np.concatenate([scores.logits[:, 0] for scores in first])
            rows = np.flatnonzero(hard.chosen(logits))
            second = self._scores([chunk[row] for row in rows], grid)
            for row, scores in zip(rows, second, strict=True):  # an image a pass
                logits[row] = self.fusion.fuse(*scores)[0]
            found.append(logits)
        return np.concatenate(found)

    def _scores(self, images: Iterable[Image], grid: ViewGrid) -> Iterator[ViewScores]:
        return score_views(
            self.model, self.config.preprocessing, images, grid, self.batch_size, self.device
        )
