"""`natix check`: a miner of its own process is asked what validators ask, and worse."""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from streetvision import cli
from streetvision.bundle.natix import check as module
from streetvision.bundle.natix.check import (
    Answer,
    Finding,
    challenge_image,
    check,
    malformed,
    payload,
    running_miner,
    unusual,
)
from streetvision.bundle.natix.install import DETECTOR, DETECTORS, install
from streetvision.bundle.natix.stand_in import make_checkout
from streetvision.core.errors import UserError

if TYPE_CHECKING:
    from tests.conftest import Trained

MINER_PYTHON = os.environ.get("MINER_PYTHON", sys.executable)


def test_a_good_bundle_passes(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["natix", "check", str(trained.bundle), "--challenges", "5"]
    assert cli.main([*arguments, "--python", MINER_PYTHON]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    shown = "\n".join(lines)
    assert "loads without StreetVision: Python 3." in shown
    assert "5 challenges within 9 s each: p50 " in shown
    assert "the Predictor's probabilities: largest difference" in shown
    for name in malformed():
        assert f"{name}: no answer (-1): " in shown
    for name in unusual():
        assert f"{name}: a probability: 0." in shown
    assert "the first challenge again" in lines[-1]
    peak = int(lines[-1].split()[-2].replace(",", ""))
    assert 50 < peak < 1500, "MiB; the payloads of 144 and 400 megapixels must not be decoded"


def test_one_failure_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    findings = [Finding("this", True, "fine"), Finding("that", False, "0.3")]
    monkeypatch.setattr(module, "check", lambda *_: findings)
    assert cli.main(["natix", "check", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "ok      this: fine\nFAILED  that: 0.3\n"


def test_what_counts_as_a_failure() -> None:
    refused, served = module._refused, module._served
    nothing, something = Answer(-1.0, "ValueError: no", 0.1, 9), Answer(0.4, "", 0.1, 9)
    assert refused("x", nothing).ok
    assert not refused("x", something).ok
    assert served("x", something).ok
    assert not served("x", nothing).ok
    assert not served("x", Answer(float("nan"), "", 0.1, 9)).ok
    assert not served("x", Answer(1.01, "", 0.1, 9)).ok


def test_a_challenge_is_like_the_validators() -> None:
    with Image.open(io.BytesIO(challenge_image(3))) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (224, 224), "RGB")
    assert challenge_image(3) == challenge_image(3) != challenge_image(4)


def program(folder: Path, text: str) -> Path:
    """An interpreter that does something else instead."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_miner_that_does_not_start(trained: Trained, tmp_path: Path) -> None:
    broken = program(tmp_path, "echo first >&2; echo 'no module named torch' >&2; exit 3")
    with pytest.raises(UserError, match="ended with status 3: no module named torch"):
        check(trained.bundle, 1, broken)
    with pytest.raises(UserError, match="nowhere/python cannot be run: No such file"):
        check(trained.bundle, 1, tmp_path / "nowhere/python")
    with pytest.raises(UserError, match="0 challenges are too few"):
        check(trained.bundle, 0)


READY = '{"versions": {"torch": "0"}, "threads": 1, "seconds": 1}'


def test_a_miner_that_hangs_or_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT_S", 0.3)
    hangs = program(tmp_path, f"echo '{READY}'; exec sleep 60")
    with (
        pytest.raises(UserError, match=r"the miner did not answer within 0\.3 s"),
        running_miner(tmp_path, hangs) as miner,
    ):
        miner.ask(b"{}")
    monkeypatch.setattr(module, "LIMIT_S", 9.0)
    dies = program(tmp_path, f"echo '{READY}'; read line; echo killed >&2; exit 9")
    with (
        pytest.raises(UserError, match="the miner ended with status 9: killed"),
        running_miner(tmp_path, dies) as miner,
    ):
        miner.ask(b"{}" * 10**6)


def test_the_installed_file_is_what_answers(trained: Trained, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path)
    install(trained.bundle, checkout)
    path = checkout / DETECTORS / DETECTOR
    path.write_text(path.read_text().replace("    def __call__(", "    def _unused(") + CONSTANT)
    with running_miner(checkout, MINER_PYTHON) as miner:
        assert miner.ask(payload(challenge_image(0))).prediction == 0.125


CONSTANT = "\n\nStreetVisionDetector.__call__ = lambda self, image: 0.125\n"
CONSTANT += "StreetVisionDetector.__abstractmethods__ = frozenset()\n"
