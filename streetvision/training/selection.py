"""After each epoch: average the weights, score VAL_SELECT, keep the best, stop when nothing improves."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from streetvision.core.errors import UserError
from streetvision.core.params import Train
from streetvision.core.processes import in_threads
from streetvision.core.progress import progress
from streetvision.data.loader import EpochSampler, EvaluationImages
from streetvision.data.transforms import Preprocessing
from streetvision.models.loop import epoch_loss
from streetvision.stats.metrics import all_metrics
from streetvision.training.frozen import KeptFeatures
from streetvision.training.task import ClassifierTask

log = logging.getLogger(__name__)
SELECT_BATCH = 64  # images a forward pass


class WeightAverage(Callback):  # type: ignore[misc]
    """Averages the weights after each optimiser step.

    `ema` weighs the weights t steps back by `ema_decay`^t and divides by the sum of these factors, so that
    short runs are not held at their first step; BatchNorm statistics are averaged likewise. `swa` is the
    plain mean of all steps from `swa_start_fraction` on (arXiv 1803.05407); it gets its BatchNorm
    statistics from a pass over the epoch's training batches each time it is evaluated.

    Parameters
    ----------
    loader: that of the training, whose `batch_sampler` is an `EpochSampler`
    """

    def __init__(self, train: Train, loader: DataLoader[Any], preprocessing: Preprocessing) -> None:
        self.train = train
        self.loader = loader
        self.preprocessing = preprocessing
        self.model: nn.Module | None = None
        self.count = 0
        self.step = 0
        self._saved: dict[str, torch.Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """How many weights were averaged, and the average."""
        return {"count": self.count, "weights": self.model.state_dict() if self.model else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the average until the weights are on their device."""
        self.count, self._saved = state_dict["count"], state_dict["weights"]

    def on_train_start(self, trainer: Any, task: ClassifierTask) -> None:
        """Make room for the average."""
        self.step = trainer.global_step
        self.model = copy.deepcopy(task.model).requires_grad_(requires_grad=False)
        if self._saved is not None:
            self.model.load_state_dict(self._saved)
            self._saved = None

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Any, task: ClassifierTask, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the weights of this step, if the optimiser stepped."""
        del outputs, batch, batch_idx
        if self.model is None or trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        swa = self.train.weight_average == "swa"
        if swa and self.step <= self.train.swa_start_fraction * trainer.estimated_stepping_batches:
            return
        self.count += 1
        decay = self.train.ema_decay
        share = 1 / self.count if swa else (1 - decay) / (1 - decay**self.count)
        own, new = self.model.state_dict(), task.model.state_dict()
        floating = [name for name, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_([own[n] for n in floating], [new[n] for n in floating], share)
        for name in own.keys() - set(floating):
            own[name].copy_(new[name])

    def evaluated(self, task: ClassifierTask, epoch: int) -> nn.Module:
        """The average, or the plain weights as long as there is none."""
        if self.model is None or not self.count:
            return task.model
        if self.train.weight_average == "swa":
            pairs = zip(self.model.modules(), task.model.modules(), strict=True)
            self._estimate_statistics(
                [
                    own
                    for own, trained in pairs
                    if isinstance(own, nn.modules.batchnorm._BatchNorm) and trained.training
                ],
                epoch,
                task.device,
            )
        return self.model

    @torch.no_grad()
    def _estimate_statistics(
        self, norms: list[nn.modules.batchnorm._BatchNorm], epoch: int, device: torch.device
    ) -> None:
        """Give `norms` the mean statistics over the batches of `epoch`, as they were trained on, unmixed.

        The order matters: variances are taken within batches, so that in batches of neighbouring rows,
        which are frames of one drive, they would be those of a drive. Unlike torch's `update_bn` it leaves
        frozen norms alone, and dropout off. The ranks share the batches, as `SyncBatchNorm` does.
        """
        if not norms or self.model is None:
            return
        self.model.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
            norm.train()
        cast("EpochSampler", self.loader.batch_sampler).seek(epoch)
        for images, _ in self.loader:
            self.model(self.preprocessing.normalise(images.to(device)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class EpochSelection(Callback):  # type: ignore[misc]
    """Scores VAL_SELECT after each epoch, keeps the best weights and the history, stops early.

    Its state travels in the checkpoint, so that a resumed run knows what an undisturbed one would. The
    weights that are kept are those that were scored. The ranks share the work and all know the outcome.

    Parameters
    ----------
    stop_after: epochs after which to stop whatever the scores, in the middle of the schedule
    """

    def __init__(
        self,
        images: EvaluationImages | KeptFeatures,
        preprocessing: Preprocessing,
        train: Train,
        average: WeightAverage | None = None,
        stop_after: int | None = None,
    ) -> None:
        self.images = images
        self.split = images.split
        self.preprocessing = preprocessing
        self.rule = train.choose_epoch
        self.patience = train.patience_epochs
        self.learning_rate = train.learning_rate
        self.average = average
        self.stop_after = stop_after
        self.history: list[dict[str, float]] = []
        self.best: dict[str, torch.Tensor] | None = None
        self.best_logits = np.zeros(0, np.float32)

    def state_dict(self) -> dict[str, Any]:
        """History, best weights and their logits."""
        logits = torch.from_numpy(self.best_logits)
        return {"history": self.history, "best": self.best, "best_logits": logits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the checkpoint ended."""
        self.history = list(state_dict["history"])
        self.best = state_dict["best"]
        self.best_logits = state_dict["best_logits"].numpy()

    def on_train_epoch_end(self, trainer: Any, task: ClassifierTask) -> None:
        """Score, remember, and stop when nothing has improved for `patience` epochs."""
        train_loss = epoch_loss(trainer)
        model: nn.Module = task.model
        if self.average is not None:
            model = self.average.evaluated(task, trainer.current_epoch)
        logits = self._logits(model, task.device, trainer)
        if not (math.isfinite(train_loss) and np.isfinite(logits).all()):
            raise UserError(
                f"training diverged in epoch {trainer.current_epoch + 1}: its loss is {train_loss}, "
                "or its last step broke the weights; lower train.learning_rate"
            )
        probabilities = torch.from_numpy(logits).double().sigmoid().numpy()
        scores = all_metrics(self.split.labels, probabilities)
        # Groups differ by a factor, with layer decay or for the head; the schedule is common to them.
        group = trainer.optimizers[0].param_groups[0]
        row = {
            "epoch": trainer.current_epoch,
            "train_loss": train_loss,
            "learning_rate": float(self.learning_rate * group["lr"] / group["initial_lr"]),
            "val_loss": float(scores["log_loss"]),
            "val_mcc": float(scores["mcc"]),
            "val_accuracy": float(scores["accuracy"]),
        }
        self.history.append(row)
        if self.chosen is row:
            self.best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            self.best_logits = logits
        log.info(
            "epoch %d of %d: loss %.4f, VAL_SELECT loss %.4f, MCC %.4f",
            row["epoch"] + 1, trainer.max_epochs, train_loss, row["val_loss"], row["val_mcc"],
        )  # fmt: skip
        trainer.should_stop = self._done()

    def _logits(self, model: nn.Module, device: torch.device, trainer: Any) -> NDArray[np.float32]:
        """Logits [N]; each rank computes its part."""
        rows = range(trainer.global_rank, len(self.images), trainer.world_size)
        mine = predict_logits(model, self.images, self.preprocessing, device, rows=rows)
        if trainer.world_size == 1:
            return mine
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, mine)
        logits = np.empty(len(self.images), np.float32)
        for rank, part in enumerate(parts):
            logits[rank :: trainer.world_size] = part
        return logits

    @property
    def chosen(self) -> dict[str, float]:
        """The last epoch, or the best one by VAL_SELECT's MCC or log loss, the later of equals."""
        if self.rule == "last":
            return self.history[-1]
        if self.rule == "best_log_loss":
            return max(self.history, key=lambda row: (-row["val_loss"], row["epoch"]))
        return max(self.history, key=lambda row: (row["val_mcc"], row["epoch"]))

    def on_train_start(self, trainer: Any, task: ClassifierTask) -> None:
        """A run that was killed after it stopped early does not train on."""
        del task
        trainer.should_stop = self._done()

    def _done(self) -> bool:
        """Whether it is out of patience, or at the epoch that was asked for."""
        if not self.history:
            return False
        if len(self.history) == self.stop_after:
            return True
        waited = self.history[-1]["epoch"] - self.chosen["epoch"]
        return bool(self.patience) and waited >= self.patience


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    images: EvaluationImages | KeptFeatures,
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int = SELECT_BATCH,
    rows: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """Logits of `rows` (default: all) in evaluation mode and float32; the model's mode is put back."""
    wanted = range(len(images)) if rows is None else rows
    modes = {module: module.training for module in model.modules()}
    model.eval()
    parts = [np.zeros(0, np.float32)]
    starts = range(0, len(wanted), batch_size)
    for start in progress(starts, len(starts), images.split.name):
        chosen = in_threads(images.__getitem__, wanted[start : start + batch_size])
        batch = torch.stack(list(chosen)).to(device)
        with torch.autocast(device.type, enabled=False):
            parts.append(model(preprocessing.normalise(batch))[0].cpu().numpy())
    for module, training in modes.items():
        module.training = training
    return np.concatenate(parts)
