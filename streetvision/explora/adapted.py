"""What `explora` hands on, adapted or not, without what only training needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from streetvision.core.artifacts import write_atomic, write_json_atomic

PASSTHROUGH = "passthrough"  # the method of an `explora` that is off
Row = dict[str, Any]  # of the history
HISTORY_COLUMNS = (
    "epoch", "train_loss", "loss", "alignment", "uniformity", "rankme", "embedding_rankme",
    "embedding_spread",
)  # fmt: skip


@dataclass(frozen=True)
class AdaptationResult:
    """The adapted backbone, merged, and how it came about.

    Attributes
    ----------
    method: explora, `<objective> pretraining` (no pretrained weights) or passthrough
    adapter: what an adapted backbone has learnt, before merging; empty without adapters
    history: `HISTORY_COLUMNS` of the start (epoch 0) and after each epoch; empty where none was asked for
    """

    backbone: nn.Module
    method: str
    adapter: dict[str, Tensor]
    history: list[Row]
    metrics: dict[str, Any]


def pass_through(backbone: nn.Module) -> AdaptationResult:
    """Hand the backbone on as it is: `explora.enabled: false`."""
    metrics = {
        "method": PASSTHROUGH,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "trainable_parameters": 0,
    }
    return AdaptationResult(backbone, PASSTHROUGH, {}, [], metrics)


def save_adaptation(result: AdaptationResult, config: Mapping[str, Any], folder: Path) -> None:
    """Write `backbone.safetensors`, `adapter.safetensors` if there is one, and `config.json`.

    The latter holds `method` and `config`.
    """
    _save_tensors(result.backbone.state_dict(), folder / "backbone.safetensors")
    if result.adapter:
        _save_tensors(result.adapter, folder / "adapter.safetensors")
    else:
        (folder / "adapter.safetensors").unlink(missing_ok=True)
    write_json_atomic(folder / "config.json", {"method": result.method, **config})


def _save_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_atomic(path, lambda temporary: save_file(plain, temporary))
