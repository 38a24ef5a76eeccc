"""`params.yaml` is the user's again after every end of a run, also an unfriendly one."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streetvision.commands.repro import preset_params, reproduce
from streetvision.core import git
from streetvision.core.artifacts import exclusive
from streetvision.core.errors import UserError
from streetvision.core.params import load_params
from streetvision.presets import load_preset
from tests.pipeline.project import Project

OWN = b"seed: 3  # mine\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_bytes(OWN)
    return tmp_path


def content(root: Path) -> bytes:
    return (root / "params.yaml").read_bytes()


def left_over(root: Path) -> list[str]:
    folder = root / ".streetvision"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def kill_during(root: Path, preset: str = "smoke") -> None:
    """Leave what a run leaves that dies between two statements: nothing is put back."""
    context = preset_params(root, preset)
    context.__enter__()
    files = [root / "params.yaml", *(root / ".streetvision").iterdir()]
    kept = {path: path.read_bytes() for path in files}
    context.__exit__(None, None, None)
    for path, data in kept.items():
        path.write_bytes(data)


def test_a_preset_holds_during_the_run_alone(root: Path) -> None:
    with preset_params(root, "smoke"):
        assert load_params(root / "params.yaml") == load_preset("smoke", root)
        assert content(root).startswith(b"# Preset smoke")
    assert content(root) == OWN
    assert left_over(root) == []


def test_without_a_preset_nothing_is_touched(root: Path) -> None:
    before = (root / "params.yaml").stat().st_ino
    with preset_params(root, None):
        assert content(root) == OWN
    assert (root / "params.yaml").stat().st_ino == before
    assert left_over(root) == []


@pytest.mark.parametrize("error", [UserError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_puts_it_back(root: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), preset_params(root, "smoke"):
        raise error
    assert content(root) == OWN
    assert left_over(root) == []


@pytest.mark.parametrize("preset", [None, "smoke", "photos"])
def test_after_a_kill_the_next_run_puts_it_back_first(root: Path, preset: str | None) -> None:
    kill_during(root)
    assert content(root) != OWN
    with preset_params(root, preset):
        assert (content(root) == OWN) == (preset is None)
    assert content(root) == OWN
    assert left_over(root) == []


@pytest.mark.parametrize("moment", ["before params.yaml is replaced", "after it is put back"])
def test_a_kill_beside_the_run_leaves_no_false_alarm(
    root: Path, moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    del moment  # both leave the same files
    kill_during(root)
    (root / "params.yaml").write_bytes(OWN)
    with caplog.at_level(logging.WARNING), preset_params(root, None):
        assert content(root) == OWN
    assert "edited" not in caplog.text
    assert left_over(root) == []


def test_an_edit_during_the_run_is_kept_and_the_old_file_too(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), preset_params(root, "smoke"):
        (root / "params.yaml").write_bytes(b"seed: 4\n")
    assert content(root) == b"seed: 4\n"
    assert (root / ".streetvision/params.yaml.yours").read_bytes() == OWN
    assert "edited" in caplog.text
    with preset_params(root, None):
        assert content(root) == b"seed: 4\n"
    assert content(root) == b"seed: 4\n"


def test_an_edit_after_a_kill_is_kept(root: Path) -> None:
    kill_during(root)
    (root / "params.yaml").write_bytes(b"seed: 4\n")
    with preset_params(root, "smoke"):
        assert content(root).startswith(b"# Preset smoke")
    assert content(root) == b"seed: 4\n"
    assert left_over(root) == []


def test_mistakes_change_nothing(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="is not one of"), preset_params(root, "smokey"):
        pass
    assert content(root) == OWN
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=r"params.yaml is missing"), preset_params(empty, "smoke"):
        pass
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("code", [0, 1, 255])
def test_dvc_runs_in_the_project_with_this_python(
    root: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], dict[str, Any], bytes]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        calls.append((command, options, content(root)))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(git, "check_repository", lambda _: None)
    monkeypatch.setattr(git, "changed", lambda *_: [])
    assert reproduce(root, "smoke") == code
    [(command, options, seen)] = calls
    assert command == [sys.executable, "-m", "dvc", "repro"]
    assert options["cwd"] == root
    # `python` in dvc.yaml must be this interpreter.
    assert options["env"]["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert seen.startswith(b"# Preset smoke")
    assert content(root) == OWN


# --------------------------------------------------------------------------- what a preset leaves


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with results in Git, in a folder of its repository; `dvc repro` makes others."""
    project = Project(tmp_path / "repository/project")
    for name in ("params.yaml", "dvc.lock", "metrics/a.json", "metrics/plots/b.csv"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(f"{name}\n")
    (project / ".gitignore").write_text("/.streetvision\n")
    project.run("git", "init", "--quiet", project.root.parent)
    project.commit()
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if "dvc" not in command:
            return real(command, **options)
        for name in ("dvc.lock", "metrics/a.json"):
            (project / name).write_text("smoke's\n")
        # As DVC does, which stages what it changes.
        project.git("add", "dvc.lock")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return project


def test_a_preset_says_what_it_leaves_and_how_to_bring_back_what_was_there(
    committed: Project, caplog: pytest.LogCaptureFixture
) -> None:
    assert reproduce(committed.root, "smoke") == 0
    [said] = caplog.messages
    assert said == (
        "dvc.lock and files in metrics, 2 that Git has otherwise, hold results of the preset smoke, not of "
        "params.yaml; those of HEAD: git checkout HEAD -- dvc.lock metrics && dvc checkout (`make repro`, "
        "where DVC's cache has not all of them)"
    )
    command = said.partition("of HEAD: ")[2].partition(" && dvc")[0]
    committed.run(*command.split())
    assert committed.git("status", "--porcelain").stdout == ""
    assert (committed / "metrics/a.json").read_text() == "metrics/a.json\n"


def test_nothing_is_said_where_nothing_differs(
    committed: Project, caplog: pytest.LogCaptureFixture
) -> None:
    assert reproduce(committed.root, None) == 0
    committed.commit()
    assert reproduce(committed.root, "smoke") == 0
    assert caplog.messages == []


def test_without_results_in_head_there_is_nothing_to_bring_back(
    committed: Project, caplog: pytest.LogCaptureFixture
) -> None:
    committed.git("rm", "--quiet", "-r", "dvc.lock", "metrics")
    committed.commit()
    (committed / "metrics").mkdir()
    assert reproduce(committed.root, "smoke") == 0
    [said] = caplog.messages
    assert said == (
        "dvc.lock and files in metrics, 1 that Git has otherwise, hold results of the preset smoke, not of "
        "params.yaml"
    )


def test_a_second_repro_in_the_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("dvc was started"))
    with (
        exclusive(tmp_path / ".streetvision/repro.lock", "busy"),
        pytest.raises(UserError, match="another `repro` is running"),
    ):
        reproduce(tmp_path, None)
