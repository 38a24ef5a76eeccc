"""`natix check`: a miner of its own process is asked what validators ask, and worse."""

from __future__ import annotations

import io
import os
import re
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from streetvision import cli
from streetvision.bundle.natix import check as module
from streetvision.bundle.natix.check import (
    SIZES,
    Answer,
    Finding,
    challenge_image,
    check,
    malformed,
    payload,
    running_miner,
    unusual,
)
from streetvision.bundle.natix.install import DETECTOR, install
from streetvision.bundle.natix.layout import LAYOUTS, Layout
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
    for count, size in (
        (2, "4032×3024 (2.7"), (2, "1024×1024 (0.24 MB)"), (1, "224×224 (0.01 MB)"),
    ):  # fmt: skip
        assert f"{count} of {size}" in shown
    for line in lines[1:4]:
        assert "within 9 s each: p50 " in line
        *_, whole, decoding = re.findall(r"p50 ([\d.]+) ms", line)
        assert 0 < float(decoding) < float(whole)
    large, *_, small = (float(line.rpartition("p50 ")[2].split()[0]) for line in lines[1:4])
    assert large > 10 * small, "a picture 240 times as large takes longer to decode"
    assert "the Predictor's probabilities: largest difference" in shown
    for name in malformed():
        assert f"{name}: no answer (-1): " in shown
    for name in unusual():
        assert f"{name}: a probability: 0." in shown
    assert "the first challenge again" in lines[-2]
    assert "the same in base_miner (before v0.4): 0." in lines[-1]
    peak = int(lines[-2].split()[-2].replace(",", ""))
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
    nothing, something = Answer(-1.0, "ValueError: no", 0.1, 0.05, 9), Answer(0.4, "", 0.1, 0.05, 9)
    assert refused("x", nothing).ok
    assert not refused("x", something).ok
    assert served("x", something).ok
    assert not served("x", nothing).ok
    assert not served("x", Answer(float("nan"), "", 0.1, 0.05, 9)).ok
    late = module._speed((9, 9), [b""], [Answer(0.4, "", 9.1, 0.05, 9)])
    assert not late.ok
    assert late.found.startswith("p50 9100.0 ms")
    assert "of that decoding p50 50.0 ms" in late.found
    assert not served("x", Answer(1.01, "", 0.1, 0.05, 9)).ok


@pytest.mark.parametrize("size", SIZES)
def test_a_challenge_is_like_the_validators(size: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(challenge_image(3, size))) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", size, "RGB")
        plain = io.BytesIO()
        image.save(plain, "JPEG")
        with Image.open(plain) as default:
            assert image.quantization == default.quantization
    assert challenge_image(3, size) == challenge_image(3, size) != challenge_image(4, size)


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
    make_checkout(tmp_path)
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


def test_an_interpreter_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    program(tmp_path, f"echo '{READY}'; exec sleep 60")
    monkeypatch.chdir(tmp_path)
    with running_miner(checkout, "./python") as miner:
        assert miner.ready["threads"] == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_installed_file_is_what_answers(
    layout: Layout, trained: Trained, tmp_path: Path
) -> None:
    checkout = make_checkout(tmp_path, layout)
    install(trained.bundle, checkout)
    path = checkout / layout.detectors / DETECTOR
    path.write_text(path.read_text().replace("    def __call__(", "    def _unused(") + CONSTANT)
    with running_miner(checkout, MINER_PYTHON) as miner:
        assert miner.ask(payload(challenge_image(0))).prediction == 0.125


CONSTANT = "\n\nStreetVisionDetector.__call__ = lambda self, image: 0.125\n"
CONSTANT += "StreetVisionDetector.__abstractmethods__ = frozenset()\n"
