"""Times ours and an alternative alternately in the same run and reports the ratio of each pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

PAIRS = 5


@dataclass(frozen=True)
class Result:
    """Median seconds of both, and the ratio alternative / ours: median, least and largest of the pairs.

    `reach` is the ratio to reach, where there is one.
    """

    name: str
    against: str
    ours_seconds: float
    other_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    reach: float | None


@dataclass(frozen=True)
class Table:
    """Any other result: rows of cells under named columns."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def compare(
    name: str,
    against: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    other_factor: float = 1.0,
    *,
    reach: float | None = None,
) -> Result:
    """Run `PAIRS` pairs after one warm-up of each.

    `other_factor` scales the alternative's time where only a part of its work is run; `reach` is the ratio
    that is wanted.
    """
    ours()
    other()
    mine, theirs = [], []
    for _ in range(PAIRS):
        mine.append(seconds(ours))
        theirs.append(seconds(other) * other_factor)
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    return Result(
        name,
        against,
        statistics.median(mine),
        statistics.median(theirs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        reach,
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
