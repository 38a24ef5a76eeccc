"""The commands as a user types them; what they call is tested beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streetvision import cli
from streetvision.sources import hub

COMMANDS = (
    "doctor",
    "preset",
    "repro",
    "pin",
    "evaluate",
    "predict",
    "crossval",
    "final-fit",
    "evidence",
    "natix",
    "replay",
    "fold",
    "compare",
    "gate",
    "drift",
    "label-noise",
    "leakage",
    "sweep-summary",
    "report",
)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: streetvision {name}" in capsys.readouterr().out


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preset", "nope"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith('streetvision preset: error: preset "nope" is not one of cpu-demo')
    assert shown.err.count("\n") == 1


def test_crossval_outside_a_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["crossval"]) == 2
    assert "holds no params.yaml" in capsys.readouterr().err


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preset"]) == 0
    assert capsys.readouterr().out.split() == ["cpu-demo", "natix-gpu", "photos", "smoke"]


def test_pin_prints_the_newest_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "latest_revision", lambda repo_id: f"{repo_id}@abc")
    assert cli.main(["pin", "owner/name"]) == 0
    assert capsys.readouterr().out == "owner/name@abc\n"


def test_evaluate_prints_the_report_and_writes_the_files(
    trained: Any,
    write_split: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_split(tmp_path / "given.arrow")
    output = tmp_path / "out"
    arguments = ["evaluate", str(trained.bundle), str(data), "--resamples", "200"]
    assert cli.main([*arguments, "--output", str(output)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((output / "evaluation.json").read_text())
    assert report["n"] == 48
    assert (output / "plots/predictions.csv").read_text().count("\n") == 49
    pictures = {"confusion", "mistakes", "roc", "precision_recall", "reliability"}
    assert {path.stem for path in (output / "plots").glob("*.png")} == pictures
    assert cli.main(["evaluate", str(trained.bundle), str(tmp_path / "missing.csv")]) == 2
    assert "does not exist" in capsys.readouterr().err
