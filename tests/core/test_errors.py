"""What reaches the person at the keyboard, and with which exit code."""

from __future__ import annotations

import errno
import logging

import pytest

from streetvision.core.errors import UserError, guarded, log_to_terminal


def raising(error: BaseException) -> int:
    def main() -> int:
        raise error

    return guarded("stage", main)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_exit_code_is_mains(returned: int | None, code: int) -> None:
    assert guarded("stage", lambda: returned) == code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("params.yaml is missing"), 2, "stage: error: params.yaml is missing\n"),
        (KeyboardInterrupt(), 130, "stage: interrupted; run it again\n"),
        (
            KeyboardInterrupt("to go on from the last checkpoint"),
            130,
            "stage: interrupted; run it again to go on from the last checkpoint\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "stage: error: the disk is full; free some space and run it again\n",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", f"\x1b{'x' * 400}"),
            2,
            f"stage: error: \\x1b{'x' * 38}…{'x' * 40}: File name too long\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", b"a/b"),
            2,
            "stage: error: a/b: Permission denied\n",
        ),
    ],
)
def test_a_users_mistake_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "broken disk"),
        PermissionError(errno.EPERM, "of no path"),
        ValueError("a bug"),
    ],
)
def test_anything_else_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        raising(error)


def test_a_warning_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    """A fit that is repeated for each fold warns each time; progress and errors are always shown."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        log_to_terminal(logging.INFO, "calibrate: %(message)s")
        log = logging.getLogger("streetvision.x")
        for fold in (1, 1, 2):
            log.warning("no slope in part %d", fold)
            log.info("epoch")
            log.error("lost")
        log_to_terminal(logging.INFO, "next: %(message)s")
        log.warning("no slope in part %d", 1)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "slope" in line] == [
        "calibrate: no slope in part 1", "calibrate: no slope in part 2", "next: no slope in part 1",
    ]  # fmt: skip
    assert lines.count("calibrate: epoch") == lines.count("calibrate: lost") == 3
