"""`gate`, `compare` and `report` on the real pipeline: stale results, and other test sets."""

from __future__ import annotations

import csv
import hashlib
import subprocess
from pathlib import Path

import pytest

from streetvision.core.artifacts import ArtifactSchema
from streetvision.data.store import open_split
from tests.pipeline.project import Project


def say(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    return project.python("-m", "streetvision", *arguments, check=False)


@pytest.mark.slow
def test_stale_results_do_not_pass(project: Project, tmp_path: Path) -> None:
    """Of parameters, and of code that no metric shows; also in a clone without data, as in CI."""
    done = say(project, "gate", "main")
    assert "stale" not in done.stdout + done.stderr
    assert "working tree against main: " in done.stdout
    project.git("checkout", "--quiet", "-b", "rate")
    project.change({"train": {"learning_rate": 0.123}})
    project.commit()
    project.git("checkout", "--quiet", "-b", "code", "main")
    code = project / "streetvision/decision/threshold.py"
    code.write_text(code.read_text() + "# a change\n")
    project.commit()
    clone = Project(tmp_path / "clone")
    project.git("clone", "--quiet", project.root, clone.root)
    clone.git("branch", "rate", "origin/rate")
    was = project.params()["train"]["learning_rate"]
    reasons = {
        "rate": f"train: train.learning_rate was {was} and is 0.123",
        "code": "sweep, cvfm, calibrate, export, evaluate, challenge: "
        "streetvision/decision changed",
    }
    for where, base in ((project, "main"), (clone, "origin/main")):
        for branch, reason in reasons.items():
            where.git("checkout", "--quiet", branch)
            for head in ([], [branch]):
                name = branch if head else "working tree"
                done = say(where, "gate", base, *head, "--inconclusive", "pass")
                assert done.returncode == 1, done.stderr
                assert done.stdout.startswith(f"stale in {name}: {reason}\n")
                assert f"{name} against {base}: fail, its results are stale" in done.stdout
        assert f"Note: stale in rate: {reasons['rate']}." in say(where, "compare", "rate").stdout
        assert say(where, "report", "rate").returncode == 0
        text = (where / "report/report.md").read_text()
        assert text.startswith("# What this change does\n\n**Stale in rate:**")
        assert f"- {reasons['code']}" in text
    # A change without effect, said to be one, is judged.
    project.git("checkout", "--quiet", "code")
    project.dvc("commit", "--force", "--quiet")
    assert "stale" not in say(project, "gate", "main").stdout


@pytest.mark.slow
def test_predictions_carry_the_hash_of_each_stored_picture(reproduced: Project) -> None:
    split = open_split("evaluate", "val_test", ArtifactSchema(reproduced.root).split("val_test"))
    with (reproduced / "metrics/plots/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [hashlib.sha256(split.image_bytes(row)).hexdigest()[:16] for row in range(len(split))]
    assert [row["image_sha256"] for row in rows] == wanted
