"""The rooms of the package: each imports only rooms below it."""

from __future__ import annotations

from pathlib import Path

import pytest

from streetvision.core.imports import imported

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "streetvision"
# From the ground up. `docs/development.md` says what each is about.
ROOMS = (
    "core", "presets", "stats", "plots", "subnet", "data", "sources", "prepare", "models", "explora",
    "training", "decision", "fusion", "bundle", "evaluation", "review", "studies", "commands", "cli",
)  # fmt: skip
MODULES = {path: imported(path, ROOT) for path in sorted(PACKAGE.rglob("*.py"))}


def room(path: Path) -> str:
    """The folder, or the module, at the top of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_rooms_below_it(name: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(name) + 1], "__init__"}
    found = [
        f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for path, others in MODULES.items()
        for other in others
        if room(path) == name and room(other) not in allowed
    ]
    assert not found, "\n".join(found)


def test_every_room_has_its_place() -> None:
    assert {room(path) for path in MODULES} == {*ROOMS, "__init__", "__main__"}
