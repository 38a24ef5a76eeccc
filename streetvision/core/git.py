"""What Git has of a project: its commits and their files, also where the repository's top is above the project.

Only plumbing commands and `diff --name-only` are run: no DVC remote is asked, whatever a revision's own
configuration names, and nothing of a revision is run.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from streetvision.core.errors import UserError

# A table of a million predictions is a quarter of it.
MAX_FILE_BYTES = 2**28
_EXPERIMENTS = "refs/exps/"
# Neither the user's pager, signature programs or monitors nor a question for a password.
_COMMAND = ("git", "-c", "core.fsmonitor=false", "-c", "log.showSignature=false")
_ENVIRONMENT = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def commit_of(root: Path, revision: str) -> str:
    """The full hash of a DVC experiment's or a Git revision's commit; experiments go first.

    Raises
    ------
    UserError
        No repository, or no such revision.
    """
    check_repository(root)
    if revision.isprintable() and revision.strip():
        named = experiments(root, revision)
        if revision in named:
            return named[revision]
        wanted = f"{revision}^{{commit}}"
        arguments = ("rev-parse", "--verify", "--quiet", "--end-of-options", wanted)
        found = _git(root, *arguments) or ""
        if re.fullmatch("[0-9a-f]{40,64}", found):
            return found
    hint = ""
    if _git(root, "rev-parse", "--is-shallow-repository") == "true":
        hint = "; this clone is shallow: `git fetch --unshallow` brings what is older"
    raise UserError(f'"{revision}" is neither a DVC experiment nor a Git revision of {root}{hint}')


def experiments(root: Path, name: str | None = None) -> dict[str, str]:
    """Commits of DVC's finished experiments by name: HEAD's, or those of any commit that have this name.

    DVC keeps each as `refs/exps/<2 digits>/<38 digits of the commit it began at>/<name>`.
    """
    check_repository(root)
    if name is None:
        head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD") or "none"
        pattern = f"{_EXPERIMENTS}{head[:2]}/{head[2:]}/"
    else:
        pattern = _EXPERIMENTS
    listed = _git(root, "for-each-ref", "--format=%(refname) %(objectname)", pattern) or ""
    found = {}
    for line in listed.splitlines():
        ref, _, commit = line.rpartition(" ")
        parts = ref.removeprefix(_EXPERIMENTS).split("/")
        if len(parts) == 3 and len(parts[0]) == 2 and name in {None, parts[2]}:
            found[parts[2]] = commit
    return found


def failed_experiments(root: Path) -> list[str]:
    """Names of HEAD's experiments that failed in DVC's queue and did not run under that name since.

    DVC keeps each in the log of `refs/exps/celery/failed`: its parent, the commit it began at, its name.
    """
    check_repository(root)
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    listed = _git(
        root, "log", "--walk-reflogs", "--format=%gs", f"{_EXPERIMENTS}celery/failed", "--"
    )
    found = re.findall(
        r"^commit: dvc-exp:[0-9a-f]+:([0-9a-f]+):([^:\n]+)", listed or "", re.MULTILINE
    )
    finished = experiments(root)
    return sorted({name for began, name in found if began == head and name not in finished})


def files(
    root: Path, wanted: Iterable[tuple[str, str]], limit: int = MAX_FILE_BYTES
) -> dict[tuple[str, str], bytes | None]:
    """Contents by (commit, path from `root`); None where there is no such file.

    Raises
    ------
    UserError
        A path that leaves the project or is no path, a folder in a file's place, or a file above `limit`
        bytes.
    """
    found = _objects(root, wanted, limit)
    for (commit, path), each in found.items():
        if each is not None and each.kind != "blob":
            raise UserError(f"{path} of {commit[:7]} is no file")
    contents = _contents(root, [each for each in found.values() if each is not None])
    return {pair: None if each is None else contents[each.name] for pair, each in found.items()}


def md5_of_files(root: Path, commit: str, paths: Iterable[str]) -> dict[str, str | None]:
    """Hex MD5 of a commit's files by path from `root`, as DVC has them; None where there is no such file.

    All that were not read before, of whichever commit, are read at once. UserError as `files`.
    """
    found = _objects(root, [(commit, path) for path in paths])
    blobs = [each for each in found.values() if each is not None and each.kind == "blob"]
    _hash(root, blobs)
    return {
        path: None if each is None or each.kind != "blob" else _MD5[each.name]
        for (_, path), each in found.items()
    }


def md5_below(root: Path, commit: str, folder: str) -> dict[str, str]:
    """The same of all files below a folder, by path from there; empty where Git has no such folder."""
    check_path(folder)
    listed = _git(root, "ls-tree", "-r", "-l", "-z", "--full-tree", f"{commit}:./{folder}")
    blobs = {}
    for line in (listed or "").split("\0"):
        what, _, path = line.partition("\t")
        if path and what.startswith("100"):  # a regular file: neither a link nor a submodule
            _, kind, name, size = what.split()
            blobs[path] = _Object(name, kind, int(size))
    _hash(root, blobs.values())
    return {path: _MD5[each.name] for path, each in blobs.items()}


def files_below(root: Path, folder: str, ignore: str) -> tuple[list[str], bool]:
    """Files below a folder of the working tree, by path from `root`; whether they are just those that Git has.

    Left out are those that patterns in files called `ignore` name. Outside of a repository there are none.
    """
    check_path(folder)
    listed = _git(
        root, "ls-files", "-t", "--cached", "--others", "-z", f"--exclude-per-directory={ignore}",
        "--", folder,
    )  # fmt: skip
    lines = [line.partition(" ") for line in (listed or "").split("\0") if line]
    names = sorted({name for _, _, name in lines if (root / name).is_file()})
    tracked = {name for tag, _, name in lines if tag != "?"}
    return names, tracked == set(names)


def ignores_below(root: Path, folder: str) -> bool:
    """Whether Git is told (by `.gitignore` here) to leave out what lies in a folder: data, kept elsewhere."""
    names = [f"{folder}/x{suffix}" for suffix in ("", ".jpg", ".parquet")]
    return _run(root, ["check-ignore", "--no-index", "--", *names]).returncode == 0


@dataclass(frozen=True)
class _Object:
    """An object of Git: name (hash), kind (`blob`, `tree`, …), size in bytes."""

    name: str
    kind: str
    size: int


# MD5 by the name of a blob, which is a hash of its content: the revisions of a sweep have most files in common.
_MD5: dict[str, str] = {}


def _objects(
    root: Path, wanted: Iterable[tuple[str, str]], limit: int = MAX_FILE_BYTES
) -> dict[tuple[str, str], _Object | None]:
    """What lies at (commit, path from `root`), None where there is nothing; UserError as `files`."""
    pairs = list(dict.fromkeys(wanted))
    for _, path in pairs:
        check_path(path)
    request = "".join(f"{commit}:./{path}\n" for commit, path in pairs).encode()
    found: dict[tuple[str, str], _Object | None] = dict.fromkeys(pairs)
    if not pairs:
        return found
    for pair, line in zip(pairs, _batch(root, "--batch-check", request).splitlines(), strict=True):
        if line.endswith(b" missing"):
            continue
        name, kind, digits = line.decode().rsplit(" ", 2)
        found[pair] = each = _Object(name, kind, int(digits))
        if each.kind == "blob" and each.size > limit:
            raise UserError(
                f"{pair[1]} of {pair[0][:7]} has {each.size:,} bytes, more than {limit:,}"
            )
    return found


def changed(root: Path, paths: Sequence[str]) -> list[str]:
    """Files at or below these paths that differ from HEAD, new ones that Git tracks included.

    Raises
    ------
    UserError
        No repository, or no commit yet.
    """
    check_repository(root)
    for path in paths:
        check_path(path)
    options = ("--name-only", "--no-ext-diff", "--no-renames", "-z", "HEAD", "--")
    listed = _git(root, "diff", *options, *paths)
    if listed is None:
        raise UserError(f"Git cannot compare {root} with HEAD")
    return [name for name in listed.split("\0") if name]


def _contents(root: Path, objects: Iterable[_Object]) -> dict[str, bytes]:
    """Contents of objects by name."""
    unique = {each.name: each for each in objects}
    if not unique:
        return {}
    answer, place = _batch(root, "--batch", "".join(f"{name}\n" for name in unique).encode()), 0
    found = {}
    for name, each in unique.items():
        start = answer.index(b"\n", place) + 1
        place = start + each.size + 1
        found[name] = answer[start : place - 1]
    return found


def _hash(root: Path, objects: Iterable[_Object]) -> None:
    """Make `_MD5` hold these."""
    new = [each for each in objects if each.name not in _MD5]
    for name, content in _contents(root, new).items():
        _MD5[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()


def asks_elsewhere(root: Path, commit: str) -> bool:
    """Whether DVC would ask for this commit's data where HEAD's would not: another `.dvc/config` or import."""
    asked = []
    for each in (commit, "HEAD"):
        listed = _git(root, "ls-tree", "-r", "-z", each) or ""
        lines = (line.partition("\t") for line in listed.split("\0"))
        asked.append(
            {
                (path, what)
                for what, _, path in lines
                if path == ".dvc/config" or path.endswith(".dvc")
            }
        )
    return not asked[0] <= asked[1]


def check_path(path: str) -> None:
    """Refuse what is no relative path below the project (UserError)."""
    parts = path.split("/")
    if not path.isprintable() or not {"", ".", ".."}.isdisjoint(parts):
        raise UserError(f"{path!r} is no path of a file below the project")


@dataclass(frozen=True)
class Commit:
    """A commit: hash, first parent (None at the start of the history that is here), time in seconds."""

    name: str
    parent: str | None
    time: int


def commits_that_changed(root: Path, commit: str, path: str, most: int) -> list[Commit]:
    """The last `most` commits up to this one that changed a file, newest first.

    Raises
    ------
    UserError
        Git cannot read the commit.
    """
    check_path(path)
    arguments = (f"--max-count={most}", "--format=%H %ct %P", commit, "--", path)
    listed = _git(root, "rev-list", *arguments)
    if listed is None:
        raise UserError(f"Git cannot read the commit {commit[:7]} of {root}")
    found = []
    for line in listed.splitlines():
        if not line.startswith("commit "):
            name, seconds, *parents = line.split()
            found.append(Commit(name, parents[0] if parents else None, int(seconds)))
    return found


def check_repository(root: Path) -> None:
    """Refuse a folder that no Git repository holds (UserError): say what to do."""
    try:
        done = _run(root, ["rev-parse", "--git-dir"])
    except FileNotFoundError as error:
        raise UserError("git is not installed; revisions are read with it") from error
    if done.returncode == 0:
        return
    said = done.stderr.decode(errors="replace").strip()
    if "not a git repository" in said:
        raise UserError(
            f"{root} is in no Git repository, which DVC and all that compares revisions need (a ZIP download "
            "has none): `git clone` the project, or make this folder one with `git init` and a first commit"
        )
    raise UserError(f"Git cannot read {root}: {said}")


def _git(root: Path, *arguments: str) -> str | None:
    """What a command prints; None if it fails."""
    done = _run(root, arguments)
    return done.stdout.decode(errors="surrogateescape").strip() if done.returncode == 0 else None


def _batch(root: Path, mode: str, request: bytes) -> bytes:
    done = _run(root, ["cat-file", mode], request)
    if done.returncode:
        raise UserError(f"Git cannot read {root}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _run(
    root: Path, arguments: Sequence[str], request: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*_COMMAND, *arguments], cwd=root, input=request, capture_output=True, check=False,
        env=os.environ | _ENVIRONMENT,
    )  # fmt: skip
