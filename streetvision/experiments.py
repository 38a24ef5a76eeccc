"""DVC experiments and commits as runs: parameters, metrics, and whether a metric is of this run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from streetvision.errors import UserError
from streetvision.params import leaves

# The metrics of the stages that read VAL_TEST: for the report, never for a choice.
TEST_METRICS = ("metrics/evaluation.json", "metrics/challenge.json")


@dataclass(frozen=True)
class Run:
    """One experiment or commit.

    Attributes
    ----------
    name, commit : as the user calls it; the full hash
    params : by dotted name
    metrics : numbers and texts by `file:dotted.name`
    outdated : metric files that `dvc.lock` ties to other inputs than the run's own: the experiment
        stopped before their stage
    """

    name: str
    commit: str
    params: Mapping[str, Any]
    metrics: Mapping[str, Any]
    outdated: frozenset[str]


def finished(root: Path, revisions: Sequence[str] = ()) -> list[Run]:
    """The runs of these experiments, branches or commits; by default HEAD's finished experiments.

    Raises
    ------
    UserError
        No Git repository with DVC; a revision is unknown or holds no pipeline.
    """
    commits = _commits(root, revisions)
    stages = _read(root, [(commit, "dvc.yaml") for commit in commits.values()])
    found = []
    for name, commit in commits.items():
        pipeline = stages[commit, "dvc.yaml"]
        if pipeline is None:
            raise UserError(f"{name} ({commit[:7]}) holds no dvc.yaml")
        owners = _metric_files(_document(pipeline, f"dvc.yaml of {name}"))
        texts = _read(root, [(commit, path) for path in ("params.yaml", "dvc.lock", *owners)])
        metrics = {
            f"{path}:{key}": value
            for path in owners
            for key, value in _flat(_document(texts[commit, path], f"{path} of {name}")).items()
        }
        lock = _document(texts[commit, "dvc.lock"], f"dvc.lock of {name}")
        params = _flat(_document(texts[commit, "params.yaml"], f"params.yaml of {name}"))
        stale = _stale_stages(lock.get("stages", {}), params)
        outdated = frozenset(path for path, stage in owners.items() if stage in stale)
        found.append(Run(name, commit, params, metrics, outdated))
    return found


def stage_seconds(root: Path, run_log: Path, commit: str | None) -> dict[str, float]:
    """Seconds of each stage that was run for a commit, or for the working tree if that is None.

    A run log knows the commit that a stage ran on, the parent of the one its results went into. Counted
    are the stages that `dvc.lock` has otherwise than that parent, each by its last run before the commit.
    Empty without a log of them: it is untracked, and that of a queued experiment is lost with its copy.
    """
    parent = _commit(root, "HEAD") if commit is None else _parent(root, commit)
    if parent is None or not run_log.is_file():
        return {}
    if commit is None:
        now, until = (root / "dvc.lock").read_bytes(), datetime.now(UTC)
    else:
        now = _read(root, [(commit, "dvc.lock")])[commit, "dvc.lock"] or b""
        until = datetime.fromisoformat(_git(root, "show", "-s", "--format=%cI", commit))
    before = _read(root, [(parent, "dvc.lock")])[parent, "dvc.lock"] or b""
    locks = [_document(text, "dvc.lock").get("stages", {}) for text in (before, now)]
    found = {}
    for line in run_log.read_text().splitlines():
        entry = json.loads(line)
        step = entry["step"]
        if (
            entry["status"] == "ok"
            and entry["git_commit"] == parent
            and locks[1].get(step) != locks[0].get(step)
            and datetime.fromisoformat(entry["started"]) <= until
        ):
            found[step] = float(entry["seconds"])
    return found


def _parent(root: Path, commit: str) -> str | None:
    parents = _git(root, "show", "-s", "--format=%P", commit).split()
    return parents[0] if parents else None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _commits(root: Path, revisions: Sequence[str]) -> dict[str, str]:
    """Name to commit, in the order given; experiments go before branches of the same name."""
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        with Repo(str(root)) as repo:
            listed = repo.experiments.ls(all_commits=bool(revisions))
            named = {name: commit for group in listed.values() for name, commit in group}
            if not revisions:
                return named
            return {name: named.get(name) or _commit(root, name) for name in revisions}
    except NotDvcRepoError as error:
        raise UserError(f"{root} is no DVC project; run this in the project's folder") from error
    except (DvcException, SCMError) as error:
        raise UserError(f"DVC cannot list the experiments of {root}: {error}") from error


def _commit(root: Path, revision: str) -> str:
    command = [
        "git",
        "rev-parse",
        "--verify",
        "--quiet",
        "--end-of-options",
        f"{revision}^{{commit}}",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f'"{revision}" is neither a DVC experiment nor a Git revision of {root}')
    return done.stdout.strip()


def _read(root: Path, files: Iterable[tuple[str, str]]) -> dict[tuple[str, str], bytes | None]:
    """Contents of (commit, path from `root`) in one Git process; None where there is no such file."""
    wanted = list(files)
    done = subprocess.run(
        ["git", "cat-file", "--batch"], cwd=root, capture_output=True, check=True,
        input="".join(f"{commit}:./{path}\n" for commit, path in wanted).encode(),
    )  # fmt: skip
    found: dict[tuple[str, str], bytes | None] = {}
    rest = done.stdout
    for each in wanted:
        header, _, rest = rest.partition(b"\n")
        if header.endswith(b" missing"):
            found[each] = None
            continue
        n_bytes = int(header.rsplit(b" ", 1)[1])
        found[each], rest = rest[:n_bytes], rest[n_bytes + 1 :]
    return found


def _metric_files(pipeline: Mapping[str, Any]) -> dict[str, str]:
    """Each metric file of a `dvc.yaml`, with the stage that writes it."""
    found = {}
    for stage, entry in pipeline.get("stages", {}).items():
        for metric in entry.get("metrics", []):
            found[next(iter(metric)) if isinstance(metric, Mapping) else metric] = stage
    return found


def _stale_stages(locked: Mapping[str, Any], params: Mapping[str, Any]) -> set[str]:
    """Stages of a `dvc.lock` that ran on other inputs or parameters than are there, and all behind them."""
    made = {
        out["path"]: (stage, out.get("md5"))
        for stage, entry in locked.items()
        for out in entry.get("outs", [])
    }
    stale = {
        stage
        for stage, entry in locked.items()
        for key, value in entry.get("params", {}).get("params.yaml", {}).items()
        if params.get(key) != value
    }
    while True:
        more = {
            stage
            for stage, entry in locked.items()
            for dep in entry.get("deps", [])
            if dep["path"] in made
            and (made[dep["path"]][0] in stale or made[dep["path"]][1] != dep.get("md5"))
        }
        if more <= stale:
            return stale
        stale |= more


def _document(text: bytes | None, origin: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty where there is none."""
    if text is None:
        return {}
    try:
        found = json.loads(text) if text.startswith(b"{") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{origin} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name."""
    found = {}
    for name in leaves(document):
        value: Any = document
        for part in name.split("."):
            value = value[part]
        found[name] = value
    return found
