"""What the commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

# Name, what it runs, one line of help → its parser.
Add = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]
PARAMS = "params.yaml"
ALARM = 3  # exit code of `replay`, `drift` and `leakage`


def say(text: str) -> None:
    """Print a command's answer; names in it whatever the terminal's encoding is."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(f"{text}\n".encode(encoding, "backslashreplace").decode(encoding))
