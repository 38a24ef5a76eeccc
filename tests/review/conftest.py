"""A small project with Git and DVC whose predictions are of a real bundle, for `compare` and `gate`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streetvision import cli
from streetvision.bundle.predictor import Predictor
from streetvision.core.artifacts import write_csv_atomic
from streetvision.data.store import open_split
from streetvision.evaluation.evaluate import evaluate_split, write_evaluation
from tests.pipeline.project import Project

TABLE = "metrics/plots/predictions.csv"
Run = Callable[..., tuple[int, str, str]]


def improved(predictions: dict[str, Any], seed: int) -> dict[str, list[Any]]:
    """The same predictions with log-odds that are noisy, but nearer to the truth."""
    p, sign = predictions["probability"], 2 * predictions["label"] - 1
    noise = np.random.default_rng(seed).normal(0, 1, len(p))
    logits = np.log(p / (1 - p)) + 1.5 * sign + noise
    columns = {name: list(values) for name, values in predictions.items()}
    return columns | {"probability": (1 / (1 + np.exp(-logits))).tolist()}


@pytest.fixture(scope="session")
def made(
    trained: Any,
    write_split: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    repository: Path,
) -> Project:
    """The tiny bundle's real evaluation as `main`, a better one as the experiment `better`. Read only."""
    project = Project(tmp_path_factory.mktemp("compared") / "project")
    split = write_split(project / "data/splits/val_test.arrow", 160, groups=16)
    found = evaluate_split(
        Predictor.load(trained.bundle), open_split("evaluate", "val_test", split), 0.5,
        n_resamples=100, mistakes=4, seed=7,
    )  # fmt: skip
    write_evaluation(found, project / "metrics/evaluation.json", project / "metrics/plots")
    shutil.copy(repository / "params.yaml", project / "params.yaml")
    (project / ".gitignore").write_text("/data/splits/\n")
    (project / "dvc.yaml").write_text("metrics: [metrics/evaluation.json]\n")
    project.git("init", "--quiet", "--initial-branch", "main")
    project.dvc("init", "--quiet")
    project.commit()
    write_csv_atomic(project / TABLE, improved(found.predictions, seed=0))
    project.dvc("exp", "save", "--name", "better")
    project.git("checkout", "--quiet", "--", ".")
    return project


@pytest.fixture
def compared(made: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy to change, and the working directory."""
    shutil.copytree(made.root, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return Project(tmp_path / "project")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, output and error output of a command line."""

    def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(arguments)
        return code, *capsys.readouterr()

    return command
