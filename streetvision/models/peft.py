"""Parameter-efficient training: LoRA and DoRA through PEFT, blocks trained in full, and merging."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from streetvision.core.errors import UserError
from streetvision.core.params import Lora

log = logging.getLogger(__name__)

# What `auto` adapts in a transformer: attention and MLP, plain or gated, as timm names them.
_TRANSFORMER_TARGETS = (
    "attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj",
    "mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2",
)  # fmt: skip


def backbone_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the blocks (of a convolutional net, the stages) from input to output.

    Raises
    ------
    UserError
        The architecture is none of those whose blocks are known.
    """
    return [backbone.get_submodule(name) for name in _block_names(backbone)]


def _block_names(backbone: nn.Module) -> list[str]:
    for container in ("blocks", "stages"):
        if isinstance(getattr(backbone, container, None), nn.Sequential | nn.ModuleList):
            return [f"{container}.{i}" for i in range(len(getattr(backbone, container)))]
    layers = [name for name, _ in backbone.named_children() if re.fullmatch(r"layer\d+", name)]
    if layers:
        return layers
    raise UserError(
        f"the blocks of a {type(backbone).__name__} are not known: last blocks, adapters by name auto "
        "and layer-wise learning rates exist for ViT, DINOv3, ResNet, MobileNet, EfficientNet, ConvNeXt"
    )


def after_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the modules between the last block and the features, as the final norm."""
    return [backbone.get_submodule(name) for name in _names_after_blocks(backbone)]


def _names_after_blocks(backbone: nn.Module) -> list[str]:
    children = [name for name, _ in backbone.named_children()]  # timm names them in order
    return children[children.index(_block_names(backbone)[-1].split(".")[0]) + 1 :]


def _trained_in_full(backbone: nn.Module, last_blocks: int) -> list[str]:
    """Names of the modules that `unfreeze` trains."""
    if not last_blocks:
        return []
    blocks = _block_names(backbone)
    if last_blocks > len(blocks):
        raise UserError(
            f"params.yaml: the last {last_blocks} blocks shall be trained in full, "
            f"but the backbone has {len(blocks)}"
        )
    return blocks[-last_blocks:] + _names_after_blocks(backbone)


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _adaptable(module: nn.Module) -> bool:
    """Whether PEFT can adapt and merge it; subclasses compute something else with their weight."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    return type(module) is nn.Linear


def adapter_targets(backbone: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Return the full names of the layers to adapt.

    Parameters
    ----------
    wanted: ends of module names, such as `attn.qkv`. `auto` stands for attention and MLP of a
        transformer (and of ConvNeXt), for the 1×1 convolutions of other nets, and for all convolutions
        of a net that has 1×1 ones in its shortcuts only (ResNet-18); never for the stem, for grouped
        convolutions or for shortcuts.

    Raises
    ------
    UserError
        A name matches nothing, or a layer that cannot be adapted; the message says what there is.
    """
    adaptable = [name for name, module in backbone.named_modules() if _adaptable(module)]
    chosen: set[str] = set()
    for suffix in wanted:
        if suffix == "auto":
            chosen.update(_automatic_targets(backbone, adaptable))
            continue
        found = {name for name, _ in backbone.named_modules() if _ends(name, suffix)}
        wrong = sorted(found.difference(adaptable))
        problem = "matches no layer"
        if wrong:
            kind = type(backbone.get_submodule(wrong[0])).__name__
            problem = f"matches {wrong[0]}, a {kind} that cannot be adapted"
        if wrong or not found:
            raise UserError(
                f'params.yaml: lora.targets "{suffix}" {problem}; '
                f"the backbone offers {_offer(adaptable)}"
            )
        chosen.update(found)
    return [name for name in adaptable if name in chosen]


def _automatic_targets(backbone: nn.Module, adaptable: Sequence[str]) -> list[str]:
    body = _block_names(backbone) + _names_after_blocks(backbone)
    inside = [name for name in adaptable if _within(name, body) and "downsample" not in name]
    transformer = [n for n in inside if any(_ends(n, suffix) for suffix in _TRANSFORMER_TARGETS)]
    if transformer:
        return transformer
    modules = {name: backbone.get_submodule(name) for name in inside}
    kernels = {n: m.kernel_size for n, m in modules.items() if isinstance(m, nn.Conv2d)}
    pointwise = [name for name, kernel in kernels.items() if kernel == (1, 1)]
    return pointwise or list(kernels)


def _offer(names: Sequence[str]) -> str:
    """Distinct ends of names, without the numbers of blocks, at most a dozen."""
    ends = dict.fromkeys(re.sub(r"^(.*\.)?\d+\.(?=.*[a-z])", "", name) for name in names)
    shown = list(ends)[:12]
    return ", ".join(shown) + (f" and {len(ends) - 12} more" if len(ends) > 12 else "")


def add_adapters(
    backbone: nn.Module,
    lora: Lora,
    *,
    dora: bool = False,
    init: str = "default",
    seed: int = 0,
    skip_blocks: int = 0,
) -> nn.Module:
    """Inject adapters in place and freeze everything else; the outputs stay what they were.

    LoRA: arXiv 2106.09685; DoRA: 2402.09353; rsLoRA: 2312.03732; PiSSA: 2404.02948. DoRA divides by the
    norm of each row of a weight, so layers with a row of zeros are left out, which is logged. PiSSA
    moves the principal part of a weight into the adapter: what is left in the base layer is no longer
    the original weight until the adapter is merged.

    Parameters
    ----------
    init: default (the adapter starts at zero) or pissa (exact, by SVD; linear layers only)
    seed: of the adapters' weights; the global generators stay untouched
    skip_blocks: last blocks, and what follows them, that get no adapters because `unfreeze` trains
        them in full, as in ExPLoRA (arXiv 2406.10973)

    Returns
    -------
    The same backbone

    Raises
    ------
    UserError
        No such target, PiSSA on a convolution, more blocks to skip than there are, or nothing to adapt.
    """
    from peft import LoraConfig, inject_adapter_in_model

    skipped = _trained_in_full(backbone, skip_blocks)
    names = adapter_targets(backbone, lora.targets)
    names = [name for name in names if not _within(name, skipped)]
    layers: dict[str, Any] = {name: backbone.get_submodule(name) for name in names}
    convolutions = [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    if init == "pissa" and convolutions:
        raise UserError(
            "params.yaml: lora.init pissa exists for linear layers only, and "
            f"{convolutions[0]} is a convolution; use default"
        )
    if dora:
        for name in [n for n, layer in layers.items() if _has_zero_row(layer.weight)]:
            log.warning("no DoRA adapter on %s: a row of its weight is all zero", name)
            del layers[name]
    if not layers:
        raise UserError(
            "params.yaml: lora.targets and the blocks trained in full leave no layer to adapt"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=dora,
        init_lora_weights="pissa" if init == "pissa" else True,
        # A pattern matches whole names; a list would match their ends.
        target_modules="|".join(re.escape(name) for name in layers),
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU and then moves
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, backbone)
    for name in layers:
        backbone.get_submodule(name).train(backbone.training)  # PEFT leaves the dropout on
        _call_the_layer(backbone, name, separate=True)
    return backbone


def _has_zero_row(weight: torch.Tensor) -> bool:
    return bool((weight.detach().flatten(1).norm(dim=1) == 0).any())


def _call_the_layer(backbone: nn.Module, name: str, separate: bool) -> None:
    """Let an attention with q and v biases call its qkv layer.

    timm's Eva and BEiT take that layer's weight otherwise, past the adapter, which would never train.
    """
    parent: Any = backbone.get_submodule(name.rpartition(".")[0])
    if hasattr(parent, "qkv_bias_separate"):
        parent.qkv_bias_separate = separate


def unfreeze(backbone: nn.Module, last_blocks: int, norms: bool) -> None:
    """Train the last blocks in full, with what follows them (the final norm), of a frozen backbone.

    Parameters
    ----------
    norms: train scale and shift of every norm layer, too

    Raises
    ------
    UserError
        There are fewer blocks.
    """
    for name in _trained_in_full(backbone, last_blocks):
        backbone.get_submodule(name).requires_grad_(requires_grad=True)
    if norms:
        for module in backbone.modules():
            if "norm" in type(module).__name__.lower():  # as all of torch's and timm's
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad = True


@torch.no_grad()
def merge_adapters(backbone: nn.Module) -> nn.Module:
    """Add the adapters to their weights, in float64, and remove them, in place.

    Afterwards it is the plain model that was adapted, with the same keys; what was frozen stays so.
    Does nothing to a backbone without adapters.
    """
    if not hasattr(backbone, "peft_config"):
        return backbone
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(n, m) for n, m in backbone.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in adapted:
        dtype = layer.get_base_layer().weight.dtype
        layer.double().merge()
        backbone.set_submodule(name, layer.get_base_layer().to(dtype))
        _call_the_layer(backbone, name, separate=False)
    del backbone.peft_config
    return backbone


def adapter_state(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Return what an adapted backbone has learnt: adapters, whatever else is trained, norm statistics.

    `add_adapters` with the same arguments on the *original* backbone and `load_state_dict(…,
    strict=False)` rebuild the adapted one. With PiSSA only the original will do, since the frozen
    remainder of each weight is computed from it.

    Returns
    -------
    Detached tensors on the CPU by their names in the adapted backbone
    """
    learnt = {
        name for name, p in backbone.named_parameters() if p.requires_grad or ".lora_" in name
    }
    learnt.update(name for name, _ in backbone.named_buffers())
    return {
        name: value.detach().cpu().clone()
        for name, value in backbone.state_dict().items()
        if name in learnt
    }
