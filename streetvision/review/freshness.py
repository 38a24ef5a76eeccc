"""Do results belong to what a revision holds? Its `dvc.lock` against its own files, as DVC would decide.

DVC decides that for the working tree alone and with the data there: without them `dvc repro --allow-missing
--dry` ends in "no such file" for a stage that would run, and with status 0 where it needs none. A revision's
code and parameters are in Git, and what its stages read of one another is in its `dvc.lock`.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from streetvision.core import git
from streetvision.core.documents import mapping_in, read_yaml
from streetvision.core.errors import UserError
from streetvision.core.escaping import shortened

PARAMS, PIPELINE, LOCK = "params.yaml", "dvc.yaml", "dvc.lock"
# A larger folder is told by the number and the size of its files: reading it would take longer than a report.
MAX_HASHED_BYTES = 2**30
_SHOWN = 3  # reasons of a stage
MEND = (
    "`dvc repro` makes stale results anew; `dvc commit -f` keeps them after a change without effect"
)
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
State = Literal["same", "changed", "gone", "unknown"]
_WORDS = {"changed": "changed", "gone": "is gone"}


@dataclass(frozen=True)
class Hash:
    """What `dvc.lock` records of a file or folder: MD5 (of a folder with `.dir`), bytes, number of files."""

    md5: str | None
    size: int | None
    nfiles: int | None

    @property
    def of_folder(self) -> bool:
        """Whether it is that of a folder."""
        return self.md5 is not None and self.md5.endswith(".dir")


@dataclass(frozen=True)
class Locked:
    """What `dvc.lock` records of a stage: command, parameters by dotted name, what it read and made by path."""

    command: Any
    params: Mapping[str, Any]
    deps: Mapping[str, Hash]
    outs: Mapping[str, Hash]


# Of a path that a stage writes: the stage, and what it wrote at its last run.
Made = dict[str, tuple[str, Hash | None]]


@dataclass(frozen=True)
class Freshness:
    """Which stages' results are not those of a revision's own code, parameters and data.

    Attributes
    ----------
    why : what is wrong with a stage, in the pipeline's order
    behind : stages with nothing wrong but that they read what those make
    unknown : what stages read that is neither in Git nor here, so that nobody can say whether it changed
    """

    why: Mapping[str, str]
    behind: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def stale(self) -> frozenset[str]:
        """All stages that `dvc repro` would run."""
        return frozenset({*self.why, *self.behind})

    def lines(self) -> list[str]:
        """What is stale and why; stages that have one reason share a line."""
        by_reason: dict[str, list[str]] = {}
        for stage, reason in self.why.items():
            by_reason.setdefault(reason, []).append(shortened(stage))
        found = [f"{', '.join(stages)}: {reason}" for reason, stages in by_reason.items()]
        if self.behind:
            found.append(f"{', '.join(map(shortened, self.behind))}: behind the above")
        return found


FRESH = Freshness({}, (), ())


class Files(Protocol):
    """The project's files at one revision; paths are from the project's folder."""

    def read(self, paths: Iterable[str]) -> Mapping[str, bytes | None]:
        """Contents, None where there is no such file; UserError where one cannot be read."""

    def md5(self, paths: Iterable[str]) -> Mapping[str, str | None]:
        """MD5 of files, None where there is no such file."""

    def folder(self, path: str, locked: Hash) -> State:
        """Whether a folder is what it was."""


@dataclass(frozen=True)
class CommitFiles:
    """Those of a commit, from Git's objects alone."""

    root: Path
    commit: str

    def read(self, paths: Iterable[str]) -> Mapping[str, bytes | None]:
        """As `Files`."""
        found = git.files(self.root, [(self.commit, path) for path in paths])
        return {path: text for (_, path), text in found.items()}

    def md5(self, paths: Iterable[str]) -> Mapping[str, str | None]:
        """As `Files`; what lies outside the project is not there."""
        wanted = list(paths)
        inside = [path for path in wanted if not _outside(path)]
        return dict.fromkeys(wanted) | git.md5_of_files(self.root, self.commit, inside)

    def folder(self, path: str, locked: Hash) -> State:
        """As `Files`."""
        if _outside(path):
            return "unknown"
        found = git.md5_below(self.root, self.commit, path)
        if len(found) < (locked.nfiles or 0) and git.ignores_below(self.root, path):
            return "unknown"
        return "same" if folder_md5(found) == locked.md5 else "changed"


@dataclass(frozen=True)
class WorkingFiles:
    """Those of the working tree."""

    root: Path

    def read(self, paths: Iterable[str]) -> Mapping[str, bytes | None]:
        """As `Files`."""
        found: dict[str, bytes | None] = {}
        for path in paths:
            git.check_path(path)
            try:
                found[path] = (self.root / path).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                found[path] = None
            except OSError as error:
                raise UserError(f"cannot read {self.root / path}: {error.strerror}") from error
        return found

    def md5(self, paths: Iterable[str]) -> Mapping[str, str | None]:
        """As `Files`; also of what lies outside the project."""
        return {path: self._md5(path) for path in paths}

    def folder(self, path: str, locked: Hash) -> State:
        """As `Files`; a folder of more than 1 GiB is told by the number and the size of its files."""
        top = self.root / path
        if not top.is_dir():
            return "unknown" if _outside(path) or git.ignores_below(self.root, path) else "gone"
        if _outside(path):
            walked = [Path(folder) / name for folder, _, names in os.walk(top) for name in names]
            files, only_git = [each.relative_to(top).as_posix() for each in walked], False
        else:
            names, only_git = git.files_below(self.root, path, ".dvcignore")
            files = [name.removeprefix(f"{path}/") for name in names]
        if only_git and len(files) < (locked.nfiles or 0) and git.ignores_below(self.root, path):
            return "unknown"
        total = sum((top / name).stat().st_size for name in files if (top / name).is_file())
        if (locked.nfiles, locked.size) != (len(files), total):
            return "changed"
        if total > MAX_HASHED_BYTES:
            return "same"
        found = {name: self._md5(f"{path}/{name}") or "" for name in files}
        return "same" if folder_md5(found) == locked.md5 else "changed"

    def _md5(self, path: str) -> str | None:
        place = self.root / path
        if not place.is_file():
            return None
        try:
            with place.open("rb") as file:
                return hashlib.file_digest(file, _md5_hasher).hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {place}: {error.strerror}") from error


def folder_md5(files: Mapping[str, str]) -> str:
    """DVC's hash of a folder, of the MD5 of its files by path from there."""
    listed = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    text = json.dumps(listed, sort_keys=True).encode()
    return f"{hashlib.md5(text, usedforsecurity=False).hexdigest()}.dir"


def read_lock(text: bytes | None, origin: str) -> dict[str, Locked]:
    """The stages of a `dvc.lock`; none where there is no such file."""
    document = None if text is None else read_yaml(text, origin)
    found = {}
    stages = mapping_in(document, "stages", origin) if isinstance(document, dict) else {}
    for stage in stages:
        entry = mapping_in(stages, stage, origin)
        hashes: list[dict[str, Hash]] = []
        for key in ("deps", "outs"):
            files = entry.get(key) or []
            if not isinstance(files, list) or not all(
                isinstance(file, Mapping) and isinstance(file.get("path"), str) for file in files
            ):
                raise UserError(f"{origin}: {key} of {stage} must be a list of files")
            by_path = {_normal(file["path"]): _hash(file) for file in files}
            hashes.append({path: each for path, each in by_path.items() if path != PARAMS})
        params = mapping_in(mapping_in(entry, "params", origin), PARAMS, origin)
        found[stage] = Locked(entry.get("cmd"), flat(params), *hashes)
    return found


def flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name."""
    found: dict[str, Any] = {}
    for key, item in document.items():
        if isinstance(item, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in flat(item).items()}
        else:
            found[key] = item
    return found


def changed_params(
    lock: Mapping[str, Locked], given: Callable[[str], Any]
) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Parameters that a stage ran with and that are otherwise now: then and now, by stage and name."""
    return {
        (stage, key): (then, given(key))
        for stage, entry in lock.items()
        for key, then in entry.params.items()
        if given(key) != then
    }


def judge(
    pipeline: Mapping[str, Any],
    lock: Mapping[str, Locked],
    given: Callable[[str], Any],
    files: Files,
) -> Freshness:
    """Hold each stage of a `dvc.yaml` against its run in `dvc.lock`: command, parameters, all that it read.

    Of what it wrote, files that Git has are compared, too: they may have been merged or edited. What stages
    read of one another is compared within `dvc.lock`; the data themselves need not be there.

    Parameters
    ----------
    given
        The value of a parameter by its dotted name.

    Raises
    ------
    UserError
        `dvc.yaml` is none, or a path in either file is no path.
    """
    stages = _stages(pipeline, lock, given)
    ran = {name: lock[name] for name in stages if name in lock}
    made: Made = {}
    for name, stage in stages.items():
        made |= dict.fromkeys(stage.outs, (name, None))
        if name in ran:
            made |= {path: (name, md5) for path, md5 in ran[name].outs.items()}
    plain = {
        (path, then)
        for name, locked in ran.items()
        for path, then in locked.deps.items()
        if path in stages[name].deps and _maker(path, made) is None
    }
    kept = {
        (path, then)
        for name, locked in ran.items()
        for path, then in locked.outs.items()
        if path in stages[name].in_git
    }
    states = _states(plain | kept, files)
    changed = changed_params(lock, given)
    why: dict[str, str] = {}
    for name, stage in stages.items():
        if stage.frozen:
            continue
        if name not in ran:
            why[name] = f"{LOCK} has no run of it"
            continue
        reasons = [
            f"{shortened(key)} was {_shown(then)} and is {_shown(now)}"
            for (owner, key), (then, now) in changed.items()
            if owner == name
        ]
        reasons += _reasons(stage, ran[name], made, states, given)
        if reasons:
            more = len(reasons) - _SHOWN
            why[name] = "; ".join([*reasons[:_SHOWN], *([f"{more} more"] if more > 0 else [])])
    unknown = {path for path, then in plain if states[path, then] == "unknown"}
    return Freshness(why, _behind(stages, why, made), tuple(sorted(unknown)))


@dataclass(frozen=True)
class _Stage:
    """A stage of a `dvc.yaml`; `command` is None where variables are in it. `in_git`: outs without a cache."""

    frozen: bool  # DVC leaves it as it is
    command: Any
    deps: Sequence[str]
    params: Sequence[str]
    outs: Sequence[str]
    in_git: Sequence[str]


def _stages(
    pipeline: Mapping[str, Any], lock: Mapping[str, Locked], given: Callable[[str], Any]
) -> dict[str, _Stage]:
    """The stages that a `dvc.yaml` defines; of those that it makes by `foreach` or `matrix` what ran."""
    found = {}
    for name, entry in mapping_in(pipeline, "stages", PIPELINE).items():
        if not isinstance(entry, Mapping):
            raise UserError(f"{PIPELINE}: stages.{name} must be a mapping")
        if "foreach" in entry or "matrix" in entry:
            for each, locked in lock.items():
                if each.partition("@")[0] == name:
                    found[each] = _Stage(False, None, [*locked.deps], [], [*locked.outs], [])
            continue
        command = entry.get("cmd")
        outs = [pair for kind in ("outs", "metrics", "plots") for pair in _entries(entry.get(kind))]
        params = [
            key
            for path, keys in _entries(entry.get("params"))
            for key in ([path] if keys is None else keys if path == PARAMS else [])
            if isinstance(key, str)
        ]
        # A stage that reads the file of parameters (`check`) vouches for it; what counts is told by name.
        listed = [path for path, _ in _entries(entry.get("deps")) if path != PARAMS]
        deps = _filled(listed, given)
        if name in lock:
            # One below the project is relative in `dvc.lock`, on whichever machine that was.
            deps = [each for each in deps if each[0] != "/" or each in lock[name].deps]
        if len(deps) < len(listed) and name in lock:
            deps = list(dict.fromkeys([*deps, *lock[name].deps]))
        found[name] = _Stage(
            entry.get("frozen") is True,
            None if "${" in str(command) else command,
            deps,
            params,
            _filled([path for path, _ in outs], given),
            [
                _normal(path) for path, flags in outs
                if isinstance(flags, Mapping) and flags.get("cache") is False
            ],
        )  # fmt: skip
    return found


def _reasons(
    stage: _Stage,
    ran: Locked,
    made: Made,
    states: Mapping[tuple[str, Hash], State],
    given: Callable[[str], Any],
) -> Iterator[str]:
    """What is wrong with a stage that ran, but for the values of its parameters."""
    values = {name: given(name) for name in stage.params}
    for name in (*stage.deps, *flat(values)):
        if name not in ran.deps and name not in ran.params:
            yield f"{shortened(name)} is in {PIPELINE}, and it ran without"
    if stage.command is not None and stage.command != ran.command:
        yield f"{PIPELINE} has another command"
    for path, then in ran.deps.items():
        if path not in stage.deps:
            continue
        maker = _maker(path, made)
        if maker is None and states[path, then] in _WORDS:
            yield f"{shortened(path)} {_WORDS[states[path, then]]}"
        elif path in made and made[path][1] not in {None, then}:
            yield f"it read another {shortened(path)} than {shortened(made[path][0])} made"
    for path in stage.in_git:
        if path in ran.outs and states[path, ran.outs[path]] in _WORDS:
            yield f"{shortened(path)} is not what it wrote"


def _entries(listed: Any) -> list[tuple[str, Any]]:
    """The names in a list of `dvc.yaml`, each with what it maps to."""
    found = []
    for each in listed if isinstance(listed, list) else []:
        pairs = each.items() if isinstance(each, Mapping) else [(each, None)]
        found += [(name, rest) for name, rest in pairs if isinstance(name, str)]
    return found


def _filled(paths: Iterable[str], given: Callable[[str], Any]) -> list[str]:
    """Paths with the parameters that stand in them; without those that hold another variable of DVC's."""
    found = []
    for path in paths:
        text = path
        for name in _VARIABLE.findall(path):
            item = given(name.strip())
            if item is None:
                break
            text = text.replace(f"${{{name}}}", str(item))
        else:
            found.append(_normal(text))
    return found


def _normal(path: str) -> str:
    """A path as others write it: `./a//b/` and `a/x/../b` are `a/b`."""
    return path if "://" in path else posixpath.normpath(path)


def _states(pairs: Iterable[tuple[str, Hash]], files: Files) -> dict[tuple[str, Hash], State]:
    """Whether files and folders are what they were; all files are read at once."""
    wanted = dict.fromkeys(pairs)
    md5 = files.md5(dict.fromkeys(path for path, then in wanted if not then.of_folder))
    found: dict[tuple[str, Hash], State] = {}
    for path, then in wanted:
        if then.md5 is None:
            found[path, then] = "unknown"  # of a server, by its own mark
        elif then.of_folder:
            found[path, then] = files.folder(path, then)
        elif md5[path] is None:
            found[path, then] = "unknown" if _outside(path) else "gone"
        else:
            found[path, then] = "same" if md5[path] == then.md5 else "changed"
    # What `dvc add` took is not in Git, but its hash is.
    absent = [pair for pair, state in found.items() if state in {"gone", "unknown"}]
    added = files.read([f"{path}.dvc" for path, _ in absent if not _outside(path)])
    for path, then in absent:
        text = added.get(f"{path}.dvc")
        document = None if text is None else read_yaml(text, f"{path}.dvc")
        outs = document.get("outs") if isinstance(document, dict) else None
        if isinstance(outs, list) and outs and isinstance(outs[0], Mapping):
            found[path, then] = "same" if outs[0].get("md5") == then.md5 else "changed"
    return found


def _maker(path: str, made: Made) -> str | None:
    """The stage that writes a file or folder, or a part of it, or what it is a part of."""
    if path in made:
        return made[path][0]
    for other, (stage, _) in made.items():
        if other.startswith(f"{path}/") or path.startswith(f"{other}/"):
            return stage
    return None


def _behind(
    stages: Mapping[str, _Stage],
    why: Mapping[str, str],
    made: Made,
) -> tuple[str, ...]:
    """Stages that read what stale ones make, directly or not."""
    before = {
        name: {maker for path in stage.deps if (maker := _maker(path, made)) is not None}
        for name, stage in stages.items()
    }
    stale = set(why)
    while (
        more := {
            name for name, makers in before.items() if makers & stale and not stages[name].frozen
        }
        - stale
    ):
        stale |= more
    return tuple(name for name in stages if name in stale - set(why))


def _hash(entry: Mapping[str, Any]) -> Hash:
    md5, size, nfiles = (entry.get(key) for key in ("md5", "size", "nfiles"))
    return Hash(
        md5 if isinstance(md5, str) else None,
        size if isinstance(size, int) else None,
        nfiles if isinstance(nfiles, int) else None,
    )


def _md5_hasher() -> Any:
    return hashlib.md5(usedforsecurity=False)


def _outside(path: str) -> bool:
    """Whether a path leads out of the project, or to a server."""
    return path.startswith(("/", "../")) or path == ".." or "://" in path


def _shown(value: Any) -> str:
    return shortened(json.dumps(value, default=str))
