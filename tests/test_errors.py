"""What reaches the person at the keyboard, and with which exit code."""

from __future__ import annotations

import errno

import pytest

from streetvision.errors import UserError, guarded


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
        (
            KeyboardInterrupt(),
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
