"""How often `compare` says what is not so: false positives, coverage and power, on clustered images.

Each simulated test set has groups of unequal length (log-normal, 20 images in the mean) whose images share
how hard they are. Two models see the same images; each adds errors of its own, some of them shared by a
group. In the null worlds both have the same MCC exactly, by construction:

- `exchangeable`: both are drawn from one law;
- `operating point`: base says yes more, head as much less; the classes mirror each other, the prior is 50 %;
- `correlation`: errors of the same size, base's by image, head's by group.

In `better` head is better; its true differences are those of 250,000 groups.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from streetvision.evaluation.predictions import Predictions
from streetvision.review.compare import compare_predictions, difference_intervals
from streetvision.stats.metrics import Floats, GroupTable, Integers, all_metrics_batch
from streetvision.stats.paired import (
    fisher_z_interval,
    mcnemar_exact,
    same_mcc_p,
)
from streetvision.subnet.reward import expected_reward
from tests.benchmarks.runner import Table

PRIOR = 0.5
NULLS = ("exchangeable", "operating point", "correlation")
BETTER = "better"
METRICS = ("mcc", "accuracy", "log_loss", "reward", "ece_debiased")
_COLUMNS = ("mcc", "accuracy", "log_loss", "ece_debiased", "fnr", "fpr")
REPEATS = 1000
RESAMPLES = 500


def simulate(
    world: str, n_groups: int, rng: np.random.Generator
) -> tuple[Integers, Floats, Floats, Integers]:
    """Labels, base's and head's probabilities and groups of one test set; [N] each."""
    lengths = np.clip(rng.lognormal(np.log(17), 0.6, n_groups).round(), 2, 80).astype(np.int64)
    groups = np.repeat(np.arange(n_groups), lengths)
    n = len(groups)
    labels = (rng.random(n) < rng.beta(3, 3, n_groups)[groups]).astype(np.int64)
    sign = 2 * labels - 1
    shared = sign * (1.5 + rng.normal(0, 0.8, n_groups)[groups]) + rng.normal(0, 0.7, n)

    def probabilities(by_group: float, shift: float = 0.0, gain: float = 0.0) -> Floats:
        # Half of a group's errors is on how hard it is, half on how readily it is called roadwork.
        hard, ready = rng.normal(0, by_group, (2, n_groups))
        own = rng.normal(0, np.sqrt(1 - 2 * by_group**2), n)
        return 1 / (
            1 + np.exp(-(shared + sign * (gain + hard[groups]) + ready[groups] + shift + own))
        )

    base, head = {
        "exchangeable": ({}, {}),
        "operating point": ({"shift": 0.7}, {"shift": -0.7}),
        "correlation": ({"by_group": 0.1}, {"by_group": 0.65}),
        BETTER: ({}, {"gain": 0.25}),
    }[world]
    settings = [{"by_group": 0.45} | each for each in (base, head)]
    return labels, probabilities(**settings[0]), probabilities(**settings[1]), groups


@cache
def true_differences(world: str) -> dict[str, float]:
    """Head's metrics minus base's in the whole world, at a prior of 50 %.

    In the null worlds both have one law of probability and label by image, or its mirror: no metric that
    treats the classes alike differs.
    """
    if world in NULLS:
        return dict.fromkeys(METRICS, 0.0)
    sums: list[Floats] = [np.zeros(())] * 2
    for seed in range(5):
        labels, *sides, _ = simulate(world, 50_000, np.random.default_rng([99, seed]))
        one = np.zeros_like(labels)
        tables = [GroupTable.build(labels, p, one, PRIOR) for p in sides]
        sums = [total + table.sums for total, table in zip(sums, tables, strict=True)]
    values = []
    for table, total in zip(tables, sums, strict=True):
        whole = GroupTable(total, table.ordered, table.steps)
        found = all_metrics_batch(whole, np.ones((1, 1)), PRIOR, _COLUMNS)
        found["reward"] = expected_reward(1 - found["fnr"], found["fpr"], PRIOR)
        values.append(found)
    return {m: float(values[1][m][0] - values[0][m][0]) for m in METRICS}


@dataclass(frozen=True)
class Rates:
    """Of the simulated test sets; NaN where none has an interval.

    Attributes
    ----------
    same_mcc, mcnemar
        Share with p <= 0.05.
    given, fisher_covered
        Share with an interval of MCC; how often Fisher's z holds the truth.
    covered
        By metric the share of intervals that hold the true difference.
    excluded, halfwidth
        Share whose interval of MCC excludes 0; its mean half width.
    """

    same_mcc: float
    mcnemar: float
    given: float
    fisher_covered: float
    covered: dict[str, float]
    excluded: float
    halfwidth: float


def rates(
    world: str,
    n_groups: int,
    repeats: int,
    seed: int,
    resamples: int = RESAMPLES,
    metrics: Sequence[str] = ("mcc",),
) -> Rates:
    """Simulate, compare as `compare` does, count."""
    rng = np.random.default_rng([seed, n_groups, (*NULLS, BETTER).index(world)])
    truth = true_differences(world)
    tests = np.empty((repeats, 4))  # p of ours, p of McNemar, bounds of Fisher's z
    deltas = np.full((repeats, len(metrics), 2), np.nan)  # low, high
    for repeat in range(repeats):
        labels, base, head, groups = simulate(world, n_groups, rng)
        pair = (labels, base, head, groups, PRIOR)
        right = [(p > 0.5) == (labels == 1) for p in (base, head)]
        exact = mcnemar_exact(int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum()))
        fisher = fisher_z_interval(labels, base > 0.5, head > 0.5)
        bounds = (fisher.low, fisher.high) if fisher else (np.nan, np.nan)
        tests[repeat] = same_mcc_p(*pair, resamples, repeat), exact, *bounds
        found = difference_intervals(*pair, metrics, resamples, repeat)
        deltas[repeat] = [(found[m].low, found[m].high) for m in metrics]
    p, exact_p, fisher_low, fisher_high = tests.T
    low, high = deltas[:, 0].T
    given = np.isfinite(low)
    covered = {
        metric: _held(*deltas[:, place].T, truth[metric]) for place, metric in enumerate(metrics)
    }
    return Rates(
        float((p <= 0.05).mean()), float((exact_p <= 0.05).mean()), float(given.mean()),
        _held(fisher_low, fisher_high, truth["mcc"]), covered,
        _mean((low > 0) | (high < 0), given), _mean((high - low) / 2, given),
    )  # fmt: skip


def _held(low: Floats, high: Floats, truth: float) -> float:
    """Share of the intervals [R], as far as they exist, that hold the truth."""
    return _mean((low <= truth) & (truth <= high), np.isfinite(low))


def _mean(values: NDArray[np.generic], chosen: NDArray[np.bool_]) -> float:
    return float(values[chosen].mean()) if chosen.any() else float("nan")


def _speed() -> Table:
    """Seconds of one comparison with 10,000 resamples."""
    rows = []
    for n_groups in (45, 200, 1000):
        rng = np.random.default_rng(0)
        n = 10_000
        labels = rng.integers(0, 2, n)
        names = (np.arange(n) * n_groups // n).astype(str)
        base, head = (
            Predictions(np.arange(n).astype(str), names, labels, 1 / (1 + np.exp(-logits)))
            for logits in 2 * (2 * labels - 1) + rng.normal(0, 1.5, (2, n))
        )
        compare_predictions(base, head, PRIOR, n_resamples=100)  # tables that are made once
        start = time.perf_counter()
        compare_predictions(base, head, PRIOR)
        rows.append([f"{n_groups}", f"{time.perf_counter() - start:.2f} s"])
    return Table(
        "One comparison of 10,000 images, 10,000 resamples and 10,000 sign-flips, all metrics",
        ["groups", "time"],
        rows,
    )


def comparison() -> list[Table]:
    """False positives, coverage and cost."""
    noise = 100 * np.sqrt(0.05 * 0.95 / REPEATS)
    tests, covers = [], []
    for n_groups in (8, 20, 45, 60, 200):
        for world in (*NULLS, BETTER):
            all_of_them = world in {"correlation", BETTER}
            metrics = METRICS if all_of_them else METRICS[:1]
            found = rates(world, n_groups, REPEATS, seed=0, metrics=metrics)
            tests.append([
                f"{n_groups}", world, f"{found.same_mcc:.1%}", f"{found.mcnemar:.1%}",
                f"{found.covered['mcc']:.1%}", f"± {found.halfwidth:.3f}", f"{found.fisher_covered:.1%}",
            ])  # fmt: skip
            if all_of_them:
                covers.append([f"{n_groups}", world, *(f"{found.covered[m]:.1%}" for m in metrics)])
    title = f"{REPEATS:,} simulated test sets a row (so that 5 % and 95 % are ± {noise:.1f}), 20 images a group"
    return [
        Table(
            f"{title}; how often p <= 0.05, which is a false positive but for `{BETTER}`, and how often a 95 % "
            "interval of the MCC difference holds the true one",
            ["groups", "world", "same MCC? rejects", "McNemar (i.i.d.) rejects", "covers", "half width",
             "Fisher z (i.i.d.) covers"],
            tests,
        ),
        Table(
            f"{title}; how often a 95 % interval of a difference holds the true one",
            ["groups", "world", *METRICS],
            covers,
        ),
        _speed(),
    ]  # fmt: skip
