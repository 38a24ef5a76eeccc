"""What a prediction costs, from the architecture alone: parameters and floating-point operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from streetvision.data.transforms import Preprocessing
from streetvision.fusion.fusion import Fusion
from streetvision.models.classifier import RoadworkClassifier

if TYPE_CHECKING:
    from collections.abc import Callable


def prediction_cost(
    model: RoadworkClassifier, preprocessing: Preprocessing, fusion: Fusion, *, second_pass: bool
) -> dict[str, int]:
    """Count what one image costs.

    Floating-point operations are those of matrix products, convolutions and attention, a multiplication
    and an addition being two.

    Parameters
    ----------
    second_pass
        Whether the policy gives all views to hard images only.

    Returns
    -------
    parameters, fusion_parameters
    flops_per_view: of one pass of the classifier
    views, flops: of an image that gets all views, fusion and first pass included
    views_easy, flops_easy: of one that the first pass settles; the same without a second pass
    """
    shape = (1, 3, preprocessing.height, preprocessing.width)
    per_view = forward_flops(model, torch.zeros(shape, device="meta"))
    network = fusion.network
    fused = fusion.n_views
    fusing = 0 if network is None else _counted(lambda: _fuse_nothing(fusion))
    twice = second_pass and fused > 1
    views = fused + twice
    own = () if network is None else network.own_state().values()
    easy = {"views_easy": 1, "flops_easy": per_view} if twice else {}
    whole = {"views": views, "flops": views * per_view + fusing}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fusion_parameters": sum(tensor.numel() for tensor in own),
        "flops_per_view": per_view,
        **whole,
        **(easy or {f"{name}_easy": value for name, value in whole.items()}),
    }


def forward_flops(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Floating-point operations of one forward pass of images [B, 3, H, W] on the meta device."""
    try:
        return counted_on_meta(model, images)
    except (NotImplementedError, RuntimeError):  # something in it needs numbers
        return _counted(lambda: model(torch.zeros(images.shape)))


def counted_on_meta(model: torch.nn.Module, images: torch.Tensor) -> int:
    """As `forward_flops`, but without an answer where the model needs numbers: it raises torch's error."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    return _counted(lambda: functional_call(model, empty, (images,)))


@torch.no_grad()
def _counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _fuse_nothing(fusion: Fusion) -> Any:
    count = fusion.n_views
    boxes = np.tile([0.0, 0.0, 1.0, 1.0], (1, count, 1))
    features = np.zeros((1, count, fusion.config.features))
    return fusion.fuse(np.zeros((1, count)), features, np.ones((1, count)), boxes)
