"""Progress of long work: a bar on a terminal, a line a minute anywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
LINE_SECONDS = 60.0
# items, their number, what they are → the same items
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


def no_progress(iterable: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """Show nothing."""
    del total, description
    return iterable


def progress(iterable: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield from `iterable` of `total` items and show how far it is."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, total=total, desc=description, leave=False)
        return
    start = last = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            left = (now - start) / done * (total - done)
            log.info("%s: %d of %d, about %d s left", description, done, total, left)
            last = now
