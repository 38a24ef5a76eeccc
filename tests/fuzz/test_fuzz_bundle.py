"""The fuzzing script: its targets accept their seeds, refuse what is broken, and it skips without atheris."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.fuzz import fuzz_bundle


@pytest.mark.parametrize("target", fuzz_bundle.TARGETS)
def test_targets_know_right_from_wrong(target: str) -> None:
    if target == "onnx":
        pytest.importorskip("onnx")
    for seed in fuzz_bundle.seeds(target):
        assert fuzz_bundle.attempt(target, seed) == ""
        for length in range(0, len(seed) // 3, 97):
            assert fuzz_bundle.attempt(target, seed[:length])


def test_a_finding_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_: bytes) -> None:
        raise IndexError

    monkeypatch.setitem(fuzz_bundle.TARGETS, "image", crash)
    with pytest.raises(IndexError):
        fuzz_bundle.attempt("image", b"")


def test_without_atheris_it_skips(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "atheris", None)
    assert fuzz_bundle.main(["image"]) == 0
    assert capsys.readouterr().out == "skipped: atheris is not installed (pip install atheris)\n"
    assert fuzz_bundle.main(["nothing"]) == 2
    assert Path(fuzz_bundle.__file__).name in capsys.readouterr().err
