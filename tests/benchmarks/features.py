"""A frozen backbone whose features are kept, against computing them in every epoch."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.benchmarks.runner import PAIRS, Result
from tests.benchmarks.training import bench_splits, fit

BACKBONE, SIDE = "vit_tiny_patch16_224", 224
IMAGES = 32


def frozen() -> list[Result]:
    """Seconds of an epoch after the first, its look at VAL_SELECT and its checkpoint included."""
    from streetvision.core.params import Train

    constant = {
        "backbone": BACKBONE, "height_px": SIDE, "width_px": SIDE, "trainable": "head", "batch_size": 16,
        "init_from_explora": False, "served_probability": 0.0, "crop_min_area": 1.0,
        "colour_jitter": 0.0, "precision": "fp32",
    }  # fmt: skip
    kept = Train.model_validate(constant | {"flip_probability": 0.0, "epochs": 6})
    # Augmentation is on, if only just: nothing is kept.
    recomputed = Train.model_validate(constant | {"flip_probability": 1e-9, "epochs": 2})
    with bench_splits(IMAGES, SIDE, SIDE) as (splits, folder):
        pairs = [
            (_later_epochs(kept, splits, folder), _later_epochs(recomputed, splits, folder))
            for _ in range(PAIRS)
        ]
    ratios = [other / ours for ours, other in pairs]
    ours, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    result = Result(
        f"an epoch after the first, {BACKBONE} frozen, no augmentation, {IMAGES} images",
        "computing the features again", ours, other, statistics.median(ratios), min(ratios),
        max(ratios), 20,
    )  # fmt: skip
    return [result]


def _later_epochs(train: Any, splits: Any, folder: Path) -> float:
    """Median seconds of the epochs of one run, but for the first."""
    from streetvision.models.loop import Bookkeeping

    ends: list[float] = []
    last = Bookkeeping.on_train_epoch_end  # of the callbacks' hooks the last one

    def timed(self: Any, *arguments: Any) -> None:
        last(self, *arguments)
        ends.append(time.perf_counter())

    with patch.object(Bookkeeping, "on_train_epoch_end", timed):
        fit(train, splits, folder)
    return statistics.median(b - a for a, b in pairwise(ends))
