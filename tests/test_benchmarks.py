"""The runner of `make bench`: what it keeps, prints and refuses; no benchmark is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as bench
from tests.benchmarks.limits import REST, shares
from tests.benchmarks.runner import Result, Table, compare


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two benchmarks that cost nothing."""
    first = Result("sweep", "a loop", 0.25, 500.0, 2000.0, 1900.0, 2100.0, 1000)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(bench, "CASES", {"sweep": lambda: [first]})
    monkeypatch.setattr(bench, "TABLES", {"memory": lambda: [Table("Peaks", ["a"], [["9 MiB"]])]})
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)
    return bench.RESULTS


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    return bench.main()


ROW = "| sweep | a loop | 0.25 s | 500 s | 2,000× (1,900, 2,100) | ≥ 1,000× |"


def test_results_add_up_and_are_printed_with_the_machine(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "sweep") == 0
    printed = capsys.readouterr().out
    assert ROW in printed
    assert "sweep took 0 s" in printed
    assert run(monkeypatch, "memory") == 0
    capsys.readouterr()
    assert run(monkeypatch, "--table") == 0
    printed = capsys.readouterr().out
    assert ROW in printed
    assert "Peaks\n\n| a |\n| --- |\n| 9 MiB |" in printed
    assert "Measured on " in printed
    assert run(monkeypatch, "--table", "memory") == 0
    assert ROW not in capsys.readouterr().out
    # What another machine measured is not mixed with this one's.
    document = json.loads(results.read_text())
    document["machine"]["cores"] += 1
    results.write_text(json.dumps(document))
    assert run(monkeypatch, "memory") == 0
    assert set(json.loads(results.read_text())["results"]) == {"memory"}


def test_without_names_all_run_but_those_on_request(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ON_REQUEST", ("memory",))
    assert run(monkeypatch) == 0
    assert set(json.loads(results.read_text())["results"]) == {"sweep"}


def test_an_unknown_benchmark_is_refused(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "sweeep") == 2
    assert "sweeep is not one of sweep, memory" in capsys.readouterr().err
    assert not results.exists()


def test_shares_of_steps_add_up_and_a_renamed_step_is_noticed() -> None:
    numbers = list(range(20_000))

    def work() -> None:
        sorted(numbers, key=lambda number: -number)
        json.dumps(numbers)

    name = "<built-in method builtins.sorted>"
    found = shares(work, {"sorting": (name,), "writing": ("__init__.py:dumps",)})
    assert sum(found.values()) == pytest.approx(1)
    assert min(found["sorting"], found["writing"]) > 0.01
    assert 0 <= found[REST] < min(found["sorting"], found["writing"])
    with pytest.raises(LookupError, match="dump_all"):
        shares(work, {"writing": ("__init__.py:dump_all",)})


def test_pairs_alternate_and_scale_the_alternative() -> None:
    calls: list[str] = []
    result = compare(
        "a", "b", lambda: calls.append("ours"), lambda: calls.append("other"), 10.0, reach=2
    )
    assert calls == ["ours", "other"] * (len(calls) // 2)
    assert len(calls) >= 6
    assert 0 < result.ratio_low <= result.ratio <= result.ratio_high
    assert result.reach == 2
