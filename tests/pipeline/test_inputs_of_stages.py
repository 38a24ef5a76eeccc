"""Which data the stages after training look at: each runs where nothing else is there, and not without them.

What a stage cannot find it cannot have read, so these fail where a stage comes to read another split.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from stages.calibrate import calibrate
from stages.challenge import challenge
from stages.common import Stage
from stages.cvfm import cvfm
from stages.embed import embed
from stages.evaluate import evaluate
from stages.sweep import sweep
from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.errors import UserError
from streetvision.core.params import Params, check_params
from streetvision.data.embeddings import read_embeddings
from streetvision.data.store import open_split, write_arrow

if TYPE_CHECKING:
    from tests.conftest import Trained

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Inputs:
    """A stage and the only data, by path, that it may read."""

    body: Callable[[Stage], None]
    splits: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    originals: bool = False

    def files(self, paths: ArtifactSchema) -> list[Path]:
        return [
            *(paths.split(name) for name in self.splits),
            *([paths.originals] if self.originals else []),
            *(paths.embeddings(name, c) for name in self.embeddings for c in ("clean", "served")),
        ]


READ = {
    "embed": Inputs(embed, splits=("train", "val_select", "val_calib")),
    "sweep": Inputs(sweep, embeddings=("val_calib",)),
    "cvfm": Inputs(cvfm, embeddings=("train", "val_select")),
    "calibrate": Inputs(calibrate, embeddings=("val_calib",)),
    "evaluate": Inputs(evaluate, splits=("val_test",)),
    "challenge": Inputs(challenge, splits=("val_test",), originals=True),
}


def parameters() -> Params:
    changes: dict[str, Any] = {
        "embed": {"served_repeats": 1},
        "cvfm": {"epochs": 2},
        "decision": {"n_resamples": 100},
        "evaluate": {"n_resamples": 100, "mistakes": 2},
        "challenge": {"n_resamples": 100, "simulated_days": 10},
        "hardware": {"workers": 1, "device": "cpu"},
    }
    return check_params(changes, "params.yaml")


@pytest.fixture(scope="module")
def complete(
    trained: Trained, tiny_splits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> ArtifactSchema:
    """A project with the data of every stage."""
    paths = ArtifactSchema(tmp_path_factory.mktemp("complete"))
    paths.ensure_dirs()
    shutil.copy(REPOSITORY / "dvc.yaml", paths.root)
    shutil.copytree(trained.classifier, paths.classifier)
    shutil.copytree(trained.bundle, paths.bundle)
    for name, source in tiny_splits.items():
        paths.split(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, paths.split(name))
    test = open_split("challenge", "val_test", paths.split("val_test"))
    files = [test.image_bytes(row) for row in range(len(test))]
    write_arrow(paths.originals, {"id": test.ids.tolist(), "image": files})
    for name in ("embed", "sweep", "cvfm"):
        READ[name].body(Stage(name, parameters(), paths))
    return paths


def project_with_only(name: str, complete: ArtifactSchema, folder: Path) -> ArtifactSchema:
    """A copy whose splits and embeddings are those that the stage may read."""
    shutil.copytree(complete.root, folder)
    paths = ArtifactSchema(folder)
    allowed = set(READ[name].files(paths))
    for path in folder.rglob("*.arrow"):
        if path not in allowed:
            path.unlink()
    assert set(folder.rglob("*.arrow")) == allowed
    return paths


@pytest.mark.parametrize("name", READ)
def test_a_stage_reads_these_files_and_no_others(
    name: str, complete: ArtifactSchema, tmp_path: Path
) -> None:
    paths = project_with_only(name, complete, tmp_path / "project")
    READ[name].body(Stage(name, parameters(), paths))
    manifest = json.loads(paths.manifest(name).read_text())
    data = {entry["path"] for entry in manifest["inputs"] if entry["path"].endswith(".arrow")}
    expected = READ[name].files(paths)
    if name == "sweep":  # a threshold of images as they are
        expected = [paths.embeddings("val_calib")]
    assert data == {path.relative_to(paths.root).as_posix() for path in expected}
    for path in expected:
        hidden = path.with_suffix(".hidden")
        path.rename(hidden)
        with pytest.raises((UserError, FileNotFoundError), match=path.name):
            READ[name].body(Stage(name, parameters(), paths))
        hidden.rename(path)


def test_the_numbers_are_of_these_images(complete: ArtifactSchema, tmp_path: Path) -> None:
    threshold = json.loads(complete.thresholds.read_text())
    calib = read_embeddings(complete.embeddings("val_calib"))
    assert threshold["split_used"] == "val_calib"
    positive = calib.logits > np.log(threshold["threshold"] / (1 - threshold["threshold"]))
    table = np.bincount(2 * calib.labels + positive, minlength=4).reshape(2, 2)
    denominator = np.sqrt(np.prod([*table.sum(axis=0), *table.sum(axis=1)], dtype=float))
    mcc = np.linalg.det(table) / denominator
    assert threshold["metrics"]["mcc"] == pytest.approx(mcc)

    paths = project_with_only("evaluate", complete, tmp_path / "evaluate")
    evaluate(Stage("evaluate", parameters(), paths))
    with paths.plot("predictions.csv").open(newline="") as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    assert sorted(ids) == [f"val_test-{row:04d}" for row in range(40)]
