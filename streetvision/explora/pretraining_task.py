"""The task of learning from two views: features, teacher, loss, optimiser; apart from the loop."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from streetvision.core.params import Compile, Explora
from streetvision.data.transforms import Preprocessing
from streetvision.explora.selfsupervised import (
    Objective,
    Pair,
    cached_features,
    move_average,
    teacher_decay,
)
from streetvision.models.backbone import freeze_norm_statistics
from streetvision.models.loop import compiled
from streetvision.models.optim import make_optimiser, parameter_groups, warmup_cosine


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
        self.run = compiled(backbone, compile_settings)
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
        features = self.features(self.run, images)
        return self.objective.loss(features, self.teacher_features(images), gather=True)

    def features(self, backbone: Callable[[Tensor], Tensor], images: Tensor) -> Pair:
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
