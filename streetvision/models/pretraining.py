"""Phase 4a: adapt a backbone to TRAIN's images without labels, watched on VAL_SELECT's images without labels.

With pretrained weights this is ExPLoRA (arXiv 2406.10973): adapters on all but the last blocks, which are
trained in full. Adapters on random weights mean nothing, so without pretrained weights everything is trained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from streetvision.artifacts import write_atomic, write_json_atomic
from streetvision.data.loader import PairImages, loader_workers, training_loader
from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing, contrastive_transform
from streetvision.errors import UserError
from streetvision.models.backbone import freeze_norm_statistics
from streetvision.models.classifier import pick_device
from streetvision.models.loop import LoopSettings, compiled, epoch_loss, run_loop
from streetvision.models.optim import make_optimiser, parameter_groups, warmup_cosine
from streetvision.models.peft import adapter_state, add_adapters, merge_adapters, unfreeze
from streetvision.models.selfsupervised import (
    COLLAPSE_RANK,
    COLLAPSE_SPREAD,
    Objective,
    Pair,
    alignment,
    build_objective,
    cached_features,
    move_average,
    rankme,
    refuse_batch_statistics,
    spread,
    teacher_decay,
    uniformity,
)
from streetvision.params import Compile, Explora, Hardware

log = logging.getLogger(__name__)

Row = dict[str, Any]  # of the history, see `HISTORY_COLUMNS`
PASSTHROUGH = "passthrough"
# VAL_SELECT images that are watched, at most.
MONITORED = 1024
# Largest difference of merged and unmerged features, relative to the largest feature, on this many images.
MERGE_TOLERANCE = 1e-4
MERGE_IMAGES = 8
COLLAPSE_RULE = (
    f"RankMe of the embeddings < {COLLAPSE_RANK:g} or their spread < {COLLAPSE_SPREAD:g}"
)
HISTORY_COLUMNS = (
    "epoch", "train_loss", "loss", "alignment", "uniformity", "rankme", "embedding_rankme",
    "embedding_spread",
)  # fmt: skip


@dataclass(frozen=True)
class AdaptationResult:
    """The adapted backbone, merged; `history` has a row for the start (epoch 0) and one for each epoch.

    Attributes
    ----------
    method: explora, `<objective> pretraining` (no pretrained weights) or passthrough
    adapter: what an adapted backbone has learnt, before merging; empty without adapters
    history: `HISTORY_COLUMNS`; all but `train_loss` are measured on VAL_SELECT
    """

    backbone: nn.Module
    method: str
    adapter: dict[str, Tensor]
    history: list[Row]
    metrics: dict[str, Any]


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

    A run that finds a checkpoint in `scratch` goes on from there. `explora.enabled: false` measures the
    backbone and hands it back as it is.

    Parameters
    ----------
    backbone: images [B, 3, H, W] → features [B, `num_features`]
    monitor_split: images for loss, alignment, uniformity and RankMe
    pretrained: the backbone has learnt something: adapters, merged at the end, instead of all weights
    freeze_norm: BatchNorm keeps its statistics

    Raises
    ------
    UserError
        Adapters or blocks do not fit the backbone, a gradient cache with BatchNorm statistics from the
        batch, or the loss is not finite.
    """
    torch.manual_seed(seed)
    backbone.to(memory_format=torch.channels_last)
    objective = build_objective(explora, int(backbone.num_features))  # type: ignore[arg-type]
    adapting = explora.enabled and pretrained
    if adapting:
        add_adapters(backbone, explora.lora, seed=seed, skip_blocks=explora.unfreeze_blocks)
        unfreeze(backbone, explora.unfreeze_blocks, explora.train_norms)
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
    if not explora.enabled:
        task.to(pick_device(hardware.device))
        start = monitor.measure(task, epoch=0, train_loss=None)
        log.info("explora.enabled is false: the backbone passes through")
        metrics |= {"method": PASSTHROUGH, "trainable_parameters": 0, "start": _readings(start)}
        return AdaptationResult(backbone.cpu().eval(), PASSTHROUGH, {}, [start], metrics)

    if explora.gradient_cache_chunks > 1:
        refuse_batch_statistics(backbone)
    method = "explora" if adapting else f"{explora.objective} pretraining"
    metrics |= {"method": method, **_sizes(backbone, objective), "train_images": len(fit_split)}
    _announce(explora, method, metrics, len(fit_split))
    images = PairImages(fit_split, preprocessing, view, seed)
    settings = LoopSettings(
        explora.epochs, explora.precision, explora.accumulate_batches, seed, scratch, hardware,
        compile_settings,
    )  # fmt: skip
    loader = training_loader(
        images, explora.batch_size, seed, loader_workers(hardware.workers),
        pin_memory=pick_device(hardware.device).type == "cuda",
    )  # fmt: skip
    run_loop(task, loader, [monitor], settings)
    last = monitor.history[-1]
    metrics |= {
        "epochs": explora.epochs,
        "start": _readings(monitor.history[0]),
        "end": _readings(last),
        "train_loss": last["train_loss"],
        "collapsed": monitor.collapsed(last),
        "collapse_rule": COLLAPSE_RULE,
    }
    backbone.cpu().eval()
    adapter = adapter_state(backbone) if adapting else {}
    if adapting:
        metrics |= _merge(backbone, preprocessing.normalise(monitor.views[:MERGE_IMAGES, 0]))
    return AdaptationResult(backbone, method, adapter, monitor.history, metrics)


class AdaptationTask(lightning.LightningModule):  # type: ignore[misc]
    """Two views, a backbone, an objective and, where it needs one, a teacher; apart from the loop.

    The teacher of the backbone is a moving average of it, without dropout; it moves after each optimiser step.
    """

    def __init__(
        self,
        backbone: nn.Module,
        objective: Objective,
        preprocessing: Preprocessing,
        explora: Explora,
        freeze_norm: bool,
        compile_settings: Compile,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.objective = objective
        self.teacher = (
            deepcopy(backbone).requires_grad_(requires_grad=False)
            if objective.needs_teacher
            else None
        )
        self.preprocessing = preprocessing
        self.explora = explora
        self.freeze_norm = freeze_norm
        # Without the wrapping an uncompiled backbone would be registered twice.
        self.run_backbone = partial(compiled(backbone, compile_settings))
        self.train()

    def train(self, mode: bool = True) -> AdaptationTask:
        """Training mode, but for norms that are frozen and the teacher's dropout."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
            for module in self.teacher.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train(mode)
        if self.freeze_norm:
            freeze_norm_statistics(self)
        return self

    def training_step(self, views: Tensor, _: int) -> Tensor:
        """Loss of a batch of pairs, uint8 [B, 2, 3, H, W], over the batches of all ranks."""
        images = self.preprocessing.normalise(views.flatten(0, 1))
        features = self.features(self.run_backbone, images)
        return self.objective.loss(features, self.teacher_features(images), gather=True)

    def features(self, backbone: Any, images: Tensor) -> Pair:
        """Features [B, F] of the two views of normalised images [2B, 3, H, W]."""
        found = cached_features(backbone, images, self.explora.gradient_cache_chunks)
        return found[0::2], found[1::2]

    @torch.no_grad()
    def teacher_features(self, images: Tensor) -> Pair | None:
        """The teacher's, where there is one."""
        return None if self.teacher is None else self.features(self.teacher, images)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, then let the teacher follow."""
        step, steps = self.global_step, int(self.trainer.estimated_stepping_batches)
        super().optimizer_step(*arguments, **options)
        if self.teacher is not None:
            decay = teacher_decay(self.explora.teacher_decay, step, steps)
            move_average(self.teacher, self.backbone, decay)
            self.objective.update_teacher(decay)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip by norm; Lightning's own clipping refuses fused optimisers in mixed precision."""
        if self.explora.gradient_clip > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.explora.gradient_clip)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW; linear warm-up, then cosine to zero, per step."""
        groups = parameter_groups(
            self.backbone, self.objective, learning_rate=self.explora.learning_rate, head_factor=1.0,
            layer_decay=1.0, weight_decay=self.explora.weight_decay,
        )  # fmt: skip
        optimizer = make_optimiser(groups, kind="adamw")
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(steps, self.explora.warmup_fraction)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Monitor(Callback):  # type: ignore[misc]
    """Measures the learned space on the same pairs of views before the first and after each epoch.

    Every rank measures all of them, without the others. The history travels in the checkpoint.
    """

    def __init__(
        self, split: Split, preprocessing: Preprocessing, view: Any, batch_size: int, seed: int
    ) -> None:
        count = min(len(split), MONITORED)
        # The loss depends on the number of negatives: whole batches, where there is one.
        self.batch_size = min(batch_size, count)
        count -= count % self.batch_size
        chosen = split.select([row * len(split) // count for row in range(count)])
        pairs = PairImages(chosen, preprocessing, view, seed)
        self.views = torch.stack([pairs[0, row, 0] for row in range(count)])  # [M, 2, 3, H, W]
        self.history: list[Row] = []

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the checkpoint ended."""
        self.history = list(state_dict["history"])

    def on_train_start(self, trainer: Any, task: AdaptationTask) -> None:
        """Measure the start, unless a resumed run has done so."""
        del trainer
        if not self.history:
            self.history.append(self.measure(task, epoch=0, train_loss=None))
            self._tell("start")

    def on_train_epoch_end(self, trainer: Any, task: AdaptationTask) -> None:
        """Measure, remember, and say where the embeddings have collapsed."""
        epoch, train_loss = trainer.current_epoch + 1, epoch_loss(trainer)
        row = self.measure(task, epoch, train_loss)
        if not all(math.isfinite(value) for value in row.values()):
            raise UserError(
                f"self-supervised training diverged in epoch {epoch}: its loss is {train_loss}, or its "
                "last step broke the weights; lower explora.learning_rate"
            )
        self.history.append(row)
        self._tell(f"epoch {epoch} of {trainer.max_epochs}: training loss {train_loss:.4f}")
        if self.collapsed(row):
            log.warning("the embeddings have collapsed: %s", COLLAPSE_RULE)

    @staticmethod
    def collapsed(row: Row) -> bool:
        """Whether embeddings tell images apart no longer; see `COLLAPSE_RULE`."""
        return row["embedding_rankme"] < COLLAPSE_RANK or row["embedding_spread"] < COLLAPSE_SPREAD

    @torch.no_grad()
    def measure(self, task: AdaptationTask, epoch: int, train_loss: float | None) -> Row:
        """One row of the history; float32, evaluation mode, afterwards training mode again.

        Alignment, uniformity and RankMe are those of the backbone's features, which are kept; of several
        heads' embeddings, which the objective shapes, the worst is reported.
        """
        task.eval()
        losses, first, second, embeddings = [], [], [], []
        for views in torch.split(self.views, self.batch_size):
            with torch.autocast(task.device.type, enabled=False):
                images = task.preprocessing.normalise(views.to(task.device).flatten(0, 1))
                pair = task.features(task.backbone, images)
                losses.append(task.objective.loss(pair, task.teacher_features(images)).double())
                embeddings.append([value.cpu() for value in task.objective.embeddings(pair[0])])
            first.append(pair[0].cpu())
            second.append(pair[1].cpu())
        task.train()
        features = torch.cat(first)
        heads = [torch.cat(batches) for batches in zip(*embeddings, strict=True)]
        loss = float(torch.stack(losses).mean())
        if not (math.isfinite(loss) and bool(torch.isfinite(features).all())):
            return {"epoch": epoch, "train_loss": train_loss, "loss": math.nan}
        return {
            "epoch": epoch,
            "train_loss": train_loss,
            "loss": loss,
            "alignment": alignment(features, torch.cat(second)),
            "uniformity": uniformity(features),
            "rankme": rankme(features),
            "embedding_rankme": min(rankme(head) for head in heads),
            "embedding_spread": min(spread(head) for head in heads),
        }

    def _tell(self, when: str) -> None:
        row = self.history[-1]
        log.info(
            "%s; VAL_SELECT loss %.4f, alignment %.3f, uniformity %.3f, RankMe %.1f",
            when, row["loss"], row["alignment"], row["uniformity"], row["rankme"],
        )  # fmt: skip


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


def _announce(explora: Explora, method: str, metrics: Mapping[str, Any], images: int) -> None:
    """Say before the first step what will be done, and what no setting can buy."""
    batch = min(explora.batch_size, images)
    log.info(
        "%s: %s of %s parameters are trained, on %d images in batches of %d",
        method, f"{metrics['trainable_parameters']:,}", f"{metrics['parameters']:,}", images, batch,
    )  # fmt: skip
    if explora.objective == "simclr":
        log.info(
            "each view has %d negatives, an untrained loss is about log(%d) = %.2f",
            2 * batch - 2, 2 * batch - 1, math.log(2 * batch - 1),
        )  # fmt: skip
    if explora.accumulate_batches > 1:
        log.info(
            "explora.accumulate_batches %d adds no negatives; explora.batch_size does, in the same memory "
            "with explora.gradient_cache_chunks", explora.accumulate_batches,
        )  # fmt: skip


def _sizes(backbone: nn.Module, objective: nn.Module) -> dict[str, int]:
    trainable = [p.numel() for p in backbone.parameters() if p.requires_grad]
    heads = [p.numel() for p in objective.parameters() if p.requires_grad]
    return {"trainable_parameters": sum(trainable), "head_parameters": sum(heads)}


def _readings(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in {"epoch", "train_loss"}}


@torch.no_grad()
def _merge(backbone: nn.Module, images: Tensor) -> dict[str, float]:
    """Merge the adapters in place and hold the features against the unmerged ones."""
    before = backbone(images)
    after = merge_adapters(backbone)(images)
    error = float((after - before).abs().max() / before.abs().max())
    if not error <= MERGE_TOLERANCE:
        raise RuntimeError(
            f"merging the adapters changes features by {error:.2g} of the largest, "
            f"more than {MERGE_TOLERANCE:g}"
        )
    return {"merge_error": error, "merge_tolerance": MERGE_TOLERANCE}
