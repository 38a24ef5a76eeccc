"""The evidence of the training stack: every variant against the plain baseline, over seeds.

Data and pretrained weights are made first, then all runs go through a pool of single-threaded processes,
and the tables are written from the lines that the runs left.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from streetvision.core.artifacts import config_hash, exclusive, write_atomic
from streetvision.core.imports import code_sha256
from streetvision.core.params import Params
from streetvision.core.processes import in_processes, usable_cores
from streetvision.core.progress import progress
from streetvision.studies.data import READ, Fold, make_distorted, plan_folds, prepare_folds
from streetvision.studies.report import Table
from streetvision.studies.runs import Run, finish, read_lines, results_file, train
from streetvision.studies.variants import Comparison, Variant, every_run

log = logging.getLogger(__name__)
PRETRAINING_SEED = 1_000_003


@dataclass(frozen=True)
class Plan:
    """One comparison with everything it will run; `pretraining` is there where its backbone needs it."""

    comparison: Comparison
    folds: tuple[Fold, ...]
    runs: tuple[Run, ...]
    pretraining: Pretraining | None


@dataclass(frozen=True)
class Pretraining:
    """Weights that the runs of a comparison start from, supervised on other scenes."""

    params: Params
    fold: Fold
    weights: Path


def plan(comparison: Comparison, seeds: int, root: Path, scratch: Path) -> Plan:
    """All runs of a comparison; nothing is made yet."""
    base = comparison.params(comparison.variants[0], 0)
    folds = plan_folds(
        base.data, comparison.folds, root, scratch / "data", calibrated=comparison.calibrated
    )
    pretraining = _plan_pretraining(comparison, root, scratch)
    code = code_version("streetvision.studies.runs")
    hardware = {"workers": 0 if usable_cores() <= 2 else 1}
    runs = []
    for variant, seed, number in every_run(comparison, seeds):
        changes: dict[str, Any] = {"hardware": hardware}
        if pretraining is not None:
            changes["train"] = {"weights": pretraining.weights.relative_to(scratch).as_posix()}
        params = comparison.params(variant, seed, changes)
        start = root if pretraining is None else scratch
        runs.append(
            Run(comparison.name, variant.name, seed, number, folds[number], params, start, scratch,
                code)
        )  # fmt: skip
    return Plan(comparison, folds, tuple(runs), pretraining)


@cache
def code_version(module: str) -> str:
    """A short hash of the code that a module needs."""
    return code_sha256(module, Path(__file__).parents[2])[:12]


def _plan_pretraining(comparison: Comparison, root: Path, scratch: Path) -> Pretraining | None:
    if comparison.pretraining is None:
        return None
    variant = Variant("pretraining", "", comparison.pretraining)
    params = comparison.params(variant, PRETRAINING_SEED)
    (fold,) = plan_folds(params.data, 1, root, scratch / "data", PRETRAINING_SEED)
    key = config_hash(
        {"train": params.train.model_dump(mode="json"), "data": fold.folder.as_posix()}
    )
    return Pretraining(params, fold, scratch / "pretrained" / f"{key[:16]}.safetensors")


def pretrain(pretraining: Pretraining, scratch: Path) -> None:
    """Train the backbone with labels on its own scenes and save it, unless that is done."""
    from safetensors.torch import save_file

    if pretraining.weights.is_file():
        return
    log.info("pretraining %s on other scenes", pretraining.params.train.backbone)
    result = train(
        pretraining.params,
        pretraining.fold,
        scratch,
        scratch / "running" / pretraining.weights.stem,
    )
    state = {k: v.contiguous() for k, v in result.model.backbone.state_dict().items()}
    write_atomic(pretraining.weights, lambda path: save_file(state, path))


def prepare(plan: Plan, root: Path, scratch: Path, workers: int) -> None:
    """Data and weights of a comparison, unless they are there."""
    prepare_folds(
        plan.folds, plan.runs[0].params.data, root, workers, calibrated=plan.comparison.calibrated
    )
    pretraining = plan.pretraining
    if pretraining is not None:
        prepare_folds([pretraining.fold], pretraining.params.data, root, workers, PRETRAINING_SEED)
        pretrain(pretraining, scratch)


def _prepare(plans: Sequence[Plan], root: Path, scratch: Path, workers: int) -> None:
    """Data, weights and distorted images, before any run needs them."""
    from streetvision.models.backbone import initial_backbone

    distorted = []
    for each in plans:
        prepare(each, root, scratch, workers)
        run = each.runs[0]
        params = run.params
        *_, preprocessing = initial_backbone(params.train, 0, run.root)
        distorted += [(fold, name, preprocessing) for fold in each.folds for name in READ]
    made = in_processes(make_distorted, distorted, workers)
    for _ in progress(made, len(distorted), "distorting"):
        pass


def run_all(
    chosen: Sequence[Comparison], seeds: int, root: Path, scratch: Path, workers: int
) -> list[Table]:
    """Do every run that is not finished yet, `workers` at a time; the tables of all.

    Raises
    ------
    UserError
        Data are missing, or another process is at work in `scratch`.
    """
    plans = [plan(each, seeds, root, scratch) for each in chosen]
    every = [run for each in plans for run in each.runs]
    path = results_file(scratch)
    with exclusive(scratch / "lock", f"another process is collecting evidence in {scratch}"):
        lines = read_lines(path, every)
        left = [run for run in every if run.key not in lines]
        log.info(
            "%d of %d runs are finished, %s left",
            len(lines),
            len(every),
            _time(plans, lines, workers),
        )
        if left:
            _prepare(plans, root, scratch, workers)
            for line in progress(in_processes(finish, left, workers), len(left), "runs"):
                scores = line.get("error") or f"MCC {line['mcc']:.4f}"
                log.info("%s/%s, seed %d, fold %d: %s, %.0f s", line["comparison"], line["variant"],
                         line["seed"], line["fold"], scores, line["seconds"])  # fmt: skip
        lines = read_lines(path, every)
    return [Table(each.comparison, each.runs, lines) for each in plans]


def listing(
    chosen: Sequence[Comparison], seeds: int, root: Path, scratch: Path, workers: int
) -> str:
    """What would be run, what is finished, and about how long the rest takes."""
    plans = [plan(each, seeds, root, scratch) for each in chosen]
    lines = read_lines(results_file(scratch), [run for each in plans for run in each.runs])
    text = []
    for each in plans:
        text.append(f"{each.comparison.name}: {each.comparison.title}")
        for variant in each.comparison.variants:
            runs = [run for run in each.runs if run.variant == variant.name]
            done = sum(run.key in lines for run in runs)
            text.append(f"  {variant.name:20} {done} of {len(runs)} runs  {variant.change}")
    return "\n".join([*text, f"left: {_time(plans, lines, workers)}"])


def _time(plans: Sequence[Plan], lines: dict[str, dict[str, Any]], workers: int) -> str:
    """The time that the unfinished runs take: as planned, times what the finished ones took of their plan."""
    total = 0.0
    for each in plans:
        planned = {run.key: _planned(each.comparison, run) for run in each.runs}
        done = [key for key in planned if key in lines]
        took = sum(lines[key]["seconds"] for key in done)
        factor = took / sum(planned[key] for key in done) if done else 1.0
        total += factor * sum(planned[key] for key in planned if key not in lines)
    return f"about {total / workers / 60:.0f} minutes"


def _planned(comparison: Comparison, run: Run) -> float:
    adapting = run.params.explora.enabled
    return comparison.seconds + adapting * comparison.adaptation_seconds
