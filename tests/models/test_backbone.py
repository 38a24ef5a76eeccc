"""Backbones by name, at any input size, with weights that fit or one clear refusal."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from streetvision.core.errors import UserError
from streetvision.models.backbone import (
    ARCHITECTURES,
    build_backbone,
    freeze_norm_statistics,
    resolve,
)

TINY = ARCHITECTURES["street_resnet_tiny"]


def tiny(**changes: Any) -> nn.Module:
    return build_backbone(TINY.timm_name, {**TINY.arguments, **changes})


def test_the_names_of_bundles_are_timms() -> None:
    for architecture in ARCHITECTURES.values():
        assert timm.is_model(architecture.timm_name)


# The last four keep a hidden layer of their head, which widens what comes out.
@pytest.mark.parametrize(
    "name",
    [
        *ARCHITECTURES, "efficientnet_b0", "vit_tiny_patch16_224",
        "mobilenetv4_conv_small_035", "mobilenetv3_small_050", "ghostnet_050", "lcnet_035",
    ],
)  # fmt: skip
@pytest.mark.parametrize(("height", "width"), [(64, 96), (48, 48)])
def test_a_backbone_gives_one_feature_vector_an_image(name: str, height: int, width: int) -> None:
    timm_name, arguments, mean, std = resolve(name, height, width)
    model = build_backbone(timm_name, arguments).eval()
    with torch.no_grad():
        features = model(torch.zeros(2, 3, height, width))
    assert features.shape == (2, model.num_features)
    assert len(mean) == len(std) == 3
    assert ("img_size" in arguments) == ("vit" in name or "xcit" in name)


def test_the_arguments_survive_json() -> None:
    import json

    for name in ARCHITECTURES:
        timm_name, arguments, _, _ = resolve(name, 32, 48)
        again = json.loads(json.dumps(arguments))
        shapes = {k: v.shape for k, v in build_backbone(timm_name, again).state_dict().items()}
        built = build_backbone(timm_name, arguments).state_dict()
        assert shapes == {k: v.shape for k, v in built.items()}


def test_mean_and_std_are_timms_or_ours() -> None:
    config = timm.get_pretrained_cfg("efficientnet_b0")
    assert resolve("efficientnet_b0", 32, 32)[2:] == (config.mean, config.std)
    assert resolve("mobilenetv2_100_same", 32, 32)[2:] == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("resnet81", "resnet18"),
        ("street_resnt", "street_resnet"),
        ("qqqqqqqqq", "street_vit"),
        ("resnet18.nosuch", "resnet18.a1_in1k"),
    ],
)
def test_an_unknown_name_lists_close_ones(name: str, close: str) -> None:
    with pytest.raises(UserError, match=rf'"{name}" is unknown; near it: .*{close}'):
        resolve(name, 32, 32)


def test_arguments_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(UserError, match="backbone resnet18 cannot be built"):
        build_backbone("resnet18", {"wings": 2})


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(*_: Any, **__: Any) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(UserError, match=r"could not be fetched from the hub .*no route to host"):
        build_backbone("resnet18", {}, pretrained=True)


def test_norm_statistics_freeze() -> None:
    model = tiny().train()
    freeze_norm_statistics(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, 3, 32, 48))
    assert len(before) > 10
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert model.training
