"""What this machine has for StreetVision: `python -m streetvision doctor`."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from streetvision.core.errors import UserError
from streetvision.core.git import check_repository


@dataclass(frozen=True)
class Check:
    """One line of the report; `ok` is None where something optional is missing."""

    name: str
    found: str
    ok: bool | None


def run_checks(root: Path) -> list[Check]:
    """Python, dependencies with their versions, optional extras, GPUs, Git, DVC project, disk."""
    python = platform.python_version()
    checks = [Check("Python", python, sys.version_info >= (3, 11))]
    checks += [_dependency(requirement) for requirement in _requirements()]
    checks.append(_gpu())
    git = shutil.which("git")
    checks.append(Check("git", git or "missing", git is not None))
    if git is not None:
        checks.append(_repository(root))
    inside = (root / "dvc.yaml").is_file() and (root / ".dvc").is_dir()
    checks.append(Check("DVC project", str(root) if inside else "not in this folder", inside))
    free = shutil.disk_usage(root).free / 2**30
    checks.append(Check("free disk", f"{free:.0f} GiB", free > 2))
    return checks


def _repository(root: Path) -> Check:
    try:
        check_repository(root)
    except UserError as error:
        return Check("Git repository", str(error), None)
    return Check("Git repository", "yes", ok=True)


def _requirements() -> list[str]:
    try:
        return requires("streetvision") or []
    except PackageNotFoundError:
        return []


def _dependency(requirement: str) -> Check:
    """Compare the installed version with a requirement such as `torch>=2.9; extra == "hub"`."""
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    extra = re.search(r'extra == "(\w+)"', requirement)
    name = parsed.name + (f" [{extra[1]}]" if extra else "")
    try:
        found = version(parsed.name)
    except PackageNotFoundError:
        return Check(name, "missing", None if extra else False)
    fits = parsed.specifier.contains(found, prereleases=True)
    return Check(name, found if fits else f"{found}, needs {parsed.specifier}", fits)


def _gpu() -> Check:
    try:
        import torch
    except ImportError:
        return Check("GPU", "torch is missing", None)
    if not torch.cuda.is_available():
        return Check("GPU", f"none (torch {torch.__version__} computes on the CPU)", None)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("GPU", f"{', '.join(names)}; CUDA {torch.version.cuda}", ok=True)
