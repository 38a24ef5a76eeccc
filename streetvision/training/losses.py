"""The classifier's losses on logits: cross entropy, weighted by class or focal, for soft targets, too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn import functional

from streetvision.core.errors import UserError
from streetvision.core.params import Train

Values = torch.Tensor | ArrayLike
Loss = Callable[[Values, Values], torch.Tensor]


def log_odds(logits: Values) -> torch.Tensor:
    """Log-odds [B] of roadwork in float32 from a tensor, array or list of logits.

    [B] or [B, 1] are log-odds; [B, 2] are logits of the classes None and Roadwork, whose softmax has the
    log-odds of their difference. UserError for another shape.
    """
    values = torch.as_tensor(logits).float()
    if values.ndim == 1:
        return values
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim == 2 and values.shape[1] == 2:
        return values[:, 1] - values[:, 0]
    raise UserError(
        f"logits have shape {tuple(values.shape)}; [B], [B, 1] or [B, 2] (None, Roadwork) is needed"
    )


def _pair(logits: Values, targets: Values) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-odds [B] and targets [B] of one batch, on one device."""
    odds = log_odds(logits)
    wanted = torch.as_tensor(targets).to(odds.device).float()
    if wanted.ndim == 2 and wanted.shape[1] == 1:
        wanted = wanted[:, 0]
    if wanted.shape != odds.shape:
        raise UserError(
            f"{len(odds)} logits but targets of shape {tuple(wanted.shape)}; one each, [B] in [0, 1]"
        )
    return odds, wanted


def make_loss(train: Train, labels: NDArray[np.int64]) -> Loss:
    """Loss that `train` describes, from logits and targets [B] in [0, 1] to a float32 scalar.

    Logits are tensors, arrays or lists as `log_odds` takes them; so are targets, [B] or [B, 1].

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

    def cross_entropy(logits: Values, targets: Values) -> torch.Tensor:
        odds, wanted = _pair(logits, targets)
        smooth = wanted * (1 - smoothing) + smoothing / 2
        return functional.binary_cross_entropy_with_logits(odds, smooth)

    def weighted(logits: Values, targets: Values) -> torch.Tensor:
        odds, wanted = _pair(logits, targets)
        smooth = wanted * (1 - smoothing) + smoothing / 2
        # -log p and -log(1 - p). Powers of p are exponentials of these: stable, with finite gradients.
        positive, negative = functional.softplus(-odds), functional.softplus(odds)
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
