"""The classifier's losses on logits: cross entropy, weighted by class or focal, for soft targets, too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from streetvision.errors import UserError
from streetvision.params import Train

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_loss(train: Train, labels: NDArray[np.int64]) -> Loss:
    """Loss that `train` describes, from logits [B] and targets [B] in [0, 1] to a float32 scalar.

    Targets are smoothed first, to t (1 - s) + s / 2. `ce` is the binary cross entropy; `weighted_ce`
    weighs each class inversely to its frequency, so that the images' mean weight is 1; `focal` is

        t α₁ (1 - p)^γ (-log p) + (1 - t) α₀ p^γ (-log(1 - p)),

    for hard targets that of Lin et al. 2017, arXiv 1708.02002. All are means over the batch.

    Parameters
    ----------
    train
        `loss`, `focal_alpha` (weight of no roadwork, of roadwork), `focal_gamma`, `label_smoothing`.
    labels
        [N] in {0, 1} of the images that are fitted; only `weighted_ce` needs them.

    Raises
    ------
    UserError
        A class is missing, so that its inverse frequency does not exist.
    """
    smoothing = train.label_smoothing
    gamma = train.focal_gamma if train.loss == "focal" else 0.0
    weights = balanced_weights(labels) if train.loss == "weighted_ce" else train.focal_alpha
    negative_weight, positive_weight = weights

    def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        smooth = targets.float() * (1 - smoothing) + smoothing / 2
        return functional.binary_cross_entropy_with_logits(logits.float(), smooth)

    def weighted(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        smooth = targets.float() * (1 - smoothing) + smoothing / 2
        # -log p and -log(1 - p). Powers of p are exponentials of these: stable, with finite gradients.
        positive, negative = functional.softplus(-logits), functional.softplus(logits)
        losses = (
            positive_weight * smooth * torch.exp(-gamma * negative) * positive
            + negative_weight * (1 - smooth) * torch.exp(-gamma * positive) * negative
        )
        return losses.mean()

    return cross_entropy if train.loss == "ce" else weighted


def balanced_weights(labels: NDArray[np.int64]) -> tuple[float, float]:
    """Weight of class 0 and of class 1, inverse to their frequency, with mean 1 over `labels` [N].

    Raises `UserError` when one of them is missing.
    """
    counts = np.bincount(labels, minlength=2)
    if not counts.all():
        raise UserError(
            f"train.loss weighted_ce needs images of both classes, got {counts[0]} without "
            f"and {counts[1]} with roadwork"
        )
    negative, positive = len(labels) / (2 * counts)
    return float(negative), float(positive)
