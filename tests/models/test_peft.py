"""Adapters: what they change, what merging gives back, and refusals that say what there is."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from streetvision.core.errors import UserError
from streetvision.core.params import Lora
from streetvision.models.backbone import ARCHITECTURES, build_backbone, resolve
from streetvision.models.peft import (
    adapter_state,
    adapter_targets,
    add_adapters,
    after_blocks,
    backbone_blocks,
    merge_adapters,
    unfreeze,
)

SIDE = 32
LINEAR = ["street_vit", "dinov3", "eva02"]
CONVOLUTIONAL = ["street_resnet_tiny", "mobilenetv2_100"]
# Largest difference of outputs over the largest output. Measured, merged against not merged: linear layers
# 5e-8 to 3e-7, in every combination; convolutions 7e-7 to 3e-6, since BatchNorm amplifies rounding.
TOLERANCE = {**dict.fromkeys(LINEAR, 2e-6), **dict.fromkeys(CONVOLUTIONAL, 1e-5)}
VISIBLE = 0.01  # smallest difference that training must make, or a comparison says nothing
BLOCK = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


def backbone(name: str) -> nn.Module:
    torch.manual_seed(3)
    if name in {"dinov3", "eva02"}:
        timm_name = {"dinov3": "vit_small_patch16_dinov3", "eva02": "eva02_tiny_patch14_224"}[name]
        size = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": SIDE, "patch_size": 16}
        model = build_backbone(timm_name, size)
    else:
        timm_name, arguments, *_ = resolve(name, SIDE, SIDE)
        model = build_backbone(timm_name, arguments)
    for key, parameter in model.named_parameters():
        # A LayerScale of 1e-5, or a last norm that starts at zero, hides whatever the blocks do.
        if "gamma" in key or key.endswith("bn2.weight"):
            nn.init.ones_(parameter)
    return model.eval()


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, steps: int = 4) -> None:
    """Pull the features of random images towards random ones, hard."""
    model.train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        features = model(torch.randn(8, 3, SIDE, SIDE, generator=generator))
        wanted = torch.randn(features.shape, generator=generator)
        optimiser.zero_grad()
        nn.functional.mse_loss(features, wanted).backward()
        optimiser.step()
    model.eval()


@torch.no_grad()
def distance(first: nn.Module, second: nn.Module) -> float:
    a, b = first(images()), second(images())
    return float((a - b).abs().max() / b.abs().max())


def switches(model: nn.Module) -> list[dict[str, bool]]:
    """What else decides the forward pass of each module."""
    return [{k: v for k, v in vars(m).items() if isinstance(v, bool)} for m in model.modules()]


def adapted(name: str, **options: Any) -> nn.Module:
    lora = {key: options.pop(key) for key in set(options) & set(Lora.model_fields)}
    return add_adapters(backbone(name), Lora(**{"rank": 4, **lora}), **options)


# --------------------------------------------------------------------------- blocks and targets


@pytest.mark.parametrize(
    ("name", "count", "after"),
    [
        ("street_vit", 4, {"norm", "fc_norm", "head_drop", "head"}),
        ("dinov3", 3, {"norm", "fc_norm", "head_drop", "head"}),
        ("street_resnet_tiny", 4, {"global_pool", "fc"}),
        ("mobilenetv2_100", 7, {"conv_head", "bn2", "global_pool", "classifier"}),
        ("efficientnet_b0", 7, {"conv_head", "bn2", "global_pool", "classifier"}),
        ("convnext_atto", 4, {"norm_pre", "head"}),
    ],
)
def test_a_backbone_is_stem_blocks_and_what_follows(name: str, count: int, after: set[str]) -> None:
    model = backbone(name)
    blocks = backbone_blocks(model)
    names = {id(module): key for key, module in model.named_modules()}
    assert len(blocks) == count
    assert {names[id(module)] for module in after_blocks(model)} == after
    # In the order of the forward pass.
    seen: list[int] = []
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, i=i: seen.append(i))
    model(images(1))
    assert seen == list(range(count))


def test_an_architecture_without_known_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"blocks of a Linear are not known.*ViT, DINOv3, ResNet"):
        backbone_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize("name", LINEAR)
def test_auto_takes_attention_and_mlp_of_a_transformer(name: str) -> None:
    model = backbone(name)
    wanted = {f"blocks.{i}.{kind}" for i in range(len(backbone_blocks(model))) for kind in BLOCK}
    assert set(adapter_targets(model, ["auto"])) == wanted


def test_auto_takes_separate_projections_and_gates() -> None:
    size = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": SIDE, "patch_size": 16}
    found = adapter_targets(build_backbone("eva02_base_patch14_224", size), ["auto"])
    attention = [f"attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "proj")]
    mlp = [f"mlp.{part}" for part in ("fc1_g", "fc1_x", "fc2")]
    assert found == [f"blocks.0.{kind}" for kind in [*attention, *mlp]]


def test_auto_takes_pointwise_convolutions() -> None:
    model = backbone("mobilenetv2_100")
    found = adapter_targets(model, ["auto"])
    wanted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    ]
    assert found == wanted
    assert "conv_head" in found


def test_auto_takes_all_convolutions_of_basic_blocks_but_shortcuts() -> None:
    found = adapter_targets(backbone("street_resnet_tiny"), ["auto"])
    assert found == [f"layer{i}.0.conv{j}" for i in (1, 2, 3, 4) for j in (1, 2)]


def test_auto_takes_the_mlp_of_convnext() -> None:
    found = adapter_targets(timm.create_model("convnext_atto"), ["auto"])
    assert {name.rpartition(".mlp.")[2] for name in found} == {"fc1", "fc2"}


def test_targets_are_ends_of_names() -> None:
    model = backbone("street_vit")
    assert adapter_targets(model, ["attn.proj"]) == [f"blocks.{i}.attn.proj" for i in range(4)]
    assert "patch_embed.proj" in adapter_targets(model, ["proj"])
    assert adapter_targets(model, ["blocks.1.mlp.fc1"]) == ["blocks.1.mlp.fc1"]
    both = adapter_targets(model, ["auto", "patch_embed.proj"])
    assert both == ["patch_embed.proj", *adapter_targets(model, ["auto"])]


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        (
            "street_vit",
            "query",
            r'"query" matches no layer.*patch_embed\.proj, attn\.qkv, attn\.proj, ',
        ),
        ("street_vit", "v", r'"v" matches no layer'),
        ("street_vit", "norm1", r'"norm1" matches blocks\.0\.norm1, a LayerNorm that cannot be'),
        ("mobilenetv2_100", "conv_dw", r"blocks\.0\.0\.conv_dw, a Conv2d that cannot.*conv_pwl"),
        (
            "street_resnet_tiny",
            "qkv",
            r"offers conv1\.0, conv1\.3, conv1\.6, conv1, conv2, downsample\.0",
        ),
    ],
)
def test_a_wrong_target_is_refused_with_what_there_is(name: str, target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_adapters(backbone(name), Lora(targets=[target]))


# --------------------------------------------------------------------------- adapters and merging

COMBINATIONS = [
    *[(n, d, r, i) for n in LINEAR for d in (0, 1) for r in (0, 1) for i in ("default", "pissa")],
    *[(n, d, r, "default") for n in CONVOLUTIONAL for d in (0, 1) for r in (0, 1)],
]


@pytest.mark.parametrize(("name", "dora", "rslora", "init"), COMBINATIONS)
def test_merged_is_unmerged_and_a_plain_model(
    name: str, dora: int, rslora: int, init: str, tmp_path: Path
) -> None:
    original = backbone(name)
    model = adapted(name, dora=bool(dora), rslora=bool(rslora), init=init, dropout=0.1)
    assert distance(model, original) < TOLERANCE[name]
    before = merge_adapters(copy.deepcopy(model))
    assert distance(before, original) < TOLERANCE[name]

    train(model)
    untrained = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not untrained, "an adapter that the forward pass never meets"
    unmerged = copy.deepcopy(model)
    assert merge_adapters(model) is model
    assert distance(model, unmerged) < TOLERANCE[name]
    plain = backbone(name)
    statistics = {key: value for key, value in model.named_buffers() if key in plain.state_dict()}
    plain.load_state_dict(statistics, strict=False)
    assert distance(model, plain) > VISIBLE, "training changed too little to test merging"

    assert model.state_dict().keys() == original.state_dict().keys()
    assert all(
        value.dtype == original.state_dict()[k].dtype for k, value in model.state_dict().items()
    )
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert vars(model).keys() == vars(original).keys()
    assert switches(model) == switches(original)
    torch.save(model.state_dict(), tmp_path / "merged.pt")
    again = backbone(name)
    again.load_state_dict(torch.load(tmp_path / "merged.pt", weights_only=True))
    assert torch.equal(again(images()), model(images()))
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))
    once = {key: value.clone() for key, value in model.state_dict().items()}
    merge_adapters(model)
    assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "dora", "init"),
    [
        ("street_vit", True, "pissa"),
        ("dinov3", False, "default"),
        ("mobilenetv2_100", True, "default"),
    ],
)
def test_an_adapted_backbone_is_rebuilt_from_the_original(name: str, dora: bool, init: str) -> None:
    options: dict[str, Any] = {"dora": dora, "init": init, "skip_blocks": 1}
    model = adapted(name, **options)
    unfreeze(model, 1, norms=True)
    train(model)
    state = adapter_state(model)
    total = sum(value.numel() for value in model.state_dict().values())
    assert sum(value.numel() for value in state.values()) < total

    again = adapted(name, seed=9, **options)
    assert distance(again, model) > VISIBLE
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [key for key in missing if ".lora_" in key]
    assert torch.equal(again(images()), model(images()))


def test_adapters_take_over_the_mode_of_the_backbone() -> None:
    for training in (True, False):
        model = add_adapters(backbone("street_vit").train(training), Lora(rank=2, dropout=0.5))
        assert {module.training for module in model.modules()} == {training}


def test_only_the_adapters_are_trained() -> None:
    model = adapted("street_vit", dora=True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 4 * 3  # blocks × layers × (A, B, magnitude)
    assert all(".lora_" in name for name in trained)
    assert model.num_features == backbone("street_vit").num_features


def test_rank_alpha_and_rslora_scale_as_published() -> None:
    for rslora, scale in ((False, 12 / 4), (True, 12 / 2)):
        model = adapted("street_vit", rank=4, alpha=12, rslora=rslora, targets=["blocks.0.mlp.fc1"])
        layer: Any = model.get_submodule("blocks.0.mlp.fc1")
        weight = layer.base_layer.weight.detach().clone()
        nn.init.normal_(layer.lora_B["default"].weight)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        merged: Any = merge_adapters(model).get_submodule("blocks.0.mlp.fc1")
        torch.testing.assert_close(merged.weight, weight + scale * product.detach())


def test_the_seed_alone_decides_and_the_global_generator_stays() -> None:
    def weights(seed: int, noise: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        model = backbone("street_vit")
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        add_adapters(model, Lora(rank=4), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return adapter_state(model), state

    first, second, other = weights(1, 10)[0], weights(1, 11)[0], weights(2, 10)[0]
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_pissa_on_a_convolution_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"pissa .* linear layers only, and layer1\.0\.conv1 is a conv"
    ):
        adapted("street_resnet_tiny", init="pissa")
    with pytest.raises(UserError, match=r"patch_embed\.proj is a convolution"):
        adapted("street_vit", init="pissa", targets=["proj"])


def test_dora_leaves_layers_with_a_dead_row_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = backbone("mobilenetv2_100")
    dead: Any = model.get_submodule("blocks.1.1.conv_pw")
    with torch.no_grad():
        dead.weight[3] = 0
    plain = add_adapters(copy.deepcopy(model), Lora(rank=2))
    assert any("blocks.1.1.conv_pw.lora_A" in name for name, _ in plain.named_parameters())
    with caplog.at_level(logging.WARNING):
        add_adapters(model, Lora(rank=2), dora=True)
    assert [record.getMessage() for record in caplog.records] == [
        "no DoRA adapter on blocks.1.1.conv_pw: a row of its weight is all zero"
    ]
    assert not any("blocks.1.1.conv_pw.lora" in name for name, _ in model.named_parameters())
    train(model, 1)
    assert bool(merge_adapters(model)(images()).isfinite().all())


# --------------------------------------------------------------------------- blocks in full


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_last_blocks_and_the_final_norm_are_trained() -> None:
    model = backbone("dinov3").requires_grad_(requires_grad=False)
    unfreeze(model, 1, norms=False)
    every = {name for name, _ in model.named_parameters()}
    assert trained(model) == {n for n in every if n.startswith(("blocks.2.", "norm."))}
    unfreeze(model, 0, norms=True)
    assert trained(model) == {n for n in every if n.startswith("blocks.2.") or "norm" in n}


def test_norms_of_a_convolutional_net_are_trained() -> None:
    model = backbone("mobilenetv2_100").requires_grad_(requires_grad=False)
    unfreeze(model, 0, norms=True)
    assert trained(model) == {
        n for n, _ in model.named_parameters() if ".bn" in n or n.startswith("bn")
    }


@pytest.mark.parametrize("name", ["street_vit", "mobilenetv2_100"])
def test_blocks_trained_in_full_carry_no_adapters(name: str) -> None:
    model = adapted(name, skip_blocks=2)
    unfreeze(model, 2, norms=False)
    inside = [*backbone_blocks(model)[-2:], *after_blocks(model)]
    names = [n for module in inside for n, _ in module.named_parameters()]
    assert names
    assert not any("lora" in n for n in names)
    assert all(p.requires_grad for module in inside for p in module.parameters())
    assert any(
        "lora" in n for block in backbone_blocks(model)[:-2] for n, _ in block.named_parameters()
    )
    unmerged = copy.deepcopy(model)
    train(model)
    train(unmerged)
    assert distance(merge_adapters(model), unmerged) < TOLERANCE[name]


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"last 5 blocks .* but the backbone has 4"):
        unfreeze(backbone("street_vit"), 5, norms=False)
    with pytest.raises(UserError, match=r"last 5 blocks .* but the backbone has 4"):
        adapted("street_vit", skip_blocks=5)
    with pytest.raises(UserError, match="no layer to adapt"):
        adapted("street_vit", skip_blocks=4)


def test_every_architecture_of_ours_has_blocks_and_targets() -> None:
    for name in ARCHITECTURES:
        model = backbone(name)
        assert backbone_blocks(model)
        assert adapter_targets(model, ["auto"])
