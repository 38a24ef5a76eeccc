"""Fitting fusion on TRAIN's fusion part, and choosing a mode on VAL_SELECT."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streetvision.data.views import ViewScores
from streetvision.decision.calibrators import CalibrationMap, Platt, PlattMap
from streetvision.decision.inputs import sigmoid
from streetvision.decision.threshold import metrics_at_threshold
from streetvision.errors import UserError
from streetvision.evaluation.metrics import all_metrics
from streetvision.models.fusion import MODES, TRAINED, Fusion, FusionConfig
from streetvision.models.fusion_networks import (
    FusionNetwork,
    ViewTensors,
    build_network,
    freeze_head,
    view_tensors,
)
from streetvision.params import Cvfm, ViewGrid

log = logging.getLogger(__name__)
# Steps of L-BFGS an epoch.
ITERATIONS = 2


@dataclass(frozen=True)
class LabelledViews:
    """Scores of N images' views with labels [N], 1 = roadwork."""

    scores: ViewScores
    labels: NDArray[np.int64]

    @property
    def both_classes(self) -> bool:
        """Whether there is something to learn from."""
        return len(np.unique(self.labels)) == 2


@dataclass(frozen=True)
class FusionFit:
    """A fitted fusion; `epoch` is the one that was chosen, 0 the start; `log_losses` of VAL_SELECT."""

    fusion: Fusion
    epoch: int
    log_losses: tuple[float, ...]


def fit_fusion(
    mode: str,
    settings: Cvfm,
    grid: ViewGrid,
    train: LabelledViews,
    select: LabelledViews,
    head: nn.Module | None,
    seed: int,
) -> FusionFit:
    """Fit one trained mode; the epoch with the lowest VAL_SELECT log loss counts, the start among them.

    The loss is the mean over the images plus weight_decay / 2 · |W - W₀|² of all weight matrices W, whose
    start is W₀. L-BFGS on all images at once, with the dropped views drawn once: no learning rate, and
    on hundreds of images of a thousand features each it gets where Adam does not. The result depends on
    the arrays and `seed` alone.

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
    config = FusionConfig.of(mode, settings, grid, train.scores.features.shape[2])
    fitting, judged = _tensors(train), _tensors(select)
    labels = torch.as_tensor(train.labels, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(config, freeze_head(head))
    network.fit_start(fitting, generator)
    parameters = network.trainable()
    fixed = {name: v.clone() for name, v in network.state_dict().items() if name not in parameters}
    start = {name: v.detach().clone() for name, v in parameters.items() if v.ndim > 1}
    views = drop_views(fitting, settings.view_dropout, generator)
    optimiser = torch.optim.LBFGS(
        parameters.values(), max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        optimiser.zero_grad()
        away = [(parameters[name] - value).square().sum() for name, value in start.items()]
        loss = network.loss(views, labels) + settings.weight_decay / 2 * torch.stack(away).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    history = [_log_loss(network, judged, select.labels)]
    best, chosen = _copy(network), 0
    for epoch in range(1, settings.epochs + 1):
        optimiser.step(objective)  # type: ignore[no-untyped-call]
        history.append(_log_loss(network, judged, select.labels))
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
    return FusionFit(Fusion(config, network), chosen, tuple(history))


def drop_views(views: ViewTensors, share: float, generator: torch.Generator) -> ViewTensors:
    """For a `share` of the images keep the global views and a random number of random tiles, also none."""
    n, v = views.logits.shape
    chosen = torch.rand(n, 1, generator=generator) < share
    keep = torch.rand(n, 1, generator=generator)
    dropped = chosen & views.tiles & (torch.rand(n, v, generator=generator) >= keep)
    return views._replace(present=views.present & ~dropped, tiles=views.tiles & ~dropped)


def choose_fusion(
    settings: Cvfm,
    grid: ViewGrid,
    train: LabelledViews,
    select: LabelledViews,
    head: nn.Module | None,
    phase_2_threshold: float,
    seed: int,
) -> tuple[Fusion, dict[str, Any]]:
    """Fit every mode, report each on VAL_SELECT and return the chosen one with the report.

    `auto` takes the lowest log loss, the earlier in `MODES` of equals. A rule without training has no
    say on bias and scale, which the calibrator sets later: for its log loss and MCC at 0.5, and for nothing
    else, its logits pass a Platt map fitted on TRAIN's fusion part. Trained modes learnt both there.

    Raises
    ------
    UserError
        The mode that was asked for cannot be fitted.
    """
    several = train.scores.logits.shape[1] > 1
    fits: dict[str, FusionFit] = {}
    rows: dict[str, dict[str, float]] = {}
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
            fits[mode] = FusionFit(Fusion(FusionConfig.of(mode, settings, grid, 0)), 0, ())
        rows[mode] = _row(fits[mode], train, select, phase_2_threshold)
        log.info("%s: VAL_SELECT log loss %.4f, MCC %.4f", mode, rows[mode]["log_loss"],
                 rows[mode]["mcc"])  # fmt: skip
    chosen: str = settings.mode
    if chosen == "auto":
        chosen = min(rows, key=lambda mode: rows[mode]["log_loss"])
    report = {
        "mode": chosen,
        "modes": rows,
        "gain": {
            "mcc": rows[chosen]["mcc"] - rows["single"]["mcc"],
            "log_loss": rows[chosen]["log_loss"] - rows["single"]["log_loss"],
        },
        "fusion_images": len(train.labels),
        "val_select_images": len(select.labels),
    }
    return fits[chosen].fusion, report


def _row(
    fit: FusionFit, train: LabelledViews, select: LabelledViews, threshold: float
) -> dict[str, float]:
    """One mode on VAL_SELECT."""
    fused = fit.fusion.fuse(*select.scores)
    scale: CalibrationMap = PlattMap(1.0, 0.0)
    if fit.fusion.network is None and train.both_classes:
        scale = Platt().fit(fit.fusion.fuse(*train.scores), train.labels)
    scores = all_metrics(select.labels, sigmoid(scale(fused)))
    at_threshold = metrics_at_threshold(fused, select.labels, threshold)
    network = fit.fusion.network
    return {
        "log_loss": scores["log_loss"],
        "mcc": scores["mcc"],
        "mcc_at_phase_2_threshold": at_threshold["mcc"],
        "views": fit.fusion.n_views,
        "parameters": sum(p.numel() for p in network.trainable().values()) if network else 0,
        "epoch": fit.epoch,
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
