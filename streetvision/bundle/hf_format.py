"""A classifier's weights and preprocessing in the files that stock `transformers` opens.

A plain ViT becomes transformers' own ViT, which its releases of 2024 open, too. Any other timm architecture
goes through transformers' timm wrapper, which builds the model with the timm that is installed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from streetvision.bundle.affine import Affine
from streetvision.core.errors import UserError
from streetvision.core.schema import CLASS_NAMES
from streetvision.data.transforms import Preprocessing
from streetvision.models.classifier import ClassifierConfig, RoadworkClassifier

# The first releases of transformers that open each kind; the wrapper took model arguments later.
VIT_NEEDS = "4.45"
WRAPPER_NEEDS = "4.48"
WRAPPER_WITH_ARGUMENTS_NEEDS = "4.53"
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class HfModel:
    """What is written, and what it takes.

    Attributes
    ----------
    needs: the first release of transformers that opens it
    state, config, processor: tensors, `config.json` and `preprocessor_config.json`; no processor where
        transformers takes it from `config.json`
    other_shapes: what becomes of images that are not square, in words
    """

    kind: Literal["vit", "timm_wrapper"]
    needs: str
    state: State
    config: dict[str, Any]
    processor: dict[str, Any] | None
    other_shapes: str


def hf_model(model: RoadworkClassifier, config: ClassifierConfig, affine: Affine) -> HfModel:
    """Fold `affine` into the last layer: two logits, None and Roadwork, whose softmax is the probability.

    The first logit is always 0.

    Raises
    ------
    UserError
        The head has a hidden layer, or the architecture ends in no linear layer on its features.
    """
    if config.head_hidden is not None:
        raise UserError(
            "the head has a hidden layer, which transformers' models have no room for: "
            "train with train.head linear"
        )
    weight, bias = model.head.weight.detach().double(), model.head.bias.detach().double()
    weight = torch.cat([torch.zeros_like(weight), affine.slope * weight]).float()
    bias = torch.cat([torch.zeros_like(bias), affine.slope * bias + affine.intercept]).float()
    fit = config.preprocessing
    shown = "the middle part" if fit.fit == "crop" else "the whole on a border"
    vit = plain_vit(model.backbone)
    # A ViT's own processor stretches to the input, which a square one survives. Those that cut exist, but
    # with `use_fast`, as the subnet's detector asks, not in 4.45.
    if vit is not None and fit.height == fit.width:
        state = vit_state(model.backbone, vit) | {
            "classifier.weight": weight,
            "classifier.bias": bias,
        }
        labels = {"id2label": dict(enumerate(CLASS_NAMES)), "label2id": _numbered()}
        shapes = f"the whole, stretched; the bundle takes {shown}"
        return HfModel("vit", VIT_NEEDS, state, vit | labels, _vit_processor(fit), shapes)
    state = _wrapped_state(model, config, weight, bias)
    needs = WRAPPER_WITH_ARGUMENTS_NEEDS if config.arguments else WRAPPER_NEEDS
    return HfModel(
        "timm_wrapper", needs, state, _wrapper_config(config), None, f"{shown}, as in the bundle"
    )


def plain_vit(backbone: nn.Module) -> dict[str, Any] | None:
    """Return the `config.json` of the same ViT in transformers, or None where it has no such thing.

    Plain is: a class token that is the feature, learned positions, pre-norm blocks with GELU. LayerScale
    may be there: `vit_state` multiplies it into the layer before it.
    """
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    # timm's model checked part by part: whatever is not known to be the same is not.
    model: Any = backbone
    if type(model) is not VisionTransformer or type(model.patch_embed) is not PatchEmbed:
        return None
    blocks = list(model.blocks)
    if not blocks or any(type(block) is not Block for block in blocks):
        return None
    bias = blocks[0].attn.qkv.bias is not None
    scaled = hasattr(blocks[0].ls1, "gamma")
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    names |= {"norm.weight", "norm.bias"}
    for index in range(len(blocks)):
        layers = {"norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2", "attn.qkv"}
        inside = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        inside -= set() if bias else {"attn.qkv.bias"}
        inside |= {"ls1.gamma", "ls2.gamma"} if scaled else set()
        names |= {f"blocks.{index}.{name}" for name in inside}
    norms = [model.norm, *(norm for block in blocks for norm in (block.norm1, block.norm2))]
    height, width = model.patch_embed.grid_size
    same = (
        set(model.state_dict()) == names
        and model.global_pool == "token"
        and model.num_prefix_tokens == 1
        and tuple(model.pos_embed.shape) == (1, height * width + 1, model.embed_dim)
        and all(isinstance(norm, nn.LayerNorm) and norm.eps == norms[0].eps for norm in norms)
        and all(type(b.mlp.act) is nn.GELU and b.mlp.act.approximate == "none" for b in blocks)
        and len({block.attn.num_heads for block in blocks}) == 1
    )
    if not same:
        return None
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": norms[0].eps,
        "image_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "num_channels": 3,
        "qkv_bias": bias,
        "problem_type": "single_label_classification",
    }


def vit_state(backbone: nn.Module, config: Mapping[str, Any]) -> State:
    """Return a plain ViT's tensors by transformers' names (those of 4.45, which later ones know)."""
    old = backbone.state_dict()
    new = {
        "vit.embeddings.cls_token": old["cls_token"],
        "vit.embeddings.position_embeddings": old["pos_embed"],
    }

    def layer(source: str, target: str, scale: torch.Tensor | None = None) -> None:
        weight, bias = old[f"{source}.weight"], old[f"{source}.bias"]
        if scale is not None:
            weight, bias = scale[:, None] * weight, scale * bias
        new[f"{target}.weight"], new[f"{target}.bias"] = weight, bias

    layer("patch_embed.proj", "vit.embeddings.patch_embeddings.projection")
    layer("norm", "vit.layernorm")
    for index in range(config["num_hidden_layers"]):
        block, target = f"blocks.{index}", f"vit.encoder.layer.{index}"
        for kind in ("weight", "bias") if config["qkv_bias"] else ("weight",):
            parts = old[f"{block}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                new[f"{target}.attention.attention.{name}.{kind}"] = part
        first, second = (old.get(f"{block}.ls{number}.gamma") for number in (1, 2))
        layer(f"{block}.attn.proj", f"{target}.attention.output.dense", first)
        layer(f"{block}.norm1", f"{target}.layernorm_before")
        layer(f"{block}.norm2", f"{target}.layernorm_after")
        layer(f"{block}.mlp.fc1", f"{target}.intermediate.dense")
        layer(f"{block}.mlp.fc2", f"{target}.output.dense", second)
    return new


def _vit_processor(fit: Preprocessing) -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": fit.height, "width": fit.width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(fit.mean),
        "image_std": list(fit.std),
    }


def _wrapped_state(
    model: RoadworkClassifier, config: ClassifierConfig, weight: torch.Tensor, bias: torch.Tensor
) -> State:
    """The tensors of the timm model with two classes."""
    import timm

    name = config.backbone.split(".")[0]
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.arguments.items()}
    whole: Any = timm.create_model(name, pretrained=False, num_classes=2, **options)
    last = whole.get_classifier()
    path = next((path for path, module in whole.named_modules() if module is last), None)
    state = dict(model.backbone.state_dict())
    if isinstance(last, nn.Linear) and path is not None and last.weight.shape == weight.shape:
        state |= {f"{path}.weight": weight, f"{path}.bias": bias}
    wanted = {key: value.shape for key, value in whole.state_dict().items()}
    if {key: value.shape for key, value in state.items()} != wanted:
        raise UserError(
            f"the timm architecture {name} ends in no linear layer on its features; it cannot be folded"
        )
    return state


def _wrapper_config(config: ClassifierConfig) -> dict[str, Any]:
    fit = config.preprocessing
    document = {
        "architectures": ["TimmWrapperForImageClassification"],
        "model_type": "timm_wrapper",
        "architecture": config.backbone.split(".")[0],
        "num_classes": len(CLASS_NAMES),
        "label_names": list(CLASS_NAMES),
        "problem_type": "single_label_classification",
        "pretrained_cfg": {
            "input_size": [3, fit.height, fit.width],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "border" if fit.fit == "letterbox" else "center",
            "mean": list(fit.mean),
            "std": list(fit.std),
        },
    }
    return document | ({"model_args": config.arguments} if config.arguments else {})


def _numbered() -> dict[str, int]:
    return {name: number for number, name in enumerate(CLASS_NAMES)}
