"""Progress off a terminal: every item passes, a line a minute."""

from __future__ import annotations

import logging

import pytest

from streetvision.core import progress as module


@pytest.mark.parametrize("terminal", [False, True])
def test_every_item_passes_in_order(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(module.progress(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert list(module.progress([], 0, "nothing")) == []


def test_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = iter(range(0, 10_000, 25))  # 25 seconds pass between two looks at the clock
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO):
        list(module.progress(range(9), 9, "shards"))
    assert [record.getMessage() for record in caplog.records] == [
        "shards: 3 of 9, about 150 s left",
        "shards: 6 of 9, about 75 s left",
        "shards: 9 of 9, about 0 s left",
    ]
