"""The GitHub workflows: what they may do, and the review's comment, made by its own lines."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline.project import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
REPORT = "# What this change does\n\n| MCC | 0.9 |\n\n![roc](roc.png)\n\n## Cost\n"


def steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_official_actions_and_lines_that_a_shell_can_read(path: Path) -> None:
    for step in steps(path):
        assert ("uses" in step) != ("run" in step)
        assert step.get("uses", "actions/").startswith("actions/")
        # What an event holds reaches a shell through the environment, never as text of the script.
        assert "${{" not in step.get("run", "")
        subprocess.run(["bash", "-n", "-c", step.get("run", "")], check=True)
    assert yaml.safe_load(path.read_text())["permissions"]["contents"] == "read"


def test_they_call_targets_of_the_makefile() -> None:
    lines = [line for path in WORKFLOWS for step in steps(path) for line in [step.get("run", "")]]
    targets = {line.split()[1] for line in lines if line.startswith("make ")}
    makefile = (REPOSITORY / "Makefile").read_text()
    assert {"test", "report"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize("fork", ["false", "true"])
def test_the_comment(tmp_path: Path, fork: str) -> None:
    """On a fork, whose token may not write, the summary alone."""
    script = next(
        step["run"] for step in steps(REPOSITORY / ".github/workflows/review.yml")
        if step.get("name") == "comment"
    )  # fmt: skip
    gh = tmp_path / "bin/gh"
    gh.parent.mkdir()
    gh.write_text('#!/bin/sh\necho "$@" >> called\n')
    gh.chmod(0o755)
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.md").write_text(REPORT + "long " * 20_000)
    environment = os.environ | {
        "PATH": f"{gh.parent}:{os.environ['PATH']}", "FORK": fork, "NUMBER": "7",
        "PICTURES": "https://example.org/a", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }  # fmt: skip
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, check=True)
    comment = (tmp_path / "comment.md").read_text()
    assert comment == (tmp_path / "summary").read_text()
    first = (
        "[Pictures and plots](https://example.org/a)\n\n# What this change does\n\n| MCC | 0.9 |\n"
    )
    assert comment.startswith(first)
    assert "![" not in comment
    assert len(comment) < 65_536
    called = tmp_path / "called"
    if fork == "true":
        assert not called.exists()
    else:
        wanted = "pr comment 7 --edit-last --create-if-none --body-file comment.md\n"
        assert called.read_text() == wanted
