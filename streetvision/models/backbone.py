"""Backbones: timm models by name, a few shapes of our own, weights from the hub, a file, or none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streetvision.core.errors import UserError
from streetvision.core.params import Train
from streetvision.data.transforms import Preprocessing
from streetvision.models.weights import load_weights

log = logging.getLogger(__name__)
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Architecture:
    """A timm model with arguments; `mean` and `std` replace timm's where the weights want others."""

    timm_name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mean: Triple | None = None
    std: Triple | None = None


# Names that timm does not have. Bundles store the timm name and arguments, never one of these.
ARCHITECTURES: dict[str, Architecture] = {
    # One block a stage: 1.2 M parameters, made for 128 × 96 pixels and a CPU. Widths are multiples of 16, the
    # block that BF16 kernels work in: three quarters of them (24 to 192) take the same time.
    "street_resnet": Architecture(
        "resnet18",
        {
            "layers": [1, 1, 1, 1],
            "channels": [32, 64, 128, 256],
            "stem_type": "deep",
            "stem_width": 16,
        },
    ),
    # The same with a quarter of the width, for tests.
    "street_resnet_tiny": Architecture(
        "resnet18",
        {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64], "stem_type": "deep", "stem_width": 4},
    ),
    # A small ViT from scratch, for the code paths of DINOv3.
    "street_vit": Architecture(
        "vit_tiny_patch16_224",
        {"embed_dim": 64, "depth": 4, "num_heads": 4, "class_token": False, "global_pool": "avg"},
    ),
    # A small transformer with a convolutional stem, which a few thousand scenes are enough for.
    "street_xcit": Architecture(
        "xcit_nano_12_p8_224", {"embed_dim": 48, "depth": 3, "num_heads": 4}
    ),
    # MobileNetV2 with TensorFlow's padding and input range, as the folded int8-derived weights want it.
    "mobilenetv2_100_same": Architecture(
        "mobilenetv2_100", {"pad_type": "same"}, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    ),
}


def resolve(name: str, height: int, width: int) -> tuple[str, dict[str, Any], Triple, Triple]:
    """Return timm name, arguments, mean and std of a backbone for inputs of `height` × `width` pixels.

    Raises
    ------
    UserError
        Neither timm nor this project knows the name; close names are listed.
    """
    import difflib

    import timm

    known = ARCHITECTURES.get(name, Architecture(name))
    architecture = known.timm_name.split(".")[0]
    if not timm.is_model(architecture):
        names = [*ARCHITECTURES, *timm.list_models()]
        close = difflib.get_close_matches(name, names, 4) or list(ARCHITECTURES)
        raise UserError(
            f'params.yaml: train.backbone "{name}" is unknown; near it: {", ".join(close)}'
        )
    arguments = dict(known.arguments)
    try:
        config = timm.get_pretrained_cfg(known.timm_name, allow_unregistered=True)
    except RuntimeError as error:  # a tag behind the dot that does not exist
        tagged = ", ".join(timm.list_models(f"{architecture}.*", pretrained=True))
        raise UserError(
            f'params.yaml: train.backbone "{name}" is unknown; near it: {tagged}'
        ) from error
    if config is not None and config.fixed_input_size:
        arguments["img_size"] = [height, width]
    mean = known.mean or (tuple(config.mean) if config else (0.485, 0.456, 0.406))
    std = known.std or (tuple(config.std) if config else (0.229, 0.224, 0.225))
    return known.timm_name, arguments, mean, std


def build_backbone(
    timm_name: str, arguments: Mapping[str, Any], pretrained: bool = False
) -> nn.Module:
    """Build a feature extractor: images [B, 3, H, W] → pooled features [B, `num_features`].

    Raises
    ------
    UserError
        The arguments do not fit the architecture, or pretrained weights cannot be fetched.
    """
    import timm

    options = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    try:
        model: nn.Module = timm.create_model(
            timm_name, pretrained=pretrained, num_classes=0, **options
        )
    except Exception as error:
        if pretrained:
            raise UserError(
                f"weights of {timm_name} could not be fetched from the hub "
                f"({type(error).__name__}: {error}); give a local file in train.weights or none"
            ) from error
        reason = str(error) or type(error).__name__
        raise UserError(f"backbone {timm_name} cannot be built: {reason}") from error
    # timm counts before the hidden layer that the heads of MobileNetV3, V4 and some others keep.
    if model.num_features != model.head_hidden_size:
        model.num_features = model.head_hidden_size
    return model


def initial_backbone(
    train: Train, seed: int, root: Path, weights: Path | None = None
) -> tuple[nn.Module, str, dict[str, Any], Preprocessing]:
    """Build `train.backbone` with the weights in the file `weights`, else with `train.weights`.

    Random weights are those of `seed`, whoever asks; relative weight files lie below `root`.

    Returns
    -------
    backbone, timm name, its arguments, preprocessing
    """
    name, arguments, mean, std = resolve(train.backbone, train.height_px, train.width_px)
    if weights is None and train.weights not in {"none", "hub"}:
        weights = root / train.weights
    torch.manual_seed(seed)
    backbone = build_backbone(name, arguments, weights is None and train.weights == "hub")
    if weights is not None:
        load_weights(backbone, weights)
    preprocessing = Preprocessing(train.height_px, train.width_px, train.fit, mean, std)
    return backbone, name, arguments, preprocessing


def freeze_norm_statistics(model: nn.Module) -> None:
    """Put every BatchNorm into evaluation mode: its running statistics stay as they are."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
