"""Atomic writes, manifests, the run log and locked scratch folders."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streetvision.core.artifacts import (
    ArtifactSchema,
    config_hash,
    create_step_manifest,
    json_text,
    read_json,
    run_log,
    scratch_folder,
    sha256_file,
    write_atomic,
    write_bytes_atomic,
    write_csv_atomic,
    write_json_atomic,
)
from streetvision.core.errors import UserError
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
        paths.raw, paths.quarantine, paths.classifier, paths.thresholds, paths.scrc_params,
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


def fail_in_scratch(parent: Path, step: str, key: dict[str, int]) -> Path:
    """A run that wrote a checkpoint and failed; returns its folder."""
    found = []

    def run() -> None:
        with scratch_folder(parent, step, key) as folder:
            found.append(folder)
            (folder / "last.ckpt").write_bytes(b"epoch 1")
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


def test_stale_folders_go_and_other_steps_stay(tmp_path: Path) -> None:
    stale = fail_in_scratch(tmp_path, "train", {"seed": 1})
    other = fail_in_scratch(tmp_path, "prepare", {"seed": 1})
    with scratch_folder(tmp_path, "train", {"seed": 2}) as folder:
        assert folder != stale
        assert not stale.exists()
        assert (other / "last.ckpt").exists()


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


def test_a_second_process_is_refused_until_the_first_is_dead(
    tmp_path: Path, holder: Callable[[], None]
) -> None:
    for key in ({"seed": 1}, {"seed": 2}):
        with (
            pytest.raises(UserError, match="another process is still running stage `train`"),
            scratch_folder(tmp_path, "train", key),
        ):
            pass
    [folder] = [path for path in (tmp_path / "train").iterdir() if path.is_dir()]
    assert names(folder) == ["mine"]
    with scratch_folder(tmp_path, "prepare", {"seed": 1}):
        pass  # another step is free
    holder()
    with scratch_folder(tmp_path, "train", {"seed": 1}) as again:
        assert names(again) == ["mine"]
