"""Every program says what it is for at once: no heavy library is imported for `--help`."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.pipeline.project import REPOSITORY, STAGES, environment

HEAVY = {"torch", "torchvision", "lightning", "timm", "sklearn", "matplotlib", "scipy", "dvc"}


def imported(module: str, *arguments: str) -> tuple[str, set[str]]:
    """Run a module; return what it printed and the top-level packages it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, *arguments, "--help"],
        cwd=REPOSITORY, env=environment(REPOSITORY), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout, set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("name", STAGES)
def test_help_of_a_stage_is_light(name: str) -> None:
    text, packages = imported(f"stages.{name}")
    assert f"usage: python -m stages.{name}" in text
    assert {"pydantic", "streetvision"} <= packages, "the probe sees no imports"
    assert not packages & HEAVY


@pytest.mark.parametrize(
    "command",
    ["", "preset", "repro", "evaluate", "doctor", "pin", "crossval", "natix", "replay", "drift"],
)
def test_help_of_a_command_is_light(command: str) -> None:
    text, packages = imported("streetvision", *filter(None, [command]))
    assert "usage: python -m streetvision" in text
    assert not packages & HEAVY
