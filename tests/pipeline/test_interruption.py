"""Killed at any point, the pipeline goes on to the same bytes; Ctrl-C ends in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streetvision.core.artifacts import ArtifactSchema
from tests.pipeline.project import Project, environment, outputs, read_dvc_yaml, stages_run

# What a stage leaves in its scratch folder when it is part of the way.
PARTS = {
    "ingest": "*.parquet", "prepare": "*.arrow", "explora": "last.ckpt", "train": "last.ckpt",
}  # fmt: skip


def start(project: Project, *command: str) -> subprocess.Popen[str]:
    """Start a program in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=project.root, env=environment(project.root), text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(
    process: subprocess.Popen[str], folder: Path, pattern: str, newer_than: int = 0
) -> list[Path]:
    """Wait until a finished part appears, written after a time in ns; temporary files begin with a dot."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = [path for path in folder.glob(f"*/{pattern}") if path.name[0] != "."]
        if found and max(path.stat().st_mtime_ns for path in found) > newer_than:
            return found
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    raise AssertionError(f"no {pattern} in {folder} after two minutes")


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Send a signal to the whole group; return exit code and stderr."""
    os.killpg(process.pid, number)
    stderr = process.communicate(timeout=60)[1]
    return process.returncode, stderr


@pytest.mark.slow
def test_killed_in_four_stages_and_the_same_bytes(project: Project, reproduced: Project) -> None:
    written = [name for s in read_dvc_yaml(project.root)["stages"].values() for name in outputs(s)]
    # From nothing: no results, and no cache that they could come from.
    project.run("rm", "-rf", "dvc.lock", "metrics", "models", ".dvc/cache", ".dvc/tmp",
                *("data/raw", "data/splits", "data/embeddings", "data/quarantine.csv"))  # fmt: skip
    project.run("rm", "-rf", ".streetvision")
    for stage, pattern in PARTS.items():
        scratch = ArtifactSchema(project.root).scratch / stage
        process = start(project, "dvc", "repro")
        wait_for(process, scratch, pattern)
        code, _ = stop(process, signal.SIGKILL)
        assert code == -signal.SIGKILL
        left = [path for path in scratch.glob(f"*/{pattern}") if path.name[0] != "."]
        assert left, f"{stage} was through before it was killed: this shows nothing"
    done = project.dvc("repro")
    assert set(stages_run(done.stdout)[-3:]) == {"evaluate", "challenge", "headline"}
    assert "train: resuming from the checkpoint" in done.stderr
    assert project.hashes(written) == reproduced.hashes(written)
    assert list(ArtifactSchema(project.root).scratch.glob("*/*/")) == []
    assert [path for path in project.root.rglob("*.tmp") if ".dvc" not in path.parts] == []


@pytest.mark.slow
def test_an_experiment_in_a_copy_goes_on(project: Project) -> None:
    """What `dvc exp run --temp` works in is gone after Ctrl-C or a kill; the checkpoint stays."""
    scratch = ArtifactSchema(project.root).scratch / "train"
    # Training alone, and although its result is known.
    train = ("--force", "--single-item", "-S", "hardware.workers=0", "train")
    command = ("exp", "run", "--temp", *train)
    resuming = "train: resuming from the checkpoint of an interrupted run"
    process = start(project, "dvc", *command)
    [checkpoint] = wait_for(process, scratch, PARTS["train"])
    code, stderr = stop(process, signal.SIGINT)
    said = stderr.splitlines()
    assert "train: interrupted; run it again to go on from the last checkpoint" in said, stderr
    assert resuming not in said
    assert "Traceback" not in stderr
    assert code
    process = start(project, "dvc", *command)
    wait_for(process, scratch, PARTS["train"], newer_than=checkpoint.stat().st_mtime_ns)
    code, stderr = stop(process, signal.SIGKILL)
    assert resuming in stderr.splitlines()
    assert checkpoint.exists(), "training was through before it was killed: this shows nothing"
    assert resuming in project.dvc(*command).stderr.splitlines()
    assert list(scratch.glob("*/")) == []
    [made] = project.git("for-each-ref", "--format", "%(refname)", "refs/exps/??/**").stdout.split()
    changed = project.git("diff", "--name-only", "HEAD", made).stdout.split()
    assert changed == ["params.yaml"], "not what it is in one go"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ingest", "prepare"])
def test_ctrl_c_in_the_data_stages_is_one_line(light: Project, stage: str) -> None:
    # Two workers, many parts: the signal reaches them too.
    light.change({"data": {"shard_images": 10}, "hardware": {"workers": 2}})
    if stage == "prepare":
        light.stage("ingest")
    process = start(light, f"stages.{stage}")
    wait_for(process, ArtifactSchema(light.root).scratch / stage, PARTS[stage])
    code, stderr = stop(process, signal.SIGINT)
    assert stderr == f"{stage}: interrupted; run it again to go on from the last checkpoint\n"
    assert code == 130
    light.stage(stage)
