"""What somebody does who wants other files used than those that were checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streetvision.bundle.validate import BUNDLE_JSON, sealed
from streetvision.core.artifacts import json_text, sha256_file


def swap_when_hashed(monkeypatch: pytest.MonkeyPatch, path: Path, other: bytes) -> None:
    """Put `other` in the place of a file as soon as the file was hashed."""
    own, real, real_file = path.read_bytes(), hashlib.sha256, hashlib.file_digest

    def swapped(data: bytes = b"") -> Any:
        found = real(data)
        if data == own:
            path.write_bytes(other)
        return found

    def file_swapped(file: Any, name: str) -> Any:
        found = real_file(file, name)
        if Path(file.name) == path:
            path.write_bytes(other)
        return found

    monkeypatch.setattr(hashlib, "sha256", swapped)
    monkeypatch.setattr(hashlib, "file_digest", file_swapped)


def forge(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Change `bundle.json`, give all files their SHA-256 and seal it."""
    document = json.loads((folder / BUNDLE_JSON).read_text())
    for name in document["files"]:
        document["files"][name] = sha256_file(folder / name)
    change(document)
    (folder / BUNDLE_JSON).write_text(json_text(sealed(document)))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))
