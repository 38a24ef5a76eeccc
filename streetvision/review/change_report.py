"""A change on one page: is it real, what else moved, where it helps, what it costs. For a pull request.

What DVC's remote would be needed for is left out, and the page says so; everything else is in Git.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.errors import UserError
from streetvision.core.escaping import caption, markdown, shortened
from streetvision.core.params import Gates
from streetvision.evaluation.predictions import match_predictions
from streetvision.review.compare_report import changes_table, markdown_report, markdown_table
from streetvision.review.experiments import TEST_METRICS, stage_seconds
from streetvision.review.freshness import MEND
from streetvision.review.gates import Timing, gate_section, judge
from streetvision.review.revisions import Review, Revision, contact_sheet, review
from streetvision.review.sweep_summary import as_text, is_number
from streetvision.stats.metrics import Floats

_COST = {
    "metrics/train.json:parameters": "parameters",
    "metrics/train.json:trainable_parameters": "of them trained",
    "metrics/train.json:cost.flops_per_step": "floating point operations of a training step",
    "metrics/train.json:cost.peak_memory_bytes": "peak memory of training, bytes",
    "metrics/export.json:parameters": "parameters of the bundle",
    "metrics/export.json:bytes": "bytes of the bundle",
}
_MOST_ROWS = 25  # more are folded away
_LEGEND = 30  # characters of a name in a picture, or of a number
_SIDES = ["base", "head", "change"]
Values = dict[str, dict[str, Any]]  # old, new and, of numbers, diff, by `file:name`


@dataclass
class ChangeReport:
    """The page in Markdown, the pictures it shows by file name, and the columns of `changed.csv`."""

    markdown: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)
    changed: dict[str, list[Any]] | None = None


def change_report(
    base: Revision, head: Revision, gates: Gates | str, timings: tuple[Timing, Timing] | None = None
) -> ChangeReport:
    """Compare two revisions in everything that Git, DVC and this machine's run log know of them.

    `gates` are judged as by `gate`, or say why there are none; `timings` are latencies of base and head by
    engine, None where not measured.

    Raises
    ------
    UserError
        A revision is unknown.
    """
    root = base.root
    runs = base.run, head.run
    made = ChangeReport()
    parts = ["# What this change does", *_stale(base, head), "## Is it real?"]
    metrics = _differences(base.run.metrics, head.run.metrics)
    params = _differences(base.run.params, head.run.params)
    try:
        found = review(base, head)
    except UserError as error:
        parts += [
            f"### {markdown(f'{head} against {base}')}",
            f"**Predictions cannot be compared:** {markdown(str(error))}.",
        ]
        parts += _gates(base, head, gates, None, timings)
    else:
        parts.append(markdown_report(found).strip())
        parts += _gates(base, head, gates, found, timings)
        parts += _pictures(found, made)
    parts += _sweep_curves(base, head, made)
    parts += ["## Parameters", *_params_table(params)]
    parts += ["## Metrics", *_metrics_tables(metrics)]
    log = ArtifactSchema(root).run_log
    seconds = [stage_seconds(root, log, run.commit) for run in runs]
    parts += ["## Cost", *_cost_table(metrics, seconds, timings)]
    made.markdown = "\n\n".join(parts) + "\n"
    return made


def _stale(base: Revision, head: Revision) -> list[str]:
    """Which results are not those of their revision, before anything is said of them."""
    parts = []
    for each in dict.fromkeys((base, head)):
        lines = each.run.freshness.lines()
        if lines:
            parts.append(f"**Stale in {markdown(str(each))}:** {MEND}.")
            parts.append("\n".join(f"- {markdown(line)}" for line in lines))
    return parts


def _gates(
    base: Revision, head: Revision, gates: Gates | str, found: Review | None,
    timings: tuple[Timing, Timing] | None,
) -> list[str]:  # fmt: skip
    """What `gate` says."""
    if head.run.freshness.stale:
        said = [f"{markdown(f'{head} against {base}')}: fail, its results are stale."]
    elif isinstance(gates, str):
        said = [f"Nothing is judged: {markdown(gates)}."]
    elif found is None:
        said = ["Nothing can be judged without a comparison."]
    else:
        try:
            said = gate_section(gates, judge(gates, found, timings), found)
        except UserError as error:
            said = [f"Nothing can be judged: {markdown(str(error))}."]
    return ["## May it be taken?", *said]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Values:
    """What either side has, by name in alphabetical order, with the difference of numbers."""
    found: Values = {}
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        found[name] = {"old": before, "new": after}
        if is_number(before) and is_number(after):
            found[name]["diff"] = after - before
    return found


def _pictures(found: Review, made: ChangeReport) -> list[str]:
    """Curves of both sides on the images that both answered, and the sheet of changed decisions."""
    from streetvision.review import review_plots

    tables = found.base.predictions(), found.head.predictions()
    _, *rows = match_predictions(*tables)
    both = {
        name: each.probabilities[own]
        for name, each, own in zip(_names(found.base, found.head), tables, rows, strict=True)
    }
    labels, prior = tables[1].labels[rows[1]], found.comparison.served_prior
    made.pictures["roc.png"] = review_plots.overlay_roc(labels, both)
    made.pictures["precision_recall.png"] = review_plots.overlay_precision_recall(
        labels, both, prior
    )
    made.pictures["reliability.png"] = review_plots.overlay_reliability(labels, both, prior)
    parts = ["## Curves", *map(_shown, ("roc.png", "precision_recall.png", "reliability.png"))]
    made.changed = changes_table(found.comparison)
    sheet = contact_sheet(found) if found.comparison.changes else None
    if sheet is not None:
        made.pictures["changed.png"] = sheet
    where = "All are in `changed.csv`."
    parts += ["## Images whose decision changed", where]
    return parts if sheet is None else [*parts, _shown("changed.png")]


def _sweep_curves(base: Revision, head: Revision, made: ChangeReport) -> list[str]:
    """MCC over the threshold on VAL_CALIB, of the revisions that have the curve."""
    from streetvision.review import review_plots

    curves, missing = {}, []
    path = ArtifactSchema(base.root).plot("mcc_curve.csv")
    for name, revision in zip(_names(base, head), (base, head), strict=True):
        text = revision.read(path)
        if text is None:
            missing.append(f"{markdown(str(revision))} has no {path.relative_to(base.root)}.")
            continue
        curves[name] = _curve(text, f"{path.relative_to(base.root)} of {revision}")
    if not curves:
        return missing
    made.pictures["mcc_curve.png"] = review_plots.overlay_mcc_curves(curves)
    return ["## MCC over the threshold, VAL_CALIB", *missing, _shown("mcc_curve.png")]


def _curve(text: str, origin: str) -> list[Floats]:
    """Thresholds [T] and MCC [T] of a `mcc_curve.csv`."""
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        found = [np.array([float(row[name]) for row in rows]) for name in ("threshold", "mcc")]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{origin} is no table of thresholds and MCC: {error}") from error
    if not rows or not np.isfinite(found).all():
        raise UserError(f"{origin} is no table of thresholds and MCC")
    return found


def _names(base: Revision, head: Revision) -> tuple[str, str]:
    return f"base {caption(str(base), _LEGEND)}", f"head {caption(str(head), _LEGEND)}"


def _params_table(params: Values) -> list[str]:
    rows = [
        [markdown(shortened(name)), *(_cell(each[side]) for side in ("old", "new"))]
        for name, each in params.items()
        if each["old"] != each["new"]
    ]
    return _table(["parameter", "base", "head"], rows, "None differs.")


def _metrics_tables(metrics: Values) -> list[str]:
    # The headline has numbers of the other files again.
    changed = {
        name: each
        for name, each in metrics.items()
        if each["old"] != each["new"] and not name.startswith("metrics/headline.json:")
    }
    first = {
        name: each
        for name, each in changed.items()
        if (name.startswith(TEST_METRICS) and "." not in name.partition(":")[2])
        or ":val_select." in name
    }
    rest = _rows({name: each for name, each in changed.items() if name not in first})
    parts = _table(["metric", *_SIDES], _rows(first), "None differs.")
    if rest:
        parts += _folded(f"{len(rest)} more", ["metric", *_SIDES], rest)
    return parts


def _cost_table(
    metrics: Values, seconds: Sequence[Mapping[str, float]], timings: tuple[Timing, Timing] | None
) -> list[str]:
    rows = [_row(name, metrics[key]) for key, name in _COST.items() if key in metrics]
    rows += _pairs("seconds of `{}`, on this machine", *seconds)
    if timings is not None:
        p95 = [{engine: each["p95_ms"] for engine, each in side.items()} for side in timings]
        rows += _pairs("latency of {}, 95 % quantile, ms", *p95)
    parts = _table(["cost", *_SIDES], rows, "No cost is recorded.")
    if not any(seconds):
        parts.append("Times are not known: this machine's run log has no run of these revisions.")
    return parts


def _pairs(name: str, base: Mapping[str, float], head: Mapping[str, float]) -> list[list[str]]:
    """A row for each key of either side."""
    rows = []
    for key in {**base, **head}:
        old, new = base.get(key), head.get(key)
        change = {} if old is None or new is None else {"diff": new - old}
        rows.append(_row(name.format(key), {"old": old, "new": new, **change}))
    return rows


def _rows(metrics: Values) -> list[list[str]]:
    return [_row(markdown(shortened(name)), each) for name, each in metrics.items()]


def _row(name: str, value: Mapping[str, Any]) -> list[str]:
    change = value.get("diff")
    sign = "" if change is None else f"{'+' if change >= 0 else '−'}{_value(abs(change))}"
    return [name, _value(value["old"]), _value(value["new"]), sign]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1000 else shortened(f"{value:,.0f}", _LEGEND)
    if isinstance(value, int) and not isinstance(value, bool):
        return shortened(f"{value:,}", _LEGEND)
    return _cell(value)


def _cell(value: Any) -> str:
    return "–" if value is None else markdown(shortened(as_text(value)))


def _table(header: list[str], rows: list[list[str]], nothing: str) -> list[str]:
    if not rows:
        return [nothing]
    if len(rows) > _MOST_ROWS:
        return _folded(f"{len(rows)} differ", header, rows)
    return [markdown_table(header, rows)]


def _folded(summary: str, header: list[str], rows: list[list[str]]) -> list[str]:
    table = markdown_table(header, rows)
    return [f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>"]


def _shown(name: str) -> str:
    return f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"
