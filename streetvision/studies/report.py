"""Tables of the finished runs, and VAL_TEST for what was chosen; every number and word comes from them."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streetvision.core.artifacts import library_versions, write_bytes_atomic
from streetvision.core.escaping import markdown, shortened
from streetvision.stats.bootstrap import Interval, Resting, statistic_intervals
from streetvision.stats.metrics import (
    METRIC_RANGES,
    Floats,
    GroupTable,
    all_metrics_batch,
    mcc_from_counts,
)
from streetvision.studies.data import counts
from streetvision.studies.runs import Run, Scores, unseal
from streetvision.studies.variants import BASELINE, Comparison, Variant

Line = Mapping[str, Any]
N_RESAMPLES = 2000
COLUMNS = (
    "variant", "change", "MCC", "Δ MCC", "challenge MCC", "Δ challenge MCC", "ROC AUC", "log loss",
    "trained parameters", "s a run",
)  # fmt: skip
# What variants may be chosen by.
CRITERIA = {"clean": "undistorted images", "served": "the four challenge levels together"}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over the seeds; no deviation of one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one number a seed."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), deviation)

    def text(self, sign: str = "") -> str:
        """`0.812 ± 0.010`; `sign` "+" shows it also where it is positive."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.3f}"
        return f"{self.mean:{sign}.3f}{spread}"


@dataclass(frozen=True)
class Table:
    """The runs of one comparison: planned, and their lines by key."""

    comparison: Comparison
    runs: Sequence[Run]
    lines: Mapping[str, Line]

    def of(self, variant: str) -> list[tuple[Run, Line | None]]:
        """The runs of a variant, in order, each with its line where it is finished."""
        return [(run, self.lines.get(run.key)) for run in self.runs if run.variant == variant]

    def error(self, variant: str) -> str | None:
        """Why a variant could not be trained."""
        errors = [line["error"] for _, line in self.of(variant) if line and "error" in line]
        return errors[0] if errors else None

    def complete(self, variant: str) -> bool:
        """Whether every run of a variant is finished, without an error."""
        return all(line is not None for _, line in self.of(variant)) and not self.error(variant)

    def by_seed(self, variant: str) -> list[list[Line]]:
        """The lines of a variant, one list of folds a seed."""
        found: dict[int, list[Line]] = defaultdict(list)
        for run, line in self.of(variant):
            if line is not None:
                found[run.seed].append(line)
        return list(found.values())

    def mcc(self, variant: str, criterion: str) -> list[float]:
        """VAL_SELECT MCC of each seed, its decisions pooled over the folds."""
        return [pooled_mcc(lines, criterion) for lines in self.by_seed(variant)]

    def chosen(self, criterion: str) -> list[str]:
        """The variant chosen in each fold: the best mean MCC over the seeds on that fold's VAL_SELECT.

        Of equals the first, so that the baseline stays unless something is better.
        """
        complete = [v.name for v in self.comparison.variants if self.complete(v.name)]
        found = []
        for fold in range(self.comparison.folds):
            means = {
                name: np.mean(
                    [pooled_mcc([lines[fold]], criterion) for lines in self.by_seed(name)]
                )
                for name in complete
            }
            found.append(max(means, key=lambda name: means[name]))
        return found

    def best(self, criterion: str) -> str:
        """The variant with the best mean MCC over the seeds, folds pooled."""
        complete = [v.name for v in self.comparison.variants if self.complete(v.name)]
        return max(complete, key=lambda name: float(np.mean(self.mcc(name, criterion))))


def pooled_mcc(lines: Sequence[Line], criterion: str) -> float:
    """MCC of all decisions in some lines."""
    counts = [
        c for line in lines for c in ([line["clean"]] if criterion == "clean" else line["levels"])
    ]
    total = {name: sum(c[name] for c in counts) for name in ("tp", "fp", "tn", "fn")}
    return float(mcc_from_counts(**total))


def _weighted(lines: Sequence[Line], name: str) -> float:
    """Mean over images of a mean that each fold's line holds."""
    return float(np.average([line[name] for line in lines], weights=[x["images"] for x in lines]))


def variants_table(table: Table) -> list[str]:
    """The Markdown table of one comparison."""
    best = {criterion: table.best(criterion) for criterion in CRITERIA}
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for variant in table.comparison.variants:
        marks = [f"best on {c}" for c in CRITERIA if best[c] == variant.name]
        name = f"**{variant.name}** ({', '.join(marks)})" if marks else variant.name
        cells = [name, variant.change, *_cells(table, variant)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cells(table: Table, variant: Variant) -> list[str]:
    error = table.error(variant.name)
    if error is not None:
        return [f"failed: {markdown(shortened(error))}", *[""] * (len(COLUMNS) - 3)]
    if not table.complete(variant.name):
        runs = table.of(variant.name)
        return [
            f"{sum(line is not None for _, line in runs)} of {len(runs)} runs",
            *[""] * (len(COLUMNS) - 3),
        ]
    seeds = table.by_seed(variant.name)
    cells = []
    for criterion in CRITERIA:
        mine = table.mcc(variant.name, criterion)
        cells.append(Spread.of(mine).text())
        if variant.name == BASELINE or not table.complete(variant.against):
            cells.append("")
            continue
        other = table.mcc(variant.against, criterion)
        gain = Spread.of([a - b for a, b in zip(mine, other, strict=True)]).text("+")
        cells.append(
            gain + ("" if variant.against == BASELINE else f" (against {variant.against})")
        )
    cells += [
        Spread.of([_weighted(lines, name) for lines in seeds]).text()
        for name in ("roc_auc", "log_loss")
    ]
    every = [line for lines in seeds for line in lines]
    cells.append(f"{every[0]['trainable_parameters']:,}")
    cells.append(f"{np.mean([line['seconds'] for line in every]):.0f}")
    return cells


# --------------------------------------------------------------------------- VAL_TEST


def test_lines(table: Table) -> list[str]:
    """VAL_TEST for the baseline and for what was chosen, by each criterion: the only use of that split."""
    lines = [
        "| chosen by | in fold | baseline | chosen | chosen − baseline |",
        "|---|---|---|---|---|",
    ]
    for criterion, what in CRITERIA.items():
        chosen = table.chosen(criterion)
        baseline, picked, gain = test_intervals(table, chosen, criterion)
        names = chosen[0] if len(set(chosen)) == 1 else ", ".join(chosen)
        cells = [what, names, *(_interval(x) for x in (baseline, picked))]
        lines.append(f"| {' | '.join([*cells, _interval(gain, '+')])} |")
    return lines


def test_intervals(
    table: Table, chosen: Sequence[str], criterion: str
) -> tuple[Interval, Interval, Interval]:
    """VAL_TEST MCC of the baseline, of the variant chosen in each fold, and the difference.

    Each is the mean over the seeds of the MCC of all folds' decisions; intervals resample groups.
    """
    baseline = [BASELINE] * table.comparison.folds
    tables = {
        name: _group_tables(table, names, criterion)
        for name, names in (("baseline", baseline), ("chosen", chosen))
    }

    def evaluate(multiplicities: Floats, names: Sequence[str]) -> dict[str, Floats]:
        found = {
            name: np.mean(
                [all_metrics_batch(each, multiplicities, None, ("mcc",))["mcc"] for each in seeds],
                axis=0,
            )
            for name, seeds in tables.items()
        }
        found["gain"] = found["chosen"] - found["baseline"]
        return {name: found[name] for name in names}

    images = tables["baseline"][0].sums[:, :, 0]  # [G, 2]
    low, high = METRIC_RANGES["mcc"]
    intervals = statistic_intervals(
        evaluate,
        len(images),
        dict.fromkeys(("baseline", "chosen", "gain"), Resting.of(images)),
        {"baseline": (low, high), "chosen": (low, high), "gain": (low - high, high - low)},
        N_RESAMPLES,
        scales={"baseline": "atanh", "chosen": "atanh", "gain": "identity"},
    )
    return intervals["baseline"], intervals["chosen"], intervals["gain"]


def _group_tables(table: Table, names: Sequence[str], criterion: str) -> list[GroupTable]:
    """Sums by group of one seed's VAL_TEST decisions, `names` giving the variant of each fold."""
    by_seed: dict[int, list[tuple[Run, Scores]]] = defaultdict(list)
    for fold, name in enumerate(names):
        for run, _ in table.of(name):
            if run.fold_number == fold:
                by_seed[run.seed].append((run, unseal(run)))
    found = []
    for parts in by_seed.values():
        labels, groups, probabilities = [], [], []
        for run, scores in parts:
            split = run.fold.read("val_test")
            rows = scores.clean[None] if criterion == "clean" else scores.levels
            labels.append(np.tile(split.labels, len(rows)))
            groups.append(np.tile(split.groups.astype(str), len(rows)))
            probabilities.append(rows.ravel())
        index = np.unique(np.concatenate(groups), return_inverse=True)[1].astype(np.int64)
        found.append(
            GroupTable.build(np.concatenate(labels), np.concatenate(probabilities), index, None)
        )
    return found


def _interval(interval: Interval, sign: str = "") -> str:
    value = f"{interval.value:{sign}.3f}"
    if interval.low is None or interval.high is None:
        return f"{value} (no interval; {interval.method.removeprefix('none: ')})"
    return f"{value} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


# --------------------------------------------------------------------------- the document

_INTRODUCTION = """\
Written by `{command}` from one line a run (the `.jsonl` beside this file); no number here is typed by hand. \
MCC is that of the decision p > 0.5 on uncalibrated probabilities; ROC AUC does not depend on calibration. \
*Challenge* is the same images through the validator's four distortion levels (fixed draws, a quarter each). \
± is the standard deviation over seeds; Δ is paired by seed with the baseline, or with the variant named. \
Each variant is one change. Variants are compared on VAL_SELECT after the last epoch, so that no epoch is \
chosen on it; where there are folds, the decisions of all folds are pooled. {machine}."""
_SIZES = """\
Input {train.height_px} × {train.width_px}, {train.epochs} epochs, batches of {train.batch_size}, learning \
rate {train.learning_rate:g}, {train.precision}; ExPLoRA {explora.epochs} epochs, batches of \
{explora.batch_size}. {seeds} seeds. {parts}."""
_FOLDS = """\
Mean over {folds} folds of whole groups: in fold k part k is VAL_TEST, part k + 1 VAL_SELECT, the rest and all \
groups of one class TRAIN, so each group with both classes is VAL_SELECT once and VAL_TEST once."""
_PRETRAINED = """\
The backbone starts from weights trained with labels on other scenes of other cities: it has seen the task, \
so read the trainable parts against each other."""
_CHOICE = """\
Chosen {where}: the highest mean MCC over the seeds, on {criteria}. VAL_TEST was opened for these and the \
baseline alone; mean over the seeds, intervals over groups."""


def document(tables: Sequence[Table], command: str, workers: int) -> str:
    """What was done, and for each comparison its sizes, its variants and VAL_TEST of what was chosen."""
    found = library_versions()
    versions = [f"{name} {found[name]}" for name in ("torch", "timm", "peft") if name in found]
    machine = ", ".join([platform.machine(), f"{workers} processes of one thread", *versions])
    introduction = _INTRODUCTION.format(command=command, machine=machine)
    text = ["# What each part of the training stack adds", "", introduction]
    for table in tables:
        text += ["", f"## {table.comparison.title}", "", _sizes(table), ""]
        if table.complete(BASELINE):
            text += [*variants_table(table), "", _choice(table), "", *test_lines(table)]
        else:
            text.append("The baseline is not finished.")
    return "\n".join(text) + "\n"


def _sizes(table: Table) -> str:
    """Recipe, data and folds, a sentence each."""
    params = table.runs[0].params
    folds = list({run.fold_number: run.fold for run in table.runs}.values())
    parts = [
        f"{name} {images:,.0f} images of {groups:,.0f} groups"
        for name, (images, groups) in counts(folds).items()
    ]
    text = [
        _SIZES.format(
            train=params.train, explora=params.explora, parts=", ".join(parts),
            seeds=len({run.seed for run in table.runs}),
        )
    ]  # fmt: skip
    if len(folds) > 1:
        text.append(_FOLDS.format(folds=len(folds)))
    if table.comparison.pretraining is not None:
        text.append(_PRETRAINED)
    versions = {table.lines[run.key]["code"] for run in table.runs if run.key in table.lines}
    if len(versions) > 1:
        text.append(f"**The runs come from {len(versions)} versions of the code.**")
    return " ".join(text)


def _choice(table: Table) -> str:
    """What was chosen on what."""
    folds = table.comparison.folds > 1
    where = "in each fold on that fold's VAL_SELECT" if folds else "on VAL_SELECT"
    return _CHOICE.format(where=where, criteria=" or on ".join(CRITERIA.values()))


def write_evidence(tables: Sequence[Table], out: Path, command: str, workers: int) -> None:
    """Write the document and, beside it, the lines it is made of."""
    lines = [
        table.lines[run.key] for table in tables for run in table.runs if run.key in table.lines
    ]
    text = "".join(f"{json.dumps(line, sort_keys=True)}\n" for line in lines)
    write_bytes_atomic(out.with_suffix(".jsonl"), text.encode())
    write_bytes_atomic(out, document(tables, command, workers).encode())
