"""The command line: the installed program `streetvision`, or `python -m streetvision` in the project."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from streetvision.commands import bundles, changes, data, measuring, project
from streetvision.core.errors import guarded, log_to_terminal
from streetvision.core.escaping import terminal
from streetvision.core.processes import keep_freed_memory


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Names that a shell put on the command line may hold orders to the terminal."""
        super().error(terminal(message))


def main(arguments: Sequence[str] | None = None, name: str = "streetvision") -> int:
    """Parse `arguments` (default: the command line) and run one command; returns the exit code.

    `name` is how the program was called, for its help.
    """
    parser = _Parser(prog=name, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int | None], text: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    for each in (project, bundles, measuring, changes, data):
        each.register(add)
    options = parser.parse_args(arguments)
    log_to_terminal(logging.INFO, "%(message)s")
    keep_freed_memory()
    return guarded(f"streetvision {options.command}", lambda: options.run(options))


def program(name: str = "streetvision") -> NoReturn:
    """Run a command and leave: what is installed as `streetvision`.

    The working directory may be anybody's, and no Python that is started from here imports from it: neither
    workers nor programs (PYTHONSAFEPATH). `repro` alone runs the code of the folder it is called in.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    sys.exit(main(name=name))
