"""Latency and memory of a bundle on this machine: `python -m streetvision.bundle.timing BUNDLE ENGINE N`.

One process an engine, so that its peak of memory is its own. The numbers belong in no metric: they differ
from run to run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from streetvision.bundle.engines import load_predictor
from streetvision.errors import UserError

# What a validator sends.
SIDE_PX = 224
WARM_UP = 3
_STATUS = Path("/proc/self/status")


def time_bundle(bundle: Path, engines: Sequence[str], images: int) -> dict[str, dict[str, float]]:
    """Time `images` single predictions with each engine on the CPU, a process each.

    Returns
    -------
    By engine: `p50_ms`, `p95_ms`, `p99_ms` of one image of 224 × 224 pixels, `load_ms`, `images`, and where
    the system tells it `peak_memory_mb` of the process (10^6 bytes).

    Raises
    ------
    UserError
        A process failed.
    """
    found = {}
    for engine in engines:
        command = [sys.executable, "-m", __name__, str(bundle), engine, str(images)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"timing {bundle} with {engine} failed: {reason}")
        found[engine] = json.loads(done.stdout)
    return found


def time_predictions(bundle: Path, engine: str, images: int) -> dict[str, float]:
    """Load the bundle and time single predictions in this process; see `time_bundle`."""
    start = time.perf_counter()
    predictor = load_predictor(bundle, engine, "cpu")
    loading = time.perf_counter() - start
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(WARM_UP + images):
        image = rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        start = time.perf_counter()
        predictor(image)
        seconds.append(time.perf_counter() - start)
    low, high, highest = np.percentile(seconds[WARM_UP:], [50, 95, 99]) * 1e3
    found = {"p50_ms": low, "p95_ms": high, "p99_ms": highest, "load_ms": loading * 1e3}
    if _STATUS.exists():
        line = next(each for each in _STATUS.read_text().splitlines() if each.startswith("VmHWM"))
        found["peak_memory_mb"] = int(line.split()[1]) * 1024 / 1e6
    return {name: round(float(value), 3) for name, value in found.items()} | {"images": images}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(time_predictions(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
