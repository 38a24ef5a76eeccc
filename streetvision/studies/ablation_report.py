"""The tables of the ladder; every number and word comes from the finished runs."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streetvision.core.artifacts import library_versions, write_bytes_atomic
from streetvision.core.errors import UserError
from streetvision.core.escaping import markdown, shortened
from streetvision.core.schema import CONDITIONS
from streetvision.studies.ablation import Candidate, Climb, Outcome
from streetvision.studies.ablation_runs import Job
from streetvision.studies.data import PARTS, counts
from streetvision.studies.decision_report import table
from streetvision.studies.gains import Gain, paired_gain
from streetvision.studies.report import Spread
from streetvision.studies.runs import results_file, whole_lines
from streetvision.studies.variants import BASELINE

Lines = Mapping[str, Mapping[str, Any]]
_INTRODUCTION = """\
Written by `{command}` from one line a run (the `.jsonl` beside this file) and the log-odds that runs leave; \
no number here is typed by hand. Each rung is laid over what was carried before it. Networks and fusion are \
chosen on VAL_SELECT, calibration and threshold on VAL_CALIB out of folds of groups, always on images \
distorted as the validator does (what is served), by MCC at p > 0.5 or, for calibration, by log loss, where \
less is better (before and after both moved to the served prior). A rung is carried on if its best variant \
gains more than the standard error of that gain; \
otherwise it is shown, and the next rung is laid over what was there before. The deployed rule includes its \
calibrator. VAL_TEST was opened for the baseline and for the best variant of each rung alone. All numbers are \
at the served prior; ± is the standard deviation over the seeds; intervals, 95 %, are of the mean over the \
seeds and count groups and seeds (crossed; delete-one-group jackknife and t over the seeds, in quadrature); \
none below 4.5 effective groups. A run's seconds are those of adapting, training and, from fusion on, of \
scoring and fitting the views besides. {machine}."""
_SIZES = """\
{train.backbone}, input {train.height_px} × {train.width_px}, {train.epochs} epochs, batches of \
{train.batch_size}; each distorted image in {repeats} version{plural}. {seeds} seeds. {parts}."""
_FOLDS = """\
Mean over {folds} folds of whole groups: in fold k part k is VAL_TEST, k + 1 VAL_SELECT, k + 2 VAL_CALIB, the \
smallest group of part k + 3 TRAIN's fusion part, the rest and all groups of one class TRAIN; the decisions of \
all folds are pooled."""
_PRETRAINED = (
    "The backbone starts from weights trained with labels on other scenes of other cities."
)
_METRICS = {"mcc": "MCC", "log_loss": "log loss"}


def gain_text(gain: Gain | None) -> str:
    """`+0.012 [-0.003, +0.027]`."""
    if gain is None:
        return "not judged"
    if gain.low is None or gain.high is None:
        return f"{gain.value:+.3f} [none]"
    return f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def choices_table(climb: Climb, lines: Lines) -> list[str]:
    """What was chosen by: every variant of every rung against what was carried before."""
    rows = [
        ["rung", "variant", "change", "chosen by", "before", "Δ", "standard error", "carried on"]
    ]
    for outcome in climb.outcomes:
        for number, candidate in enumerate(outcome.candidates):
            gain = outcome.gains[number]
            carried = "**yes**" if outcome.kept and number == outcome.best else "no"
            failed = next(
                (lines[j.key]["error"] for j in candidate.jobs if "error" in lines[j.key]), ""
            )
            error = "" if gain is None or gain.error is None else f"{gain.error:.3f}"
            rows.append(
                [
                    outcome.rung, candidate.name, candidate.change,
                    f"{_METRICS[outcome.metric]}, {outcome.split.upper()}",
                    _before(outcome, candidate) if gain is not None else "",
                    f"failed: {markdown(shortened(failed))}" if failed else gain_text(gain), error, carried,
                ]
            )  # fmt: skip
    return table(rows)


def _before(outcome: Outcome, candidate: Candidate) -> str:
    params = outcome.before.jobs[0].run.params
    folds = sorted(outcome.before.folds(outcome.split) & candidate.folds(outcome.split))
    sample = outcome.before.sample(outcome.split, params.decision.fit_on, folds)
    return Spread.of(sample.by_seed(outcome.metric)).text()


def test_table(climb: Climb, lines: Lines) -> list[str]:
    """VAL_TEST: the only use of that split."""
    rows = [
        ["rung", "MCC, as they are", "Δ", "MCC, distorted", "Δ", "log loss, distorted",
         "debiased ECE, distorted", "s of a run", "views", "carried on"]
    ]  # fmt: skip
    rows.append(["baseline", *_cells(climb.baseline, None, lines), ""])
    for outcome in climb.outcomes:
        if outcome.best is None:
            rows.append([f"+ {outcome.rung}", "not judged", *[""] * 7, "no"])
            continue
        best = outcome.candidates[outcome.best]
        carried = "yes" if outcome.kept else "no"
        rows.append(
            [f"+ {outcome.rung}: {best.name}", *_cells(best, outcome.before, lines), carried]
        )
    if any(outcome.kept for outcome in climb.outcomes):
        last = climb.outcomes[-1].carried
        cells = _cells(last, climb.baseline, lines)
        rows.append([f"**carried to the end, against the {BASELINE}**", *cells, ""])
    return table(rows)


def _cells(candidate: Candidate, before: Candidate | None, lines: Lines) -> list[str]:
    cells = []
    for condition in CONDITIONS:
        after = candidate.sample("val_test", condition)
        cells.append(Spread.of(after.by_seed("mcc")).text())
        gain = ""
        if before is not None:
            gain = gain_text(paired_gain(before.sample("val_test", condition), after, "mcc"))
        cells.append(gain)
    distorted = candidate.sample("val_test", "served")
    cells += [Spread.of(distorted.by_seed(name)).text() for name in ("log_loss", "ece_debiased")]
    return [*cells, f"{_seconds(candidate.jobs, lines):.0f}", _views(candidate, lines)]


def _seconds(jobs: Sequence[Job], lines: Lines) -> float:
    """Mean time to adapt and train and, where they were used, to score, fuse and calibrate the views."""
    each = [
        lines[job.key]["seconds"] + (lines[job.network.key]["seconds"] if job.network else 0)
        for job in jobs
    ]
    return float(np.mean(each))


def _views(candidate: Candidate, lines: Lines) -> str:
    """Forward passes an image: of the fusion that each run chose, where the rung is on fused logits."""
    if not candidate.names["val_test"].startswith("fused"):
        return "1"
    return f"{np.mean([lines[job.key]['views'] for job in candidate.jobs]):.1f}"


def _modes(climb: Climb, lines: Lines) -> list[str]:
    """What the runs with views chose, in words."""
    jobs = [
        job for each in climb.outcomes for c in each.candidates for job in c.jobs if job.network
    ]
    found = {job.key: lines[job.key] for job in jobs if "error" not in lines[job.key]}
    if not found:
        return []
    modes = [line["mode"] for line in found.values()]
    text = ", ".join(f"{mode} {modes.count(mode)}" for mode in sorted(set(modes)))
    kept = next(each.kept for each in climb.outcomes if each.rung == "fusion")
    base = "fused" if kept else "single"
    moved = [sum(line["moved"][name] for line in found.values())
             for name in next(iter(found.values()))["moved"] if name.startswith(base)]  # fmt: skip
    names = [n.split("/")[1] for n in next(iter(found.values()))["moved"] if n.startswith(base)]
    shifts = ", ".join(f"{n} {k} of {len(found)}" for n, k in zip(names, moved, strict=True))
    return [f"Fusions that VAL_SELECT chose: {text}. Thresholds that were moved off 0.5: {shifts}."]


def document(climbs: Sequence[Climb], lines: Lines, command: str, workers: int) -> str:
    """What was done, and for each ladder its choices and VAL_TEST."""
    versions = library_versions()
    machine = ", ".join(
        [platform.machine(), f"{workers} processes of one thread"]
        + [f"{name} {versions[name]}" for name in ("torch", "timm", "peft") if name in versions]
    )
    text = ["# What each phase of the pipeline adds", ""]
    text.append(_INTRODUCTION.format(command=command, machine=machine))
    for climb in climbs:
        errors = [
            lines[job.key]["error"] for job in climb.baseline.jobs if "error" in lines[job.key]
        ]
        if errors:
            raise UserError(f"{climb.ladder.comparison.name}: the baseline failed: {errors[0]}")
        text += ["", f"## {climb.ladder.comparison.title}", "", _sizes(climb, lines), ""]
        text += ["Choices:", "", *choices_table(climb, lines), "", *_modes(climb, lines), ""]
        text += ["VAL_TEST:", "", *test_table(climb, lines), "", verdict(climb)]
    return "\n".join(text) + "\n"


def verdict(climb: Climb) -> str:
    """Which rungs were carried on, and which were not."""
    found = {
        kept: [each.rung for each in climb.outcomes if each.kept is kept] for kept in (True, False)
    }
    return (
        f"Carried on: {', '.join(found[True]) or 'nothing'}. "
        f"Shown, but not carried on: {', '.join(found[False]) or 'nothing'}."
    )


def _sizes(climb: Climb, lines: Lines) -> str:
    jobs = climb.baseline.jobs
    params, comparison = jobs[0].run.params, climb.ladder.comparison
    folds = list({job.run.fold_number: job.run.fold for job in jobs}.values())
    decision = (("TRAIN's fusion part", "train", "embed"), ("VAL_CALIB", "val_calib", "embed"))
    parts = [
        f"{name} {images:,.0f} images of {groups:,.0f} groups"
        for name, (images, groups) in counts(folds, (*PARTS, *decision)).items()
    ]
    repeats = params.embed.served_repeats
    text = [
        _SIZES.format(
            train=params.train, repeats=repeats, plural="s" * (repeats > 1), parts=", ".join(parts),
            seeds=len({job.run.seed for job in jobs}),
        )
    ]  # fmt: skip
    if len(folds) > 1:
        text.append(_FOLDS.format(folds=len(folds)))
    if comparison.pretraining is not None:
        text.append(_PRETRAINED)
    versions = {lines[job.key]["code"] for job in _jobs(climb)}
    if len(versions) > 1:
        text.append(f"**The runs come from {len(versions)} versions of the code.**")
    return " ".join(text)


def _jobs(climb: Climb) -> list[Job]:
    """All jobs that the tables rest on, each once."""
    every = [climb.baseline, *(c for each in climb.outcomes for c in each.candidates)]
    found = {job.key: job for candidate in every for job in candidate.jobs}
    return list(found.values())


def write_evidence(climbs: Sequence[Climb], out: Path, command: str, workers: int) -> None:
    """Write the document and, beside it, the lines it is made of."""
    lines = whole_lines(results_file(climbs[0].baseline.jobs[0].run.scratch))
    used = [lines[job.key] for climb in climbs for job in _jobs(climb)]
    text = "".join(f"{json.dumps(line, sort_keys=True)}\n" for line in used)
    write_bytes_atomic(out.with_suffix(".jsonl"), text.encode())
    write_bytes_atomic(out, document(climbs, lines, command, workers).encode())
