"""YAML and JSON of others: one meaning or a refusal that names the line, within bounds of memory and time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from streetvision.commands import project
from streetvision.core.documents import MAX_BYTES, MAX_DEPTH, MAX_NODES, read_json, read_yaml
from streetvision.core.errors import UserError
from streetvision.core.params import load_params
from streetvision.presets import preset_changes, preset_names
from tests.pipeline.project import REPOSITORY

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(-1e300, 1e300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(VALUES)
def test_what_was_written_is_read(value: Any) -> None:
    assert read_yaml(yaml.safe_dump(value, allow_unicode=True), "x") == value


@pytest.mark.parametrize("name", ["params.yaml", "dvc.yaml", "dvc.lock"])
def test_dvc_reads_the_same(name: str) -> None:
    text = (REPOSITORY / name).read_bytes()
    assert read_yaml(text, name) == YAML(typ="safe", pure=True).load(text)


def test_numbers_are_those_that_dvc_reads() -> None:
    text = "[1e-3, -2E+4, 1.5e3, 7, 0.25, 1e, e3, 12e3x]"
    assert read_yaml(text, "x") == YAML(typ="safe", pure=True).load(text)
    assert read_yaml("rate: 1e-3", "x") == {"rate": 0.001}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\ntrain: {}\nseed: 2\n", 'x line 3: "seed" is there already, in line 1'),
        ("train:\n  epochs: 1\n  rate: 2\n  epochs: 1\n", 'line 4: "epochs" .* in line 2'),
        ('a: 1\n"a": 2\n', 'line 2: "a" is there already'),
        ("- {b: 1, b: 2}", 'line 1: "b"'),
        (LAUGHS, f"more than {MAX_NODES:,} values"),
        ("a: &a [*a]", "holds itself"),
        ("a: &a {b: {c: *a}}", "holds itself"),
        ("a: &a {b: {<<: *a}}", "holds itself"),
        ("a: *b", "is not defined"),
        ("[" * 100_000, f"more than {MAX_DEPTH} levels"),
        ("{a: " * 100_000, f"more than {MAX_DEPTH} levels"),
        ("a: " + "1" * 5000, "number of 5,000 characters"),
        ("a: 0x" + "f" * 5000, "number of 5,002 characters"),
        ("a: 1" + ":1" * 50_000, "number of 100,001 characters"),
        ("a: " + "1" * 5000 + ".0", "number of 5,002 characters"),
        ("a: 0x" + "f" * 290, "not valid YAML: int too large"),
        ("a: .inf", ".inf is not finite"),
        ("a: .NaN", "not finite"),
        ("a: !!python/object/apply:os.system [ls]", r"a tag \(!\) is not taken"),
        ("a: !!timestamp x", "a tag"),
        ("? [a, b]\n: 1", "a key must be plain text"),
        ("a\n---\nb", "single document"),
        ("a: [", "not valid YAML"),
        ("#" * (MAX_BYTES + 1), "larger than 8 MiB"),
    ],
)
def test_what_is_refused_is_one_line_and_at_once(text: str, said: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match=said) as caught:
        read_yaml(text, "x")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("x ")
    assert time.perf_counter() - start < 2


def test_only_what_json_has_comes_out() -> None:
    text = "{7: a, true: b, 1.5: c, 2026-01-02: 2026-01-02, null: d, on: [{2: 3}]}"
    assert read_yaml(text, "x") == {
        "7": "a", "true": "b", "1.5": "c", "2026-01-02": "2026-01-02", "null": "d", "on": [{"2": 3}],
    }  # fmt: skip


def test_bytes_must_be_utf8() -> None:
    assert read_yaml("a: ä".encode(), "x") == read_yaml("\ufeffa: ä".encode(), "x") == {"a": "ä"}
    with pytest.raises(UserError, match="x is not valid YAML"):
        read_yaml(b"\xff\xfe", "x")


def test_aliases_within_bounds_are_read() -> None:
    text = "base: &b {x: 1}\none: {<<: *b, y: 2}\ntwo: [*b, *b]\n"
    assert read_yaml(text, "x") == {
        "base": {"x": 1}, "one": {"x": 1, "y": 2}, "two": [{"x": 1}, {"x": 1}],
    }  # fmt: skip
    # Counted where they are used.
    thousand = f"a: &a [{', '.join('x' * 1000)}]\n"
    assert len(read_yaml(f"{thousand}b: [{', '.join(['*a'] * 190)}]", "x")["b"]) == 190
    with pytest.raises(UserError, match="values"):
        read_yaml(f"{thousand}b: [{', '.join(['*a'] * 210)}]", "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "is no number"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": ' + "1" * 5000 + "}", "5,000 characters"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff", "x is not valid JSON"),
        ("{", "x is not valid JSON"),
    ],
)
def test_json_of_others(text: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_json(text, "x")
    assert "\n" not in str(caught.value)


def test_a_key_that_is_twice_in_the_parameters(tmp_path: Path) -> None:
    text = (REPOSITORY / "params.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(text + "seed: 8\n")
    last = text.count("\n") + 1
    with pytest.raises(UserError, match=rf'params.yaml line {last}: "seed" is there already'):
        load_params(path)
    lines = text.splitlines()
    twice = next(i for i, line in enumerate(lines) if line.startswith("  epochs:"))
    path.write_text("\n".join([*lines[: twice + 1], "  epochs: 99", *lines[twice + 1 :]]))
    with pytest.raises(UserError, match=rf'line {twice + 2}: "epochs" .* in line {twice + 1}'):
        load_params(path)


def test_presets_and_their_command_read_likewise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in preset_names():
        assert isinstance(preset_changes(name), dict)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("seed: 1\nseed: 2\n")
    from argparse import Namespace

    with pytest.raises(UserError, match=r"params.yaml line 2"):
        project._preset(Namespace(name="smoke"))
