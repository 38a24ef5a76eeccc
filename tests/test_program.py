"""The installed program in a folder of somebody else: nothing that lies there is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.pipeline.project import REPOSITORY, environment

if TYPE_CHECKING:
    from tests.conftest import Trained

# Modules that commands import, early and late, of Python and of others.
NAMES = (
    "yaml", "numpy", "torch", "PIL", "dvc", "json", "pickle", "struct", "socket", "multiprocessing", "pydantic",
    "sitecustomize", "usercustomize", "argparse", "logging", "concurrent", "cv2", "matplotlib", "timm", "git",
)  # fmt: skip
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images beside modules that leave a trace; also a package with this one's name."""
    found = tmp_path / "theirs"
    for name in NAMES:
        path = found / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        )
    (found / "matplotlibrc").write_text("text.usetex: True\nbackend: module://yaml\n")
    for number in range(3):
        Image.effect_noise((40, 40), 50).convert("RGB").save(found / f"{number}.png")
    return found


def installed(folder: Path) -> Path:
    """The script that pip makes of the entry point, in a folder of its own."""
    module, _, function = PYPROJECT["project"]["scripts"]["streetvision"].partition(":")
    script = folder / "bin/streetvision"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    )
    script.chmod(0o755)
    return script


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    given = environment(folder) | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, cwd=folder, env=given, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_program_runs_nothing_of_the_folder_it_is_called_in(
    folder: Path, trained: Trained, tmp_path: Path
) -> None:
    package = folder / "streetvision/__init__.py"
    package.parent.mkdir()
    package.write_text((folder / "yaml.py").read_text())
    program = installed(tmp_path)
    done = run(folder, program, "preset")
    assert (done.returncode, done.stdout.split()[-1]) == (0, "smoke"), done.stderr
    done = run(folder, program, "predict", trained.bundle, ".")
    assert (done.returncode, done.stdout.count("\n")) == (0, 3), done.stderr
    assert run(folder, program, "drift", trained.bundle, ".", "--reference", ".").returncode in {
        0,
        3,
    }
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_as_a_module_it_runs_none_but_a_package_of_its_name(folder: Path, tmp_path: Path) -> None:
    for name in ("yaml", "pydantic", "argparse", "logging"):
        assert (folder / f"{name}.py").is_file()
    for path in folder.glob("*.py"):  # Python itself imports these before anything of ours
        if path.stem in {"json", "struct"}:
            path.unlink()
    done = run(folder, sys.executable, "-m", "streetvision", "preset")
    assert (done.returncode, done.stdout.split()[-1]) == (0, "smoke"), done.stderr
    assert not (tmp_path / "ran").exists()


def test_in_the_project_itself_no_installation_is_needed() -> None:
    given = environment(REPOSITORY)
    command = [sys.executable, "-S", "-c", "import sys; print(sys.path)"]
    assert str(REPOSITORY) not in subprocess.run(command, env=given, capture_output=True, text=True,
                                                 check=True).stdout  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "streetvision", "preset"], cwd=REPOSITORY, env=given,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


WORKERS = """
import os
from pathlib import Path
from streetvision.core.processes import in_processes
if __name__ == "__main__":
    assert list(in_processes(len, ["a", "bb", "ccc"], 2)) == [1, 2, 3]
"""


def test_worker_processes_import_nothing_of_it_either(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "elsewhere/work.py"
    script.parent.mkdir()
    script.write_text(WORKERS)
    done = run(folder, sys.executable, script)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


@pytest.mark.slow
def test_nor_does_the_timing_of_a_bundle(folder: Path, trained: Trained, tmp_path: Path) -> None:
    script = tmp_path / "elsewhere/time.bundle.py"
    script.parent.mkdir()
    code = "from pathlib import Path\nfrom streetvision.bundle.timing import time_bundle\n"
    script.write_text(f"{code}print(time_bundle(Path({str(trained.bundle)!r}), ['torch'], 1))\n")
    done = run(folder, sys.executable, script)
    assert "p95_ms" in done.stdout, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_all_packages_are_installed() -> None:
    packages = {
        path.parent.relative_to(REPOSITORY).as_posix().replace("/", ".")
        for top in ("streetvision", "stages")
        for path in (REPOSITORY / top).rglob("__init__.py")
    }
    settings = PYPROJECT["tool"]["setuptools"]
    assert set(settings["packages"]) == packages
    data = {
        path.relative_to(REPOSITORY)
        for path in (REPOSITORY / "streetvision").rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    listed = {
        path.relative_to(REPOSITORY)
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (REPOSITORY / package.replace(".", "/")).glob(pattern)
    }
    assert listed == data


def test_repro_lets_the_stages_import_their_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streetvision.commands import repro

    given: list[dict[str, str]] = []

    def ran(*_: object, env: dict[str, str], **__: object) -> subprocess.CompletedProcess[str]:
        given.append(env)
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setattr(repro.subprocess, "run", ran)
    assert repro.reproduce(tmp_path, None) == 0
    assert "PYTHONSAFEPATH" not in given[0]
    assert os.environ["PYTHONSAFEPATH"] == "1"


def test_commands_are_shown_with_the_program() -> None:
    for page in (REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")):
        assert not re.findall(r"python -m streetvision \w", page.read_text()), page
