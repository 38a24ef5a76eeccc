"""What the commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from streetvision.core.escaping import terminal

if TYPE_CHECKING:
    from streetvision.sources.labels import ClassNames

# Name, what it runs, one line of help → its parser.
Add = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]
PARAMS = "params.yaml"
_LAYOUT = "\n\t"
ALARM = 3  # exit code of `replay`, `drift` and `leakage`


def add_class_names(command: argparse.ArgumentParser) -> None:
    """The options that `class_names` reads."""
    for name, what in (("positive", "roadwork"), ("negative", "no roadwork")):
        command.add_argument(
            f"--{name}", action="append", default=[], metavar="NAME",
            help=f"what {what} is called in the data: a class folder or a class name; may be repeated",
        )  # fmt: skip


def class_names(options: argparse.Namespace) -> ClassNames:
    """What the user calls the classes."""
    from streetvision.sources.labels import ClassNames

    return ClassNames(tuple(options.positive), tuple(options.negative))


def say(text: str) -> None:
    """Print a command's answer; names in it give no orders to the terminal."""
    sys.stdout.write(f"{terminal(text, keep=_LAYOUT)}\n")
