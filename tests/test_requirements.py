"""`docs/requirements.md` names what is there: on each line a module, and a test or command that shows it."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from tests.pipeline.project import REPOSITORY

TEXT = (REPOSITORY / "docs/requirements.md").read_text()
HEADER = "| tasks | requirement |"
ROWS = [
    line.strip().strip("|").split(" | ")
    for line in TEXT[TEXT.index(HEADER) :].splitlines()[2:]
    if line.startswith("|")
]
PATH = re.compile(
    r"^[\w./{},*-]+(\.(py|sh|md|json|yml|yaml|csv)|/)$|^(tests|streetvision)(/[\w{},]+)+$"
)


def expanded(token: str) -> list[str]:
    """Of `a/{b,c}.py` both."""
    parts = re.split(r"\{([^}]*)\}", token)
    choices = [part.split(",") if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def named(cell: str) -> list[str]:
    """Paths in a cell; a bare `test_x.py` lies beside the last one that has a folder."""
    found: list[str] = []
    for token in re.findall(r"`([^`]+)`", cell):
        if not PATH.match(token):
            continue
        for path in expanded(token):
            folder = f"{Path(found[-1]).parent}/" if path.startswith("test_") and found else ""
            found.append(folder + path)
    return found


@pytest.mark.parametrize("row", ROWS, ids=[row[0].strip() for row in ROWS])
def test_each_line_names_what_shows_it(row: list[str]) -> None:
    cell = row[-1]
    paths = named(cell)
    # A bare name of a folder or file, such as `schemas/`, may lie deeper.
    missing = [
        p for p in paths if not [*REPOSITORY.glob(p), *REPOSITORY.glob(f"streetvision/**/{p}")]
    ]
    assert not missing, f"docs/requirements.md, {row[0].strip()}: not there"
    tests = [path for path in paths if path.startswith("tests/")]
    commands = re.findall(r"`(?:make|streetvision|dvc) [^`]+`", cell)
    assert tests or commands, f"docs/requirements.md, {row[0].strip()}: no test or command"
    for path in tests:
        for file in REPOSITORY.glob(path):
            files = [file] if file.is_file() else file.rglob("*.py")
            text = "".join(each.read_text() for each in files)
            assert "def test_" in text or "benchmarks" in path or "compat" in path, path


def test_every_task_of_the_plan_is_on_a_line() -> None:
    known: set[int] = set()
    for row in ROWS:
        for first, last in re.findall(r"(\d+)(?:–(\d+))?", row[0]):
            known |= set(range(int(first), int(last or first) + 1))
    # What the checklist leaves out.
    assert set(range(1, 204)) - known == {105, 133, 140, 152, 160, 195}
