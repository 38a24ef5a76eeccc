"""The command line: the installed program `streetvision`, or `python -m streetvision` in the project."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from streetvision.commands import bundles, changes, data, measuring, project
from streetvision.errors import guarded
from streetvision.processes import keep_freed_memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments` (default: the command line) and run one command; returns the exit code."""
    by_module = Path(sys.argv[0]).name == "__main__.py"
    parser = argparse.ArgumentParser(
        prog="python -m streetvision" if by_module else "streetvision", description=__doc__
    )
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
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    keep_freed_memory()
    return guarded(f"streetvision {options.command}", lambda: options.run(options))


def program() -> NoReturn:
    """Run a command and leave: what is installed as `streetvision`.

    The working directory may be anybody's, and no Python that is started from here imports from it: neither
    workers nor programs (PYTHONSAFEPATH). `repro` alone runs the code of the folder it is called in.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.exit(main())
