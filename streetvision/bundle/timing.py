"""Latency and memory of a bundle on this machine.

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
from streetvision.core.errors import UserError

# What a validator sends.
SIDE_PX = 224
WARM_UP = 3
_STATUS = Path("/proc/self/status")
_CHILD = """
import sys
root = sys.argv[1]
if root not in sys.path:
    sys.path.insert(0, root)
from streetvision.bundle.timing import main
main(*sys.argv[2:])
"""


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
        # The working directory may be anybody's: -P imports nothing from it.
        root = str(Path(__file__).resolve().parents[2])
        command = [sys.executable, "-P", "-c", _CHILD, root, str(bundle), engine, str(images)]
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


def main(bundle: str, engine: str, images: str) -> None:
    """The process of one engine: print what it measured as JSON."""
    sys.stdout.write(json.dumps(time_predictions(Path(bundle), engine, int(images))))
