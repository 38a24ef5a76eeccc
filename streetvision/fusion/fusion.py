"""Fusion of the views of an image into one logit: rules without training, and trained networks.

Everything here takes N images with V views each, the global view first; views with no content (0 pixels)
do not exist. The networks are in `fusion_networks`, which needs torch; nothing here does until one is used.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streetvision.core.artifacts import read_json, write_bytes_atomic, write_json_atomic
from streetvision.core.errors import UserError
from streetvision.core.params import Cvfm, ViewGrid
from streetvision.data.views import view_names

if TYPE_CHECKING:
    import torch
    from torch import nn

    from streetvision.fusion.networks import FusionNetwork

WEIGHTS = "cvfm_weights.pth"
CONFIG = "config.json"
UNTRAINED = ("single", "simple_mean", "topk_mean", "weighted_uncertainty", "content_aware")
TRAINED = ("mlp", "latent", "attention")
MODES = UNTRAINED + TRAINED
# What of the parameters shapes each mode.
OPTIONS: dict[str, tuple[str, ...]] = dict.fromkeys(MODES, ()) | {
    "topk_mean": ("top_k",),
    "weighted_uncertainty": ("temperature",),
    "mlp": ("fits", "hidden_layers", "hidden_dim"),
    "latent": ("fits", "latent_dim", "reconstruction_weight"),
    "attention": ("fits", "attention_dim", "attention_heads"),
}
# Nats added to a view's entropy: a view that is sure weighs up to ln 2 / this more than one that is not.
ENTROPY_FLOOR = 0.05
Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class FusionConfig:
    """Rebuilds a fusion: its mode, the views it takes, the width of the features and its options."""

    mode: str
    grid: ViewGrid
    features: int
    options: Mapping[str, float]

    @classmethod
    def of(cls, mode: str, settings: Cvfm, grid: ViewGrid, features: int) -> FusionConfig:
        """What `settings` say of `mode`; `single` takes the global view alone."""
        options = {name: getattr(settings, name) for name in OPTIONS[mode]}
        views = ViewGrid(grid=1, flip=False) if mode == "single" else grid
        return cls(mode, views, features if mode in TRAINED else 0, options)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "mode": self.mode,
            "grid": self.grid.model_dump(),
            "features": self.features,
            "options": dict(self.options),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> FusionConfig:
        """Rebuild from `to_dict`; raises `UserError` on anything else."""
        try:
            config = cls(
                document["mode"],
                ViewGrid(**document["grid"]),
                int(document["features"]),
                dict(document["options"]),
            )
            wanted = set(OPTIONS[config.mode])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"fusion config is incomplete or wrong: {error}") from error
        if set(config.options) != wanted:
            raise UserError(
                f"fusion config: mode {config.mode} has the options {', '.join(sorted(wanted)) or 'none'}"
            )
        return config


class Fusion:
    """One logit of the views of an image, by one mode.

    Parameters
    ----------
    config: the mode and what it takes
    network: of a trained mode, fitted; `fuse` uses it in float64 on the CPU
    """

    def __init__(self, config: FusionConfig, network: FusionNetwork | None = None) -> None:
        self.config = config
        self.network = network.cpu().double().eval() if network is not None else None

    @property
    def n_views(self) -> int:
        """Views that one image costs."""
        return len(view_names(self.config.grid))

    @property
    def needs_features(self) -> bool:
        """Whether `fuse` must be given features."""
        return self.config.mode in TRAINED

    def fuse(
        self,
        logits: NDArray[Any],
        features: NDArray[Any] | None,
        content: NDArray[Any],
        boxes: NDArray[Any],
    ) -> Floats:
        """Fuse views [N, V] into logits [N].

        Parameters
        ----------
        logits: [N, V]; column 0 is the global view, which is always there
        features: [N, V, D]; only trained modes need them
        content: pixels of each view that show the image [N, V]; 0: no such view
        boxes: left, top, right, bottom in fractions of the image [N, V, 4]

        Raises
        ------
        UserError
            Shapes do not fit each other or the mode, or the global view is missing.
        """
        z = np.asarray(logits, dtype=np.float64)
        self._check(z, features, content, boxes)
        if len(z) == 0:
            return np.zeros(0)
        present = content > 0
        if self.needs_features and features is not None:
            return self.fuse_trained(z, np.asarray(features), present, np.asarray(boxes))
        tiles = present & is_tile(boxes)
        rules: dict[str, Callable[[], Floats]] = {
            "single": z[:, 0].copy,
            "simple_mean": lambda: weighted_mean(z, present.astype(np.float64)),
            "topk_mean": lambda: topk_mean(z, present, tiles, int(self.config.options["top_k"])),
            "weighted_uncertainty": lambda: weighted_mean(
                z, uncertainty_weights(z, float(self.config.options["temperature"])) * present
            ),
            "content_aware": lambda: weighted_mean(z, np.asarray(content, dtype=np.float64)),
        }
        return rules[self.config.mode]()

    def fuse_trained(
        self, logits: Floats, features: NDArray[Any], present: Masks, boxes: NDArray[Any]
    ) -> Floats:
        """Fuse by the network of a trained mode; arguments as `fuse`, which checks them."""
        if self.network is None:
            raise UserError(f"fusion: mode {self.config.mode} needs its network")
        return self.network.fuse_arrays(logits, features, present, boxes)

    def _check(
        self,
        logits: Floats,
        features: NDArray[Any] | None,
        content: NDArray[Any],
        boxes: NDArray[Any],
    ) -> None:
        if logits.ndim != 2 or content.shape != logits.shape or boxes.shape != (*logits.shape, 4):
            raise UserError(
                f"fusion: logits {logits.shape}, content {content.shape} and boxes {boxes.shape}; "
                "[N, V], [N, V] and [N, V, 4] are needed"
            )
        if not (content[:, 0] > 0).all():
            raise UserError("fusion: an image has no global view")
        if not self.needs_features:
            return
        if features is None or features.shape != (*logits.shape, self.config.features):
            found = "none" if features is None else str(features.shape)
            raise UserError(
                f"fusion: mode {self.config.mode} needs features [N, V, {self.config.features}]; "
                f"got {found}"
            )
        if logits.shape[1] != self.n_views:
            raise UserError(
                f"fusion: mode {self.config.mode} takes {self.n_views} views, got {logits.shape[1]}; "
                "give missing ones a content of 0"
            )


def is_tile(boxes: NDArray[Any]) -> Masks:
    """Which views [N, V] show another part of the image than the first, the global one."""
    different: Masks = (np.abs(boxes - boxes[:, :1]) > 1e-9).any(axis=2)
    return different


def view_places(present: Masks, boxes: NDArray[Any]) -> Floats:
    """Centre x, centre y, log width, log height of views [N, V] in units of the global one [N, V, 4]."""
    corner, size = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    centre = (corner + size / 2 - corner[:, :1]) / size[:, :1]
    # A view that does not exist may have an empty box.
    scale = np.log(np.where(present[..., None], size / size[:, :1], 1.0))
    return np.where(present[..., None], np.concatenate([centre, scale], axis=2), 0.0)


def weighted_mean(logits: Floats, weights: Floats) -> Floats:
    """Mean [N] of logits [N, V] with weights [N, V] that need not add up to 1."""
    mean: Floats = (logits * weights).sum(axis=1) / weights.sum(axis=1)
    return mean


def uncertainty_weights(logits: Floats, temperature: float) -> Floats:
    """Inverse entropy, in nats, of the views' probabilities at a temperature [N, V]: 1 / (floor + H)."""
    z = np.abs(logits) / temperature
    # H(σ(z)) = log(1 + e^-z) + z σ(-z), without overflow for z >= 0.
    entropy = np.log1p(np.exp(-z)) + z * np.exp(-z) / (1 + np.exp(-z))
    return np.asarray(1 / (ENTROPY_FLOOR + entropy))


def topk_mean(logits: Floats, present: Masks, tiles: Masks, k: int) -> Floats:
    """Mean [N] of the global logit and the k largest logits of tiles (all of fewer)."""
    weight = (present & ~tiles).astype(np.float64)
    globals_mean = weighted_mean(logits, weight)
    largest = -np.sort(-np.where(tiles, logits, -np.inf), axis=1)[:, :k]
    there = np.isfinite(largest)
    total = globals_mean + np.where(there, largest, 0.0).sum(axis=1)
    return np.asarray(total / (1 + there.sum(axis=1)))


def save_fusion(fusion: Fusion, folder: Path) -> list[Path]:
    """Write `config.json` and, for a trained mode, `cvfm_weights.pth`: a plain state dict in float32.

    The classifier's head, which `latent` uses, is not in it: `load_fusion` is given that head.
    """
    written = [write_json_atomic(folder / CONFIG, fusion.config.to_dict())]
    network = fusion.network
    if network is not None:
        import torch

        # It was fitted in float32: nothing is lost.
        state = {name: value.float() for name, value in network.own_state().items()}
        buffer = io.BytesIO()
        torch.save(state, buffer)  # not into the file: torch would store its temporary name
        written.append(write_bytes_atomic(folder / WEIGHTS, buffer.getvalue()))
    else:
        (folder / WEIGHTS).unlink(missing_ok=True)
    return written


def load_fusion(folder: Path, head: Callable[[], nn.Module]) -> Fusion:
    """Rebuild what `save_fusion` wrote; `head` gives the classifier's, and is asked by `latent` only.

    Raises
    ------
    UserError
        A file is missing or does not fit the configuration.
    """
    config = FusionConfig.from_dict(read_json(folder / CONFIG, "cvfm"))
    if config.mode not in TRAINED:
        return Fusion(config)
    from streetvision.models.weights import read_state_dict

    return trained_fusion(config, read_state_dict(folder / WEIGHTS), folder / WEIGHTS, head)


def trained_fusion(
    config: FusionConfig,
    state: Mapping[str, torch.Tensor],
    weights: Path,
    head: Callable[[], nn.Module],
) -> Fusion:
    """Rebuild a trained fusion from its configuration and its tensors, read from the file `weights`."""
    from streetvision.fusion.networks import build_network, freeze_head
    from streetvision.models.weights import fill

    frozen = freeze_head(head()) if config.mode == "latent" else None
    network = build_network(config, frozen).double()
    own = network.own_state()
    given = {name: value for name, value in network.state_dict().items() if name not in own}
    if given.keys() & state.keys():
        raise UserError(f"{weights} would replace the classifier's head")
    fill(network, {**given, **state}, weights)
    return Fusion(config, network)
