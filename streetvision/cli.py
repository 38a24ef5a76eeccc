"""The command line: `python -m streetvision`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from streetvision.commands import bundles, changes, data, measuring, project
from streetvision.errors import PrintableFormatter, guarded
from streetvision.processes import keep_freed_memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments` (default: the command line) and run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m streetvision", description=__doc__)
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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    keep_freed_memory()
    return guarded(f"streetvision {options.command}", lambda: options.run(options))
