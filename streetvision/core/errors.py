"""The one exception that is meant for the person at the keyboard, and how it reaches them."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable

from streetvision.core.escaping import shortened, terminal

# What is wrong with a path that a user named, wherever it is met.
_OF_A_PATH = frozenset(
    {
        errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM,
        errno.EROFS,
    }
)  # fmt: skip


class UserError(Exception):
    """A mistake the user can fix; shown as one line without a traceback.

    The message says what was wrong, where, and what is allowed.
    """


def guarded(program: str, main: Callable[[], int | None]) -> int:
    """Run `main`; turn what a user can mend into one line on stderr and an exit code."""
    try:
        return main() or 0
    except UserError as error:
        # A library's message within it may have many lines, a name orders to the terminal.
        sys.stderr.write(f"{program}: error: {terminal(' '.join(str(error).split()))}\n")
        return 2
    except KeyboardInterrupt as interrupt:
        # `artifacts.scratch_folder` knows whether anything is left to go on from.
        again = " ".join(["run it again", *map(str, interrupt.args)])
        sys.stderr.write(f"{program}: interrupted; {again}\n")
        return 130
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            said = "the disk is full; free some space and run it again"
        elif error.errno in _OF_A_PATH and isinstance(error.filename, str | bytes):
            said = f"{terminal(shortened(os.fsdecode(error.filename)))}: {error.strerror}"
        else:
            raise
        sys.stderr.write(f"{program}: error: {said}\n")
        return 2


class _Lines(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """Without orders to the terminal; our own messages are one line, a library's may be a table."""
        ours = record.name.startswith(("streetvision", "stages"))
        return terminal(super().formatMessage(record), keep="" if ours else "\n\t")


class _NewWarnings(logging.Filter):
    """Lets a warning's text pass once: what is fitted again for each fold and resample says it each time."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        text = record.getMessage()
        new = text not in self.said
        self.said.add(text)
        return new


def log_to_terminal(level: int, form: str) -> None:
    """Send the log to stderr, in place of wherever it went."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(form))
    handler.addFilter(_NewWarnings())
    logging.basicConfig(level=level, handlers=[handler], force=True)
