"""Atomic writes, manifests, the run log and locked scratch folders."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streetvision.core.artifacts import (
    MOST_LEFTOVERS,
    ArtifactSchema,
    config_hash,
    create_step_manifest,
    json_text,
    move,
    read_json,
    run_log,
    scratch_folder,
    sha256_file,
    write_atomic,
    write_bytes_atomic,
    write_csv_atomic,
    write_json_atomic,
)
from streetvision.core.errors import UserError, guarded
from streetvision.core.escaping import from_csv_cell
from streetvision.core.schema import CONDITIONS, SPLITS


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------- paths


def test_unknown_splits_and_steps_are_refused(tmp_path: Path) -> None:
    paths = ArtifactSchema(tmp_path)
    with pytest.raises(UserError, match=r'"val" is not one of train, val_select'):
        paths.split("val")
    for name in ("test", "val_test"):
        with pytest.raises(UserError, match=f'split "{name}" has no embeddings'):
            paths.embeddings(name)
    with pytest.raises(UserError, match='condition "rain" is not one of clean, served'):
        paths.embeddings("train", "rain")
    with pytest.raises(UserError, match=r'step "fit" is not one of ingest, prepare'):
        paths.manifest("fit")


def test_no_two_artifacts_share_a_path(tmp_path: Path) -> None:
    paths = ArtifactSchema(tmp_path)
    files = [
        *(paths.split(name) for name in SPLITS),
        *(paths.embeddings(name, each) for name in SPLITS[:3] for each in CONDITIONS),
        paths.raw, paths.quarantine, paths.classifier, paths.thresholds, paths.threshold, paths.scrc_params,
        paths.scrc_pickle, paths.bundle, paths.metric("a"), paths.plot("a.csv"), paths.run_log,
        *(paths.manifest(step) for step in ("ingest", "prepare", "train", "embed", "sweep")),
        *(paths.manifest(step) for step in ("calibrate", "export", "evaluate", "challenge")),
    ]  # fmt: skip
    assert len(set(files)) == len(files)
    assert all(file.is_relative_to(tmp_path) for file in files)
    paths.ensure_dirs()
    assert paths.plot("a.csv").parent.is_dir()
    assert paths.run_log.parent.is_dir()


# --------------------------------------------------------------------------- atomic writes


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("bug"), KeyboardInterrupt()]
)
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    path = write_bytes_atomic(tmp_path / "file", b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half of the ne")
        raise error

    wanted = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted) as caught:
        write_atomic(path, write)
    if wanted is UserError:
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = write_bytes_atomic(tmp_path / "deep/er/file", b"old")
    before = path.stat().st_ino

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert temporary.parent == path.parent

    assert write_atomic(path, write) == path
    assert path.read_bytes() == b"new"
    assert path.stat().st_ino != before
    assert names(path.parent) == ["file"]


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    path = write_bytes_atomic(tmp_path / ("ä" * 120 + ".csv"), b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(UserError, match="File name too long"):
        write_bytes_atomic(tmp_path / ("x" * 300), b"new")
    assert names(tmp_path) == [path.name]


def test_what_is_renamed_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash of the machine after the rename must not leave an empty file under the final name."""
    path, flushed = tmp_path / "file", []
    real = os.fsync

    def fsync(handle: int) -> None:
        flushed.append((os.fstat(handle).st_ino, os.fstat(handle).st_size, path.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes_atomic(path, b"new")
    assert (path.stat().st_ino, 3, False) in flushed


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_says_who_may_read_what_is_written(umask: int, tmp_path: Path) -> None:
    """Also of what a library writes by a file of its own, as safetensors does."""

    def anew(temporary: Path) -> None:
        temporary.unlink()
        temporary.write_bytes(b"new")
        temporary.chmod(0o600)

    before = os.umask(umask)
    try:
        paths = [
            write_bytes_atomic(tmp_path / "a/one", b""),
            write_atomic(tmp_path / "a/two", anew),
        ]
    finally:
        os.umask(before)
    for path in paths:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"^cannot write .*file/below"):
        write_bytes_atomic(tmp_path / "file/below", b"")


def test_a_file_moves_to_another_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.parent != target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_bytes_atomic(tmp_path / "here/a", b"a")
    (tmp_path / "there").mkdir()
    move(tmp_path / "here/a", tmp_path / "there/b")
    assert names(tmp_path / "here") == []
    assert names(tmp_path / "there") == ["b"]
    assert (tmp_path / "there/b").read_bytes() == b"a"
    with pytest.raises(FileNotFoundError):
        move(tmp_path / "here/a", tmp_path / "here/b")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_json_refuses_what_is_not_a_number(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(tmp_path / "a.json", {"a": [1, number]})
    assert names(tmp_path) == []
    with pytest.raises(TypeError, match="Path cannot be written"):
        json_text({"a": Path()})


def test_json_is_sorted_and_takes_numpy(tmp_path: Path) -> None:
    document = {"b": np.float64(0.1), "a": np.arange(2), "c": np.int8(3), "ä": True}
    path = write_json_atomic(tmp_path / "a.json", document)
    text = path.read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["a", "b", "c", "ä"]
    assert read_json(path, "train") == {"a": [0, 1], "b": 0.1, "c": 3, "ä": True}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing; the stage `train` makes it"),
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[1]", "must hold a JSON object"),
    ],
)
def test_a_broken_json_file_names_its_maker(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_json(path, "train")


text = st.text(st.characters(exclude_categories=["Cs", "Cc"]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(allow_nan=False), text)))
def test_csv_keeps_every_float_and_text(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "columns.csv"
    write_csv_atomic(path, {"x": [x for x, _ in rows], "text": [text for _, text in rows]})
    with path.open(newline="", encoding="utf-8") as file:
        header, *found = csv.reader(file)
    assert header == ["x", "text"]
    assert [(float(x), from_csv_cell(text)) for x, text in found] == rows


def test_csv_columns_must_be_equally_long(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        write_csv_atomic(tmp_path / "a.csv", {"a": [1, 2], "b": [1]})


# --------------------------------------------------------------------------- manifests


def project(root: Path) -> Path:
    write_bytes_atomic(root / "data/in.bin", b"in")
    write_bytes_atomic(root / "models/m/b.bin", b"bb")
    write_bytes_atomic(root / "models/m/a/a.bin", b"a")
    write_bytes_atomic(root / "models/m/x.manifest.json", b"{}")
    return root


def manifest(root: Path, reverse: bool = False) -> dict[str, Any]:
    outputs = [root / "models/m", root / "models/m/b.bin"]
    config = {"seed": 7, "train": {"epochs": 2}}
    if reverse:
        outputs.reverse()
        config = {"train": {"epochs": 2}, "seed": 7}
    metrics = {"mcc": 0.5, "broken": math.nan, "n": 3}
    return create_step_manifest(root, "train", config, [root / "data/in.bin"], outputs, metrics)


def test_the_manifest_is_deterministic_and_relative(tmp_path: Path) -> None:
    first = manifest(project(tmp_path / "one"))
    second = manifest(project(tmp_path / "elsewhere/two"), reverse=True)
    assert json_text(first) == json_text(second)
    assert [file["path"] for file in first["outputs"]] == ["models/m/a/a.bin", "models/m/b.bin"]
    assert first["inputs"] == [
        {
            "path": "data/in.bin",
            "bytes": 2,
            "sha256": sha256_file(tmp_path / "one/data/in.bin"),
        }
    ]
    assert first["metrics"] == {"mcc": 0.5, "n": 3}
    assert {"torch", "timm", "numpy"} <= set(first["libraries"])
    assert "/" not in json_text(first["libraries"])
    assert str(tmp_path) not in json_text(first)


def test_the_manifest_sees_changed_bytes_and_settings(tmp_path: Path) -> None:
    before = manifest(project(tmp_path))
    (tmp_path / "models/m/b.bin").write_bytes(b"bc")
    after = manifest(tmp_path)
    assert after["outputs"][1]["sha256"] != before["outputs"][1]["sha256"]
    assert after["outputs"][0] == before["outputs"][0]
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})


def test_files_outside_the_project_are_named_without_their_folder(tmp_path: Path) -> None:
    outside = write_bytes_atomic(tmp_path / "elsewhere/weights.pth", b"w")
    root = project(tmp_path / "root")
    found = create_step_manifest(root, "train", {}, [outside], [], {})
    assert [file["path"] for file in found["inputs"]] == ["weights.pth"]


# --------------------------------------------------------------------------- run log


def log_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_the_run_log_keeps_failures_too(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / ".streetvision/runs.jsonl"
    with run_log(path, "train") as entry:
        entry["device"] = "cpu"

    @contextmanager
    def failing() -> Iterator[None]:
        with run_log(path, "sweep"):
            yield

    with pytest.raises(type(error)), failing():
        raise error
    first, second = log_lines(path)
    assert (first["step"], first["status"], first["device"]) == ("train", "ok", "cpu")
    assert (second["step"], second["status"]) == ("sweep", "failed")
    assert second["error"] == f"{type(error).__name__}: {error}"
    for line in (first, second):
        assert line["seconds"] >= 0
        assert line["host"]
        assert line["started"].endswith("+00:00")


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    run = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def test_the_run_log_names_the_commit(tmp_path: Path) -> None:
    def commit_of_a_run() -> str | None:
        path = tmp_path / ".streetvision/runs.jsonl"
        with run_log(path, "train"):
            pass
        found: str | None = log_lines(path)[-1]["git_commit"]
        return found

    assert commit_of_a_run() is None
    git(tmp_path, "init", "-q")
    assert commit_of_a_run() is None
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of_a_run() == head
    git(tmp_path, "checkout", "-q", "--detach")
    assert commit_of_a_run() == head


# --------------------------------------------------------------------------- scratch


def fail_in_scratch(parent: Path, step: str, key: dict[str, int], size: int = 7) -> Path:
    """A run that wrote a checkpoint and failed; returns its folder."""
    found = []

    def run() -> None:
        with scratch_folder(parent, step, key) as folder:
            found.append(folder)
            (folder / "last.ckpt").write_bytes(b"epoch 1".ljust(size))
            raise UserError("killed")

    with pytest.raises(UserError, match="killed"):
        run()
    return found[0]


def test_a_failure_keeps_the_scratch_folder_and_success_deletes_it(tmp_path: Path) -> None:
    folder = fail_in_scratch(tmp_path, "train", {"seed": 1})
    with scratch_folder(tmp_path, "train", {"seed": 1}) as again:
        assert again == folder
        assert (again / "last.ckpt").read_bytes() == b"epoch 1"
    assert names(tmp_path / "train") == ["lock"]
    with scratch_folder(tmp_path, "train", {"seed": 1}) as fresh:
        assert names(fresh) == []


def aged(folder: Path, days: int) -> Path:
    for path in (folder, *folder.iterdir()):
        os.utime(path, (0, 1e9 - days * 86400))
    return folder


def test_the_newest_of_other_keys_stay(tmp_path: Path) -> None:
    """A stopped queue's experiments can all be taken up again; of older ones no more than so many are kept."""
    other = fail_in_scratch(tmp_path, "prepare", {"seed": 1})
    # The folder of the newest checkpoint is the oldest: it is what was written last that counts.
    left = [
        aged(fail_in_scratch(tmp_path, "train", {"seed": seed}), days=seed)
        for seed in range(MOST_LEFTOVERS + 2)
    ]
    os.utime(left[-1] / "last.ckpt")
    kept = [left[-1], *left[: MOST_LEFTOVERS - 1]]
    with scratch_folder(tmp_path, "train", {"seed": -1}) as folder:
        assert {path for path in folder.parent.iterdir() if path.is_dir()} == {folder, *kept}
        locks = {path.stem for path in folder.parent.glob("*.lock")}
        assert locks == {path.name for path in (folder, *kept)}
    assert (other / "last.ckpt").exists()
    # A run's own stays however old it is.
    aged(kept[0], days=1000)
    with scratch_folder(tmp_path, "train", {"seed": MOST_LEFTOVERS + 1}) as folder:
        assert names(folder) == ["last.ckpt"]


def test_leftovers_go_before_a_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [aged(fail_in_scratch(tmp_path, "train", {"seed": s}, 10**6), days=s) for s in range(3)]
    usage = shutil.disk_usage(tmp_path)
    for free, kept in ((2_500_000, 2), (1000, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with scratch_folder(tmp_path, "train", {"seed": 9}):
            assert [path.exists() for path in left] == [number < kept for number in range(3)]


def test_links_and_files_of_others_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scratch folder may be a link to another disk; what a link in it points to is not ours to delete."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis").write_bytes(b"")
    parent = tmp_path / "scratch"
    parent.symlink_to("disk")
    left = fail_in_scratch(parent, "train", {"seed": 1})
    (left / "inside").symlink_to(tmp_path / "precious")
    (parent / "train/beside").symlink_to(tmp_path / "precious")
    (parent / "train/notes").write_bytes(b"")
    monkeypatch.setattr("streetvision.core.artifacts.MOST_LEFTOVERS", 0)
    with scratch_folder(parent, "train", {"seed": 2}):
        assert not left.exists()
    assert names(tmp_path / "disk/train") == ["beside", "lock", "notes"]
    assert names(tmp_path / "precious") == ["thesis"]


def test_a_scratch_folder_that_was_cleaned_away_is_no_error(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "scratch", "train", {}):
        shutil.rmtree(tmp_path / "scratch")  # git clean -xdf
    with scratch_folder(tmp_path / "scratch", "train", {}) as folder:
        assert names(folder) == []


@pytest.mark.parametrize("place", ["scratch", "scratch/train"])
def test_a_scratch_folder_that_cannot_be_made_is_one_line(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    with (
        pytest.raises(
            UserError, match=rf"^cannot write {path}.*lock: (File exists|Not a directory)$"
        ),
        scratch_folder(tmp_path / "scratch", "train", {}),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_scratch_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with (
            pytest.raises(UserError, match=r"^cannot write .*lock: Permission denied$"),
            scratch_folder(tmp_path, "train", {}),
        ):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match=r"^cannot lock .*lock: No locks available$"),
        scratch_folder(tmp_path, "train", {}),
    ):
        pass


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ("last.ckpt", "run it again to go on from the last checkpoint"),
        (".last.ckpt.tmp", "run it again"),
        (None, "run it again"),
    ],
)
def test_an_interruption_promises_what_is_there(
    tmp_path: Path, left: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        with scratch_folder(tmp_path, "train", {}) as folder:
            (folder / "part").mkdir()
            if left is not None:
                (folder / "part" / left).write_bytes(b"")
            raise KeyboardInterrupt

    assert guarded("train", main) == 130
    assert capsys.readouterr().err == f"train: interrupted; {said}\n"


HOLD = """
import sys
from pathlib import Path
from streetvision.core.artifacts import scratch_folder
with scratch_folder(Path(sys.argv[1]), "train", {"seed": 1}) as folder:
    (folder / "mine").write_bytes(b"")
    print("holding", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path, repository: Path) -> Iterator[Callable[[], None]]:
    """A second process inside the scratch folder; the returned function kills it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"

    def kill() -> None:
        process.kill()
        process.wait()

    yield kill
    kill()


def test_a_key_is_one_process_alone_until_it_is_dead(
    tmp_path: Path, holder: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(UserError, match="another process is still running stage `train`"),
        scratch_folder(tmp_path, "train", {"seed": 1}),
    ):
        pass
    [folder] = [path for path in (tmp_path / "train").iterdir() if path.is_dir()]
    # Other keys and steps are free, and leave alone what somebody is at work in.
    monkeypatch.setattr("streetvision.core.artifacts.MOST_LEFTOVERS", 0)
    aged(folder, days=1000)
    for step in ("train", "prepare"):
        with scratch_folder(tmp_path, step, {"seed": 2}):
            assert names(folder) == ["mine"]
    holder()
    with scratch_folder(tmp_path, "train", {"seed": 1}) as again:
        assert names(again) == ["mine"]


def test_many_that_begin_at_once_disturb_each_other_in_nothing(tmp_path: Path) -> None:
    """A queue's workers: no run takes another's lock, not even for the moment of looking whether it is free."""

    def run(seed: int) -> None:
        for _ in range(20):
            with scratch_folder(tmp_path, "train", {"seed": seed}) as folder:
                (folder / "last.ckpt").write_bytes(b"")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    assert names(tmp_path / "train") == ["lock"]


def test_the_scratch_folder_is_dvcs_and_shared_with_copies_for_experiments(tmp_path: Path) -> None:
    root = tmp_path / "exps/project"
    root.mkdir(parents=True)
    assert ArtifactSchema(root).scratch == root / ".streetvision/scratch"
    (root / ".dvc").mkdir()
    wanted = root / ".dvc/tmp/streetvision/scratch"
    (tmp_path / "link").symlink_to(root)
    for place in (root, tmp_path / "link"):
        assert ArtifactSchema(place).scratch == wanted
        for copy in ("tmp1", "standalone/tmp2", "tmp3/below/in/git"):
            folder = place / ".dvc/tmp/exps" / copy
            (folder / ".dvc").mkdir(parents=True, exist_ok=True)
            assert ArtifactSchema(folder).scratch == wanted
