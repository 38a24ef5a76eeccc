"""What the commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from streetvision.escaping import terminal

# Name, what it runs, one line of help → its parser.
Add = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]
PARAMS = "params.yaml"
_LAYOUT = "\n\t"
ALARM = 3  # exit code of `replay`, `drift` and `leakage`


def say(text: str) -> None:
    """Print a command's answer; names in it give no orders to the terminal."""
    sys.stdout.write(f"{terminal(text, keep=_LAYOUT)}\n")
