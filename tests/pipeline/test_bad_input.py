"""What a user can get wrong ends in one clear line and an exit code, never in a traceback."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from streetvision.core.artifacts import write_bytes_atomic
from streetvision.core.errors import guarded
from tests.pipeline.project import Project


def one_line(done: subprocess.CompletedProcess[str], program: str, *words: str) -> None:
    """Assert that the program failed with one line on stderr that holds all `words`."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{program}: error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


def photo(seed: int) -> bytes:
    """Coarse noise as a JPEG; no two alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((64, 48), Image.Resampling.NEAREST).save(buffer, "JPEG")
    return buffer.getvalue()


def local_source(
    project: Project,
    groups: int = 12,
    label: Callable[[int], int] = lambda row: row % 2,
    bad: int = 0,
    columns: Sequence[str] = ("file", "label", "group"),
) -> None:
    """Four images a group and a CSV that lists them; the first `bad` ones are no images."""
    folder = project / "data/local/images"
    folder.mkdir(parents=True)
    with (project / "data/local/labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in range(4 * groups):
            name = f"{row:03d}.jpg"
            (folder / name).write_bytes(b"no image" if row < bad else photo(row))
            writer.writerow({"file": name, "label": label(row), "group": f"g{row // 4}"})
    source = {"kind": "csv", "name": "mine", "path": "labels.csv", "images": "images"}
    project.change({"data": {"sources": [source]}})


# --------------------------------------------------------------------------- params.yaml


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"learning_rat": 0.1}}, ['"train.learning_rat"', '"learning_rate"?']),
        ({"trane": {}}, ['unknown parameter "trane"', '"train"?']),
        ({"train": {"epochs": 0}}, ["train.epochs", "greater than or equal to 1", "got 0"]),
        ({"train": {"precision": "fp8"}}, ['"fp8"', "fp32, bf16"]),
        ({"data": {"train_fraction": 0.9}}, ["fractions add up to 1.3"]),
        ({"data": {"sources": [{"kind": "folders"}]}}, ['"folders"', "synthetic, folder, csv"]),
        ({"data": {"sources": [{"kind": "csv", "path": "a.csv", "image": "."}]}}, ['"images"?']),
        ({"seed": "seven"}, ["seed", "'seven'"]),
    ],
)
def test_wrong_parameter(light: Project, changes: dict[str, object], words: list[str]) -> None:
    light.change(changes)
    # Parameters are read before anything else: the last stage finds out as soon as the first.
    for name in ("ingest", "evaluate"):
        one_line(light.stage(name, check=False), name, "params.yaml", *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("repro",),
        ("repro", "train"),
        ("exp", "run", "-S", "+train.learing_rate=1"),
        ("exp", "run", "--temp", "-S", "+train.learing_rate=1", "train"),
    ],
    ids=" ".join,
)
def test_dvc_stops_at_an_unknown_parameter_where_nothing_else_would_run(
    project: Project, command: tuple[str, ...]
) -> None:
    if "-S" not in command:
        project.change({"train": {"learing_rate": 1}})
    done = project.dvc(*command, check=False)
    assert done.returncode == 255
    said = 'check: error: params.yaml: unknown parameter "train.learing_rate"; did you mean "learning_rate"?'
    assert said in done.stderr
    assert re.findall("Running stage '(.*)'", done.stdout) == ["check"]
    assert "Traceback" not in done.stderr


def test_missing_parameters(light: Project) -> None:
    text = (light / "params.yaml").read_text()
    (light / "params.yaml").write_text(text.replace("  epochs: 2\n", ""))
    one_line(light.stage("ingest", check=False), "ingest", "missing explora.epochs, train.epochs")
    (light / "params.yaml").write_text("seed: [")
    one_line(light.stage("ingest", check=False), "ingest", "not valid YAML")
    (light / "params.yaml").unlink()
    one_line(light.stage("ingest", check=False), "ingest", "params.yaml is missing")


# --------------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"kind": "csv", "name": "mine", "path": "none.csv"}, ["none.csv"]),
        ({"kind": "csv", "name": "mine", "path": "../x.csv"}, ["../x.csv", "data/local"]),
        ({"kind": "folder", "name": "mine", "path": "."}, ["roadwork or Roadwork or 1"]),
        ({"kind": "folder", "name": "mine", "path": "none"}, ["data/local/none is missing"]),
        ({"kind": "parquet", "name": "mine", "path": "none"}, ["data/local/none"]),
        (
            {"kind": "hub", "name": "mine", "repo_id": "a/b", "revision": "unpinned"},
            ["not pinned", "python -m streetvision pin a/b"],
        ),
    ],
    ids=lambda x: x["kind"] if isinstance(x, dict) else "",
)
def test_wrong_source(light: Project, source: dict[str, str], words: list[str]) -> None:
    light.change({"data": {"sources": [source]}})
    one_line(light.stage("ingest", check=False), "ingest", *words)


def test_csv_without_label(light: Project) -> None:
    local_source(light, columns=("file", "group"))
    words = ("labels.csv has no column label", "file, group")
    one_line(light.stage("ingest", check=False), "ingest", *words)


def test_csv_lists_a_missing_image(light: Project) -> None:
    local_source(light)
    (light / "data/local/images/005.jpg").unlink()
    words = ("labels.csv line 7", "005.jpg is missing")
    one_line(light.stage("ingest", check=False), "ingest", *words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"label": lambda _: 1}, ["no usable image", "both classes are needed"]),
        ({"groups": 3}, ["3 groups", "at least"]),
        ({"bad": 5}, ["5 of 48 rows", "data.max_bad_fraction", "quarantine.csv"]),
    ],
    ids=["one class", "few groups", "unreadable images"],
)
def test_unusable_images(light: Project, settings: dict[str, object], words: list[str]) -> None:
    local_source(light, **settings)  # type: ignore[arg-type]
    light.stage("ingest")
    one_line(light.stage("prepare", check=False), "prepare", *words)
    assert not (light / "metrics/data.json").exists()
    if "bad" in settings:
        assert len((light / "data/quarantine.csv").read_text().splitlines()) == 1 + 5
        light.change({"data": {"max_bad_fraction": 0.2}})
        light.stage("prepare")
        assert light.read_json("metrics/data.json")["rows_kept"] == 43


# --------------------------------------------------------------------------- weights, artifacts


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("explora", {"weights": "models/mine.safetensors"}),
        ("train", {"weights": "models/mine.safetensors", "init_from_explora": False}),
        ("train", {"backbone_checkpoint": "models/mine.safetensors", "init_from_explora": False}),
    ],
)
def test_missing_weights(project: Project, stage: str, changes: dict[str, object]) -> None:
    project.change({"train": changes})
    words = ("weights file", "models/mine.safetensors does not exist")
    one_line(project.stage(stage, check=False), stage, *words)


def test_weights_of_another_architecture(project: Project) -> None:
    save_file({"conv1.weight": torch.zeros(3, 3)}, project / "mine.safetensors")
    project.change({"train": {"weights": "mine.safetensors"}})
    one_line(
        project.stage("explora", check=False), "explora", "another architecture", "mine.safetensors"
    )


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("prepare", ["data/raw/ingest.manifest.json", "`ingest`"]),
        ("train", ["data/splits/train.arrow", "`prepare`"]),
        ("embed", ["models/classifier/config.json", "`train`"]),
        ("sweep", ["data/embeddings/val_calib.arrow", "`embed`"]),
        ("cvfm", ["data/embeddings/val_select.arrow", "`embed`"]),
        ("calibrate", ["models/cvfm/config.json", "`cvfm`"]),
        ("export", ["model.safetensors", "`train`", "scrc_params.json", "`calibrate`"]),
        ("evaluate", ["models/bundle/bundle.json", "`export`"]),
        ("challenge", ["models/bundle/bundle.json", "`export`"]),
    ],
)
def test_stage_before_its_turn(light: Project, stage: str, words: list[str]) -> None:
    one_line(light.stage(stage, check=False), stage, *words)


def test_bundle_with_a_changed_byte(project: Project) -> None:
    path = project / "models/bundle/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    command = ("-m", "streetvision", "evaluate", "models/bundle", "data/splits/val_test.arrow")
    done = project.python(*command, check=False)
    one_line(done, "streetvision evaluate", "model.safetensors was changed after export")


def test_broken_split_file(project: Project) -> None:
    path = project / "data/splits/train.arrow"
    path.write_bytes(path.read_bytes()[:1000])
    one_line(project.stage("embed", check=False), "embed", "not a readable Arrow file", "`prepare`")


def test_a_second_process_is_refused(light: Project) -> None:
    import fcntl

    home = light / ".streetvision"
    home.mkdir(parents=True)
    with (home / "ingest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        one_line(light.stage("ingest", check=False), "ingest", "another process is still running")


# --------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("inside_writer", [True, False])
def test_full_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    inside_writer: bool,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def main() -> None:
        if inside_writer:
            write_bytes_atomic(tmp_path / "x.json", b"x")
        else:
            full()

    monkeypatch.setattr(os, "fsync", full)
    assert guarded("train", main) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("train: error: ")
    assert "No space left" in lines[0] or "disk is full" in lines[0]
    assert list(tmp_path.iterdir()) == []
