"""How often intervals hold what they are about where groups are unequal, and of a calibration error.

`unequal` test sets have groups of Pareto sizes; in one group of 25 the model fails. The smaller the exponent
the more of the data are in a few groups. Images of a `calibrated` test set have their label drawn at the
predicted probability; `miscalibrated` ones at log-odds that are 30 % smaller; in `cities` the log-odds of a
group are moved together, calibrated over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from streetvision.stats.bootstrap import Resting, group_intervals
from streetvision.stats.metrics import Floats, GroupTable, Integers, all_metrics_batch
from tests.benchmarks.runner import Table

PRIOR = 0.5
REPEATS = 500
RESAMPLES = 500
FAILING, ERROR, ERROR_OF_FAILING = 0.04, 0.05, 0.6
ECE_LIMIT = 0.05  # as `gates.max_ece` has it
MIN_SIZE = 5


@dataclass(frozen=True)
class Coverage:
    """Of simulated test sets; NaN where none has an interval.

    Attributes
    ----------
    given, effective
        Share with an interval; median of the effective number of groups.
    covered, optimistic, pessimistic
        Share of the intervals that hold the truth, that lie above it, and below it, where more is better.
    """

    given: float
    effective: float
    covered: float
    optimistic: float
    pessimistic: float


def unequal(
    n_groups: int, exponent: float, rng: np.random.Generator
) -> tuple[Integers, Floats, Integers]:
    """Labels, probabilities and groups [N]; group sizes are Pareto's, or 20 for an exponent of 0."""
    lengths = np.full(n_groups, 20)
    if exponent:
        lengths = np.minimum(np.ceil(MIN_SIZE * (rng.pareto(exponent, n_groups) + 1)), 5000)
    groups = np.repeat(np.arange(n_groups), lengths.astype(np.int64))
    labels = rng.integers(0, 2, len(groups))
    error = np.where(rng.random(n_groups) < FAILING, ERROR_OF_FAILING, ERROR)[groups]
    wrong = rng.random(len(groups)) < error
    return labels, np.where(wrong, 1 - labels, labels) * 0.8 + 0.1, groups


def unequal_coverage(
    n_groups: int, exponent: float, repeats: int, metric: str = "mcc", seed: int = 0
) -> Coverage:
    """How often the interval of MCC, accuracy or fnr holds its value over all groups there might be."""
    mistakes = FAILING * ERROR_OF_FAILING + (1 - FAILING) * ERROR
    truth = {"mcc": 1 - 2 * mistakes, "accuracy": 1 - mistakes, "fnr": mistakes}[metric]
    rng = np.random.default_rng([seed, n_groups, int(10 * exponent)])
    found = np.full((repeats, 3), np.nan)
    for repeat in range(repeats):
        sample = unequal(n_groups, exponent, rng)
        got = group_intervals(*sample, PRIOR, RESAMPLES, seed=repeat, metrics=(metric,))[metric]
        found[repeat] = got.low, got.high, got.effective_groups
    low, high, effective = found.T
    given = np.isfinite(low)
    above, below = (low > truth)[given], (high < truth)[given]
    if metric == "fnr":
        above, below = below, above
    if not given.any():
        return Coverage(0.0, float(np.median(effective)), np.nan, np.nan, np.nan)
    return Coverage(
        float(given.mean()), float(np.median(effective)),
        float(1 - (above | below).mean()), float(above.mean()), float(below.mean()),
    )  # fmt: skip


WORLDS = ("calibrated", "miscalibrated", "cities")


def scored(
    world: str, n: int, n_groups: int, rng: np.random.Generator
) -> tuple[Integers, Floats, Integers]:
    """Labels, probabilities and groups [N] of a test set whose images are spread over the groups evenly."""
    groups = np.arange(n) % n_groups
    logits = rng.normal(0, 2, n)
    true = logits
    if world == "miscalibrated":
        true = 0.7 * logits
    elif world == "cities":
        # A normal shift of a logit flattens its mean: 16√3/(15π) is the logistic's scale (Aitchison & Shen).
        moved = rng.normal(0, 1, n_groups)[groups]
        true = logits * np.sqrt(1 + (16 * np.sqrt(3) / (15 * np.pi)) ** 2) + moved
    labels = (rng.random(n) < 1 / (1 + np.exp(-true))).astype(np.int64)
    return labels, 1 / (1 + np.exp(-logits)), groups


@cache
def true_ece(world: str) -> float:
    """The debiased ECE of the whole world: 0, or that of a million images, each a group of its own."""
    if world == WORLDS[0]:
        return 0.0
    n = 1_000_000
    labels, p, _ = scored(world, n, n, np.random.default_rng(1))
    table = GroupTable.build(labels, p, np.zeros_like(labels), PRIOR)
    found = all_metrics_batch(table, np.ones((1, 1)), PRIOR, ("ece_debiased",))["ece_debiased"]
    return max(float(found[0]), 0.0)


def ece_coverage(
    world: str, n: int, n_groups: int, repeats: int, seed: int = 0
) -> tuple[Coverage, float, float]:
    """Coverage of the debiased ECE's interval; the share above and wholly below `ECE_LIMIT`."""
    truth = true_ece(world)
    rng = np.random.default_rng([seed, n, n_groups])
    found = np.full((repeats, 2), np.nan)
    for repeat in range(repeats):
        sample = scored(world, n, n_groups, rng)
        got = group_intervals(*sample, PRIOR, RESAMPLES, metrics=("ece_debiased",))["ece_debiased"]
        found[repeat] = got.low, got.high
    low, high = found.T
    given = np.isfinite(low)
    resting = Resting.of(np.ones((n_groups, 1))).effective
    above, below = (low > truth)[given], (high < truth)[given]
    coverage = Coverage(
        float(given.mean()), resting, float(1 - (above | below).mean()), float(below.mean()),
        float(above.mean()),
    )  # fmt: skip
    return coverage, float((low > ECE_LIMIT).mean()), float((high <= ECE_LIMIT).mean())


def intervals() -> list[Table]:
    """Coverage, by world and size."""
    rows = []
    for exponent in (0.0, 2.0, 1.5, 1.2):
        for n_groups in (20, 60, 100, 300):
            for metric in ("mcc", "fnr"):
                found = unequal_coverage(n_groups, exponent, REPEATS, metric)
                rows.append([
                    "equal" if not exponent else f"Pareto {exponent}", f"{n_groups}", metric, *_cells(found)
                ])  # fmt: skip
    calibration = []
    for world in WORLDS:
        for n, n_groups in ((200, 40), (200, 200), (1000, 40), (1000, 200), (3000, 100)):
            found, fails, passes = ece_coverage(world, n, n_groups, REPEATS)
            calibration.append([
                f"{world}, {true_ece(world):.4f}", f"{n:,}", f"{n_groups}", *_cells(found)[1:],
                f"{fails:.1%}", f"{passes:.1%}",
            ])  # fmt: skip
    title = f"{REPEATS:,} simulated test sets a row, 95 % intervals"
    columns = ["with an interval", "covered", "too optimistic", "too pessimistic"]
    return [
        Table(
            f"{title}; one group in {1 / FAILING:.0f} fails: {ERROR_OF_FAILING:.0%} mistakes, "
            f"{ERROR:.0%} elsewhere",
            ["sizes", "groups", "metric", "effective groups, median", *columns],
            rows,
        ),
        Table(
            f"{title} of the debiased ECE, against gates.max_ece: {ECE_LIMIT}",
            ["model, its ECE", "images", "groups", *columns, "fails", "passes"],
            calibration,
        ),
    ]


def _cells(found: Coverage) -> Sequence[str]:
    return [
        f"{found.effective:.0f}", f"{found.given:.0%}", f"{found.covered:.1%}", f"{found.optimistic:.1%}",
        f"{found.pessimistic:.1%}",
    ]  # fmt: skip
