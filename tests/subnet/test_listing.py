"""`streetvision subnet`: every profile in a line, the halt in a sentence, all data as JSON."""

from __future__ import annotations

import json

import pytest

from streetvision.cli import main
from streetvision.subnet.profiles import HALT, PROFILES


def test_the_table_has_every_profile_and_says_that_nothing_is_paid(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["subnet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, each in zip(lines[1:], PROFILES.values(), strict=False):
        assert line.startswith(each.name)
        for part in (str(each.since), str(each.until), each.commits[0], each.status, each.sent):
            assert part in line
    assert "its own" in lines[1]
    assert "224 x 224" in lines[2]
    assert lines[len(PROFILES) + 2 :] == [HALT]
    assert "pays nothing" in HALT
    assert all(line == line.rstrip() for line in lines)


def test_json_holds_what_the_table_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["subnet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["halted"]["date"] == "2026-05-06"
    assert [each["name"] for each in found["profiles"]] == list(PROFILES)
    raw, letterbox, _ = found["profiles"]
    assert raw["side_px"] is None
    assert raw["sources"]["api"] == pytest.approx(1 / 3)
    assert letterbox["level_shares"] == [0.25] * 4
    assert raw["reward"]["window"] == 100
    assert raw["deadline_seconds"] == 9
