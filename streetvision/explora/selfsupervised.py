"""Phase 4a: what can be learned from two views of an image without a label.

Objectives (SimCLR, BYOL, SwAV, BYOL + SwAV) behind one interface, a gradient cache for batches that do not fit
in memory, and measures of the learned space. Losses are computed in float32 whatever the autocast.

Over several ranks every objective is that of the whole batch: with `gather`, candidates and codes come
from all ranks, and DDP's mean of the ranks' gradients is the gradient of one rank with the whole batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from streetvision.core.errors import UserError
from streetvision.core.params import Explora

Pair = tuple[Tensor, Tensor]  # the first and the second view of the same N images, row by row

# Embeddings have collapsed where they fill fewer directions than this (RankMe) …
COLLAPSE_RANK = 1.5
# … or scatter less than this around their mean; 1 is evenly over the sphere, 0 all in one point. An untrained
# net has about 0.1, which is why training is slow at first.
COLLAPSE_SPREAD = 0.03


# --------------------------------------------------------------------------- ranks


class _Gather(torch.autograd.Function):
    """Rows of all ranks; the gradient of a row is the sum of what all ranks say about it."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.n_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        start = dist.get_rank() * context.n_rows
        return gradient[start : start + context.n_rows]


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Gather rows [n, D] of all ranks, with gradients.

    Every rank must hold the same number of rows. Since DDP averages gradients over ranks and this backward
    sums them, a mean over ranks of per-rank losses gets its exact gradient.

    Returns
    -------
    rows of all ranks in their order [N, D], and the position of this rank's first one
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    return cast("Tensor", _Gather.apply(rows)), dist.get_rank() * len(rows)


# --------------------------------------------------------------------------- losses


def _float32(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def nt_xent(first: Tensor, second: Tensor, temperature: float, *, gather: bool = False) -> Tensor:
    """Normalised temperature-scaled cross entropy of SimCLR; Chen et al. 2020, arXiv 2002.05709.

    Each of the 2N views has to find the other view of its image among the 2N − 1 others; negatives come from
    the batch alone. For embeddings without any structure the loss is about log(2N − 1).

    Parameters
    ----------
    first, second: embeddings [N, D] of the two views, of any length
    temperature: divides cosine similarities
    gather: find among the views of all ranks; the mean over this rank's views is returned

    Returns
    -------
    scalar, float32
    """
    with _float32(first):
        own = torch.stack(
            [
                functional.normalize(first.float(), dim=1),
                functional.normalize(second.float(), dim=1),
            ],
            dim=1,
        )  # [n, 2, D]
        everyone, start = gather_rows(own) if gather else (own, 0)  # [N, 2, D]
        logits = own.flatten(0, 1) @ everyone.flatten(0, 1).T / temperature  # [2n, 2N]
        row = torch.arange(len(logits), device=logits.device)
        itself = row + 2 * start
        logits[row, itself] = -math.inf
        # Views of one image are neighbours: 0 and 1, 2 and 3, …
        return functional.cross_entropy(logits, itself ^ 1)


def byol_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean of 2 − 2 cos of predictions [N, D] and the teacher's embeddings [N, D]; arXiv 2006.07733, eq. 2.

    0 where they agree, 2 for unrelated ones, 4 at most. No gradient reaches `target`.
    """
    with _float32(predicted):
        return (
            2 - 2 * functional.cosine_similarity(predicted.float(), target.detach().float()).mean()
        )


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign rows softly to columns, so that all columns get about the same mass; arXiv 2006.09882, eq. 3–5.

    Computed on logarithms: exp(score / 0.05) would leave float32's range for scores beyond ± 4.4.

    Parameters
    ----------
    scores: similarities [N, K] of samples and prototypes
    epsilon: smaller is harder
    iterations: of normalising columns, then rows

    Returns
    -------
    codes [N, K], each row adds up to 1
    """
    logarithms = scores.float() / epsilon
    for _ in range(iterations):
        logarithms = logarithms - logarithms.logsumexp(dim=0, keepdim=True)
        logarithms = logarithms - logarithms.logsumexp(dim=1, keepdim=True)
    return logarithms.exp()


def swav_loss(
    first: Tensor,
    second: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    *,
    gather: bool = False,
) -> Tensor:
    """Predict the prototypes of one view from the other; Caron et al. 2020, arXiv 2006.09882, eq. 1–2.

    Parameters
    ----------
    first, second: cosine similarities [N, K] of the two views and the prototypes
    temperature: divides them in the prediction
    epsilon, iterations: see `sinkhorn`
    gather: balance the codes over the samples of all ranks

    Returns
    -------
    scalar, float32; log K where nothing is predicted
    """

    def codes(scores: Tensor) -> Tensor:
        everyone, start = gather_rows(scores.detach()) if gather else (scores, 0)
        return sinkhorn(everyone, epsilon, iterations)[start : start + len(scores)]

    with _float32(first):
        loss = torch.zeros((), device=first.device)
        for assigned, predicting in ((first, second), (second, first)):
            predicted = (predicting.float() / temperature).log_softmax(dim=1)
            loss = loss - (codes(assigned.float()) * predicted).sum(dim=1).mean() / 2
        return loss


# --------------------------------------------------------------------------- objectives


class ProjectionHead(nn.Sequential):
    """Features [N, `inputs`] → embeddings [N, `outputs`]: Linear, LayerNorm, GELU, Linear."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs)
        )


class Objective(nn.Module, ABC):
    """Heads and loss on the features of two views; the backbone is the caller's.

    Where `needs_teacher`, the caller also keeps a moving average of the backbone, hands its features in, and
    calls `update_teacher` after each step.
    """

    needs_teacher: ClassVar[bool] = False

    @abstractmethod
    def embeddings(self, features: Tensor) -> tuple[Tensor, ...]:
        """Embeddings [N, D] of features [N, F], one for each of the objective's heads."""

    @abstractmethod
    def loss(self, features: Pair, teacher: Pair | None = None, *, gather: bool = False) -> Tensor:
        """Scalar loss in float32 of features [N, F] of two views.

        `teacher` are the teacher backbone's features of the same views, `gather` takes all ranks' samples.
        """

    def update_teacher(self, decay: float) -> None:
        """Move the teacher's heads towards the student's; nothing without a teacher."""
        del decay


class SimCLR(Objective):
    """NT-Xent on projected features."""

    def __init__(self, explora: Explora, num_features: int) -> None:
        super().__init__()
        self.temperature = explora.temperature
        self.projection = _projection(explora, num_features)

    def embeddings(self, features: Tensor) -> tuple[Tensor, ...]:
        """Projected features."""
        return (self.projection(features),)

    def loss(self, features: Pair, teacher: Pair | None = None, *, gather: bool = False) -> Tensor:
        """See `nt_xent`."""
        del teacher
        first, second = (self.projection(view) for view in features)
        return nt_xent(first, second, self.temperature, gather=gather)


class BYOL(Objective):
    """Predict the teacher's embedding of the other view; the sum of both directions, as in the paper."""

    needs_teacher = True

    def __init__(self, explora: Explora, num_features: int) -> None:
        super().__init__()
        width = explora.projection_dim
        self.projection = _projection(explora, num_features)
        self.predictor = ProjectionHead(width, explora.projection_hidden, width)
        self.teacher = deepcopy(self.projection).requires_grad_(requires_grad=False)

    def embeddings(self, features: Tensor) -> tuple[Tensor, ...]:
        """Projected features, before the predictor."""
        return (self.projection(features),)

    def loss(self, features: Pair, teacher: Pair | None = None, *, gather: bool = False) -> Tensor:
        """See `byol_loss`; a mean over samples, so ranks need not meet."""
        del gather
        if teacher is None:
            raise ValueError("BYOL needs the features of its teacher")
        first, second = (self.predictor(self.projection(view)) for view in features)
        with torch.no_grad():
            first_target, second_target = (self.teacher(view) for view in teacher)
        return byol_loss(first, second_target) + byol_loss(second, first_target)

    def update_teacher(self, decay: float) -> None:
        """Move the teacher's projection."""
        move_average(self.teacher, self.projection, decay)


class SwAV(Objective):
    """Swapped prediction of balanced prototype assignments; prototypes are learned unit vectors."""

    def __init__(self, explora: Explora, num_features: int) -> None:
        super().__init__()
        self.temperature = explora.temperature
        self.epsilon = explora.sinkhorn_epsilon
        self.iterations = explora.sinkhorn_iterations
        self.projection = _projection(explora, num_features)
        self.prototypes = nn.Parameter(torch.randn(explora.prototypes, explora.projection_dim))

    def embeddings(self, features: Tensor) -> tuple[Tensor, ...]:
        """Projected features, before the comparison with the prototypes."""
        return (self.projection(features),)

    def loss(self, features: Pair, teacher: Pair | None = None, *, gather: bool = False) -> Tensor:
        """See `swav_loss`."""
        del teacher
        first, second = (self._scores(self.projection(view)) for view in features)
        return swav_loss(
            first, second, self.temperature, self.epsilon, self.iterations, gather=gather
        )

    def _scores(self, embeddings: Tensor) -> Tensor:
        with _float32(embeddings):
            prototypes = functional.normalize(self.prototypes.float(), dim=1)
            return functional.normalize(embeddings.float(), dim=1) @ prototypes.T


class Combined(Objective):
    """The sum of objectives, each with its own heads, on one pass of the backbone."""

    def __init__(self, parts: Sequence[Objective]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Any part does."""
        return any(part.needs_teacher for part in self._parts)

    @property
    def _parts(self) -> list[Objective]:
        return [cast("Objective", part) for part in self.parts]

    def embeddings(self, features: Tensor) -> tuple[Tensor, ...]:
        """Those of all parts, in their order."""
        return tuple(value for part in self._parts for value in part.embeddings(features))

    def loss(self, features: Pair, teacher: Pair | None = None, *, gather: bool = False) -> Tensor:
        """The sum over parts."""
        losses = [part.loss(features, teacher, gather=gather) for part in self._parts]
        return torch.stack(losses).sum()

    def update_teacher(self, decay: float) -> None:
        """Of every part."""
        for part in self._parts:
            part.update_teacher(decay)


def build_objective(explora: Explora, num_features: int) -> Objective:
    """Build `explora.objective` for a backbone with `num_features` features; draws from torch's generator."""
    if explora.objective == "byol_swav":
        return Combined([BYOL(explora, num_features), SwAV(explora, num_features)])
    kinds: dict[str, type[SimCLR | BYOL | SwAV]] = {"simclr": SimCLR, "byol": BYOL, "swav": SwAV}
    return kinds[explora.objective](explora, num_features)


def _projection(explora: Explora, num_features: int) -> ProjectionHead:
    return ProjectionHead(num_features, explora.projection_hidden, explora.projection_dim)


# --------------------------------------------------------------------------- teacher, gradient cache


@torch.no_grad()
def move_average(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Parameters of the teacher ← decay · teacher + (1 − decay) · student, where the student's are trained."""
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        if new.requires_grad:
            old.lerp_(new, 1 - decay)


def teacher_decay(first: float, step: int, steps: int) -> float:
    """Decay at `step`, from `first` to 1 along half a cosine over `steps`; arXiv 2006.07733, section 3.3."""
    return 1 - (1 - first) * (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))) / 2


def cached_features(backbone: Callable[[Tensor], Tensor], images: Tensor, chunks: int) -> Tensor:
    """Features [N, F] of images [N, 3, H, W], of which one chunk's activations at a time are in memory.

    The gradient cache of Gao et al. 2021 (arXiv 2101.06983): all chunks pass without keeping activations, the
    loss sees the features of the whole batch, and in its backward pass each chunk passes again, with the same
    dropout masks. The gradient is that of the whole batch. This is activation checkpointing with chunks as
    segments, so torch does it. BatchNorm must not take statistics from the batch: `refuse_batch_statistics`.
    """
    if chunks == 1:
        return backbone(images)
    parts = [checkpoint(backbone, chunk, use_reentrant=False) for chunk in images.chunk(chunks)]
    return torch.cat(parts)


def refuse_batch_statistics(backbone: nn.Module) -> None:
    """Raise `UserError` where a BatchNorm in training mode would see chunks, and each of them twice."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise UserError(
                "params.yaml: explora.gradient_cache_chunks above 1 would change the batch statistics of "
                f"{name}; set train.freeze_norm or take a backbone without BatchNorm"
            )


# --------------------------------------------------------------------------- measures of a learned space


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of two views [N, D] on the unit sphere, 0 to 4; Wang & Isola, arXiv 2005.10242."""
    first, second = (functional.normalize(view.double(), dim=1) for view in (first, second))
    return float((first - second).square().sum(dim=1).mean())


def uniformity(embeddings: Tensor) -> float:
    """Log of the mean of exp(−2 d²) over pairs of rows [N, D] on the unit sphere; arXiv 2005.10242.

    0 where all lie in one point; about −4 where they lie evenly on a sphere of many dimensions.
    """
    distances = torch.pdist(functional.normalize(embeddings.double(), dim=1))
    return float((-2 * distances.square()).logsumexp(dim=0) - math.log(len(distances)))


def rankme(embeddings: Tensor) -> float:
    """Effective rank of embeddings [N, D], from 1 to min(N, D): RankMe, arXiv 2210.02885, eq. 1.

    The exponential of the entropy of the singular values, as shares of their sum.
    """
    values = torch.linalg.svdvals(embeddings.double())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def spread(embeddings: Tensor) -> float:
    """Standard deviation of the coordinates of rows [N, D] on the unit sphere, times √D; from 0 to about 1."""
    on_sphere = functional.normalize(embeddings.double(), dim=1)
    return float(on_sphere.std(dim=0, correction=0).mean() * math.sqrt(embeddings.shape[1]))
