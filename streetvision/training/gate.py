"""The augmentation gate: whether training with augmentation costs MCC on VAL_SELECT.

Training on distorted images costs some MCC on images as they are and gains more on distorted ones: what is
served has to decide, so both conditions are scored and `train.augmentation_gate_on` names the one that judges.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from streetvision.core.errors import UserError
from streetvision.core.params import Subnet, ViewGrid
from streetvision.data.served_images import served_images
from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing
from streetvision.models.classifier import RoadworkClassifier
from streetvision.models.multiview import score_all_views
from streetvision.stats.bootstrap import Resting, check_groups, statistic_intervals
from streetvision.stats.metrics import Floats, GroupTable, all_metrics_batch

MARGIN = 0.03  # loss of MCC that is put up with
REPEATS = 4  # versions of each image of VAL_SELECT as it is served
SCORE_BATCH = 64  # images a forward pass

log = logging.getLogger(__name__)
Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class GateResult:
    """What augmentation did to MCC, with minus without.

    `delta` is the mean over seeds and `delta_std` the standard deviation between them (NaN for one
    seed); `low` and `high` bound the mean, paired over groups, and are None where `method` says why.
    """

    verdict: Verdict
    delta: float
    low: float | None
    high: float | None
    method: str
    seeds: tuple[int, ...]
    delta_std: float

    def report(self) -> dict[str, Any]:
        """The fields for `metrics/train.json`; what does not exist is no number to compare."""
        found = asdict(self)
        del found["seeds"]
        return {
            name: value
            for name, value in found.items()
            if value is not None and (name != "delta_std" or len(self.seeds) > 1)
        }


def served_probabilities(
    model: RoadworkClassifier,
    preprocessing: Preprocessing,
    split: Split,
    subnet: Subnet,
    seed: int,
    device: torch.device,
    workers: int,
) -> NDArray[np.float64]:
    """Probabilities of each image's versions as `subnet.validator` sends them, in the split's order.

    `REPEATS` versions where it draws anything, else one. `seed` draws.
    """
    images = served_images(split, subnet, REPEATS, seed, workers)
    grid = ViewGrid(grid=1, flip=False)
    scores = score_all_views(model, preprocessing, images, grid, SCORE_BATCH, device)
    return np.asarray(expit(scores.logits[:, 0]), dtype=np.float64)


def conditions_gate(
    runs: Mapping[tuple[bool, int], Mapping[str, Sequence[float]]],
    labels: NDArray[np.int64],
    groups: NDArray[np.object_],
    seeds: Sequence[int],
) -> dict[str, GateResult]:
    """Judge runs by (with augmentation, seed) on images as they are and on distorted ones.

    A run has the probabilities of VAL_SELECT's images, labels and groups [N], by condition: `clean` [N] and
    `served`, some versions of each.
    """
    gates = {}
    for condition in ("clean", "served"):
        repeats = len(next(iter(runs.values()))[condition]) // len(labels)
        found = augmentation_gate(
            partial(_probabilities, runs, condition), np.repeat(labels, repeats),
            np.repeat(groups, repeats), seeds,
        )  # fmt: skip
        log.info(
            "augmentation gate on %s images: %s (MCC %+.4f, %s)", condition, found.verdict, found.delta,
            found.method if found.low is None else f"interval [{found.low:+.4f}, {found.high:+.4f}]",
        )  # fmt: skip
        gates[condition] = found
    return gates


def _probabilities(
    runs: Mapping[tuple[bool, int], Mapping[str, Sequence[float]]],
    condition: str,
    augmented: bool,
    seed: int,
) -> NDArray[np.float64]:
    return np.array(runs[augmented, seed][condition])


def gate_verdict(low: float, high: float, margin: float = MARGIN) -> Verdict:
    """Judge an interval of (with minus without): pass above -`margin`, fail wholly below it."""
    if low >= -margin:
        return "pass"
    return "fail" if high < -margin else "inconclusive"


def augmentation_gate(
    run: Callable[[bool, int], NDArray[np.float64]],
    labels: ArrayLike,
    groups: ArrayLike,
    seeds: Sequence[int],
    margin: float = MARGIN,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> GateResult:
    """Train with and without augmentation for each seed, and compare MCC paired over groups.

    Each resample of groups gives the mean over seeds of the difference in MCC; the method of the
    interval is that of `streetvision.stats.bootstrap`. The seeds are taken as they are: the
    interval says nothing about others, `delta_std` does.

    Parameters
    ----------
    run
        From (with augmentation, seed) to the probabilities [N] of VAL_SELECT's images.
    labels, groups
        [N] in {0, 1} and [N] of any sortable type, of these images.
    seeds
        At least one.
    margin
        Loss of MCC that is put up with.
    n_resamples, level
        Bootstrap resamples and coverage in (0, 1).

    Raises
    ------
    UserError
        No seeds, or VAL_SELECT has one class only.
    """
    if not seeds:
        raise UserError("the augmentation gate needs at least one seed")
    pairs: list[tuple[GroupTable, GroupTable]] = []
    for seed in seeds:
        tables = []
        for augmented in (False, True):
            y, p, index = check_groups(labels, run(augmented, seed), groups)
            tables.append(GroupTable.build(y, p, index, None))
        pairs.append((tables[0], tables[1]))
    # [G, 2]: which groups hold negatives and positives.
    has = pairs[0][0].sums[:, :, 0] > 0
    if not has.any(axis=0).all():
        raise UserError("VAL_SELECT has images of one class only; the augmentation gate needs both")

    def differences(multiplicities: Floats) -> Floats:
        """Δ MCC, [seeds, R]."""
        mcc = [
            [all_metrics_batch(t, multiplicities, None, ["mcc"])["mcc"] for t in pair]
            for pair in pairs
        ]
        return np.array([augmented - plain for plain, augmented in mcc])

    found = statistic_intervals(
        lambda multiplicities, _: {"mcc": differences(multiplicities).mean(axis=0)},
        len(has),
        {"mcc": Resting.of(pairs[0][0].sums[:, :, 0])},
        {"mcc": (-2.0, 2.0)},
        n_resamples,
        level,
        scales={"mcc": "identity"},
    )["mcc"]
    per_seed = differences(np.ones((1, len(has))))[:, 0]
    verdict: Verdict = "inconclusive"
    if found.low is not None and found.high is not None:
        verdict = gate_verdict(found.low, found.high, margin)
    return GateResult(
        verdict=verdict,
        delta=found.value,
        low=found.low,
        high=found.high,
        method=found.method,
        seeds=tuple(seeds),
        delta_std=float(per_seed.std(ddof=1)) if len(per_seed) > 1 else float("nan"),
    )
