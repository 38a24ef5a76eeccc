"""DVC experiments, commits and the working tree as runs: what was set, what came out, do both fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streetvision import git
from streetvision.documents import mapping_in, read_json, read_yaml
from streetvision.errors import UserError
from streetvision.escaping import shortened
from streetvision.presets import load_preset, preset_changes, preset_names, value

# The metrics of the stages that read VAL_TEST: for the report, never for a choice.
TEST_METRICS = ("metrics/evaluation.json", "metrics/challenge.json", "metrics/headline.json")
PARAMS, PIPELINE, LOCK = "params.yaml", "dvc.yaml", "dvc.lock"
Read = Callable[[Iterable[str]], Mapping[str, bytes | None]]


@dataclass(frozen=True)
class Run:
    """One experiment, commit or working tree.

    Attributes
    ----------
    name, commit : as the user calls it; the full hash, None for the working tree
    params : by dotted name; after a run with a preset those of the preset, with which the results were made
    metrics : numbers and texts by `file:dotted.name`
    outdated : metric files that `dvc.lock` ties to other inputs than the run's own: their stage did not
        run, or ran with other parameters
    preset : the preset that the results are of, None where `params.yaml` says what was set
    changed : parameters of `params.yaml` that `dvc.lock` has otherwise: then and now. Empty with a preset
    """

    name: str
    commit: str | None
    params: Mapping[str, Any]
    metrics: Mapping[str, Any]
    outdated: frozenset[str]
    preset: str | None = None
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def why_outdated(self) -> str:
        """What is wrong with an outdated run, as the end of a sentence that begins with what is outdated."""
        if not self.changed:
            return "of other inputs: the run stopped before their stage"
        key, (then, now) = next(iter(self.changed.items()))
        others = len(self.changed) - 1
        more = f" ({others} more {'differ' if others > 1 else 'differs'})" if others else ""
        return (
            f"of other parameters than {PARAMS}: {shortened(key)} was {shortened(json.dumps(then))} and is "
            f"{shortened(json.dumps(now))}{more}; `dvc repro` there makes them anew"
        )


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
    return [_run(name, commit, _reader(root, commit)) for name, commit in commits.items()]


def working_tree(root: Path) -> Run:
    """The run that lies in the project's folder; UserError as `finished`."""

    def read(paths: Iterable[str]) -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}
        for path in paths:
            git.check_path(path)
            try:
                found[path] = (root / path).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                found[path] = None
            except OSError as error:
                raise UserError(f"cannot read {root / path}: {error.strerror}") from error
        return found

    return _run("working tree", None, read)


def _reader(root: Path, commit: str) -> Read:
    def read(paths: Iterable[str]) -> dict[str, bytes | None]:
        found = git.files(root, [(commit, path) for path in paths])
        return {path: text for (_, path), text in found.items()}

    return read


def _run(name: str, commit: str | None, read: Read) -> Run:
    pipeline = read([PIPELINE])[PIPELINE]
    if pipeline is None:
        at = "" if commit is None else f" ({commit[:7]})"
        raise UserError(
            f"{name}{at} holds no {PIPELINE} in this folder; run this in the project's folder"
        )
    owners = _metric_files(_document(pipeline, f"{PIPELINE} of {name}"), f"{PIPELINE} of {name}")
    texts = read(dict.fromkeys((PARAMS, LOCK, *owners)))
    metrics = {
        f"{path}:{key}": found
        for path in owners
        for key, found in _flat(_document(texts[path], f"{path} of {name}")).items()
    }
    params = _flat(_document(texts[PARAMS], f"{PARAMS} of {name}"))
    lock = _lock(texts[LOCK], f"{LOCK} of {name}")
    changed = _changed_params(lock, params)
    preset = _preset_of(lock) if changed else None
    if preset is not None:
        params, changed = params | _locked_params(lock), {}
    stale = _stale_stages(lock, {stage for stage, _ in changed})
    outdated = frozenset(path for path, stage in owners.items() if stage in stale)
    return Run(
        name, commit, params, metrics, outdated, preset,
        {key: values for (_, key), values in changed.items()},
    )  # fmt: skip


def stage_seconds(root: Path, run_log: Path, commit: str | None) -> dict[str, float]:
    """Seconds of each stage that was run for a commit, or for the working tree if that is None.

    A run log knows the commit that a stage ran on, the parent of the one its results went into. Counted
    are the stages that `dvc.lock` has otherwise than that parent, each by its last run before the commit.
    Empty without a log of them: it is untracked, and that of a queued experiment is lost with its copy.
    """
    git.check_repository(root)
    if commit is None:
        parent: str | None = git.commit_of(root, "HEAD")
        until = datetime.now(UTC)
    else:
        parent, committed = git.parent_and_time(root, commit)
        until = datetime.fromtimestamp(committed, UTC)
    if parent is None or not run_log.is_file():
        return {}
    before = git.files(root, [(parent, LOCK)])[parent, LOCK]
    if commit is None:
        now = (root / LOCK).read_bytes() if (root / LOCK).is_file() else None
    else:
        now = git.files(root, [(commit, LOCK)])[commit, LOCK]
    old, new = (mapping_in(_document(text, LOCK), "stages", LOCK) for text in (before, now))
    found = {}
    for line in run_log.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            step, seconds = entry["step"], float(entry["seconds"])
            started = datetime.fromisoformat(entry["started"])
            ran = entry["status"] == "ok" and entry["git_commit"] == parent and started <= until
        except (ValueError, KeyError, TypeError):
            continue  # a line that a killed run left half
        if ran and old.get(step) != new.get(step):
            found[step] = seconds
    return found


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


@dataclass(frozen=True)
class _Locked:
    """What `dvc.lock` records of a stage: parameters; hashes of what it read and made, by path."""

    params: Mapping[str, Any]
    deps: Mapping[str, Any]
    outs: Mapping[str, Any]


def _lock(text: bytes | None, origin: str) -> dict[str, _Locked]:
    """The stages of a `dvc.lock`."""
    found = {}
    for stage in (stages := mapping_in(_document(text, origin), "stages", origin)):
        entry = mapping_in(stages, stage, origin)
        hashes: list[dict[str, Any]] = []
        for key in ("deps", "outs"):
            files = entry.get(key) or []
            if not isinstance(files, list) or not all(
                isinstance(file, Mapping) and isinstance(file.get("path"), str) for file in files
            ):
                raise UserError(f"{origin}: {key} of {stage} must be a list of files")
            # What of the parameters a stage has read is told by name, not by the file `params.yaml`.
            hashes.append(
                {file["path"]: file.get("md5") for file in files if file["path"] != PARAMS}
            )
        params = mapping_in(mapping_in(entry, "params", origin), PARAMS, origin)
        found[stage] = _Locked(params, *hashes)
    return found


def _locked_params(lock: Mapping[str, _Locked]) -> dict[str, Any]:
    return {key: found for entry in lock.values() for key, found in entry.params.items()}


def _changed_params(
    lock: Mapping[str, _Locked], params: Mapping[str, Any]
) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Parameters that a stage ran with and that are otherwise now: then and now, by stage and name."""
    return {
        (stage, key): (then, params.get(key))
        for stage, entry in lock.items()
        for key, then in entry.params.items()
        if params.get(key) != then
    }


def _preset_of(lock: Mapping[str, _Locked]) -> str | None:
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


def _stale_stages(lock: Mapping[str, _Locked], stale: set[str]) -> set[str]:
    """These stages, those that ran on other inputs than are recorded as made, and all behind them."""
    made = {path: (stage, md5) for stage, entry in lock.items() for path, md5 in entry.outs.items()}
    while True:
        more = {
            stage
            for stage, entry in lock.items()
            for path, md5 in entry.deps.items()
            if path in made and (made[path][0] in stale or made[path][1] != md5)
        }
        if more <= stale:
            return stale
        stale = stale | more


def _document(text: bytes | None, origin: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty where there is none."""
    if text is None:
        return {}
    found = read_json(text, origin) if text.startswith(b"{") else read_yaml(text, origin)
    return found if isinstance(found, dict) else {}


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name."""
    found: dict[str, Any] = {}
    for key, item in document.items():
        if isinstance(item, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in _flat(item).items()}
        else:
            found[key] = item
    return found
