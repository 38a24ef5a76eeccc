"""Fitting fusion on TRAIN's fusion part, and choosing a mode on VAL_SELECT."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streetvision.core.errors import UserError
from streetvision.core.params import Cvfm, ViewGrid
from streetvision.data.views import ViewScores
from streetvision.decision.calibrators import CalibrationMap, Platt, PlattMap
from streetvision.decision.folds import group_folds
from streetvision.decision.inputs import sigmoid
from streetvision.decision.threshold import metrics_at_threshold
from streetvision.fusion.fusion import MODES, TRAINED, Fusion, FusionConfig
from streetvision.fusion.networks import (
    AverageFusion,
    FusionNetwork,
    ViewTensors,
    build_member,
    freeze_head,
    view_tensors,
)
from streetvision.stats.metrics import all_metrics

log = logging.getLogger(__name__)
# Steps of L-BFGS an epoch.
ITERATIONS = 2


@dataclass(frozen=True)
class LabelledViews:
    """Scores of N images' views with labels [N], 1 = roadwork, and groups [N]."""

    scores: ViewScores
    labels: NDArray[np.int64]
    groups: NDArray[Any]

    @property
    def both_classes(self) -> bool:
        """Whether there is something to learn from."""
        return len(np.unique(self.labels)) == 2


@dataclass(frozen=True)
class FusionFit:
    """A fitted fusion; of each of its networks the chosen epoch, 0 the start, and all VAL_SELECT losses."""

    fusion: Fusion
    epochs: tuple[int, ...]
    log_losses: tuple[tuple[float, ...], ...]


def fit_fusion(
    mode: str,
    settings: Cvfm,
    grid: ViewGrid,
    train: LabelledViews,
    select: LabelledViews,
    head: nn.Module | None,
    seed: int,
) -> FusionFit:
    """Fit one trained mode: the mean logit of `settings.fits` networks.

    Each network leaves another fifth of the groups out (`group_folds`). On few groups the mean is better
    than its members by far, and about as good as one network that is fitted on all of them, which is what
    one network, or too few groups to leave any out, means. The result depends on the arrays and `seed` alone.

    Raises
    ------
    UserError
        A part has one class only, or no features.
    """
    for name, part in (("TRAIN's fusion part", train), ("VAL_SELECT", select)):
        if not part.both_classes:
            raise UserError(
                f"cvfm.mode {mode} is fitted on TRAIN's fusion part and stopped on VAL_SELECT, and "
                f"{name} does not have both classes; choose a mode without training"
            )
    if train.scores.features is None:
        raise UserError(f"cvfm.mode {mode} needs features")
    kept = _kept_images(train, settings.fits, seed)
    settings = settings.model_copy(update={"fits": len(kept)})
    config = FusionConfig.of(mode, settings, grid, train.scores.features.shape[2])
    frozen = freeze_head(head)
    views, judged = _tensors(train), _tensors(select)
    labels = torch.as_tensor(train.labels, dtype=torch.float32)
    members, epochs, losses = [], [], []
    for number, rows in enumerate(kept):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_member_seed(seed, number))
            network = build_member(config, frozen)
        history = _fit_network(
            network, settings, (views.rows(rows), labels[rows]), (judged, select.labels),
            _member_seed(seed, number), mode,
        )  # fmt: skip
        members.append(network)
        epochs.append(int(np.argmin(history)))
        losses.append(tuple(history))
    network = AverageFusion(members) if len(members) > 1 else members[0]
    return FusionFit(Fusion(config, network), tuple(epochs), tuple(losses))


def _kept_images(train: LabelledViews, fits: int, seed: int) -> list[torch.Tensor]:
    """Rows that each network is fitted on."""
    folds = group_folds(train.labels == 1, train.groups, seed) if fits > 1 else []
    if not folds:
        return [torch.arange(len(train.labels))]
    return [torch.from_numpy(np.flatnonzero(~left_out)) for left_out in folds[:fits]]


def _member_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _fit_network(
    network: FusionNetwork,
    settings: Cvfm,
    fitting: tuple[ViewTensors, torch.Tensor],
    judging: tuple[ViewTensors, NDArray[np.int64]],
    seed: int,
    mode: str,
) -> list[float]:
    """Fit one network in place; the epoch with the lowest VAL_SELECT log loss counts, the start among them.

    The loss is the mean over the images plus weight_decay / 2 · |W - W₀|² of all weight matrices W, whose
    start is W₀. L-BFGS on all images at once, with the dropped views drawn once: no learning rate, and
    on hundreds of images of a thousand features each it gets where Adam does not. Returns the VAL_SELECT
    log loss of the start and after each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    network.fit_start(fitting[0], generator)
    parameters = network.trainable()
    fixed = {name: v.clone() for name, v in network.state_dict().items() if name not in parameters}
    start = {name: v.detach().clone() for name, v in parameters.items() if v.ndim > 1}
    views = drop_views(fitting[0], settings.view_dropout, generator)
    optimiser = torch.optim.LBFGS(
        parameters.values(), max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        optimiser.zero_grad()
        away = [(parameters[name] - value).square().sum() for name, value in start.items()]
        loss = network.loss(views, fitting[1])
        loss = loss + settings.weight_decay / 2 * torch.stack(away).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    history = [_log_loss(network, *judging)]
    best, chosen = _copy(network), 0
    for epoch in range(1, settings.epochs + 1):
        optimiser.step(objective)  # type: ignore[no-untyped-call]
        history.append(_log_loss(network, *judging))
        if not np.isfinite(history[-1]):
            raise UserError(f"cvfm.mode {mode} diverged in epoch {epoch}; raise cvfm.weight_decay")
        if history[-1] < history[chosen]:
            best, chosen = _copy(network), epoch
        if epoch - chosen >= settings.patience_epochs:
            break
    state = network.state_dict()
    if any(not torch.equal(state[name], value) for name, value in fixed.items()):
        raise RuntimeError("something frozen was changed while fusion was fitted")
    network.load_state_dict(best)
    return history


def drop_views(views: ViewTensors, share: float, generator: torch.Generator) -> ViewTensors:
    """For a `share` of the images keep the global views and a random number of random tiles, also none."""
    n, v = views.logits.shape
    chosen = torch.rand(n, 1, generator=generator) < share
    keep = torch.rand(n, 1, generator=generator)
    dropped = chosen & views.tiles & (torch.rand(n, v, generator=generator) >= keep)
    return views._replace(present=views.present & ~dropped, tiles=views.tiles & ~dropped)


def fit_modes(
    settings: Cvfm,
    grid: ViewGrid,
    train: LabelledViews,
    select: LabelledViews,
    head: nn.Module | None,
    seed: int,
) -> dict[str, FusionFit]:
    """Every mode that can be told apart on these views, and in any case `settings.mode`, by name."""
    several = train.scores.logits.shape[1] > 1
    fits: dict[str, FusionFit] = {}
    for mode in MODES:
        asked = mode == settings.mode
        if not several and mode != "single" and not asked:
            continue  # with one view the rules are all the same
        if mode in TRAINED and not (train.both_classes and select.both_classes) and not asked:
            log.warning("%s is left out: TRAIN's fusion part or VAL_SELECT has one class", mode)
            continue
        if mode in TRAINED:
            fits[mode] = fit_fusion(mode, settings, grid, train, select, head, seed)
        else:
            fits[mode] = FusionFit(Fusion(FusionConfig.of(mode, settings, grid, 0)), (0,), ())
    return fits


def learnt_scale(fusion: Fusion, train: LabelledViews) -> CalibrationMap:
    """What gives a rule without training the bias and scale that trained modes learn: a Platt map."""
    if fusion.network is None and train.both_classes:
        return Platt().fit(fusion.fuse(*train.scores), train.labels)
    return PlattMap(1.0, 0.0)


def choose_fusion(
    settings: Cvfm,
    grid: ViewGrid,
    train: LabelledViews,
    select: Mapping[str, LabelledViews],
    fit_on: str,
    head: nn.Module | None,
    phase_2_threshold: float,
    seed: int,
) -> tuple[Fusion, dict[str, Any]]:
    """Fit every mode, report each on VAL_SELECT and return the chosen one with the report.

    `train`'s images are under the condition `fit_on`, which is also the one of `select`'s conditions that
    decides: training stops, `auto` chooses and the gain is counted there; the others are reported.
    `auto` takes the lowest log loss, the earlier in `MODES` of equals. A rule without training has no
    say on bias and scale, which the calibrator sets later: for its log loss and MCC at 0.5, and for nothing
    else, its logits pass a Platt map fitted on TRAIN's fusion part. Trained modes learnt both there.

    Raises
    ------
    UserError
        The mode that was asked for cannot be fitted.
    """
    fits = fit_modes(settings, grid, train, select[fit_on], head, seed)
    rows: dict[str, dict[str, Any]] = {}
    for mode, fit in fits.items():
        rows[mode] = _costs(fit) | {
            name: _scores(fit.fusion, train, part, phase_2_threshold)
            for name, part in select.items()
        }
        log.info("%s: VAL_SELECT, %s: log loss %.4f, MCC %.4f", mode, fit_on,
                 rows[mode][fit_on]["log_loss"], rows[mode][fit_on]["mcc"])  # fmt: skip
    chosen: str = settings.mode
    if chosen == "auto":
        chosen = min(rows, key=lambda mode: rows[mode][fit_on]["log_loss"])
    report = {
        "fit_on": fit_on,
        "mode": chosen,
        "modes": rows,
        "gain": {
            name: rows[chosen][fit_on][name] - rows["single"][fit_on][name]
            for name in ("mcc", "log_loss")
        },
        "fusion_images": len(train.labels),
        "val_select_images": len(select[fit_on].labels),
    }
    return fits[chosen].fusion, report


def _costs(fit: FusionFit) -> dict[str, float]:
    network = fit.fusion.network
    return {
        "views": fit.fusion.n_views,
        "parameters": sum(p.numel() for p in network.trainable().values()) if network else 0,
        "epoch": float(np.mean(fit.epochs)),
    }


def _scores(
    fusion: Fusion, train: LabelledViews, select: LabelledViews, threshold: float
) -> dict[str, float]:
    """One mode on VAL_SELECT under one condition; its bias and scale stay those of `train`."""
    fused = fusion.fuse(*select.scores)
    scores = all_metrics(select.labels, sigmoid(learnt_scale(fusion, train)(fused)))
    at_threshold = metrics_at_threshold(fused, select.labels, threshold)
    return {
        "log_loss": scores["log_loss"],
        "mcc": scores["mcc"],
        "mcc_at_phase_2_threshold": at_threshold["mcc"],
    }


def _tensors(part: LabelledViews) -> ViewTensors:
    scores = part.scores
    if scores.features is None:
        raise UserError("trained fusion needs features")
    return view_tensors(
        scores.logits, scores.features, scores.content > 0, scores.boxes, torch.float32
    )


@torch.no_grad()
def _log_loss(network: FusionNetwork, views: ViewTensors, labels: NDArray[np.int64]) -> float:
    truth = torch.as_tensor(labels, dtype=torch.float32)
    return float(nn.functional.binary_cross_entropy_with_logits(network(views), truth))


def _copy(network: FusionNetwork) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
