"""Projects for the tests of the whole pipeline: made once a session, by one worker, and copied."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streetvision.core.params import Params
from tests.pipeline.project import Project, copy_code, with_git


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder `name` that `make` fills, shared by all workers of pytest-xdist."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    home, done = base / f"pipeline-{name}", base / f"pipeline-{name}.done"
    with (base / f"pipeline-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(home, ignore_errors=True)
            make(home / "project")
            done.touch()
    return home / "project"


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The smoke preset, reproduced once and committed. Read only: `project` is a copy to change."""

    def make(folder: Path) -> None:
        project = copy_code(folder)
        # Presets leave the number of workers open; two projects with different ones must agree.
        project.change({"hardware": {"workers": 1}})
        with_git(project).dvc("repro")
        project.commit()

    return Project(make_once(tmp_path_factory, "reproduced", make))


@pytest.fixture(scope="session")
def repeated(reproduced: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same code in a clone elsewhere, run by `repro --preset smoke` with two workers. Read only."""

    def make(folder: Path) -> None:
        reproduced.git("clone", "--quiet", reproduced.root, folder)
        project = Project(folder)
        project.git("reset", "--quiet", "--hard", "HEAD~")  # before the results
        project.change(Params().model_dump(mode="json"))
        for name, line in (
            ("streetvision/presets/smoke.yaml", "hardware: {workers: 2}\n"),
            ("params.yaml", "# a line of the user's\n"),
        ):
            (project / name).write_text((project / name).read_text() + line)
        project.commit()
        project.python("-m", "streetvision", "repro", "--preset", "smoke")

    return Project(make_once(tmp_path_factory, "repeated", make))


@pytest.fixture
def project(reproduced: Project, tmp_path: Path) -> Iterator[Project]:
    """A reproduced project of the test's own."""
    folder = tmp_path / "project"
    shutil.copytree(reproduced.root, folder, symlinks=True)
    yield Project(folder)
    shutil.rmtree(folder)


@pytest.fixture
def light(tmp_path: Path) -> Iterator[Project]:
    """Code and the smoke preset's parameters, no Git, no DVC, no results."""
    yield copy_code(tmp_path / "project")
    shutil.rmtree(tmp_path / "project")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with a test of the reproduced project: while one worker makes it, no other waits for it."""
    for place, item in enumerate(items):
        if "reproduced" in getattr(item, "fixturenames", []):
            items.insert(0, items.pop(place))
            return
