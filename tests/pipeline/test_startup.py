"""Every program says what it is for at once: no heavy library is imported for `--help`, none in vain."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.project import REPOSITORY, STAGES, Project, environment

HEAVY = {"torch", "torchvision", "lightning", "timm", "sklearn", "matplotlib", "scipy", "dvc"}


def imported(module: str, *arguments: str, folder: Path = REPOSITORY) -> tuple[str, set[str]]:
    """Run a module; return what it printed and the top-level packages it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, *arguments],
        cwd=folder, env=environment(folder), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout, set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("name", STAGES)
def test_help_of_a_stage_is_light(name: str) -> None:
    text, packages = imported(f"stages.{name}", "--help")
    assert f"usage: python -m stages.{name}" in text
    assert {"pydantic", "streetvision"} <= packages, "the probe sees no imports"
    assert not packages & HEAVY


@pytest.mark.parametrize(
    "command",
    ["", "preset", "repro", "evaluate", "doctor", "pin", "crossval", "natix", "replay", "drift"],
)
def test_help_of_a_command_is_light(command: str) -> None:
    text, packages = imported("streetvision", *filter(None, [command]), "--help")
    assert "usage: python -m streetvision" in text
    assert not packages & HEAVY


def test_adaptation_that_is_off_imports_nothing_to_train_with(project: Project) -> None:
    project.change({"explora": {"enabled": False}})
    _, packages = imported("stages.explora", folder=project.root)
    assert "timm" in packages
    assert not packages & {"lightning", "peft"}
    assert json.loads((project / "metrics/explora.json").read_text())["method"] == "passthrough"
    columns, *rows = (project / "metrics/plots/explora.csv").read_text().splitlines()
    assert columns.startswith("epoch,train_loss,")
    assert rows == []
