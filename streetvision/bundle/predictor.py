"""Inference from a bundle in torch: the code that `evaluate` runs and a miner deploys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from streetvision.bundle.archive import bundle_folder
from streetvision.bundle.base import BasePredictor
from streetvision.bundle.inputs import MAX_PIXELS
from streetvision.bundle.validate import load_bundle
from streetvision.core.errors import UserError
from streetvision.decision.policy import Policy
from streetvision.fusion.fusion import Fusion
from streetvision.models.classifier import (
    ClassifierConfig,
    RoadworkClassifier,
    pick_device,
    score,
)


class Predictor(BasePredictor):
    """Probability of roadwork for street images, with torch on a CPU or GPU; see `BasePredictor`.

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
        super().__init__(config.preprocessing, fusion, policy, batch_size, max_pixels)
        self.model = model.to(device).eval()
        self.config = config
        self.device = device

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

    def run_network(
        self, inputs: list[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
        """Return logits [B] and features [B, D] of inputs [H, W, 3] in one pass."""
        return score(self.model, self.preprocessing, inputs, len(inputs), self.device)
