"""Optimisers: parameter groups, AdamW and Muon as one, the Grokfast filter, the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from streetvision.core.errors import UserError
from streetvision.models.peft import after_blocks, backbone_blocks

Group = dict[str, Any]


def parameter_groups(
    backbone: nn.Module,
    head: nn.Module,
    *,
    learning_rate: float,
    head_factor: float,
    layer_decay: float,
    weight_decay: float,
) -> list[Group]:
    """Sort the trainable parameters by learning rate, weight decay and whether Muon may have them.

    Layer-wise learning rates as in BEiT (arXiv 2106.08254) and timm: of L blocks the last, with what
    follows it, has `learning_rate` · `layer_decay`, block i (from 0) · `layer_decay`^(L − i), and stem,
    embeddings and tokens · `layer_decay`^(L + 1). Biases, norms, tokens, position embeddings and DoRA's
    magnitudes have no weight decay.

    Parameters
    ----------
    head_factor: the head's learning rate over `learning_rate`
    layer_decay: factor in (0, 1]

    Returns
    -------
    Groups with `params`, `lr`, `weight_decay` and `hidden`: whether these are weight matrices inside
    blocks; from the stem to the head

    Raises
    ------
    UserError
        A layer decay below 1 for an architecture whose blocks are not known.
    """
    try:
        blocks, last = backbone_blocks(backbone), after_blocks(backbone)
    except UserError:
        if layer_decay < 1:
            raise
        blocks, last = [], []
    level = {id(p): len(blocks) for module in last for p in module.parameters()}
    inner = {id(p): i for i, block in enumerate(blocks, 1) for p in block.parameters()}
    level |= inner
    groups: dict[tuple[float, float, bool], Group] = {}

    def add(name: str, parameter: nn.Parameter, rate: float, inside: bool) -> None:
        matrix = _is_matrix(name, parameter)
        decay, hidden = weight_decay if matrix else 0.0, inside and parameter.ndim == 2 and matrix
        group = {"params": [], "lr": rate, "weight_decay": decay, "hidden": hidden}
        groups.setdefault((rate, decay, hidden), group)["params"].append(parameter)

    named = [(name, p, level.get(id(p), 0)) for name, p in backbone.named_parameters()]
    for name, parameter, i in sorted(named, key=lambda item: item[2]):
        if parameter.requires_grad:
            rate = learning_rate * layer_decay ** (len(blocks) + 1 - i)
            add(name, parameter, rate, id(parameter) in inner)
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            add(name, parameter, learning_rate * head_factor, inside=False)
    return list(groups.values())


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a weight matrix or kernel: no bias, scale, token, embedding or DoRA magnitude."""
    return parameter.ndim >= 2 and name.endswith("weight") and "lora_magnitude_vector" not in name


def make_optimiser(
    groups: Iterable[Group], *, kind: Literal["adamw", "muon"]
) -> torch.optim.Optimizer:
    """Fused AdamW, or Muon for the hidden matrices and fused AdamW for the rest, as one optimiser.

    Parameters
    ----------
    groups: of `parameter_groups`

    Raises
    ------
    UserError
        Muon without a hidden matrix to train.
    """
    groups = list(groups)
    if kind == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if not any(group["hidden"] for group in groups):
        raise UserError(
            "params.yaml: train.optimiser muon trains weight matrices inside the backbone's blocks, and "
            "there are none here: convolution kernels have four dimensions, and train.trainable head "
            "freezes the rest; use adamw"
        )
    return MuonAndAdamW(groups)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon on the groups that are `hidden`, fused AdamW on the others.

    To a schedule, a scaler or a checkpoint it is one optimiser: groups and state are shared with the two
    inside. Muon's step is scaled to the root mean square of AdamW's (arXiv 2502.16982), so that both
    take the same learning rate and weight decay.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        groups = sorted(groups, key=lambda group: not group["hidden"])
        super().__init__(groups, {})
        matrices = sum(bool(group["hidden"]) for group in groups)
        self._muon = torch.optim.Muon(groups[:matrices], adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(groups[matrices:], fused=True)
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]
        self._share()

    def _share(self) -> None:
        matrices = len(self._muon.param_groups)
        self._muon.param_groups = self.param_groups[:matrices]
        self._adamw.param_groups = self.param_groups[matrices:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state, which replaces groups and state."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both; `closure` is called once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step()
        return loss


class GradientFilter:
    """Grokfast-EMA: adds the slow part of the gradients to them; arXiv 2405.20233, algorithm 2.

    average ← `alpha` · average + (1 − `alpha`) · gradient, gradient ← gradient + `weight` · average; the
    first gradient is the first average, as in the authors' code.

    Parameters
    ----------
    parameters: those whose gradients are filtered, always in the same order
    """

    def __init__(self, parameters: Iterable[nn.Parameter], alpha: float, weight: float) -> None:
        self.parameters = list(parameters)
        self.alpha = alpha
        self.weight = weight
        self.averages: list[torch.Tensor | None] = [None] * len(self.parameters)

    @torch.no_grad()
    def apply(self) -> None:
        """Filter the gradients in place, once a step and before they are clipped."""
        gradients, averages = [], []
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            average = self.averages[i]
            if average is None:
                average = self.averages[i] = parameter.grad.clone()
            gradients.append(parameter.grad)
            averages.append(average)
        if gradients:
            torch._foreach_lerp_(averages, gradients, 1 - self.alpha)
            torch._foreach_add_(gradients, averages, alpha=self.weight)

    def state_dict(self) -> dict[str, Any]:
        """The averages, one a parameter."""
        return {"averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved averages, moved to where their parameters are."""
        pairs = zip(state["averages"], self.parameters, strict=True)
        self.averages = [a if a is None else a.to(p, copy=True) for a, p in pairs]


def warmup_cosine(steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Factor on the learning rate at each step: linear from 1/warm-up to 1, then half a cosine to 0."""
    warmup = max(1, round(steps * warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor
