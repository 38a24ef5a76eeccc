"""The report on this machine: found, too old, missing, optional."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from streetvision.commands import doctor
from streetvision.commands.doctor import Check, run_checks


def by_name(root: Path) -> dict[str, Check]:
    return {check.name: check for check in run_checks(root)}


def test_this_machine_can_run_the_project(repository: Path) -> None:
    checks = by_name(repository)
    for name in ("Python", "torch", "timm", "dvc", "git", "DVC project"):
        assert checks[name].ok, checks[name]
    assert {"hypothesis [dev]", "huggingface_hub [hub]", "GPU", "free disk"} <= set(checks)


def test_a_folder_without_git_says_what_to_do(tmp_path: Path, repository: Path) -> None:
    assert by_name(repository)["Git repository"] == Check("Git repository", "yes", ok=True)
    found = by_name(tmp_path)["Git repository"]
    assert found.ok is None
    assert "`git clone` the project, or make this folder one with `git init`" in found.found


def test_elsewhere_there_is_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(doctor, "_requirements", lambda: ["torch>=999; extra == 'x'"])
    checks = by_name(tmp_path)
    assert checks["DVC project"].ok is False
    assert checks["git"] == Check("git", "missing", ok=False)


@pytest.mark.parametrize(
    ("requirement", "installed", "wanted"),
    [
        ("torch>=2.9", "2.9.0", Check("torch", "2.9.0", ok=True)),
        ("torch>=2.9", "2.10.1+cpu", Check("torch", "2.10.1+cpu", ok=True)),
        ("torch>=2.9", "2.8.1", Check("torch", "2.8.1, needs >=2.9", ok=False)),
        ("torch>=2.9", "3.0.0.dev1", Check("torch", "3.0.0.dev1", ok=True)),
        ("torch>=2.9", None, Check("torch", "missing", ok=False)),
        ('ruff>=0.11; extra == "dev"', None, Check("ruff [dev]", "missing", ok=None)),
        ('ruff>=0.11; extra == "dev"', "0.1", Check("ruff [dev]", "0.1, needs >=0.11", ok=False)),
    ],
)
def test_a_dependency(
    requirement: str, installed: str | None, wanted: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(doctor, "version", version)
    assert doctor._dependency(requirement) == wanted
