"""Work on all cores: in threads, or in processes of one thread each without orphans; memory, and the end."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import chain, islice
from typing import NoReturn, TypeVar

from streetvision.core.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
TOGETHER = 4  # items that a thread takes at once: to hand one over costs a tenth of a millisecond
MOST_THREADS = (
    8  # more would wait for Python between the libraries' calls, with more images in memory
)


def in_processes(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """Yield `work(item)` in the order of `items`.

    `workers` 0 means one a usable core; with one worker, or one item, the work is done in this process.

    Raises
    ------
    UserError
        A worker was killed; what it and the others finished stays.
    """
    workers = min(workers or usable_cores(), len(items))
    if workers <= 1:
        yield from map(work, items)
        return
    # Not forked: threads of Arrow or of a caller's torch may hold locks at this moment.
    context = multiprocessing.get_context("spawn")
    # A worker begins by importing from the working directory, which may be anybody's.
    with _environment(OMP_NUM_THREADS="1", PYTHONSAFEPATH="1"):
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        try:
            # The processes are started here; those that a Ctrl-C reached while Python starts would
            # each print a traceback. They inherit the mask, the parent gets its signal afterwards.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                results = pool.map(work, items)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            yield from results
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {workers} worker processes was killed, probably for want of memory: "
                "rerun with fewer hardware.workers; what is finished is kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def in_threads(work: Callable[[T], R], items: Iterable[T], workers: int = 0) -> Iterator[R]:
    """Yield `work(item)` in the order of `items`, which are taken a few at a time, as results are asked for.

    For what Pillow, OpenCV and NumPy do with one image: they let other threads run meanwhile. `workers` 0
    means one a usable core, but no more than `MOST_THREADS`; with one worker, or one item, the caller does
    the work itself.
    """
    workers = min(workers or usable_cores(), MOST_THREADS)
    items = iter(items)
    first = list(islice(items, 2 if workers > 1 else 0))
    if len(first) < 2:
        yield from map(work, chain(first, items))
        return

    def work_on(some: list[T]) -> list[R]:
        return [work(item) for item in some]

    items = chain(first, items)
    with ThreadPoolExecutor(workers) as pool:
        # No further ahead: what the caller does with the results may want all cores, and memory is scarce.
        ahead: deque[Future[list[R]]] = deque()
        while some := list(islice(items, TOGETHER)):
            ahead.append(pool.submit(work_on, some))
            if len(ahead) > workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def keep_freed_memory() -> None:
    """Let this process use again what it frees, instead of returning it to the system at once.

    glibc maps every block above 128 KiB anew, and the system clears each page of it when it is first
    touched: a third of the time of a small network on a CPU, more of the distortions. No result changes.
    Blocks of 32 MiB and more (the most that every glibc takes) are returned as before, and elsewhere than
    on glibc nothing happens. The constants are those of `malloc.h`, see mallopt(3).
    """
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return
    mallopt(mmap_threshold, 2**25)
    mallopt(trim_threshold, 2**30)


def collect_rarely() -> None:
    """Look for reference cycles after 10,000 new objects, not 700: importing torch makes half a million."""
    gc.set_threshold(10_000)


def leave(code: int) -> NoReturn:
    """End this process now, its daemonic children and what it has written to stdout and stderr looked after.

    Taking down every module, as Python does, takes a second after torch and frees what the system frees anyway.
    """
    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    for child in daemons:
        child.terminate()
    for child in daemons:
        child.join()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it is gone
            stream.flush()
    os._exit(code)


def usable_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _environment(**given: str) -> Iterator[None]:
    """Give child processes these variables; one thread each, as more would fight over the same cores."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even when it is killed; keep freed memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
