"""Phase 4a: adapt a backbone to TRAIN's images without labels, watched on VAL_SELECT's images without labels.

With pretrained weights this is ExPLoRA (arXiv 2406.10973): adapters on all but the last blocks, which are
trained in full. Adapters on random weights mean nothing, so without pretrained weights everything is trained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streetvision.core.errors import UserError
from streetvision.core.params import Compile, Explora, Hardware
from streetvision.data.loader import PairImages, loader_workers, training_loader
from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing, contrastive_transform
from streetvision.explora.adapted import AdaptationResult, Row
from streetvision.explora.monitor import COLLAPSE_RULE, Monitor
from streetvision.explora.pretraining_task import AdaptationTask
from streetvision.explora.selfsupervised import build_objective, refuse_batch_statistics
from streetvision.models.classifier import pick_device
from streetvision.models.loop import LoopSettings, describe, run_loop
from streetvision.models.peft import adapter_state, add_adapters, merge_adapters, unfreeze

log = logging.getLogger(__name__)

# Largest difference of merged and unmerged features, relative to the largest feature, on this many images.
MERGE_TOLERANCE = 1e-4
MERGE_IMAGES = 8


def adapt_backbone(
    backbone: nn.Module,
    explora: Explora,
    fit_split: Split,
    monitor_split: Split,
    preprocessing: Preprocessing,
    *,
    pretrained: bool,
    freeze_norm: bool,
    seed: int,
    scratch: Path,
    hardware: Hardware,
    compile_settings: Compile,
) -> AdaptationResult:
    """Adapt `backbone`, in place, to the images of `fit_split`; no label is read.

    A run that finds a checkpoint in `scratch` goes on from there. `explora.enabled` is the caller's to heed.

    Parameters
    ----------
    backbone: images [B, 3, H, W] → features [B, `num_features`]
    monitor_split: images for loss, alignment, uniformity and RankMe
    pretrained: the backbone has learnt something: adapters, merged at the end, instead of all weights
    freeze_norm: BatchNorm keeps its statistics

    Raises
    ------
    UserError
        A split of one image, adapters or blocks that do not fit the backbone, a gradient cache with
        BatchNorm statistics from the batch, a loss that is not finite, or a merge that changes features.
    """
    for split in (fit_split, monitor_split):
        if len(split) < 2:
            raise UserError(
                f"{split.name} holds one image; learning to tell images apart needs two"
            )
    backbone.to(memory_format=torch.channels_last)
    if pretrained:
        add_adapters(backbone, explora.lora, seed=seed, skip_blocks=explora.unfreeze_blocks)
        unfreeze(backbone, explora.unfreeze_blocks, explora.train_norms)
    torch.manual_seed(seed)
    objective = build_objective(explora, int(backbone.num_features))  # type: ignore[arg-type]
    task = AdaptationTask(
        backbone, objective, preprocessing, explora, freeze_norm, compile_settings
    )
    view = contrastive_transform(explora, preprocessing.height, preprocessing.width)
    monitor = Monitor(monitor_split, preprocessing, view, explora.batch_size, seed)
    metrics: dict[str, Any] = {
        "objective": explora.objective,
        "monitored_images": len(monitor.views),
        "parameters": sum(p.numel() for p in backbone.parameters()),
    }
    device = pick_device(hardware.device)
    method = "explora" if pretrained else f"{explora.objective} pretraining"
    if explora.gradient_cache_chunks > 1:
        refuse_batch_statistics(backbone)
    cost = _cost(task, (3, preprocessing.height, preprocessing.width), len(fit_split))
    _announce(explora, method, cost, len(fit_split))
    loader = training_loader(
        PairImages(fit_split, preprocessing, view, seed), explora.batch_size, seed,
        loader_workers(hardware.workers), pin_memory=device.type == "cuda",
    )  # fmt: skip
    run_loop(
        task, loader, [monitor],
        LoopSettings(
            explora.epochs, explora.precision, explora.accumulate_batches, seed, scratch, hardware,
            compile_settings,
        ),
    )  # fmt: skip
    backbone.cpu().eval()
    adapter: dict[str, Tensor] = {}
    if pretrained:
        adapter = adapter_state(backbone)
        some = preprocessing.normalise(monitor.views[:MERGE_IMAGES, 0])
        metrics["merge"] = _merge(backbone, some)
    last = monitor.history[-1]
    metrics |= {
        "method": method,
        "trainable_parameters": cost["trainable_parameters"],
        "cost": {key: cost[key] for key in ("flops_per_step", "peak_memory_bytes")},
        "train_images": len(fit_split),
        "epochs": explora.epochs,
        "train_loss": last["train_loss"],
        "start": _readings(monitor.history[0]),
        "end": _readings(last),
        "collapsed": monitor.collapsed(last),
        "collapse_rule": COLLAPSE_RULE,
    }
    return AdaptationResult(backbone, method, adapter, monitor.history, metrics)


def _cost(task: AdaptationTask, shape: tuple[int, int, int], images: int) -> dict[str, int]:
    """What a step costs; as if on one device, since devices change no result."""
    explora, objective = task.explora, task.objective
    views = 2 * min(explora.batch_size, images)
    size = sum(p.numel() for p in task.backbone.parameters())
    heads = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    return describe(
        task.backbone,
        shape,
        images_at_once=-(-views // explora.gradient_cache_chunks),
        images_a_step=views * explora.accumulate_batches,
        # The teacher's, and the second one of a gradient cache.
        extra_passes=objective.needs_teacher + (explora.gradient_cache_chunks > 1),
        extra_bytes=16 * heads + 4 * size * objective.needs_teacher,
    )


def _announce(explora: Explora, method: str, cost: Mapping[str, int], images: int) -> None:
    """Say before the first step what will be done, and what no setting can buy."""
    batch = min(explora.batch_size, images)
    log.info(
        "%s on %d images: %d parameters, %d of them trained; %.3g FLOPs a step of %d pairs of views; "
        "peak of memory about %.2f GB", method, images, cost["parameters"],
        cost["trainable_parameters"], cost["flops_per_step"], batch * explora.accumulate_batches,
        cost["peak_memory_bytes"] / 1e9,
    )  # fmt: skip
    if explora.objective == "simclr":
        log.info(
            "each view has %d negatives; the loss of an untrained net is about log(%d) = %.2f",
            2 * batch - 2, 2 * batch - 1, math.log(2 * batch - 1),
        )  # fmt: skip
    if explora.accumulate_batches > 1:
        log.info(
            "explora.accumulate_batches %d adds no negatives; a larger explora.batch_size does, in the "
            "same memory with explora.gradient_cache_chunks", explora.accumulate_batches,
        )  # fmt: skip


def _readings(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in {"epoch", "train_loss"}}


@torch.no_grad()
def _merge(backbone: nn.Module, images: Tensor) -> dict[str, float]:
    """Merge the adapters in place and hold the features against the unmerged ones."""
    before = backbone(images)
    after = merge_adapters(backbone)(images)
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference <= MERGE_TOLERANCE:
        raise UserError(
            f"merging the adapters changes features by {difference:.2g} of the largest, more than "
            f"{MERGE_TOLERANCE:g}: this backbone cannot be adapted with these explora.lora.targets"
        )
    return {"feature_difference": difference, "tolerance": MERGE_TOLERANCE, "images": len(images)}
