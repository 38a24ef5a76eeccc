"""Run a function in several Gloo processes, as `torchrun` would start them."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import importlib, pickle, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
module, name, arguments, output = pickle.loads(bytes.fromhex(sys.argv[1]))
result = getattr(importlib.import_module(module), name)(*arguments)
torch.save(result, Path(output))
"""


def distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Euclidean, over all numbers of two states."""
    import torch

    parts = [(one[name].double() - other[name].double()).square().sum() for name in one]
    return float(torch.stack(parts).sum().sqrt())


def run_ranks(
    function: Callable[..., Any], *arguments: Any, folder: Path, ranks: int = 2
) -> list[Any]:
    """Call `function(*arguments)` in `ranks` processes at once and return what each returned.

    `function` lies at the top of a test module; it and what it returns go through files in `folder`. The
    processes know their rank from the environment; a function without Lightning calls
    `torch.distributed.init_process_group("gloo")`.
    """
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        call = (function.__module__, function.__name__, arguments, str(folder / f"rank-{rank}.pt"))
        command = [sys.executable, "-c", CHILD, pickle.dumps(call).hex()]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )
    try:
        told = [process.communicate(timeout=120)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(told)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]
