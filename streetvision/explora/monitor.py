"""What becomes of a space that is learned without labels: measured on VAL_SELECT's images, never its labels."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from streetvision.core.errors import UserError
from streetvision.data.loader import PairImages
from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing
from streetvision.explora.adapted import Row
from streetvision.explora.pretraining_task import AdaptationTask
from streetvision.explora.selfsupervised import (
    COLLAPSE_RANK,
    COLLAPSE_SPREAD,
    alignment,
    rankme,
    spread,
    uniformity,
)
from streetvision.models.loop import epoch_loss

log = logging.getLogger(__name__)

COLLAPSE_RULE = (
    f"RankMe of the embeddings < {COLLAPSE_RANK:g} or their spread < {COLLAPSE_SPREAD:g}"
)
MONITORED = 1024  # images, at most


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
        # In random order: negatives of a batch are those of training, not its neighbours in a drive.
        drawn = np.random.default_rng(seed).permutation(len(split))[:count]
        chosen = split.select(drawn)
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
        rank, scatter = row["embedding_rankme"], row["embedding_spread"]
        return bool(rank < COLLAPSE_RANK or scatter < COLLAPSE_SPREAD)

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
