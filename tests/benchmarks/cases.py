"""The benchmarks that are ratios; each returns its `Result`s."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.calibrators import calibration
from tests.benchmarks.data import access, distort, prepare
from tests.benchmarks.features import frozen
from tests.benchmarks.inference import views
from tests.benchmarks.runner import Result, compare
from tests.benchmarks.training import explora, train

RESAMPLES = 10_000


def sweep() -> list[Result]:
    """Exact optimum over a million scores against scikit-learn over 5,000 thresholds."""
    from sklearn.metrics import matthews_corrcoef

    from streetvision.decision.threshold import select_threshold_max_mcc

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1_000_000)
    logits = rng.normal(2 * labels - 1, 1.5)
    few = np.linspace(0.3, 0.7, 2)

    def other() -> None:
        probabilities = 1 / (1 + np.exp(-logits))
        for threshold in few:
            matthews_corrcoef(labels, probabilities > threshold)

    result = compare(
        "exact MCC sweep, 1,000,000 scores",
        f"scikit-learn over 5,000 thresholds (extrapolated from {len(few)})",
        lambda: select_threshold_max_mcc(logits, labels),
        other,
        5000 / len(few),
        reach=1000,
    )
    return [result]


def bootstrap() -> list[Result]:
    """All interval metrics over groups against scikit-learn in a loop and scipy's bootstrap."""
    from scipy import stats
    from sklearn import metrics

    from streetvision.stats.bootstrap import group_intervals
    from streetvision.stats.metrics import all_metrics

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 10_000)
    probabilities = 1 / (1 + np.exp(-rng.normal(2 * labels - 1, 1.5)))
    groups = np.repeat(np.arange(100), 100)
    rng = np.random.default_rng(1)
    rows = [np.flatnonzero(groups == group) for group in range(100)]
    few, some = 3, 20

    def loop() -> None:
        for _ in range(few):
            index = np.concatenate([rows[g] for g in rng.integers(0, 100, 100)])
            y, p = labels[index], probabilities[index]
            metrics.accuracy_score(y, p > 0.5)
            metrics.precision_recall_fscore_support(y, p > 0.5, average="binary")
            metrics.matthews_corrcoef(y, p > 0.5)
            metrics.roc_auc_score(y, p)
            metrics.average_precision_score(y, p)
            metrics.brier_score_loss(y, p)
            metrics.log_loss(y, p)

    def statistic(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        index = np.concatenate([rows[g] for g in drawn])
        return np.array(list(all_metrics(labels[index], probabilities[index]).values()))

    def scipy() -> None:
        stats.bootstrap(
            (np.arange(100),), statistic, n_resamples=some, vectorized=False, method="percentile"
        )

    what = "group bootstrap of 14 metrics, 10,000 images, 10,000 resamples"

    def ours() -> None:
        group_intervals(labels, probabilities, groups, 0.5, RESAMPLES)

    return [
        compare(
            what, f"scikit-learn in a loop, 9 of the metrics (extrapolated from {few} resamples)",
            ours, loop, RESAMPLES / few, reach=1000,
        ),
        compare(
            what, f"scipy.stats.bootstrap of our metrics (extrapolated from {some} resamples)",
            ours, scipy, RESAMPLES / some, reach=20,
        ),
    ]  # fmt: skip


CASES = {
    "prepare": prepare, "access": access, "distort": distort, "sweep": sweep, "bootstrap": bootstrap,
    "calibration": calibration,
    "train": train, "explora": explora, "frozen": frozen, "views": views,
}  # fmt: skip
