"""Names that nobody chose in every command: not UTF-8, blanks, line breaks, orders to a terminal, very long."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from streetvision import cli

if TYPE_CHECKING:
    from tests.conftest import Trained

NAMES = (
    "stra\udcdfe", " blank ", "two\nlines", "\x1b[2J", "x" * 250, "-x", "--help", "=1+1", 'quo"te,;', "a\tb",
    "$x$",
)  # fmt: skip
GROUPS = ("gr\udcffuppe", " g", "a\nb", "\x1b[31m", "g" * 255, "-g", "=g", "h,i")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images of both classes, each under an odd name in a folder of an odd name."""
    rng = np.random.default_rng(0)
    root = tmp_path / "odd\udcff set\n"
    for number, name in enumerate(NAMES * 4):
        label = ("none", "roadwork")[number % 2]
        folder = root / label / GROUPS[number % len(GROUPS)]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((48, 36), Image.Resampling.BICUBIC)
        image.save(folder / f"{name}.png", "PNG")
    return root


def test_every_command_takes_them(
    data: Path, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    n = sum(path.is_file() for path in data.rglob("*"))
    bundle, out = str(trained.bundle), tmp_path / ("o" * 250)
    roadwork, none = str(data / "roadwork"), str(data / "none")

    def run(*arguments: str, codes: tuple[int, ...] = (0,)) -> str:
        assert cli.main(arguments) in codes, capsys.readouterr().err
        said = capsys.readouterr()
        for text in (said.out, said.err):
            assert text.replace("\n", "").replace("\t", "").isprintable()
            assert "streetvision-" not in text  # no temporary file of ours
        return said.out

    shown = run("predict", bundle, str(data)).splitlines()
    assert len(shown) == n
    run("predict", bundle, str(data), "--csv", str(tmp_path / "p.csv"))
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == n
    run("evaluate", bundle, str(data), "--resamples", "20", "--mistakes", "4", "--output", str(out))
    with (out / "plots/predictions.csv").open(newline="", encoding="utf-8") as file:
        assert len({row["id"] for row in csv.DictReader(file)}) == n
    assert run("drift", bundle, roadwork, "--reference", none, "--output", str(out), codes=(0, 3))
    run("leakage", roadwork, none, "--bundle", bundle, "--output", str(out), codes=(0, 3))
    predictions = str(out / "plots/predictions.csv")
    run("label-noise", str(data), "--predictions", predictions, "--output", str(out), codes=(0, 2))
    files = sorted(path for path in data.rglob("*") if path.is_file())
    rows = [
        {"image": str(path.relative_to(tmp_path)), "label": index % 2}
        for index, path in enumerate(files)
    ]
    # JSON has a way to write each of them.
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("replay", "log.jsonl", "--bundle", bundle, codes=(0, 3))
