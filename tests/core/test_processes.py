"""Work in threads and processes: order, how far ahead, errors, death of a worker."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from streetvision.core.errors import UserError
from streetvision.core.processes import TOGETHER, in_processes, in_threads


def square(number: int) -> int:
    return number * number


def process_and_threads(_: int) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(_: int) -> None:
    raise UserError("this image is broken")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_order(workers: int) -> None:
    assert list(in_processes(square, range(20), workers)) == [n * n for n in range(20)]
    assert list(in_processes(square, [], workers)) == []


def test_one_worker_is_this_process_and_two_have_one_thread_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert {pid for pid, _ in in_processes(process_and_threads, range(3), 1)} == {os.getpid()}
    found = set(in_processes(process_and_threads, range(3), 2))
    assert os.getpid() not in {pid for pid, _ in found}
    assert {threads for _, threads in found} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_killed_worker_is_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"worker processes was killed.*fewer hardware\.workers"):
        list(in_processes(die, range(4), 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_mistake_reaches_the_caller(workers: int) -> None:
    with pytest.raises(UserError, match="this image is broken"):
        list(in_processes(fail, range(4), workers))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_of_threads_come_in_order(workers: int, count: int) -> None:
    def slow_where_even(number: int) -> int:
        time.sleep(0.002 * (number % 2 == 0))
        return square(number)

    assert list(in_threads(slow_where_even, range(count), workers)) == [n * n for n in range(count)]


def test_threads_work_at_once_and_little_ahead() -> None:
    meeting = threading.Barrier(3, timeout=30)
    taken = []

    def items() -> Iterator[int]:
        for number in range(96):
            taken.append(number)
            yield number

    def meet(number: int) -> int:
        meeting.wait()  # raises unless three are there
        return number

    found = in_threads(meet, items(), 3)
    assert next(found) == 0
    assert len(taken) == (3 + 1) * TOGETHER
    assert list(found) == list(range(1, 96))


@pytest.mark.parametrize("count", [1, 2])
def test_one_item_is_worked_on_by_the_caller(count: int) -> None:
    found = set(in_threads(lambda _: threading.get_ident(), range(count), 2))
    assert (found == {threading.get_ident()}) == (count == 1)


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    with pytest.raises(UserError, match="this image is broken"):
        list(in_threads(fail, range(9), 2))


# Ten rounds of eight blocks of 1 MiB; prints how often the system had to map a page meanwhile.
FAULTS = """
import resource
from streetvision.core.processes import keep_freed_memory
if {kept}:
    keep_freed_memory()
def round():
    blocks = [bytearray(2**20) for _ in range(8)]
    for block in blocks:
        block[::4096] = bytes(256)
round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_used_again() -> None:
    def faults(*, kept: bool) -> int:
        command = [sys.executable, "-c", FAULTS.format(kept=kept)]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    assert faults(kept=False) > 10_000
    assert faults(kept=True) < 500


LEAVING = """
import atexit, multiprocessing, sys, time
from streetvision.core.processes import leave
context = multiprocessing.get_context("fork")
child = context.Process(target=time.sleep, args=(600,), daemon=True)
child.start()
atexit.register(print, "taken down")
print(child.pid, end="")
sys.stderr.write("said")
leave(3)
"""


def test_leaving_says_all_and_takes_daemons_along() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (3, "said")
    child = int(done.stdout)  # nothing else: Python's own exit did not run
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_leaving_without_a_reader_is_no_error() -> None:
    code = "from streetvision.core.processes import leave; print('x' * 9, end=''); leave(0)"
    # Buffered, so that what is written fails in `leave`.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
