"""The evidence of the whole pipeline: rung by rung, what each phase adds to what was kept before.

What a rung is laid over depends on the choices before it, so the runs of a rung are planned when those before
are finished: `climb` goes as far as the results reach and says what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from streetvision.core.artifacts import exclusive
from streetvision.core.processes import in_processes
from streetvision.core.progress import progress
from streetvision.presets import merge
from streetvision.studies.ablation_runs import (
    AUTO,
    BASES,
    FUSED,
    MOVED,
    STAGES,
    VIEWS,
    Job,
    finish,
    repeated,
    rule,
)
from streetvision.studies.gains import Gain, Part, Sample, paired_gain
from streetvision.studies.ladder import Ladder
from streetvision.studies.runs import results_file, whole_lines
from streetvision.studies.training import code_version, plan, prepare
from streetvision.studies.variants import BASE, Changes, Variant

log = logging.getLogger(__name__)
Lines = Mapping[str, Mapping[str, Any]]
# Stages that may read the splits that choices are made on.
_READERS = {"val_select": "train", "val_calib": "embed", "val_test": "evaluate"}


@dataclass(frozen=True)
class Candidate:
    """One way up a rung: its jobs, and by split the name of its log-odds; on VAL_TEST without the condition."""

    name: str
    change: str
    changes: Changes
    jobs: tuple[Job, ...]
    names: Mapping[str, str]

    def sample(self, split: str, condition: str, folds: Sequence[int] | None = None) -> Sample:
        """Its pooled log-odds on a split under a condition; `folds` are all by default."""
        name = self.names[split]
        if split == "val_test":
            name = f"{name} {condition}".strip()
        seeds: dict[int, list[Part]] = {}
        for job in self.jobs:
            if folds is None or job.run.fold_number in folds:
                data = job.run.fold.open(split, _READERS[split])
                labels, groups = (
                    repeated(values, condition, job.run.params)
                    for values in (data.labels, data.groups)
                )
                part = (labels, groups, job.read(split)[name])
                seeds.setdefault(job.run.seed, []).append(part)
        prior = self.jobs[0].run.params.decision.served_prior
        return Sample.pool(list(seeds.values()), prior)

    def folds(self, split: str) -> set[int]:
        """The folds in which every seed has its log-odds."""
        lacking = {
            job.run.fold_number for job in self.jobs if self.names[split] not in job.read(split)
        }
        return {job.run.fold_number for job in self.jobs} - lacking


@dataclass(frozen=True)
class Outcome:
    """A rung: its candidates against what was carried before, and what is carried on.

    `gains` are those of `metric` on `split`, None where a candidate failed or cannot be judged.
    """

    rung: str
    split: str
    metric: str
    before: Candidate
    candidates: tuple[Candidate, ...]
    gains: tuple[Gain | None, ...]
    best: int | None
    kept: bool

    @property
    def carried(self) -> Candidate:
        """What the next rung is laid over."""
        return self.before if self.best is None or not self.kept else self.candidates[self.best]


@dataclass(frozen=True)
class Climb:
    """How far the results of a ladder reach: its rungs so far, and what is missing for the next.

    `planned` has for each rung its name, its jobs finished and in all, and the seconds that one takes.
    """

    ladder: Ladder
    baseline: Candidate
    outcomes: tuple[Outcome, ...]
    missing: tuple[Job, ...]
    planned: tuple[tuple[str, int, int, float], ...]


def climb(ladder: Ladder, seeds: int, root: Path, scratch: Path, lines: Lines) -> Climb:
    """Go up a ladder as far as there are results; nothing is run."""
    baseline = _network(ladder, BASE, {}, seeds, root, scratch)
    carried, outcomes = baseline, []
    seconds, adaptation = ladder.comparison.seconds, ladder.comparison.adaptation_seconds
    rungs = [(rung.name, rung.variants) for rung in ladder.rungs]
    planned, missing = [], []

    def reached(name: str, jobs: Sequence[Job], each: float) -> bool:
        lacking = [job for job in jobs if not job.finished(lines)]
        planned.append((name, len(jobs) - len(lacking), len(jobs), each))
        missing.extend(lacking)
        return not lacking

    if reached(BASE.name, baseline.jobs, seconds):
        for name, variants in rungs:
            candidates = tuple(
                _network(ladder, each, carried.changes, seeds, root, scratch) for each in variants
            )
            jobs = [job for each in candidates for job in each.jobs]
            adapts = any(job.run.params.explora.enabled for job in jobs)
            if not reached(name, jobs, seconds + adapts * adaptation):
                break
            outcomes.append(judge(name, "val_select", "mcc", carried, candidates, lines))
            carried = outcomes[-1].carried
        else:
            jobs = [_view_job(job) for job in carried.jobs]
            if reached(VIEWS, jobs, ladder.views_seconds):
                outcomes += _decisions(carried, tuple(jobs), lines)
    runs = len(baseline.jobs)
    for name, variants in rungs[max(len(planned) - 1, 0) :]:
        adapts = any("explora" in variant.changes for variant in variants)
        planned.append((name, 0, runs * len(variants), seconds + adapts * adaptation))
    if planned[-1][0] != VIEWS:
        planned.append((VIEWS, 0, runs, ladder.views_seconds))
    return Climb(ladder, baseline, tuple(outcomes), tuple(missing), tuple(planned))


def _network(
    ladder: Ladder, variant: Variant, carried: Changes, seeds: int, root: Path, scratch: Path
) -> Candidate:
    changes = merge(carried, variant.changes)
    laid = Variant(variant.name, variant.topic, changes)
    planned = plan(replace(ladder.comparison, variants=(laid,)), seeds, root, scratch)
    code = code_version("streetvision.studies.ablation")
    jobs = tuple(Job(replace(run, code=code)) for run in planned.runs)
    fit_on = jobs[0].run.params.decision.fit_on
    names = {"val_select": fit_on, "val_test": ""}
    return Candidate(variant.name, variant.change, changes, jobs, names)


def _view_job(network: Job) -> Job:
    return Job(replace(network.run, variant=VIEWS), network)


def _decisions(network: Candidate, jobs: tuple[Job, ...], lines: Lines) -> list[Outcome]:
    """The rungs that need no further run: fusion, calibration and the deployed threshold."""
    params = jobs[0].run.params
    fit_on = params.decision.fit_on
    fused = Candidate(
        FUSED, f"{params.views.grid} × {params.views.grid} tiles, cvfm.mode = auto",
        network.changes, jobs, {"val_select": f"{FUSED} {fit_on}", "val_test": FUSED},
    )  # fmt: skip
    fusion = judge("fusion", "val_select", "mcc", network, (fused,), lines)
    base = BASES[int(fusion.kept)]

    def rules(stage: str) -> tuple[Candidate, ...]:
        return tuple(
            Candidate(
                f"{stage}, {name}", f"decision.calibrator = {name}", network.changes, jobs,
                dict.fromkeys(("val_calib", "val_test"), rule(base, name, stage)),
            )
            for name in dict.fromkeys((params.decision.calibrator, AUTO))
        )  # fmt: skip

    # What was carried so far, as the runs with views have it, at the served prior.
    names = dict.fromkeys(("val_calib", "val_test"), f"{base}/{MOVED}")
    bare = replace(fusion.carried, jobs=jobs, names=names)
    calibrated, deployed = (rules(stage) for stage in STAGES)
    calibration = judge("calibration", "val_calib", "log_loss", bare, calibrated, lines)
    best = 0 if calibration.best is None else calibration.best
    threshold = judge(
        "deployed threshold", "val_calib", "mcc", calibration.carried, (deployed[best],), lines
    )
    return [fusion, calibration, threshold]


def judge(
    rung: str,
    split: str,
    metric: str,
    before: Candidate,
    candidates: tuple[Candidate, ...],
    lines: Lines,
) -> Outcome:
    """Choose a rung's best candidate; it is kept where its gain is larger than its standard error."""
    sign = -1 if metric == "log_loss" else 1
    condition = before.jobs[0].run.params.decision.fit_on
    gains: list[Gain | None] = []
    for candidate in candidates:
        failed = any("error" in lines[job.key] for job in (*candidate.jobs, *before.jobs))
        folds = set() if failed else before.folds(split) & candidate.folds(split)
        gains.append(None)
        if folds:
            pair = [each.sample(split, condition, sorted(folds)) for each in (before, candidate)]
            gains[-1] = paired_gain(pair[0], pair[1], metric)
    judged = [(sign * gain.value, -k) for k, gain in enumerate(gains) if gain is not None]
    best = -max(judged)[1] if judged else None
    chosen = None if best is None else gains[best]
    kept = chosen is not None and sign * chosen.value > (chosen.error or 0.0)
    return Outcome(rung, split, metric, before, candidates, tuple(gains), best, kept)


def run_all(
    chosen: Sequence[Ladder], seeds: int, root: Path, scratch: Path, workers: int
) -> list[Climb]:
    """Do every run that is not finished, `workers` at a time, rung by rung; all ladders climbed.

    Raises
    ------
    UserError
        Data are missing, or another process is at work in `scratch`.
    """
    done: set[str] = set()
    with exclusive(scratch / "lock", f"another process is collecting evidence in {scratch}"):
        while True:
            lines = whole_lines(results_file(scratch))
            climbs = [climb(each, seeds, root, scratch, lines) for each in chosen]
            missing = [job for each in climbs for job in each.missing]
            if not missing:
                return climbs
            if again := done & {job.key for job in missing}:
                raise RuntimeError(f"the run {again.pop()} left no result")
            log.info("%d runs of the next rung; left in all: %s", len(missing),
                     _time(climbs, lines, workers))  # fmt: skip
            for each in climbs:
                prepare(plan(each.ladder.comparison, seeds, root, scratch), root, scratch, workers)
            # The longest first, so that no core waits for long at the end of a rung.
            missing.sort(key=lambda job: -_seconds(climbs, job))
            for line in progress(in_processes(finish, missing, workers), len(missing), "runs"):
                done.add(line["key"])
                said = line.get("error") or f"{line['seconds']:.0f} s"
                log.info("%s/%s, seed %d, fold %d: %s", line["comparison"], line["variant"],
                         line["seed"], line["fold"], said)  # fmt: skip


def _seconds(climbs: Sequence[Climb], job: Job) -> float:
    each = next(c for c in climbs if c.ladder.comparison.name == job.run.comparison)
    if job.network is not None:
        return each.ladder.views_seconds
    comparison = each.ladder.comparison
    return comparison.seconds + job.run.params.explora.enabled * comparison.adaptation_seconds


def listing(chosen: Sequence[Ladder], seeds: int, root: Path, scratch: Path, workers: int) -> str:
    """What would be run, what is finished, and about how long the rest takes."""
    lines = whole_lines(results_file(scratch))
    climbs = [climb(each, seeds, root, scratch, lines) for each in chosen]
    text = []
    for each in climbs:
        text.append(f"{each.ladder.comparison.name}: {each.ladder.comparison.title}")
        for name, done, every, _ in each.planned:
            text.append(f"  {name:20} {done} of {every} runs")
    return "\n".join([*text, f"left: {_time(climbs, lines, workers)}"])


def _time(climbs: Sequence[Climb], lines: Lines, workers: int) -> str:
    """The time of the unfinished runs: as planned, times what finished networks took of their plan."""
    total = 0.0
    for each in climbs:
        took = [lines[job.key].get("seconds") for job in each.baseline.jobs if job.key in lines]
        measured = [seconds for seconds in took if seconds]
        factor = float(np.mean(measured)) / each.ladder.comparison.seconds if measured else 1.0
        left = sum((every - done) * seconds for _, done, every, seconds in each.planned)
        total += factor * left
    return f"about {np.ceil(total / workers / 60):.0f} minutes"
