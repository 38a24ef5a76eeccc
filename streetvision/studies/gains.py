"""Differences of two variants that were run on the same images with several seeds.

Groups and seeds are crossed: each seed sees each group. The variance of a difference's mean over the seeds is
that between groups (`bootstrap.spread`), plus that between seeds; what both share is counted
twice, so that the interval is rather too wide (compare Owen 2007, doi 10.1214/07-AOAS122). Its half-width is
the root of the summed squares of the two t-intervals' half-widths (Zou & Donner 2008, doi 10.1002/sim.3095):
with Satterthwaite's degrees of freedom, three seeds that happen to agree make it too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streetvision.decision.inputs import sigmoid
from streetvision.stats.bootstrap import MIN_EFFECTIVE, Resting, spread
from streetvision.stats.metrics import Floats, GroupTable, all_metrics_batch, in_range

Part = tuple[NDArray[np.int64], NDArray[Any], Floats]


@dataclass(frozen=True)
class Sample:
    """What a variant says: for each seed the sums by group of all its folds, at the served prior."""

    tables: tuple[GroupTable, ...]
    prior: float

    @classmethod
    def pool(cls, seeds: Sequence[Sequence[Part]], prior: float) -> Sample:
        """Of labels [N], groups [N] and log-odds [N] of each fold of each seed; all have the same groups."""
        tables = []
        for folds in seeds:
            labels, groups, log_odds = (np.concatenate(each) for each in zip(*folds, strict=True))
            index = np.unique(groups.astype(str), return_inverse=True)[1].astype(np.int64)
            tables.append(GroupTable.build(labels, sigmoid(log_odds), index, prior))
        return cls(tuple(tables), prior)

    @property
    def resting(self) -> Resting:
        """The groups that the metrics rest on."""
        return Resting.of(self.tables[0].sums[:, :, 0], self.prior)

    def values(self, metric: str, multiplicities: Floats) -> Floats:
        """A metric [seeds, R] for multiplicities [R, G] of the groups."""
        found = [all_metrics_batch(t, multiplicities, self.prior, (metric,)) for t in self.tables]
        return np.stack([in_range(metric, each[metric]) for each in found])

    def by_seed(self, metric: str) -> list[float]:
        """A metric of each seed."""
        whole = np.ones((1, len(self.tables[0].sums)))
        return [float(value) for value in self.values(metric, whole)[:, 0]]


@dataclass(frozen=True)
class Gain:
    """Mean over the seeds of a difference, its standard error and 95 % interval.

    None below 4.5 effective groups.
    """

    value: float
    error: float | None
    low: float | None
    high: float | None


def paired_gain(before: Sample, after: Sample, metric: str) -> Gain:
    """`after` − `before`, of the same groups and seeds."""
    n = len(before.tables[0].sums)
    every = np.concatenate([np.ones((1, n)), 1 - np.eye(n)])
    differences = after.values(metric, every) - before.values(metric, every)
    seeds, left_out = differences[:, 0], differences[:, 1:].mean(axis=0)
    resting = before.resting
    if resting.effective < MIN_EFFECTIVE or not np.isfinite(left_out).all():
        return Gain(float(seeds.mean()), None, None, None)
    return crossed(seeds, left_out, resting)


def crossed(seeds: Floats, left_out: Floats, resting: Resting) -> Gain:
    """The gain from its value for each seed [S], and for all without one group [G]."""
    from scipy.special import stdtrit

    value = float(seeds.mean())
    error_of_groups, freedom = spread(left_out, resting)
    of_groups = error_of_groups**2
    of_seeds = float(seeds.var(ddof=1)) / len(seeds) if len(seeds) > 1 else 0.0
    error = (of_groups + of_seeds) ** 0.5
    wide = float(stdtrit(freedom, 0.975)) ** 2 * of_groups
    if len(seeds) > 1:
        wide += float(stdtrit(len(seeds) - 1, 0.975)) ** 2 * of_seeds
    return Gain(value, error, value - wide**0.5, value + wide**0.5)
