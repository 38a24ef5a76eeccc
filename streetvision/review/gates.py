"""Gates: may a change be taken? Each limit is judged on a 95 % interval, not on the point.

A gate passes where the whole interval keeps the limit and fails where the whole interval breaks it. Else the
test set cannot tell, and the size that could, with 80 % power and the values seen here, is named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.errors import UserError
from streetvision.core.escaping import markdown, shortened
from streetvision.core.params import Gates
from streetvision.review.compare_report import NAMES, markdown_table, text_table
from streetvision.review.freshness import MEND
from streetvision.review.revisions import Review, Revision
from streetvision.stats.bootstrap import Interval
from streetvision.stats.paired import LEVEL, groups_needed, groups_needed_for_ece

Outcome = Literal["pass", "fail", "inconclusive"]
Timing = Mapping[str, Mapping[str, float]]
Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
_P95 = "p95_ms"


@dataclass(frozen=True)
class GateResult:
    """One gate that is on.

    Attributes
    ----------
    name, limit
        Parameter of `gates` and its value; "fresh base" has none.
    reason
        What was found; of an inconclusive gate also what would decide.
    """

    name: str
    limit: float | None
    outcome: Outcome
    reason: str


def refusal(base: Revision, head: Revision) -> str | None:
    """Why nothing can be judged, a line a reason; None where it can: the results of `head` are its own.

    A merge of stale results would leave a pipeline that `dvc repro` runs anew. What is stale in `base` is
    for `judge`: the change may be what mends it.
    """
    stale = head.run.freshness.lines()
    if not stale:
        return None
    lines = [f"stale in {head}: {line}" for line in stale]
    return "\n".join([*lines, f"{head} against {base}: fail, its results are stale; {MEND}"])


def judge(gates: Gates, found: Review, timings: tuple[Timing, Timing] | None) -> list[GateResult]:
    """Judge every gate that is on, in the order of the parameters; nothing is sure of a stale base.

    Parameters
    ----------
    timings
        Latencies of base and head by engine, see `read_timing`; None where they were not measured.
    """
    results = [
        GateResult(name, limit, *_judge(name, limit, found, timings))
        for name, limit in gates.model_dump().items()
        if limit is not None
    ]
    if found.stale_base:
        reason = "its results are stale, see above"
        results.insert(0, GateResult("fresh base", None, "inconclusive", reason))
    return results


def overall(results: Sequence[GateResult]) -> Outcome:
    """Fail if any gate fails, else inconclusive if any is, else pass."""
    outcomes = {result.outcome for result in results}
    if "fail" in outcomes:
        return "fail"
    return "inconclusive" if "inconclusive" in outcomes else "pass"


def gate_report(gates: Gates, results: Sequence[GateResult], found: Review) -> str:
    """The judgement for a terminal: each gate with its reason, those that are off, and the verdict."""
    notes = [f"Note: {note}." for note in found.notes]
    return "\n\n".join([*notes, *_judgement(gates, results, found, text_table, str)]) + "\n"


def gate_section(gates: Gates, results: Sequence[GateResult], found: Review) -> list[str]:
    """The same in Markdown, but for the notes of the review, which the report has already."""
    return _judgement(gates, results, found, markdown_table, markdown)


def _judgement(
    gates: Gates,
    results: Sequence[GateResult],
    found: Review,
    table: Table,
    escape: Callable[[str], str],
) -> list[str]:
    rows = [
        [
            each.name,
            "" if each.limit is None else f"{each.limit:g}",
            each.outcome,
            escape(each.reason),
        ]
        for each in results
    ]
    off = [name for name, limit in gates.model_dump().items() if limit is None]
    parts = [f"Note: {escape(note)}." for note in _changed_gates(gates, found)]
    parts += [table(["gate", "limit", "outcome", "why"], rows)] if rows else []
    parts += [f"Off: {', '.join(off)}."] if off else []
    return [*parts, f"{escape(f'{found.head} against {found.base}')}: {overall(results)}"]


def read_timing(path: Path) -> Timing:
    """Latencies by engine, `p95_ms` each, as `export` writes them to `.streetvision/export_timing.json`.

    Raises
    ------
    UserError
        Missing, or not of that form.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the timing {path}: {error}") from error
    engines = document.values() if isinstance(document, dict) else []
    if not engines or not all(isinstance(e, dict) and _positive(e.get(_P95)) for e in engines):
        raise UserError(f"{path} is no timing: it needs {_P95} of at least one engine")
    return document  # type: ignore[no-any-return]


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _judge(
    name: str, limit: float, found: Review, timings: tuple[Timing, Timing] | None
) -> tuple[Outcome, str]:
    comparison = found.comparison
    size = comparison.n, comparison.n_groups
    if name == "max_ece":
        # A sample's plain ECE exceeds the model's, by more than the limit on a small test set.
        return _ece(comparison.differences["ece_debiased"].head, limit, size)
    if name == "min_reward":
        return _reward(found, limit)
    if name == "max_latency_growth":
        return _latency(timings, limit)
    if not comparison.changes:
        return "pass", "no decision changed"
    metric = name.removeprefix("max_").removesuffix("_drop")
    delta = comparison.differences[metric].delta
    return _within(delta, -limit, size, f"{NAMES[metric]} difference", "+")


def _within(
    interval: Interval,
    limit: float,
    size: tuple[int, int],
    what: str,
    sign: str = "",
) -> tuple[Outcome, str]:
    """Judge an interval of a test set of `size` images and groups against a lower limit."""
    low, high = interval.low, interval.high
    if low is None or high is None:
        return "inconclusive", f"{what} {interval.value:{sign}.4f}, no interval ({interval.method})"
    seen = f"{what} {interval.value:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]{_over(interval)}"
    if low >= limit:
        return "pass", seen
    if high < limit:
        return "fail", seen
    error = (high - low) / (2 * NormalDist().inv_cdf((1 + LEVEL) / 2))
    return _undecided(seen, groups_needed(interval.value - limit, error, size[1]), size)


def _ece(interval: Interval, limit: float, size: tuple[int, int]) -> tuple[Outcome, str]:
    """Judge the interval of a debiased ECE against an upper limit."""
    low, high = interval.low, interval.high
    if low is None or high is None:
        return "inconclusive", f"debiased ECE {interval.value:.4f}, no interval ({interval.method})"
    seen = f"debiased ECE {interval.value:.4f} [{low:.4f}, {high:.4f}]{_over(interval)}"
    if high <= limit:
        return "pass", seen
    if low > limit:
        return "fail", seen
    return _undecided(seen, groups_needed_for_ece(limit, interval.value, high, size[1]), size)


def _over(interval: Interval) -> str:
    groups = interval.effective_groups
    return "" if groups is None else f" over {groups:.1f} effective groups"


def _undecided(seen: str, needed: int | None, size: tuple[int, int]) -> tuple[Outcome, str]:
    """What a gate says that a test set of `size` images and groups cannot judge."""
    images, groups = size
    if needed is None:
        return "inconclusive", f"{seen}; right at the limit, no test size would decide"
    return "inconclusive", (
        f"{seen}; about {math.ceil(needed * images / groups):,} test images in {needed:,} groups would decide, "
        f"here are {images:,} in {groups:,}"
    )


def _reward(found: Review, limit: float) -> tuple[Outcome, str]:
    path = ArtifactSchema(found.head.root).metric("challenge")
    text = found.head.read(path)
    name = f"{path.relative_to(found.head.root)} of {found.head}"
    if text is None:
        return "inconclusive", f"not measured: {name} is missing; the stage `challenge` makes it"
    try:
        document = json.loads(text)
        reward = document["reward"]
        interval = Interval(
            reward["mean"], reward.get("low"), reward.get("high"), document["interval_method"]
        )
        size = document["n"], document["n_groups"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{name} is not what `challenge` writes: {error}") from error
    return _within(interval, limit, size, "reward on distorted images")


def _latency(timings: tuple[Timing, Timing] | None, limit: float) -> tuple[Outcome, str]:
    """The engine that grew most; a point, as a timing has no interval."""
    if timings is None:
        return "inconclusive", "not measured: --timing takes base's and head's, of one machine"
    base, head = timings
    engines = sorted(set(base) & set(head))
    if not engines:
        return "inconclusive", "not measured: the two timings have no engine in common"
    growth, engine = max((head[name][_P95] / base[name][_P95] - 1, name) for name in engines)
    reason = f"p95 of {engine} {base[engine][_P95]:.1f} → {head[engine][_P95]:.1f} ms ({growth:+.1%}); a point"
    return ("pass" if growth <= limit else "fail"), reason


def _changed_gates(gates: Gates, found: Review) -> list[str]:
    """Gates that base had otherwise: a change may not loosen them in silence."""
    notes = []
    for name, limit in gates.model_dump().items():
        before = found.base.parameter("gates", name)
        if before is not None and before != limit:
            notes.append(f"{name} was {shortened(str(before))} in {found.base}")
    return notes
