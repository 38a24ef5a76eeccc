"""Every path of the project, atomic writers, step manifests, the run log and locked scratch folders.

`ArtifactSchema` is the only place that knows a path; a test holds it equal to `dvc.yaml`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from streetvision.core.errors import UserError
from streetvision.core.escaping import csv_cell
from streetvision.core.schema import CONDITIONS, SPLITS

# The libraries whose versions can change a result.
RECORDED_LIBRARIES = (
    "lightning", "numpy", "peft", "pillow", "pyarrow", "scikit-learn", "scipy", "timm", "torch",
    "torchvision",
)  # fmt: skip
MOST_LEFTOVERS = 8  # scratch folders of one step that nobody is at work in


@dataclass(frozen=True)
class ArtifactSchema:
    """The files and folders of one project, below `root`."""

    root: Path

    @property
    def checked(self) -> Path:
        """A constant, on which every stage depends: `params.yaml` was read without an error."""
        return self.root / "data/params.checked"

    @property
    def raw(self) -> Path:
        """Folder of Parquet shards in the NATIX schema."""
        return self.root / "data/raw"

    @property
    def quarantine(self) -> Path:
        """Rows that could not be used, with the reason."""
        return self.root / "data/quarantine.csv"

    def split(self, name: str) -> Path:
        """Arrow file of one split: train, val_select, val_calib or val_test."""
        if name not in SPLITS:
            raise UserError(f'split "{name}" is not one of {", ".join(SPLITS)}')
        return self.root / f"data/splits/{name}.arrow"

    @property
    def originals(self) -> Path:
        """Arrow file with the files of VAL_TEST's images as they came, for `challenge`."""
        return self.root / "data/splits/val_test_originals.arrow"

    def embeddings(self, name: str, condition: str = "clean") -> Path:
        """Cached logits and features of one split under one condition; VAL_TEST is never embedded."""
        if name not in SPLITS or name == "val_test":
            raise UserError(f'split "{name}" has no embeddings')
        if condition not in CONDITIONS:
            raise UserError(f'condition "{condition}" is not one of {", ".join(CONDITIONS)}')
        suffix = "" if condition == "clean" else f"_{condition}"
        return self.root / f"data/embeddings/{name}{suffix}.arrow"

    @property
    def explora(self) -> Path:
        """Folder with the adapted backbone, its adapter and `config.json`."""
        return self.root / "models/explora"

    @property
    def classifier(self) -> Path:
        """Folder with `model.safetensors` and `config.json`."""
        return self.root / "models/classifier"

    @property
    def cvfm(self) -> Path:
        """Folder with fusion's `config.json` and, of a trained mode, `cvfm_weights.pth`."""
        return self.root / "models/cvfm"

    @property
    def thresholds(self) -> Path:
        """Phase-2 threshold policy."""
        return self.root / "models/policy/thresholds.json"

    @property
    def threshold(self) -> Path:
        """Its threshold alone: what later stages read, whatever else the policy records."""
        return self.root / "models/policy/threshold.json"

    @property
    def scrc_params(self) -> Path:
        """The deployed policy: source of truth."""
        return self.root / "models/policy/scrc_params.json"

    @property
    def scrc_pickle(self) -> Path:
        """The same policy, pickled because the format asks for it."""
        return self.root / "models/policy/scrc_params.pkl"

    @property
    def bundle(self) -> Path:
        """The deployable bundle."""
        return self.root / "models/bundle"

    @property
    def metrics(self) -> Path:
        """Folder of the metrics that Git tracks."""
        return self.root / "metrics"

    def metric(self, name: str) -> Path:
        """`metrics/<name>.json`."""
        return self.metrics / f"{name}.json"

    def plot(self, name: str) -> Path:
        """A file under `metrics/plots`, named with its suffix."""
        return self.metrics / "plots" / name

    def manifest(self, step: str) -> Path:
        """`<step>.manifest.json`, written last, beside the step's main output."""
        folder = {
            "ingest": "data/raw",
            "prepare": "data/splits",
            "explora": "models/explora",
            "probe": "models",
            "train": "models/classifier",
            "embed": "data/embeddings",
            "sweep": "models/policy",
            "cvfm": "models/cvfm",
            "calibrate": "models/policy",
            "export": "models/bundle",
            "evaluate": "models",
            "challenge": "models",
            "headline": "models",
        }
        if step not in folder:
            raise UserError(f'step "{step}" is not one of {", ".join(folder)}')
        return self.root / folder[step] / f"{step}.manifest.json"

    @property
    def run_log(self) -> Path:
        """One JSON line a run; not tracked by Git or DVC."""
        return self.root / ".streetvision/runs.jsonl"

    @property
    def export_timing(self) -> Path:
        """Latencies and memory of the bundle on this machine; not tracked by Git or DVC."""
        return self.root / ".streetvision/export_timing.json"

    @property
    def scratch(self) -> Path:
        """Folder of checkpoints and partial outputs, which Git and DVC leave alone: in DVC's temporary folder.

        `dvc exp run --temp` and DVC's queue work in copies of the project below its `.dvc/tmp/exps`, which end
        with the run: they have the project's scratch. Without `.dvc` it is beside the run log.
        """
        root = self.root.resolve()
        for folder in root.parents:
            if folder.parts[-3:] == (".dvc", "tmp", "exps"):
                return folder.parent / "streetvision/scratch"
        dvc = root / ".dvc"
        return (dvc / "tmp/streetvision" if dvc.is_dir() else root / ".streetvision") / "scratch"

    def lock(self, step: str) -> Path:
        """Held by the process that writes a step's outputs here; not tracked by Git or DVC."""
        return self.root / f".streetvision/{step}.lock"

    def ensure_dirs(self) -> None:
        """Create every folder a stage writes to."""
        for folder in (
            "data/splits", "data/embeddings", "models/policy", "metrics/plots", ".streetvision",
        ):  # fmt: skip
            (self.root / folder).mkdir(parents=True, exist_ok=True)


# --------------------------------------------------------------------------- atomic writes


def write_atomic(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`.

    A reader sees the old file or the whole new one, never a part; a failure leaves no temporary file. Who may
    read it is for the umask to say, as with any new file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)  # `write` may have made the file anew
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _temporary(path: Path) -> Path:
    """A new, empty file beside `path`, with the permissions that the umask leaves; `mkstemp` asks it not."""
    while True:
        # The name of a file may be as long as a name may be.
        found = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
        try:
            os.close(os.open(found, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            continue
        return found


def move(source: Path, target: Path) -> None:
    """Rename a file; one on another file system is copied, atomically, and then deleted."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        write_atomic(target, lambda temporary: shutil.copyfile(source, temporary))
        source.unlink()


def write_bytes_atomic(path: Path, data: bytes) -> Path:
    """Write bytes atomically."""
    return write_atomic(path, lambda temporary: temporary.write_bytes(data))


def write_json_atomic(path: Path, document: Mapping[str, Any], *, sort_keys: bool = True) -> Path:
    """Write indented JSON; raises `ValueError` on NaN or infinity."""
    return write_bytes_atomic(path, json_text(document, sort_keys=sort_keys).encode())


def write_csv_atomic(path: Path, columns: Mapping[str, Iterable[Any]]) -> Path:
    """Write columns of equal length as CSV; floats keep every digit that matters (`repr`).

    Text that a spreadsheet would take for a formula is marked, see `escaping.csv_cell`.
    """
    import csv

    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(csv_cell, columns))
    writer.writerows(zip(*(map(csv_cell, each) for each in columns.values()), strict=True))
    return write_bytes_atomic(path, buffer.getvalue().encode())


def json_text(document: Mapping[str, Any], *, sort_keys: bool = True) -> str:
    """Sorted keys, two spaces, finite numbers only, final newline."""
    text = json.dumps(document, sort_keys=sort_keys, indent=2, allow_nan=False, default=_plain)
    return text + "\n"


def _plain(value: Any) -> Any:
    """Turn NumPy scalars and arrays into JSON types."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file names the stage that makes it."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the stage `{made_by}` makes it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); rerun `{made_by}`") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold a JSON object")
    return document


# --------------------------------------------------------------------------- manifests, run log


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a configuration in canonical JSON."""
    text = json.dumps(
        config, sort_keys=True, allow_nan=False, separators=(",", ":"), default=_plain
    )
    return hashlib.sha256(text.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change a result."""
    found = {}
    for name in RECORDED_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def create_step_manifest(
    root: Path,
    step: str,
    config: Mapping[str, Any],
    inputs: Iterable[Path],
    outputs: Iterable[Path],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the deterministic record of a step: what went in, what came out, under which settings.

    Folders stand for the files in them. Paths are relative to `root` where they lie below it.
    """

    def describe(paths: Iterable[Path]) -> list[dict[str, Any]]:
        files: set[Path] = set()
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(f"{path} belongs in the manifest of {step}")
            files.update([path] if path.is_file() else (p for p in path.rglob("*") if p.is_file()))
        return [
            {
                "path": file.relative_to(root).as_posix()
                if file.is_relative_to(root)
                else file.name,
                "sha256": sha256_file(file),
                "bytes": file.stat().st_size,
            }
            for file in sorted(files)
            if not file.name.endswith(".manifest.json")
        ]

    return {
        "step": step,
        "config_sha256": config_hash(config),
        "inputs": describe(inputs),
        "outputs": describe(outputs),
        "metrics": {
            k: v for k, v in metrics.items() if not isinstance(v, float) or math.isfinite(v)
        },
        "libraries": library_versions(),
    }


@contextmanager
def run_log(path: Path, step: str) -> Iterator[dict[str, Any]]:
    """Append one JSON line about this run, also when it fails.

    The yielded dictionary takes further entries (device, images a second, …).
    """
    entry: dict[str, Any] = {
        "step": step,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    start = time.perf_counter()
    try:
        yield entry
        entry["status"] = "ok"
    except BaseException as error:
        entry["status"] = "failed"
        entry["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        entry |= {
            "seconds": round(time.perf_counter() - start, 3),
            "host": socket.gethostname(),
            "git_commit": _git_commit(path.parent.parent),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(entry, sort_keys=True, default=str) + "\n")


def _git_commit(root: Path) -> str | None:
    """HEAD's commit, None outside a Git repository or before its first commit."""
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --------------------------------------------------------------------------- scratch


@contextmanager
def exclusive(lock: Path, busy: str | None) -> Iterator[None]:
    """Hold a lock file; a second process gets `UserError` with the text `busy`, or waits if that is None."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise UserError(f"cannot write {lock}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise UserError(busy or "") from error
        except OSError as error:
            raise UserError(f"cannot lock {lock}: {error.strerror}") from error
        yield


def main_process() -> bool:
    """Whether this is the first rank of a training job, the one that writes files and speaks.

    Lightning, torchrun and SLURM number the processes they start in the environment.
    """
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def scratch_path(parent: Path, step: str, key: Mapping[str, Any]) -> Path:
    """The folder that `scratch_folder` yields, for a process that shares it with the one that holds it."""
    return parent / step / config_hash(key)[:16]


@contextmanager
def scratch_folder(parent: Path, step: str, key: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a folder for checkpoints and parts, keyed by what determines the result.

    A run that dies leaves the folder, and the next run with the same key resumes from it; success deletes
    it. Runs with other keys, such as a sweep's, have folders of their own at the same time; of those that
    nobody is at work in, only some stay, see `_delete_leftovers`.

    Raises
    ------
    UserError
        Another process is at work on the same key, or the folder cannot be written.
    KeyboardInterrupt
        As it came, with a text for `errors.guarded` if there is something to go on from: a file whose name
        does not begin with a dot.
    """
    folder = scratch_path(parent, step, key)
    busy = f"another process is still running stage `{step}` in {folder}; wait for it or stop it"
    with ExitStack() as held:
        # Runs begin and end one at a time: no lock file is deleted while somebody is about to take it.
        with exclusive(folder.parent / "lock", None):
            held.enter_context(exclusive(_lock(folder), busy))
            _delete_leftovers(folder.parent)
            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write {folder}: {error.strerror}") from error
        try:
            yield folder
        except KeyboardInterrupt as error:
            if any(path.is_file() and path.name[0] != "." for path in folder.rglob("*")):
                raise KeyboardInterrupt("to go on from the last checkpoint") from error
            raise
        with exclusive(folder.parent / "lock", None):
            _delete(folder)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _delete(folder: Path) -> None:
    """Delete a scratch folder whose lock is held; `git clean` or its user may have been faster."""
    shutil.rmtree(folder, ignore_errors=True)
    _lock(folder).unlink(missing_ok=True)


def _delete_leftovers(home: Path) -> None:
    """Delete what interrupted runs left in `home`, but the newest: those can still be taken up again.

    At most `MOST_LEFTOVERS` stay, as many as a stopped queue leaves at once, and no more bytes than are free on
    the disk: a checkpoint is a gigabyte, and whoever frees none for a full disk would not get to the next one.
    """
    with ExitStack() as held:
        found = []
        for folder in home.iterdir():
            if folder.is_symlink() or not folder.is_dir():
                continue
            try:
                held.enter_context(exclusive(_lock(folder), "at work"))
                files = [path.lstat() for path in (folder, *folder.rglob("*"))]
            except (UserError, FileNotFoundError):
                continue
            changed = max(file.st_mtime for file in files)
            found.append((changed, sum(file.st_size for file in files), folder))
        total, free = 0, shutil.disk_usage(home).free
        for number, (_, size, folder) in enumerate(sorted(found, reverse=True)):
            total += size
            if number >= MOST_LEFTOVERS or total > free:
                _delete(folder)
