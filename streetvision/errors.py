"""The one exception that is meant for the person at the keyboard, and how it reaches them."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can fix; shown as one line without a traceback.

    The message says what was wrong, where, and what is allowed.
    """


def printable(text: str) -> str:
    r"""Text that any terminal, CSV or Arrow file takes: one line, without control signs, valid Unicode.

    Bytes of a file name that are not UTF-8 (Python has them as lone surrogates) become `\xff`, control
    signs, line separators and signs that turn the direction of writing `\n`, `\x1b`, `\u202e`.
    """
    return _UNPRINTABLE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """The same of text of several lines, with tabs: what a command prints or logs."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


class PrintableFormatter(logging.Formatter):
    """Names in log lines reach the terminal as `printable_lines`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """The line that is logged."""
        return printable_lines(super().formatMessage(record))


def escaped(name: str | os.PathLike[str]) -> str:
    r"""A name that a user did not choose, as `printable` text from which it can be told: `\` is `\\`."""
    return printable(os.fspath(name).replace("\\", "\\\\"))


# Controls, separators of lines, turns of direction, surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def _escape(found: re.Match[str]) -> str:
    sign = found[0]
    code = ord(sign)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return _SHORT.get(sign) or (f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}")


def guarded(program: str, main: Callable[[], int | None]) -> int:
    """Run `main`; turn what a user can mend into one line on stderr and an exit code."""
    try:
        return main() or 0
    except UserError as error:
        # A library's message within it may have many lines.
        sys.stderr.write(f"{program}: error: {printable(' '.join(str(error).split()))}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(
            f"{program}: interrupted; run it again to go on from the last checkpoint\n"
        )
        return 130
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.stderr.write(f"{program}: error: the disk is full; free some space and run it again\n")
        return 2
