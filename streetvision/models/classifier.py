"""The classifier: backbone, head, and everything needed to rebuild both with their preprocessing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streetvision.core.artifacts import read_json, write_atomic, write_json_atomic
from streetvision.core.errors import UserError
from streetvision.core.processes import in_threads
from streetvision.core.progress import progress
from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing
from streetvision.models.backbone import build_backbone
from streetvision.models.weights import fill, read_state_dict

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class RoadworkClassifier(nn.Module):
    """A backbone with a head of one logit (log-odds of roadwork).

    Parameters
    ----------
    backbone: images [B, 3, H, W] → features [B, D]; has `num_features` = D
    dropout: probability, before the last layer
    head_hidden: width of a GELU layer before the last one; None makes the head linear
    """

    def __init__(
        self, backbone: nn.Module, dropout: float = 0.0, head_hidden: int | None = None
    ) -> None:
        super().__init__()
        width = int(backbone.num_features)  # type: ignore[arg-type]
        self.backbone = backbone
        self.hidden: nn.Module = nn.Identity()
        if head_hidden is not None:
            self.hidden = nn.Sequential(nn.Linear(width, head_hidden), nn.GELU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width if head_hidden is None else head_hidden, 1)
        nn.init.zeros_(self.head.bias)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [B] in float32 and features [B, D]."""
        features = self.backbone(images)
        return self.head(self.dropout(self.hidden(features))).squeeze(1).float(), features


@dataclass(frozen=True)
class ClassifierConfig:
    """Rebuilds model and preprocessing.

    Attributes
    ----------
    backbone, arguments: timm name and keyword arguments
    head_hidden: width of the head's hidden layer, None without one
    """

    backbone: str
    arguments: dict[str, Any]
    preprocessing: Preprocessing
    head_hidden: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "backbone": self.backbone,
            "arguments": self.arguments,
            "head_hidden": self.head_hidden,
            "preprocessing": self.preprocessing.to_dict(),
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> ClassifierConfig:
        """Rebuild from `to_dict`; raises `UserError` where a key is missing."""
        try:
            preprocessing = Preprocessing.from_dict(document["preprocessing"])
            # Configurations from before there was a choice have a linear head.
            hidden = document.get("head_hidden")
            return cls(document["backbone"], document["arguments"], preprocessing, hidden)
        except KeyError as error:
            raise UserError(f"classifier config: {error} is missing") from error

    def build(self) -> RoadworkClassifier:
        """The architecture with random weights."""
        backbone = build_backbone(self.backbone, self.arguments)
        return RoadworkClassifier(backbone, head_hidden=self.head_hidden)


def save_classifier(model: RoadworkClassifier, config: ClassifierConfig, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomic(folder / WEIGHTS, lambda path: save_file(state, path))
    write_json_atomic(folder / CONFIG, config.to_dict())


def load_classifier(folder: Path) -> tuple[RoadworkClassifier, ClassifierConfig]:
    """Rebuild a saved classifier in evaluation mode.

    Raises
    ------
    UserError
        A file is missing, or the weights do not belong to the configuration.
    """
    config = ClassifierConfig.from_dict(read_json(folder / CONFIG, "train"))
    return load_weights_into(config, folder / WEIGHTS), config


def load_head(folder: Path) -> nn.Linear:
    """Return the last layer of a saved classifier, in evaluation mode, without building the rest.

    Raises
    ------
    UserError
        The weights are missing, or hold no such layer.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(f"head.{name}") for name in ("weight", "bias")}
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the stage `train` makes it") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} holds no classifier's head ({error}); rerun `train`") from error
    head = nn.Linear(state["weight"].shape[1], 1)
    head.load_state_dict(state)
    return head.eval()


def load_weights_into(config: ClassifierConfig, weights: Path) -> RoadworkClassifier:
    """Build the configured model and fill it with the tensors of a file, strictly."""
    return filled(config, read_state_dict(weights), weights)


def filled(
    config: ClassifierConfig, state: dict[str, torch.Tensor], weights: Path
) -> RoadworkClassifier:
    """Build the configured model and fill it with `state`, read from the file `weights`, strictly.

    Raises
    ------
    UserError
        The tensors are those of another architecture, or hold numbers that are not finite.
    """
    model = config.build()
    fill(model, state, weights)
    return model.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def score(
    model: RoadworkClassifier,
    preprocessing: Preprocessing,
    inputs: Iterable[NDArray[np.uint8]],
    batch_size: int,
    device: torch.device,
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Run inputs [H, W, 3] through the model in float32.

    Returns
    -------
    logits [N], features [N, D]
    """
    logits: list[NDArray[np.float32]] = []
    features: list[NDArray[np.float16]] = []
    for batch in _batches(inputs, batch_size):
        images = torch.from_numpy(np.stack(batch)).to(device).permute(0, 3, 1, 2)
        outcome = model(preprocessing.normalise(images))
        logits.append(outcome[0].float().cpu().numpy())
        features.append(outcome[1].float().cpu().numpy().astype(np.float16))
    if not logits:
        width = int(model.backbone.num_features)  # type: ignore[arg-type]
        return np.zeros(0, np.float32), np.zeros((0, width), np.float16)
    return np.concatenate(logits), np.concatenate(features)


def score_split(
    model: RoadworkClassifier,
    preprocessing: Preprocessing,
    split: Split,
    batch_size: int,
    device: torch.device,
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Score a split in its order; returns what `score` does."""
    inputs = in_threads(
        lambda row: preprocessing.apply(split.image(row)),
        progress(range(len(split)), len(split), split.name),
    )
    return score(model, preprocessing, inputs, batch_size, device)


def _batches(inputs: Iterable[NDArray[np.uint8]], size: int) -> Iterator[list[NDArray[np.uint8]]]:
    batch: list[NDArray[np.uint8]] = []
    for item in inputs:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one; raises `UserError` for `cuda` without one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: hardware.device is cuda, but torch finds no GPU here")
    return torch.device(name)
