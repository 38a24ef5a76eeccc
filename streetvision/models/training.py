"""Phase 1: fit the classifier on TRAIN, choose the epoch on VAL_SELECT; Lightning runs the loop."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from numpy.typing import NDArray
from torch import nn

from streetvision.artifacts import write_atomic
from streetvision.data.loader import (
    EpochSampler,
    EvaluationImages,
    TrainingImages,
    loader_workers,
    training_loader,
)
from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing, training_transform
from streetvision.errors import UserError
from streetvision.evaluation.metrics import all_metrics
from streetvision.models.backbone import (
    build_backbone,
    freeze_norm_statistics,
    load_weights,
    resolve,
)
from streetvision.models.classifier import ClassifierConfig, RoadworkClassifier
from streetvision.params import Train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """The chosen weights and how they came about; `history` has one row an epoch."""

    model: RoadworkClassifier
    config: ClassifierConfig
    history: list[dict[str, float]]
    metrics: dict[str, Any]


def build_classifier(
    train: Train, square_crop: bool, seed: int, root: Path
) -> tuple[RoadworkClassifier, ClassifierConfig]:
    """Build the classifier that `train` describes; relative weight files lie below `root`."""
    name, arguments, mean, std = resolve(train.backbone, train.height_px, train.width_px)
    torch.manual_seed(seed)
    backbone = build_backbone(name, arguments, pretrained=train.weights == "hub")
    if train.weights not in {"none", "hub"}:
        load_weights(backbone, root / train.weights)
    model = RoadworkClassifier(backbone, train.dropout)
    preprocessing = Preprocessing(
        train.height_px, train.width_px, train.fit, square_crop, mean, std
    )
    return model, ClassifierConfig(name, arguments, preprocessing)


def fit_classifier(
    model: RoadworkClassifier,
    config: ClassifierConfig,
    train: Train,
    fit_split: Split,
    select_split: Split,
    *,
    seed: int,
    scratch: Path,
    device: str = "auto",
    workers: int = 0,
) -> TrainingResult:
    """Train and return the weights of the chosen epoch (`train.choose_epoch`).

    A checkpoint in `scratch` at the end of every epoch lets a killed run go on to the same result.

    Raises
    ------
    UserError
        TRAIN or VAL_SELECT has one class only, or the loss is not finite.
    """
    for split in (fit_split, select_split):
        if len(np.unique(split.labels)) < 2:
            raise UserError(f"{split.name} has images of one class only; training needs both")
    model.to(memory_format=torch.channels_last)
    task = ClassifierTask(model, config.preprocessing, train, seed)
    images = TrainingImages(fit_split, config.preprocessing, training_transform(train), seed)
    loader = training_loader(images, train.batch_size, seed, loader_workers(workers))
    selection = EpochSelection(
        select_split,
        config.preprocessing,
        train,
        cast("EpochSampler", loader.sampler),
    )
    checkpoints = ModelCheckpoint(
        dirpath=scratch, filename="last", save_top_k=1, every_n_epochs=1, enable_version_counter=False,
        save_on_train_epoch_end=True,
    )  # fmt: skip
    last = scratch / "last.ckpt"
    if last.exists():
        log.info("resuming from the checkpoint of an interrupted run")
    # It announces devices and tips at every start.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = lightning.Trainer(
        max_epochs=train.epochs,
        accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu"}[device],
        devices=1,
        precision=_precision(train.precision, device),
        callbacks=[selection, checkpoints],
        plugins=[AtomicCheckpoints()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        # Lightning advises more workers and warns of the non-empty scratch folder; both are intended.
        warnings.filterwarnings("ignore", module=r"lightning\.")
        try:
            trainer.fit(task, loader, ckpt_path=str(last) if last.exists() else None)
        except SystemExit as error:  # Lightning's answer to Ctrl+C
            raise KeyboardInterrupt from error
    if selection.best is None:
        raise UserError("training ended before its first epoch")
    model.load_state_dict(selection.best)
    chosen = selection.chosen
    parameters = list(model.parameters())
    metrics = {
        "epochs": len(selection.history),
        "chosen_epoch": int(chosen["epoch"]),
        "train_images": len(fit_split),
        "train_loss": chosen["train_loss"],
        "val_select": {key.removeprefix("val_"): chosen[key] for key in chosen if "val_" in key},
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
    }
    return TrainingResult(model.cpu().eval(), config, selection.history, metrics)


class AtomicCheckpoints(TorchCheckpointIO):  # type: ignore[misc]
    """Writes beside the checkpoint and renames.

    Lightning moves a file from the temporary folder, which may be on another disk, and then a kill
    leaves half a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Replace `path` by `checkpoint` at once."""
        del storage_options
        write_atomic(Path(path), lambda temporary: torch.save(checkpoint, temporary))


class ClassifierTask(lightning.LightningModule):  # type: ignore[misc]
    """Loss, optimiser and schedule of the classifier, apart from the loop."""

    def __init__(
        self, model: RoadworkClassifier, preprocessing: Preprocessing, train: Train, seed: int
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.train_params = train
        self.seed = seed
        self.losses: list[torch.Tensor] = []
        if train.trainable == "head":
            model.backbone.requires_grad_(requires_grad=False)

    def on_train_epoch_start(self) -> None:
        """Fix what is frozen."""
        self.model.train()
        self.losses = []
        if self.train_params.trainable == "head":
            self.model.backbone.eval()
        elif self.train_params.freeze_norm:
            freeze_norm_statistics(self.model.backbone)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        """Binary cross entropy on logits, in float32."""
        # Dropout's masks depend on the step alone: loaders draw from the same generator, and not as often
        # in a resumed run or with workers.
        torch.manual_seed(self.seed * 1_000_003 + self.global_step)
        images, labels = batch
        logits, _features = self.model(self.preprocessing.normalise(images))
        smooth = self.train_params.label_smoothing
        targets = labels * (1 - smooth) + smooth / 2
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)
        self.losses.append(loss.detach())
        return loss

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip by norm; Lightning's own clipping refuses fused optimisers in mixed precision."""
        if self.train_params.gradient_clip > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.train_params.gradient_clip)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW without decay on biases and norms; linear warm-up, then cosine to zero, per step."""
        rate, decay = self.train_params.learning_rate, self.train_params.weight_decay
        head_rate = rate * self.train_params.head_learning_rate_factor
        groups: list[dict[str, Any]] = []
        for module, own_rate in ((self.model.backbone, rate), (self.model.head, head_rate)):
            parameters = [p for p in module.parameters() if p.requires_grad]
            for flat, own_decay in ((False, decay), (True, 0.0)):
                chosen = [p for p in parameters if (p.ndim < 2) == flat]
                groups.append({"params": chosen, "lr": own_rate, "weight_decay": own_decay})
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(steps, self.train_params.warmup_fraction)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class EpochSelection(Callback):  # type: ignore[misc]
    """Scores VAL_SELECT after each epoch, keeps the best weights and the history, stops early.

    Its state travels in the checkpoint, so that a resumed run knows what an undisturbed one would.
    """

    def __init__(
        self, split: Split, preprocessing: Preprocessing, train: Train, sampler: EpochSampler
    ) -> None:
        self.split = split
        self.sampler = sampler
        self.images = EvaluationImages(split, preprocessing)
        self.preprocessing = preprocessing
        self.rule = train.choose_epoch
        self.patience = train.patience_epochs
        self.history: list[dict[str, float]] = []
        self.best: dict[str, torch.Tensor] | None = None
        self.started = time.monotonic()
        self.last_line = 0.0

    def state_dict(self) -> dict[str, Any]:
        """History and best weights."""
        return {"history": self.history, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the checkpoint ended."""
        self.history = list(state_dict["history"])
        self.best = state_dict["best"]
        # Lightning starts to iterate before it tells the sampler of a resumed run its epoch.
        self.sampler.set_epoch(len(self.history))

    def on_train_batch_end(
        self, trainer: Any, task: ClassifierTask, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say once a minute how far training is."""
        now = time.monotonic()
        if now - max(self.last_line, self.started) >= 60:
            self.last_line = now
            log.info(
                "epoch %d of %d, step %d of %d, loss %.4f",
                trainer.current_epoch + 1, trainer.max_epochs, batch_idx + 1,
                trainer.num_training_batches, float(task.losses[-1]),
            )  # fmt: skip

    def on_train_epoch_end(self, trainer: Any, task: ClassifierTask) -> None:
        """Score, remember, and stop when nothing has improved for `patience` epochs."""
        train_loss = float(torch.stack(task.losses).double().mean())
        logits = predict_logits(task.model, self.images, self.preprocessing, task.device)
        if not (math.isfinite(train_loss) and np.isfinite(logits).all()):
            raise UserError(
                f"training diverged in epoch {trainer.current_epoch + 1}: its loss is {train_loss}, "
                "or its last step broke the weights; lower train.learning_rate"
            )
        probabilities = torch.from_numpy(logits).double().sigmoid().numpy()
        scores = all_metrics(self.split.labels, probabilities)
        row = {
            "epoch": trainer.current_epoch,
            "train_loss": train_loss,
            "learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "val_loss": float(scores["log_loss"]),
            "val_mcc": float(scores["mcc"]),
            "val_accuracy": float(scores["accuracy"]),
        }
        self.history.append(row)
        if self.chosen is row:
            self.best = {k: v.detach().cpu().clone() for k, v in task.model.state_dict().items()}
        log.info(
            "epoch %d of %d: loss %.4f, VAL_SELECT loss %.4f, MCC %.4f",
            row["epoch"] + 1, trainer.max_epochs, train_loss, row["val_loss"], row["val_mcc"],
        )  # fmt: skip
        trainer.should_stop = self._out_of_patience()

    @property
    def chosen(self) -> dict[str, float]:
        """The last epoch, or the one with the highest VAL_SELECT MCC, the later of equals."""
        if self.rule == "last":
            return self.history[-1]
        return max(self.history, key=lambda row: (row["val_mcc"], row["epoch"]))

    def on_train_start(self, trainer: Any, task: ClassifierTask) -> None:
        """A run that was killed after it stopped early does not train on."""
        trainer.should_stop = self._out_of_patience()

    def _out_of_patience(self) -> bool:
        if not self.patience or not self.history:
            return False
        return self.history[-1]["epoch"] - self.chosen["epoch"] >= self.patience


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    images: EvaluationImages,
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """Logits [N] in evaluation mode and float32; the model's mode is put back."""
    training = model.training
    model.eval()
    parts = []
    for start in range(0, len(images), batch_size):
        rows = range(start, min(start + batch_size, len(images)))
        batch = torch.stack([images[row] for row in rows]).to(device)
        with torch.autocast(device.type, enabled=False):
            parts.append(model(preprocessing.normalise(batch))[0].cpu().numpy())
    model.train(training)
    return np.concatenate(parts)


def warmup_cosine(steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Factor on the learning rate at each step: linear from 1/warm-up to 1, then half a cosine to 0."""
    warmup = max(1, round(steps * warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor


def _precision(wanted: str, device: str) -> Any:
    """Lightning's name of the precision; BF16 only where the device computes in it."""
    if wanted == "fp32":
        return "32-true"
    if device != "cpu" and torch.cuda.is_available():
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capable = torch.cpu._is_avx512_bf16_supported()
    if not capable:
        log.warning("this device has no BF16 arithmetic: training in FP32")
        return "32-true"
    return "bf16-mixed"
