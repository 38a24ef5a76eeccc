"""The evidence of fusion and calibration: single view → fused → calibrated → deployed, over split seeds.

A run is one split: prepare's with another seed. On data with few groups each group with both classes is held
out in turn besides. A finished run is one JSON line, on disk before the next one starts.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from streetvision.core.artifacts import exclusive
from streetvision.core.errors import UserError
from streetvision.core.imports import code_sha256
from streetvision.core.params import Params, check_params
from streetvision.core.processes import in_processes, usable_cores
from streetvision.core.progress import progress
from streetvision.presets import merge, preset_changes
from streetvision.studies.data import Fold, plan_folds, prepare_all, prepare_folds
from streetvision.studies.decision_held_out import QUARTERS, make_features, run_held_out
from streetvision.studies.decision_runs import Run, run_split
from streetvision.studies.runs import append_line, results_file, whole_lines
from streetvision.studies.variants import DATA, SIZES

log = logging.getLogger(__name__)
SPLIT = "split"
# Parts that the groups with both classes are held out in; the photographs have ten such groups.
FOLDS = {"smoke": 3, "cpu": 10, "large": 10}
# Seconds of a run of each kind on one core, where they were planned.
SECONDS = {
    "smoke": {"synthetic": 10, "photos": 60, "held_out": 10},
    "cpu": {"synthetic": 410, "photos": 240, "held_out": 20},
    "large": {"synthetic": 3000, "photos": 600, "held_out": 120},
}


@dataclass(frozen=True)
class Study:
    """One data set: the recipe of its runs; `folds` parts of its groups are held out in turn, 0 for none."""

    data: str
    size: str
    recipe: Params
    folds: int


def studies(size: str, data: str) -> list[Study]:
    """The studies of `data` (or `all`): `smoke` tests the code, `cpu` is for two cores, `large` a GPU.

    Raises
    ------
    UserError
        Unknown size or data.
    """
    if size not in SIZES:
        raise UserError(f'--size "{size}" is not one of {", ".join(SIZES)}')
    if data not in {*DATA, "all"}:
        raise UserError(f'--data "{data}" is not one of {", ".join((*DATA, "all"))}')
    found = []
    for name in DATA:
        preset = preset_changes({"synthetic": "cpu-demo", "photos": "photos"}[name])
        document = merge(Params().model_dump(mode="json"), preset)
        document = merge(document, _changes(size, name))
        recipe = check_params(document, f"evidence decision {name}")
        folds = 0 if name == "synthetic" else FOLDS[size]
        found.append(Study(name, size, recipe, folds))
    return [study for study in found if data in {study.data, "all"}]


def _changes(size: str, name: str) -> dict[str, Any]:
    """What the sizes change of a preset; views are on in all of them."""
    if size == "smoke":
        tiny: dict[str, Any] = {
            "embed": {"served_repeats": 2},
            "views": {"grid": 2},
            "cvfm": {"mode": "auto", "fits": 2, "epochs": 3, "latent_dim": 8, "attention_dim": 8},
            "decision": {"n_resamples": 200},
            "evaluate": {"n_resamples": 200},
        }
        if name == "photos":
            return tiny | {"train": {"height_px": 32, "width_px": 32, "epochs": 1}}
        smoke = preset_changes("smoke")
        found = merge({key: smoke[key] for key in ("data", "train")}, tiny)
        scenes = smoke["data"]["sources"][0] | {"images": 300, "cities": 50}
        return merge(found, {"data": {"sources": [scenes]}, "train": {"epochs": 6}})
    if name == "photos":
        side = 224 if size == "cpu" else 256
        return {
            "views": {"grid": 3},
            "cvfm": {"mode": "auto"},
            "train": {"height_px": side, "width_px": side},
        }
    source = {"kind": "synthetic", "name": "synthetic"}
    scenes = {"cpu": {"images": 14000, "cities": 300}, "large": {"images": 60000, "cities": 1200}}
    return {"views": {"grid": 3}, "data": {"sources": [{**source, **scenes[size]}]}}


def plan(study: Study, seeds: int, root: Path, scratch: Path) -> list[Run]:
    """All runs of a study; nothing is made yet.

    Raises
    ------
    UserError
        A source is missing.
    """
    code = code_sha256("streetvision.studies.decision", Path(__file__).parents[2])[:12]
    workers = {"hardware": {"workers": 0 if usable_cores() <= 2 else 1}}
    document = merge(study.recipe.model_dump(mode="json"), workers)
    runs = []
    for seed in range(seeds):
        params = check_params(document | {"seed": seed}, f"evidence decision {study.data}")
        (fold,) = plan_folds(params.data, 1, root, scratch / "data", seed)
        runs.append(Run(study.data, SPLIT, seed, params, fold.folder, root, scratch, code))
    params = check_params(document, f"evidence decision {study.data}")
    kind = f"held out of {study.folds}"
    for quarter, part in product(range(QUARTERS), range(study.folds)):
        (fold,) = plan_folds(params.data, 1, root, scratch / "whole")
        source = fold.folder.parent
        runs.append(Run(study.data, kind, quarter, params, source, root, scratch, code, part))
    return runs


# --------------------------------------------------------------------------- all runs


def finish(run: Run) -> dict[str, Any]:
    """Do a run and append its line."""
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    line: dict[str, Any] = {
        "key": run.key, "data": run.data, "kind": run.kind, "number": run.number,
        "part": run.part, "code": run.code,
    }  # fmt: skip
    line |= run_split(run) if run.kind == SPLIT else run_held_out(run, int(run.kind.split()[-1]))
    line["seconds"] = round(time.perf_counter() - start, 2)
    append_line(results_file(run.scratch), line)
    shutil.rmtree(run.scratch / "running" / run.key, ignore_errors=True)
    return line


def run_all(
    chosen: Sequence[Study], seeds: int, root: Path, scratch: Path, workers: int
) -> dict[str, list[tuple[Run, Mapping[str, Any]]]]:
    """Do every run that is not finished, `workers` at a time; the runs of each data set with their lines.

    Raises
    ------
    UserError
        Data are missing or too few, or another process is at work in `scratch`.
    """
    plans = {study.data: plan(study, seeds, root, scratch) for study in chosen}
    every = [run for runs in plans.values() for run in runs]
    path = results_file(scratch)
    with exclusive(scratch / "lock", f"another process is collecting evidence in {scratch}"):
        lines = whole_lines(path)
        left = [run for run in every if run.key not in lines]
        log.info("%d of %d runs are finished", len(every) - len(left), len(every))
        for run in left:
            if run.kind == SPLIT:
                prepare_folds([Fold(run.source)], run.params.data, root, workers, run.number)
            else:
                prepare_all(run.params.data, root, run.source, workers, run.params.seed)
                make_features(run)
        for line in progress(in_processes(finish, left, workers), len(left), "runs"):
            log.info("%s, %s, seed %d, part %d: %.0f s", line["data"], line["kind"], line["number"],
                     line["part"], line["seconds"])  # fmt: skip
        lines = whole_lines(path)
    return {data: [(run, lines[run.key]) for run in runs] for data, runs in plans.items()}


def listing(chosen: Sequence[Study], seeds: int, root: Path, scratch: Path, workers: int) -> str:
    """What would be run, what is finished, and about how long the rest takes."""
    lines = whole_lines(results_file(scratch))
    text, total = [], 0.0
    for study in chosen:
        runs = plan(study, seeds, root, scratch)
        for kind in dict.fromkeys(run.kind for run in runs):
            same = [run for run in runs if run.kind == kind]
            left = [run for run in same if run.key not in lines]
            took = [lines[run.key]["seconds"] for run in same if run.key in lines]
            planned = SECONDS[study.size][study.data if kind == SPLIT else "held_out"]
            total += len(left) * float(np.mean(took) if took else planned)
            name = "splits" if kind == SPLIT else f"runs with a part of the groups {kind}"
            text.append(f"{study.data}: {len(same) - len(left)} of {len(same)} {name}")
    return "\n".join([*text, f"left: about {np.ceil(total / workers / 60):.0f} minutes"])
