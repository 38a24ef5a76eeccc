"""How often `compare` says what is not so: false positives, coverage and power, on clustered images.

Each simulated test set has groups of unequal length (log-normal, 20 images in the mean) whose images share
how hard they are. Two models see the same images; each adds errors of its own, some of them shared by a
group. In the null worlds both have the same MCC exactly, by construction:

- `exchangeable`: both are drawn from one law;
- `operating point`: base says yes more, head as much less; the classes mirror each other, the prior is 50 %;
- `correlation`: errors of the same size, base's by image, head's by group.

In `better` head is better; its true difference is that of 250,000 groups.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from streetvision.evaluation.compare import compare_predictions, mcc_difference
from streetvision.evaluation.metrics import Floats, Integers, mcc_from_counts
from streetvision.evaluation.paired import fisher_z_interval, mcnemar_exact
from streetvision.evaluation.predictions import Predictions
from tests.benchmarks.runner import Table

PRIOR = 0.5
NULLS = ("exchangeable", "operating point", "correlation")
BETTER = "better"
REPEATS = 2000
RESAMPLES = 1000


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
def true_difference(world: str) -> float:
    """Head's MCC minus base's in the whole world, at a prior of 50 %."""
    if world in NULLS:
        return 0.0
    called, images = np.zeros((2, 2)), np.zeros(2)  # [side, label], [label]
    for seed in range(5):
        labels, *sides, _ = simulate(world, 50_000, np.random.default_rng([99, seed]))
        images += np.bincount(labels)
        called += [np.bincount(labels, p > 0.5) for p in sides]
    fpr, tpr = (called / images).T
    base, head = mcc_from_counts(tpr, fpr, 1 - fpr, 1 - tpr)
    return float(head - base)


@dataclass(frozen=True)
class Rates:
    """Of the simulated test sets; NaN where none has an interval.

    Attributes
    ----------
    sign_flip, mcnemar
        Share with p <= 0.05.
    given, covered, fisher_covered
        Share with an interval; of these the share that holds the truth; the same of Fisher's z.
    excluded, halfwidth
        Share whose interval excludes 0; its mean half width.
    """

    sign_flip: float
    mcnemar: float
    given: float
    covered: float
    fisher_covered: float
    excluded: float
    halfwidth: float


def rates(world: str, n_groups: int, repeats: int, seed: int, resamples: int = RESAMPLES) -> Rates:
    """Simulate, compare as `compare` does, count."""
    rng = np.random.default_rng([seed, n_groups, (*NULLS, BETTER).index(world)])
    truth = true_difference(world)
    rows = []
    for repeat in range(repeats):
        labels, base, head, groups = simulate(world, n_groups, rng)
        delta, p_value = mcc_difference(labels, base, head, groups, PRIOR, resamples, repeat)
        right = [(p > 0.5) == (labels == 1) for p in (base, head)]
        exact = mcnemar_exact(int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum()))
        fisher = fisher_z_interval(labels, base > 0.5, head > 0.5)
        bounds = [
            (x.low, x.high) if x and x.low is not None else (np.nan, np.nan)
            for x in (delta, fisher)
        ]
        rows.append((p_value, exact, *bounds[0], *bounds[1]))
    p, exact, low, high, fisher_low, fisher_high = np.array(rows, dtype=np.float64).T
    given = np.isfinite(low)
    return Rates(
        float((p <= 0.05).mean()), float((exact <= 0.05).mean()), float(given.mean()),
        _mean((low <= truth) & (truth <= high), given),
        _mean((fisher_low <= truth) & (truth <= fisher_high), np.isfinite(fisher_low)),
        _mean((low > 0) | (high < 0), given), _mean((high - low) / 2, given),
    )  # fmt: skip


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
    rows = []
    for n_groups in (4, 8, 20, 45, 60, 100, 200):
        for world in (*NULLS, BETTER):
            found = rates(world, n_groups, REPEATS, seed=0)
            null = world in NULLS
            without = found.given == 0
            rows.append([
                f"{n_groups}", world, f"{found.sign_flip:.1%}" if null else "",
                f"{found.mcnemar:.1%}" if null else "", f"{found.given:.0%}",
                "" if without else f"{found.covered:.1%}", "" if without else f"± {found.halfwidth:.3f}",
                f"{found.fisher_covered:.1%}",
            ])  # fmt: skip
    return [
        Table(
            f"{REPEATS:,} simulated test sets a row, 20 images a group; rejections at p <= 0.05 where there is "
            "no difference, and how often a 95 % interval of the MCC difference holds the true one",
            ["groups", "world", "sign-flip rejects", "McNemar (i.i.d.) rejects", "interval given", "covers",
             "half width", "Fisher z (i.i.d.) covers"],
            rows,
        ),
        _speed(),
    ]  # fmt: skip
