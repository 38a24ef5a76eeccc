"""The classifier's training task: what is trained, its loss, its optimiser; apart from the loop."""

from __future__ import annotations

from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streetvision.core.params import Compile, Train
from streetvision.data.augment import mix_batch
from streetvision.data.transforms import Preprocessing
from streetvision.models.backbone import freeze_norm_statistics
from streetvision.models.classifier import RoadworkClassifier
from streetvision.models.loop import compiled
from streetvision.models.optim import (
    GradientFilter,
    make_optimiser,
    parameter_groups,
    warmup_cosine,
)
from streetvision.models.peft import add_adapters, unfreeze
from streetvision.training.losses import make_loss


def choose_trainable(model: RoadworkClassifier, train: Train, seed: int) -> None:
    """Freeze what `train.trainable` does not train, or add adapters to the backbone; the head is trained."""
    backbone = model.backbone
    if train.trainable in {"head", "last_n_blocks"}:
        backbone.requires_grad_(requires_grad=False)
    if train.trainable == "last_n_blocks":
        unfreeze(backbone, train.last_n_blocks, norms=False)
    if train.trainable in {"lora", "dora"}:
        dora = train.trainable == "dora"
        add_adapters(backbone, train.lora, dora=dora, init=train.lora.init, seed=seed)


class ClassifierTask(lightning.LightningModule):  # type: ignore[misc]
    """Loss, optimiser and schedule of a classifier whose trainable part has been chosen.

    Parameters
    ----------
    labels: [N] of the images it is fitted on; `weighted_ce` weighs by them
    """

    def __init__(
        self,
        model: RoadworkClassifier,
        preprocessing: Preprocessing,
        train: Train,
        labels: NDArray[np.int64],
        compile_settings: Compile,
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.train_params = train
        self.loss = make_loss(train, labels)
        self.mix = mix_batch(train)
        self.run = compiled(model, compile_settings)
        self.filter = GradientFilter(
            [p for p in model.parameters() if p.requires_grad],
            train.grokfast_alpha,
            train.grokfast_lambda,
        )
        self._saved_filter: dict[str, Any] | None = None
        self.set_modes()

    def set_modes(self) -> None:
        """Training mode, but for what is frozen: a frozen norm keeps its statistics."""
        self.model.train()
        if self.train_params.trainable == "head":
            self.model.backbone.eval()
        elif self.train_params.freeze_norm:
            freeze_norm_statistics(self.model.backbone)
        elif self.train_params.trainable != "full":
            for module in self.model.backbone.modules():
                if not any(p.requires_grad for p in module.parameters()):
                    freeze_norm_statistics(module)

    def on_train_start(self) -> None:
        """Fix what is frozen; a run resumed within an epoch does not get `on_train_epoch_start`."""
        self.set_modes()
        if self._saved_filter is not None:
            self.filter.load_state_dict(self._saved_filter)
            self._saved_filter = None

    def on_train_epoch_start(self) -> None:
        """Fix what is frozen again."""
        self.set_modes()

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        """Loss of one batch, in float32; the loop has seeded what is random."""
        images, targets = batch
        images = self.preprocessing.normalise(images)
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        logits, _features = self.run(images)
        return self.loss(logits, targets)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Filter, then clip by norm; Lightning's own clipping refuses fused optimisers in mixed precision."""
        if self.train_params.grokfast:
            self.filter.apply()
        if self.train_params.gradient_clip > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.train_params.gradient_clip)

    def configure_optimizers(self) -> dict[str, Any]:
        """Linear warm-up, then cosine to zero, per optimiser step."""
        train = self.train_params
        groups = parameter_groups(
            self.model.backbone,
            nn.ModuleList([self.model.hidden, self.model.head]),
            learning_rate=train.learning_rate,
            head_factor=train.head_learning_rate_factor,
            layer_decay=train.layer_decay,
            weight_decay=train.weight_decay,
        )
        optimizer = make_optimiser(groups, kind=train.optimiser)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, warmup_cosine(steps, train.warmup_fraction)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the gradient filter."""
        if self.train_params.grokfast:
            checkpoint["gradient_filter"] = self.filter.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the filter's state until the weights are on their device."""
        self._saved_filter = checkpoint.get("gradient_filter")
