"""The first-party modules a module imports, directly or not, read from the source without running it.

`dvc.yaml` lists the rooms (packages) that these lie in, and checkpoints are keyed by the modules themselves.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

PACKAGES = ("streetvision", "stages")


def import_closure(module: str, root: Path) -> list[Path]:
    """Files below `root` that `module` needs, itself included, sorted; packages count by `__init__.py`."""
    found: set[Path] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = _find(".".join(parts[:depth]), root)
            if path is not None and path not in found:
                found.add(path)
                todo += _names(path)
    return sorted(found)


def imported(path: Path, root: Path) -> list[Path]:
    """Files below `root` that the module in `path` imports itself, at any depth of its code, sorted."""
    return sorted({file for name in _names(path) if (file := _find(name, root)) is not None})


def code_sha256(module: str, root: Path) -> str:
    """One hash over the closure of `module`."""
    digest = hashlib.sha256()
    for path in import_closure(module, root):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _find(name: str, root: Path) -> Path | None:
    base = root.joinpath(*name.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _names(path: Path) -> list[str]:
    """Absolute first-party names in the import statements of one file, at any depth of the code."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from a.b import c`: c may be a module or a name in a.b; `_find` ignores the latter.
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] in PACKAGES]
