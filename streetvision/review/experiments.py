"""DVC experiments, commits and the working tree as runs: what was set, what came out, do both fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streetvision.core import git
from streetvision.core.documents import mapping_in, read_json, read_yaml
from streetvision.core.errors import UserError
from streetvision.core.params import Params
from streetvision.presets import load_preset, preset_changes, preset_names, value
from streetvision.review.freshness import (
    FRESH,
    LOCK,
    PARAMS,
    PIPELINE,
    CommitFiles,
    Files,
    Freshness,
    Locked,
    WorkingFiles,
    changed_params,
    flat,
    judge,
    read_lock,
)

# The metrics of the stages that read VAL_TEST: for the report, never for a choice.
TEST_METRICS = ("metrics/evaluation.json", "metrics/challenge.json", "metrics/headline.json")
_MOST_COMMITS = 100  # how far back the run of a stage is looked for


@dataclass(frozen=True)
class Run:
    """One experiment, commit or working tree.

    Attributes
    ----------
    name, commit : as the user calls it; the full hash, None for the working tree
    params : by dotted name; after a run with a preset those of the preset, with which the results were made
    metrics : numbers and texts by `file:dotted.name`
    outdated : metric files of stages that are stale
    preset : the preset that the results are of, where `params.yaml` has the defaults, as `repro --preset`
        leaves it; None where `params.yaml` says what was set
    freshness : which stages are stale, and why
    """

    name: str
    commit: str | None
    params: Mapping[str, Any]
    metrics: Mapping[str, Any]
    outdated: frozenset[str]
    preset: str | None = None
    freshness: Freshness = FRESH


def finished(root: Path, revisions: Sequence[str] = ()) -> list[Run]:
    """The runs of these experiments, branches or commits; by default HEAD's finished experiments.

    Raises
    ------
    UserError
        No Git repository with DVC; a revision is unknown or holds no pipeline; what it holds is broken.
    """
    if not any((root / name).exists() for name in (".dvc", PIPELINE)):
        raise UserError(f"{root} is no DVC project; run this in the project's folder")
    commits = (
        {name: git.commit_of(root, name) for name in revisions}
        if revisions
        else git.experiments(root)
    )
    return [_run(name, commit, CommitFiles(root, commit)) for name, commit in commits.items()]


def working_tree(root: Path) -> Run:
    """The run that lies in the project's folder; UserError as `finished`."""
    return _run("working tree", None, WorkingFiles(root))


def _run(name: str, commit: str | None, files: Files) -> Run:
    pipeline = files.read([PIPELINE])[PIPELINE]
    if pipeline is None:
        at = "" if commit is None else f" ({commit[:7]})"
        raise UserError(
            f"{name}{at} holds no {PIPELINE} in this folder; run this in the project's folder"
        )
    document = _document(pipeline, f"{PIPELINE} of {name}")
    owners = _metric_files(document, f"{PIPELINE} of {name}")
    texts = files.read(dict.fromkeys((PARAMS, LOCK, *owners)))
    metrics = {
        f"{path}:{key}": found
        for path in owners
        for key, found in flat(_document(texts[path], f"{path} of {name}")).items()
    }
    written = _document(texts[PARAMS], f"{PARAMS} of {name}")
    lock = read_lock(texts[LOCK], f"{LOCK} of {name}")
    ran = {key: found for entry in lock.values() for key, found in entry.params.items()}
    preset = None
    # Whoever edited the file since, or runs another pipeline than ours, has no preset's results: those of the
    # defaults are a preset's, too.
    as_shipped = Params().model_dump(mode="json")
    if all(value(written, key) == value(as_shipped, key) for key in ran):
        preset = _preset_of(lock) if changed_params(lock, lambda key: value(written, key)) else None
    params = flat(written)
    if preset is None:
        freshness = judge(document, lock, lambda key: value(written, key), files)
    else:
        params |= ran
        freshness = judge(document, lock, lambda key: ran.get(key, value(written, key)), files)
    outdated = frozenset(path for path, stage in owners.items() if stage in freshness.stale)
    return Run(name, commit, params, metrics, outdated, preset, freshness)


def stage_seconds(root: Path, run_log: Path, commit: str | None) -> dict[str, float]:
    """Seconds of the runs whose results a commit holds, by stage; of the working tree if that is None.

    A run log knows the commit that a stage ran on, the parent of the one its results went into. That one is
    looked for from this commit back: where `dvc.lock` got what it has of the stage; and of runs on its
    parent the last one before it counts. Empty without a log of them: it is untracked, and that of a queued
    experiment is lost with its copy.
    """
    git.check_repository(root)
    runs = _logged(run_log)
    if not runs:
        return {}
    head = git.commit_of(root, "HEAD") if commit is None else commit
    history = [
        (each.name, each.parent, datetime.fromtimestamp(each.time, UTC))
        for each in git.commits_that_changed(root, head, LOCK, _MOST_COMMITS)
        if each.parent in runs
    ]
    wanted = [head, *(name for found in history for name in found[:2] if name is not None)]
    texts = git.files(root, [(name, LOCK) for name in wanted])
    known = {text: _readable_lock(text) for text in texts.values()}
    locks = {name: known[texts[name, LOCK]] for name in wanted}
    now = locks[head]
    if commit is None:
        now = _readable_lock((root / LOCK).read_bytes() if (root / LOCK).is_file() else None)
        history.insert(0, ("", head, datetime.now(UTC)))
        locks[""] = now
    found: dict[str, float] = {}
    for name, parent, until in history:
        for step, entry in now.items():
            if step in found or locks[name].get(step) != entry or locks[parent].get(step) == entry:
                continue
            ran = [run for run in runs.get(parent, ()) if run.step == step and run.started <= until]
            if ran:
                found[step] = ran[-1].seconds
    return found


@dataclass(frozen=True)
class _Logged:
    """A line of the run log: a stage that ran to its end."""

    step: str
    seconds: float
    started: datetime


def _logged(run_log: Path) -> dict[str, list[_Logged]]:
    """The finished runs of a run log by the commit they ran on."""
    found: dict[str, list[_Logged]] = {}
    text = run_log.read_text(errors="replace") if run_log.is_file() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            started = datetime.fromisoformat(entry["started"]).astimezone(UTC)
            run = _Logged(str(entry["step"]), float(entry["seconds"]), started)
            if entry["status"] == "ok":
                found.setdefault(str(entry["git_commit"]), []).append(run)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a killed run left half
    return found


def _readable_lock(text: bytes | None) -> dict[str, Locked]:
    """The stages of a `dvc.lock` of the past, none of a broken one."""
    try:
        return read_lock(text, LOCK)
    except UserError:
        return {}


def _metric_files(pipeline: Mapping[str, Any], origin: str) -> dict[str, str | None]:
    """Each metric file of a `dvc.yaml`, with the stage that writes it (None of the file's own list).

    Those are what DVC shows as metrics, and JSON among the plots: a list of points has no metric.
    """
    found: dict[str, str | None] = {}

    def add(entries: Any, stage: str | None, place: str, suffix: str = "") -> None:
        if not isinstance(entries, list):
            raise UserError(f"{origin}: {place} must be a list")
        for entry in entries:
            path = next(iter(entry), None) if isinstance(entry, Mapping) else entry
            if not isinstance(path, str):
                raise UserError(f"{origin}: {place} must be paths")
            if not path.endswith(suffix):
                continue
            git.check_path(path)
            if ":" in path:  # what separates a file from its metrics
                raise UserError(
                    f"{origin}: {place} has {path!r}, and no metric file may have a colon"
                )
            found.setdefault(path, stage)

    for stage, entry in mapping_in(pipeline, "stages", origin).items():
        if not isinstance(entry, Mapping):
            raise UserError(f"{origin}: stages.{stage} must be a mapping")
        add(entry.get("metrics") or [], stage, f"stages.{stage}.metrics")
        add(entry.get("plots") or [], stage, f"stages.{stage}.plots", ".json")
    add(pipeline.get("metrics") or [], None, "metrics")
    return found


def _preset_of(lock: Mapping[str, Locked]) -> str | None:
    """The preset whose values all stages ran with: `repro --preset` puts `params.yaml` back afterwards."""
    locked = [item for entry in lock.values() for item in entry.params.items()]
    for name in preset_names():
        document, written = load_preset(name, Path()).model_dump(mode="json"), preset_changes(name)
        # Paths to places outside the project are absolute in a run, and of its machine.
        if all(
            found == value(document, key) or str(value(written, key)).startswith("../")
            for key, found in locked
        ):
            return name
    return None


def _document(text: bytes | None, origin: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty where there is none."""
    if text is None:
        return {}
    found = read_json(text, origin) if text.startswith(b"{") else read_yaml(text, origin)
    return found if isinstance(found, dict) else {}
