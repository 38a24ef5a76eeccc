"""How far each calibrator stays from the true map as its sample grows, and what it costs.

The truth is known, so the regret is exact up to the fixed test logits: the mean KL divergence, in
millinats, of the true probabilities from the calibrated ones, which is log loss above the best
possible. `auto` is the choice out of group folds. The logits are those of an overconfident model.
"""

from __future__ import annotations

import resource
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from streetvision.decision.calibrators import CalibrationMap
from streetvision.decision.choice import AUTO, CALIBRATORS, fit_kind
from streetvision.decision.ensemble import TIERS
from streetvision.decision.folds import group_folds, out_of_fold
from streetvision.decision.policy import fit_abstaining_policy, fit_policy
from tests.benchmarks.runner import Result, Table, compare

Floats = NDArray[np.float64]
Fit = Callable[[Floats, NDArray[np.bool_], NDArray[np.intp]], CalibrationMap]

SIZES = (100, 300, 1000, 3000, 10_000)
REPEATS = 20
RESAMPLES = 2000
PER_GROUP = 20  # images of a drive; independent here, so that only the size matters


def _affine(x: Floats) -> Floats:
    return 0.45 * x - 0.6


def _beta(x: Floats) -> Floats:
    return -0.9 * np.logaddexp(0, -x) + 0.3 * np.logaddexp(0, x) - 0.4


def _noisy_labels(x: Floats) -> Floats:
    """Affine, with 3 % of the labels wrong: levels off at both ends."""
    p = 0.03 + 0.94 / (1 + np.exp(-_affine(x)))
    return np.log(p) - np.log1p(-p)


def _wavy(x: Floats) -> Floats:
    return 0.45 * x - 0.6 + 0.8 * np.sin(0.8 * x)


TRUTHS: dict[str, Callable[[Floats], Floats]] = {
    "affine (Platt is right)": _affine,
    "beta-shaped (beta is right)": _beta,
    "3 % wrong labels (none is right)": _noisy_labels,
    "wavy, not monotone (none is right)": _wavy,
}


def _logits(rng: np.random.Generator, size: int) -> Floats:
    """Two overlapping clusters, most of the mass at large |logit|."""
    return np.where(rng.random(size) < 0.6, rng.normal(5, 3.5, size), rng.normal(-3, 3.5, size))


def _labels(rng: np.random.Generator, log_odds: Floats) -> NDArray[np.bool_]:
    return np.asarray(rng.random(log_odds.size) < 1 / (1 + np.exp(-log_odds)))


def regret(truth: Floats, found: Floats) -> float:
    """Mean KL divergence in nats of the probabilities of two log-odds [N], the first being true."""
    p = 1 / (1 + np.exp(-truth))
    positive = np.logaddexp(0, -found) - np.logaddexp(0, -truth)
    negative = np.logaddexp(0, found) - np.logaddexp(0, truth)
    return float(np.mean(p * positive + (1 - p) * negative))


def _regrets(name: str, truth: Callable[[Floats], Floats]) -> Table:
    fits: dict[str, Fit] = {kind: each.fit for kind, each in (CALIBRATORS | TIERS).items()}
    fits["auto"] = partial(fit_kind, AUTO, seed=0, served_prior=0.5)
    tested = _logits(np.random.default_rng(1), 20_000)
    wanted = truth(tested)
    found = np.zeros((len(fits), len(SIZES), REPEATS))
    for column, size in enumerate(SIZES):
        for repeat in range(REPEATS):
            rng = np.random.default_rng([size, repeat])
            logits = _logits(rng, size)
            labels = _labels(rng, truth(logits))
            groups = np.arange(size) // PER_GROUP
            for row, fit in enumerate(fits.values()):
                found[row, column, repeat] = regret(wanted, fit(logits, labels, groups)(tested))
    mean = 1000 * found.mean(axis=2)
    error = 1000 * found.std(axis=2, ddof=1) / np.sqrt(REPEATS)
    rows = [
        [kind, *(f"{mean[row, i]:.3g} ± {error[row, i]:.1g}" for i in range(len(SIZES)))]
        for row, kind in enumerate(fits)
    ]
    return Table(
        f"Regret in millinats (mean ± standard error of {REPEATS}), true map {name}",
        ["calibrator", *(f"n = {size:,}" for size in SIZES)],
        rows,
    )


def _costs() -> Table:
    """Seconds and peak memory of 5 group folds and the final fit."""
    rows = []
    for size in (10_000, 100_000):
        rng = np.random.default_rng(0)
        logits = _logits(rng, size)
        labels = _labels(rng, _noisy_labels(logits))
        groups = np.arange(size) // 200
        folds = group_folds(labels, groups, 0)
        total, highest = 0.0, 0
        for kind, calibrator in (CALIBRATORS | TIERS).items():

            def work(fit: Fit = calibrator.fit) -> None:
                out_of_fold(fit, logits, labels, groups, folds)  # noqa: B023
                fit(logits, labels, groups)  # noqa: B023

            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
            tracemalloc.start()  # apart: it slows Python down
            work()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            total, highest = total + seconds, max(highest, peak)
            rows.append([f"{size:,}", kind, f"{seconds:.3f} s", f"{peak / 2**20:.0f} MiB"])
        rows.append([f"{size:,}", "all", f"{total:.3f} s", f"{highest / 2**20:.0f} MiB"])
    return Table(
        "Five group folds and the final fit, one core; memory beyond the input",
        ["logits", "calibrator", "time", "peak memory"],
        rows,
    )


def _policy_costs() -> Table:
    """CPU seconds and peak memory of all that `calibrate` computes, for 100,000 logits."""
    rng = np.random.default_rng(0)
    logits = _logits(rng, 100_000)
    data = logits, _labels(rng, _noisy_labels(logits)), np.arange(logits.size) // 200

    def fit(calibrator: str) -> None:
        fit_policy(*data, 0.5, RESAMPLES, 0, calibrator, compare_tiers=True)

    def abstain() -> None:
        fit_abstaining_policy(
            *data, 0.5, RESAMPLES, 0, method="scrc_i", control="error", alpha=0.05, delta=0.1,
            guarantee_fraction=0.5, compare_tiers=True,
        )  # fmt: skip

    runs: dict[str, Callable[[], None]] = {
        "platt": partial(fit, "platt"),
        "multi_objective": partial(fit, "multi_objective"),
        "platt with scrc_i": abstain,
    }
    rows = []
    for name, work in runs.items():
        start = time.process_time()
        work()
        seconds = time.process_time() - start
        # Of the process so far, its libraries included: tracing allocations would take minutes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append([name, f"{seconds:.1f} s", f"{peak:.0f} MiB"])
    return Table(
        "All calibrators, tiers, folds and intervals (2,000 resamples), 100,000 logits in 500 groups",
        ["decision.calibrator", "CPU time", "peak memory of the process"],
        rows,
    )


SKLEARN_METHODS = {"temperature": "temperature", "platt": "sigmoid", "isotonic": "isotonic"}


def calibration() -> list[Result]:
    """The methods that scikit-learn has, too: out of five group folds, and the final fit."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    rng = np.random.default_rng(0)
    logits = _logits(rng, 10_000)
    labels = _labels(rng, _noisy_labels(logits))
    groups = np.arange(logits.size) // 200
    masks = group_folds(labels, groups, 0)
    folds = [(np.flatnonzero(~mask), np.flatnonzero(mask)) for mask in masks]

    inputs = logits[:, None]
    model = FrozenEstimator(LogisticRegression().fit(inputs, labels))  # a logit of its own

    def ours() -> None:
        for kind in SKLEARN_METHODS:
            out_of_fold(CALIBRATORS[kind].fit, logits, labels, groups, masks)
            CALIBRATORS[kind].fit(logits, labels, groups)

    def other() -> None:
        for method in SKLEARN_METHODS.values():
            calibrated = CalibratedClassifierCV(model, method=method)
            cross_val_predict(calibrated, inputs, labels, cv=folds, method="predict_proba")
            calibrated.fit(inputs, labels)

    result = compare(
        f"{', '.join(SKLEARN_METHODS)}: five group folds and the final fit, 10,000 logits",
        "scikit-learn: CalibratedClassifierCV, cross_val_predict",
        ours, other, reach=1,
    )  # fmt: skip
    return [result]


def calibrators() -> list[Table]:
    """Regret of each calibrator for each truth, and the costs."""
    regrets = (_regrets(name, truth) for name, truth in TRUTHS.items())
    return [*regrets, _costs(), _policy_costs()]
