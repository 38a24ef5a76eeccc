"""What a user waits for beside the work itself: DVC, starting programs, a changed decision, `make repro`.

Runs in a copy of this checkout, with the outputs that are there.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from streetvision.core.artifacts import ArtifactSchema
from tests.benchmarks.limits import Steps
from tests.benchmarks.runner import PAIRS, Table
from tests.pipeline.project import STAGES, Project

ROOT = Path(__file__).parents[2]
DVC = [sys.executable, "-m", "dvc"]
COLUMNS = ["what", "median", "least, largest", "to reach"]
# Wall time from the start of `ingest` to the end of `challenge` when this table was begun, on two cores.
REPRO_BEFORE = 397
DECISIONS = {
    "served_prior": (0.45, 0.55),
    "n_resamples": (1900,),
}  # the latter from `sweep` on
# The stages that a decision parameter reruns up to the evaluation, and what their time goes into.
DECIDED: dict[str, Steps] = {
    "calibrate": {
        "resampled thresholds": ("threshold.py:bagged_median_threshold",),
        "calibrators out of fold": ("choice.py:estimate_all",),
        "pictures": ("plots.py:render",),
    },
    "export": {
        "building the network": ("backbone.py:build_backbone",),
        "manifest": ("common.py:write_manifest",),
    },
    "evaluate": {
        "loading the bundle": ("validate.py:load_bundle",),
        "scoring": ("base.py:probabilities",),
        "metrics and intervals": ("report.py:evaluation_report",),
        "pictures": ("plots.py:render",),
    },
}


def startup() -> list[Table]:
    """Every stage as a program that only says what it is for."""
    rows = []
    for stage in STAGES:
        command = [sys.executable, "-m", f"stages.{stage}", "--help"]
        times = [_run(command, ROOT) for _ in range(PAIRS)]
        rows.append(_row(f"python -m stages.{stage} --help", times, "< 1 s"))
    return [Table("Starting a stage", COLUMNS, rows)]


def dvc() -> list[Table]:
    """`dvc repro` with nothing to do, and after a decision parameter was changed."""
    title = "DVC, on the default data"
    with _copy() as project:
        if _changed(project):
            reason = "not measured: the outputs here are not of this code; `make repro` first"
            return [Table(title, COLUMNS, [[reason, "", "", ""]])]
        subprocess.run([*DVC, "commit", "--force", "--quiet"], cwd=project, check=True)
        plain = [*DVC, "repro", "--quiet"]
        ours = [sys.executable, "-m", "streetvision", "repro"]
        rows = [
            _row("dvc repro, nothing to do", [_run(plain, project) for _ in range(PAIRS)], "< 3 s"),
            _row("make repro, nothing to do", [_run(ours, project) for _ in range(PAIRS)], "< 3 s"),
        ]
        for name, values in DECISIONS.items():
            times = []
            for value in values:
                Project(project).change({"decision": {name: value}})
                times.append(_run([*plain, "evaluate"], project))
            rows.append(_row(f"decision.{name} changed → metrics/evaluation.json", times, "< 20 s"))
        profiled = [_profiled(stage, project) for stage in DECIDED]
    parts = ["stage", "in a new process", "of it starting libraries", "the rest"]
    return [
        Table(title, COLUMNS, rows),
        Table("What runs after a changed decision, without DVC", parts, profiled),
    ]


def _profiled(stage: str, project: Path) -> list[str]:
    """A stage's time, how much of it a second run in one process saves, and the steps of that one."""
    code = (
        "import json; from tests.benchmarks import limits, pipeline; "
        f"print(json.dumps(limits.stage_times({stage!r}, pipeline.DECIDED[{stage!r}])))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=project, env=_environment(project), check=True, capture_output=True, text=True
    )
    first, second, shares = json.loads(done.stdout.splitlines()[-1])
    steps = ", ".join(f"{step} {share:.0%}" for step, share in shares.items())
    return [stage, f"{first:.1f} s", f"{first - second:.1f} s", f"{second:.1f} s: {steps}"]


def repro() -> list[Table]:
    """Seconds of each stage in the last `make repro` here, as its run log says; nothing is run."""
    title = f"Default `make repro`, as it ran here last (to reach: half of {REPRO_BEFORE} s)"
    last: dict[str, dict[str, Any]] = {}
    log = ArtifactSchema(ROOT).run_log
    if log.exists():
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            if entry["status"] == "ok":
                last[entry["step"]] = entry
    commits = {entry["git_commit"] for entry in last.values()}
    if len(last) < len(STAGES) or len(commits) > 1:
        reason = "not measured: the stages here did not run in one go; `make repro` first"
        return [Table(title, ["stage", "time"], [[reason, ""]])]
    starts = [datetime.fromisoformat(entry["started"]).timestamp() for entry in last.values()]
    ends = [start + e["seconds"] for start, e in zip(starts, last.values(), strict=True)]
    rows = [[stage, f"{last[stage]['seconds']:.1f} s"] for stage in STAGES]
    rows.append(["all, with starting them", f"{max(ends) - min(starts):.0f} s"])
    return [Table(title, ["stage", "time"], rows)]


def _changed(project: Path) -> bool:
    """Whether anything would run, had the copy a cache."""
    command = [*DVC, "status", "--json"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    found = [each for stage in json.loads(done.stdout).values() for each in stage]
    states = [value for each in found for value in each.get("changed outs", {}).values()]
    return any(set(each) != {"changed outs"} for each in found) or bool(
        set(states) - {"not in cache"}
    )


def _row(what: str, times: list[float], reach: str) -> list[str]:
    spread = f"{min(times):.2f}, {max(times):.2f} s" if len(times) > 1 else "one run"
    return [what, f"{statistics.median(times):.2f} s", spread, reach]


def _run(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=_environment(folder), check=True, capture_output=True)
    return time.perf_counter() - start


def _environment(folder: Path) -> dict[str, str]:
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return os.environ | {"PYTHONPATH": str(folder), "PATH": os.pathsep.join(programs)}


@contextmanager
def _copy() -> Iterator[Path]:
    """This checkout without its cache, history and environment."""
    with tempfile.TemporaryDirectory() as place:
        project = Path(place) / "project"
        left = shutil.ignore_patterns(
            ".git", ".venv", ".streetvision", "cache", "tmp", "__pycache__", ".*_cache", "report"
        )
        shutil.copytree(ROOT, project, ignore=left)
        subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
        yield project
