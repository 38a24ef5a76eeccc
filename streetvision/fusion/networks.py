"""The trained fusions: networks on cached features.

The backbone's features come from a cache and the classifier's head is a frozen copy: only what is made here
learns. `mlp` and `attention` have an output layer of their own that starts at zero; `latent` starts as the
mean of the views' logits and keeps the classifier's head. What is shipped is the mean of several.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from streetvision.core.errors import UserError
from streetvision.data.views import view_names
from streetvision.fusion.fusion import FusionConfig, is_tile, view_places

# Tiles whose largest logits are one of the terms that every network sees.
TOP_TILES = 3
# FlexAttention works in blocks of this many tokens: with fewer, most of a block is padding.
FLEX_BLOCK = 128
Kernel = Literal["sdpa", "flex"]


class ViewTensors(NamedTuple):
    """N images with V views, the global one first.

    Attributes
    ----------
    logits : [N, V]
    features : [N, V, D]
    present : which views exist [N, V]
    tiles : which of them are not global, or mirrored global, views [N, V]
    places : centre x, centre y, log width, log height of each view in units of the global one [N, V, 4]
    """

    logits: Tensor
    features: Tensor
    present: Tensor
    tiles: Tensor
    places: Tensor

    def rows(self, index: Tensor) -> ViewTensors:
        """The images at `index`."""
        return ViewTensors(*(part[index] for part in self))


def view_tensors(
    logits: NDArray[Any],
    features: NDArray[Any],
    present: NDArray[np.bool_],
    boxes: NDArray[Any],
    dtype: torch.dtype,
) -> ViewTensors:
    """Tensors of arrays; boxes [N, V, 4] are left, top, right, bottom."""
    return ViewTensors(
        torch.as_tensor(logits, dtype=dtype),
        torch.from_numpy(np.ascontiguousarray(features)).to(dtype),
        torch.from_numpy(present),
        torch.from_numpy(present & is_tile(boxes)),
        torch.as_tensor(view_places(present, boxes), dtype=dtype),
    )


class FusionNetwork(nn.Module):
    """Base of the trained fusions.

    Parameters of two or more dimensions are drawn back to where they start by weight decay (`penalty`).
    """

    def fit_start(self, views: ViewTensors, generator: torch.Generator) -> None:
        """Set scales, and whatever else the start depends on, from the training views."""
        raise NotImplementedError

    def loss(self, views: ViewTensors, labels: Tensor) -> Tensor:
        """Mean binary cross entropy of the fused logits with labels [N]."""
        return functional.binary_cross_entropy_with_logits(self(views), labels)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What learns, by name: everything but the head."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def own_state(self) -> dict[str, Tensor]:
        """The state without the classifier's head."""
        state = self.state_dict()
        return {name: v for name, v in state.items() if "head" not in name.split(".")}

    @torch.no_grad()
    def fuse_arrays(
        self,
        logits: NDArray[Any],
        features: NDArray[Any],
        present: NDArray[np.bool_],
        boxes: NDArray[Any],
    ) -> NDArray[np.float64]:
        """Fused logits [N] in float64; the network must be in it."""
        views = view_tensors(logits, features, present, boxes, torch.float64)
        return np.asarray(self(views).numpy(), dtype=np.float64)


class Scale(nn.Module):
    """Standardises features by the mean and standard deviation of the training part."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def fit(self, values: Tensor) -> None:
        """Take mean and deviation of values [M, D]; a constant feature keeps its scale."""
        deviation, mean = torch.std_mean(values, dim=0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, 1.0))

    def forward(self, values: Tensor) -> Tensor:
        """Standardised values [..., D]."""
        return (values - self.mean) / self.deviation


def logit_terms(views: ViewTensors) -> Tensor:
    """Logits of the global view, the mean tile and the mean top tile [N, 3]; the first without tiles."""
    whole = masked_mean(views.logits, views.present & ~views.tiles)
    low = torch.where(views.tiles, views.logits, -torch.inf)
    top = low.topk(min(TOP_TILES, low.shape[1]), dim=1).values
    top = masked_mean(top.nan_to_num(neginf=0.0), top > -torch.inf)
    means = torch.stack([masked_mean(views.logits, views.tiles), top], dim=1)
    any_tile = views.tiles.any(dim=1, keepdim=True)
    return torch.cat([whole[:, None], torch.where(any_tile, means, whole[:, None])], dim=1)


class MlpFusion(FusionNetwork):
    """Global ⧺ mean of the tiles' features, and the views' logits → logit.

    Without hidden layers it is logistic regression on the concatenated, standardised features.
    """

    def __init__(self, width: int, hidden_layers: int, hidden_dim: int) -> None:
        super().__init__()
        self.scale_global, self.scale_tiles, self.scale_terms = Scale(width), Scale(width), Scale(3)
        widths = [2 * width + 3, *[hidden_dim] * hidden_layers]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.hidden = nn.Sequential(*layers)
        self.output = zero_linear(widths[-1])

    def fit_start(self, views: ViewTensors, generator: torch.Generator) -> None:
        """Scales of the global view's and the mean tile's features, and of the logits."""
        whole, tiles, any_tile = self._parts(views)
        self.scale_global.fit(whole)
        self.scale_terms.fit(logit_terms(views))
        if any_tile.any():
            self.scale_tiles.fit(tiles[any_tile])

    def forward(self, views: ViewTensors) -> Tensor:
        """Fused logits [N]."""
        whole, tiles, any_tile = self._parts(views)
        # Of an image without tiles the average image's are assumed.
        tiles = torch.where(any_tile[:, None], self.scale_tiles(tiles), 0.0)
        terms = self.scale_terms(logit_terms(views))
        joined = torch.cat([self.scale_global(whole), tiles, terms], dim=1)
        logits: Tensor = self.output(self.hidden(joined)).squeeze(1)
        return logits

    @staticmethod
    def _parts(views: ViewTensors) -> tuple[Tensor, Tensor, Tensor]:
        whole = masked_mean(views.features, views.present & ~views.tiles)
        return whole, masked_mean(views.features, views.tiles), views.tiles.any(dim=1)


class LatentFusion(FusionNetwork):
    """Views meet in a latent space and are decoded to the one feature vector that the head sees.

    A shared encoder takes each view to the latent space, learned view weights average them there, and a
    decoder for each view reconstructs that view's features from the average. The fused features are the
    weighted mean of what is decoded; the classifier's frozen head makes their logit.

    At the start encoder and decoders are the projection on the principal directions, the head's own among
    them, so that with a linear head the fused logit is the mean of the views' logits.
    """

    def __init__(
        self, width: int, n_views: int, latent_dim: int, reconstruction: float, head: nn.Module
    ) -> None:
        super().__init__()
        latent_dim = min(latent_dim, width)
        self.scale = Scale(width)
        self.encoder = nn.Linear(width, latent_dim)
        self.inner = nn.Linear(latent_dim, latent_dim)
        self.outer = nn.Linear(latent_dim, latent_dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.decoders = nn.Parameter(torch.zeros(n_views, width, latent_dim))
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(width)) for _ in range(n_views)])
        self.view_logits = nn.Parameter(torch.zeros(n_views))
        self.reconstruction = reconstruction
        self.head = head

    def fit_start(self, views: ViewTensors, generator: torch.Generator) -> None:
        """Scale, then the head's direction and the principal ones as encoder and decoders."""
        features = views.features[views.present]
        self.scale.fit(features)
        centre = self.scale.mean.clone().requires_grad_()
        (direction,) = torch.autograd.grad(self.head(centre[None]).sum(), centre)
        with torch.no_grad():
            values = self.scale(features)
            wanted = self.encoder.out_features - 1
            seed = int(torch.randint(2**31, (), generator=generator))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                found = torch.pca_lowrank(values, min(wanted, *values.shape), center=True)[2]
                spare = torch.randn(values.shape[1], wanted - found.shape[1], dtype=values.dtype)
            first = (direction * self.scale.deviation)[:, None]
            basis = torch.linalg.qr(torch.cat([first, found, spare], dim=1))[0]  # [D, L]
            self.encoder.weight.copy_(basis.T)
            nn.init.zeros_(self.encoder.bias)
            self.decoders.copy_(basis.expand_as(self.decoders))

    def forward(self, views: ViewTensors) -> Tensor:
        """Fused logits [N]."""
        logits: Tensor = self.head(self.fuse_features(views)[0]).squeeze(1)
        return logits

    def fuse_features(self, views: ViewTensors) -> tuple[Tensor, Tensor, Tensor]:
        """Fused features [N, D], weights of the views [N, V], reconstructed scaled features [N, V, D]."""
        encoded = self.encoder(self.scale(views.features))  # [N, V, L]
        encoded = encoded + self.outer(functional.gelu(self.inner(encoded)))
        masked = self.view_logits.expand_as(views.logits).masked_fill(~views.present, -torch.inf)
        weights = masked.softmax(dim=1)
        latent = torch.einsum("nv,nvl->nl", weights, encoded)
        decoded = torch.einsum("vdl,nl->nvd", self.decoders, latent) + torch.stack(
            list(self.biases)
        )
        fused = torch.einsum("nv,nvd->nd", weights, decoded)
        return fused * self.scale.deviation + self.scale.mean, weights, decoded

    def loss(self, views: ViewTensors, labels: Tensor) -> Tensor:
        """Cross entropy plus the weighted mean squared error of the views' scaled features."""
        fused, _, decoded = self.fuse_features(views)
        entropy = functional.binary_cross_entropy_with_logits(self.head(fused).squeeze(1), labels)
        error = (decoded - self.scale(views.features)).square().mean(dim=2)
        total: Tensor = entropy + self.reconstruction * error[views.present].mean()
        return total


class AttentionFusion(FusionNetwork):
    """Views attend to each other with a bias by their places; global ⧺ mean tile token → logit."""

    def __init__(self, width: int, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale, self.scale_terms = Scale(width), Scale(3)
        self.token = nn.Linear(width, dim)
        self.place = nn.Linear(4, dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.mixed = nn.Linear(dim, dim)
        self.bias = nn.Linear(6, heads, bias=False)
        nn.init.zeros_(self.bias.weight)
        self.output = zero_linear(2 * dim + 3)

    def fit_start(self, views: ViewTensors, generator: torch.Generator) -> None:
        """Scales of the features of all views, and of the logits."""
        self.scale.fit(views.features[views.present])
        self.scale_terms.fit(logit_terms(views))

    def forward(self, views: ViewTensors) -> Tensor:
        """Fused logits [N]."""
        tokens = self.token(self.scale(views.features)) + self.place(views.places)  # [N, V, dim]
        n, v, dim = tokens.shape
        split = self.query_key_value(tokens).view(n, v, 3, self.heads, dim // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [N, heads, V, dim / heads]
        mixed = attend(query, key, value, self._bias(views), pick_kernel(query))
        tokens = tokens + self.mixed(mixed.transpose(1, 2).reshape(n, v, dim))
        whole = masked_mean(tokens, views.present & ~views.tiles)
        tiles = masked_mean(tokens, views.tiles)
        terms = self.scale_terms(logit_terms(views))
        logits: Tensor = self.output(torch.cat([whole, tiles, terms], dim=1)).squeeze(1)
        return logits

    def _bias(self, views: ViewTensors) -> Tensor:
        """Added to the attention's scores [N, heads, V, V]; -inf where the key does not exist."""
        apart = views.places[:, None] - views.places[:, :, None]  # key minus query [N, V, V, 4]
        bias = self.bias(torch.cat([apart, apart[..., :2].square()], dim=3)).permute(0, 3, 1, 2)
        masked: Tensor = bias.masked_fill(~views.present[:, None, None, :], -torch.inf)
        return masked


class AverageFusion(FusionNetwork):
    """The mean of the logits of several networks; each was fitted on its own."""

    def __init__(self, members: Sequence[FusionNetwork]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, views: ViewTensors) -> Tensor:
        """Fused logits [N]."""
        return torch.stack([member(views) for member in self.members]).mean(dim=0)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, kernel: Kernel) -> Tensor:
    """Scaled dot-product attention [N, H, V, d] with a bias [N, H, V, V] on the scores."""
    if kernel == "sdpa":
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    from torch.nn.attention.flex_attention import flex_attention

    def add_bias(score: Tensor, n: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + bias[n, head, q, k]

    # Compiled it is one fused kernel; eager, on a CPU, it is there for comparison.
    run: Any = torch.compile(flex_attention) if query.is_cuda else flex_attention
    result: Tensor = run(query.contiguous(), key.contiguous(), value.contiguous(), add_bias)
    return result


def pick_kernel(query: Tensor) -> Kernel:
    """FlexAttention where it can be the faster one: on a GPU, with at least one whole block of views."""
    return "flex" if query.is_cuda and query.shape[2] >= FLEX_BLOCK else "sdpa"


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [N, V] or [N, V, D] over the views of a mask [N, V]; 0 where there is none."""
    weights = mask.to(values.dtype)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("nv,nv...->n...", weights, values)


def zero_linear(width: int) -> nn.Linear:
    """A linear layer to one logit that starts at zero."""
    layer = nn.Linear(width, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def freeze_head(head: nn.Module | None) -> nn.Module | None:
    """A copy of the classifier's head in evaluation mode, without gradients."""
    if head is None:
        return None
    return copy.deepcopy(head).cpu().eval().requires_grad_(requires_grad=False)


def build_network(config: FusionConfig, head: nn.Module | None) -> FusionNetwork:
    """The network of a trained mode, the mean of several where `config` says so; see `build_member`."""
    members = [build_member(config, head) for _ in range(int(config.options["fits"]))]
    return AverageFusion(members) if len(members) > 1 else members[0]


def build_member(config: FusionConfig, head: nn.Module | None) -> FusionNetwork:
    """One network of a trained mode, at its start but for scales; `head` is a frozen one.

    Raises
    ------
    UserError
        `latent` without a head.
    """
    options = {name: int(value) for name, value in config.options.items()}
    if config.mode == "mlp":
        return MlpFusion(config.features, options["hidden_layers"], options["hidden_dim"])
    if config.mode == "attention":
        return AttentionFusion(
            config.features, options["attention_dim"], options["attention_heads"]
        )
    if head is None:
        raise UserError("fusion mode latent needs the classifier's head")
    return LatentFusion(
        config.features, len(view_names(config.grid)), options["latent_dim"],
        float(config.options["reconstruction_weight"]), head,
    )  # fmt: skip
