"""The table of all bounds says what the code does, and has all of them."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

ROW = re.compile(r"\| .+ \| (?P<said>[^|]+) \| `(?P<constant>[^`]+)` \|")
# Modules each of whose bounds, its numbers with a public name, has a row.
WHOLE = (
    "streetvision.bundle.limits", "streetvision.sources.parquet_bounds", "streetvision.data.pixels",
    "streetvision.core.documents",
)  # fmt: skip
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def rows(repository: Path) -> dict[str, str]:
    """What the table says, by constant."""
    lines = (repository / "docs/limits.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| ") and "| at most |" not in line]
    found = [ROW.fullmatch(line) for line in table]
    assert all(found), "a row is not: what, at most, constant"
    return {match["constant"]: match["said"] for match in found if match}


def value(constant: str, repository: Path) -> float:
    """The number in the code, or in a JSON Schema."""
    file, _, pointer = constant.partition("#/")
    if pointer:
        document = json.loads((repository / "streetvision/bundle" / file).read_text())
        for key in pointer.split("/"):
            document = document[key]
        return float(document)
    module, _, name = constant.rpartition(".")
    return float(getattr(importlib.import_module(module), name))


def test_each_row_is_what_the_code_has(repository: Path) -> None:
    table = rows(repository)
    assert len(table) > 15
    for constant, said in table.items():
        number, unit = said.split()
        assert float(number.replace(",", "")) * UNITS.get(unit, 1) == value(constant, repository), (
            said
        )


@pytest.mark.parametrize("module", WHOLE)
def test_each_bound_has_a_row(module: str, repository: Path) -> None:
    public = vars(importlib.import_module(module)).items()
    names = [
        name
        for name, found in public
        if name.isupper() and name[0] != "_" and isinstance(found, int | float)
    ]
    assert names
    assert {f"{module}.{name}" for name in names} <= rows(repository).keys()


def test_the_schema_counts_files_as_the_code_does(repository: Path) -> None:
    pointer = "schemas/bundle.schema.json#/properties/files/maxProperties"
    assert value(pointer, repository) == value("streetvision.bundle.limits.MAX_FILES", repository)
