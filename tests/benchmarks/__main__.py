"""Run the benchmarks named, or all but the long simulations; prints tables, adds results to `results.json`.

`--table` prints what that file beside this one holds as the tables for README, with the machine, and runs
nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from streetvision.core.artifacts import write_json_atomic
from streetvision.core.processes import keep_freed_memory, usable_cores
from tests.benchmarks.calibrators import calibrators
from tests.benchmarks.cases import CASES
from tests.benchmarks.comparison import comparison
from tests.benchmarks.data import prepare_memory
from tests.benchmarks.gpu import gpu
from tests.benchmarks.inference import inference, latency, shared
from tests.benchmarks.intervals import intervals
from tests.benchmarks.leakage import leakage
from tests.benchmarks.limits import fuzz, limits, payloads
from tests.benchmarks.pipeline import dvc, repro, startup
from tests.benchmarks.runner import Result, Table
from tests.benchmarks.training import memory

# What is measured in something else than seconds prints a table of its own.
TABLES = {
    "calibrators": calibrators, "comparison": comparison, "inference": inference, "latency": latency,
    "memory": memory, "shared": shared, "gpu": gpu, "prepare_memory": prepare_memory,
    "intervals": intervals, "leakage": leakage, "limits": limits, "payloads": payloads, "fuzz": fuzz,
    "startup": startup, "dvc": dvc, "repro": repro,
}  # fmt: skip
# Minutes of simulation each, about how right something is and not how fast.
ON_REQUEST = ("calibrators", "comparison", "intervals", "leakage")
RESULTS = Path(__file__).parent / "results.json"
COLUMNS = ["what", "against", "ours", "other", "ratio (of 5 pairs: least, largest)", "to reach"]


def main() -> int:
    """Run the benchmarks named on the command line."""
    known = [*CASES, *TABLES]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        help=f"of {', '.join(known)}; default: all but {', '.join(ON_REQUEST)}",
    )
    parser.add_argument("--table", action="store_true", help="print results.json for README")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        sys.stderr.write(f"bench: {unknown[0]} is not one of {', '.join(known)}\n")
        return 2
    document = _earlier()
    if not options.table:
        keep_freed_memory()  # as every stage does; the alternatives profit, too
        for name in options.names or [name for name in known if name not in ON_REQUEST]:
            print(f"\n{name}\n")
            start = time.perf_counter()
            found = _measure(name)
            document["results"][name] = found | {"seconds": round(time.perf_counter() - start, 1)}
            _print({name: document["results"][name]})
            print(f"\n{name} took {document['results'][name]['seconds']:.0f} s")
            write_json_atomic(RESULTS, document)
        return 0
    wanted = {name: document["results"][name] for name in known if name in document["results"]}
    _print({name: wanted[name] for name in options.names or wanted if name in wanted})
    machine = document["machine"]
    print(
        f"\nMeasured on {machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB, "
        f"Python {machine['python']}, "
        + ", ".join(f"{name} {number}" for name, number in sorted(machine["libraries"].items()))
    )
    return 0


def _measure(name: str) -> dict[str, Any]:
    if name in CASES:
        return {"ratios": [asdict(result) for result in CASES[name]()]}
    return {"tables": [asdict(table) for table in TABLES[name]()]}


def _earlier() -> dict[str, Any]:
    """The results of this machine up to now; those of another one are forgotten."""
    machine = _machine()
    if RESULTS.exists():
        document: dict[str, Any] = json.loads(RESULTS.read_text())
        if document.get("machine") == machine:
            return document
    return {"machine": machine, "results": {}}


def _machine() -> dict[str, Any]:
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    total = meminfo.read_text().split()[1] if meminfo.exists() else "0"
    libraries = (
        "numpy",
        "pillow",
        "pyarrow",
        "scikit-learn",
        "scipy",
        "timm",
        "torch",
        "torchvision",
    )
    return {
        "cores": usable_cores(),
        "processor": names[0] if names else platform.machine(),
        "memory_gib": round(int(total) / 2**20),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in libraries},
    }


def _print(results: Mapping[str, Mapping[str, Any]]) -> None:
    """All ratios as one table, then the tables."""
    ratios = [Result(**each) for found in results.values() for each in found.get("ratios", [])]
    if ratios:
        _print_rows(COLUMNS, [_cells(result) for result in ratios])
    for found in results.values():
        for table in (Table(**each) for each in found.get("tables", [])):
            print(f"\n{table.title}\n")
            _print_rows(table.columns, table.rows)


def _cells(result: Result) -> list[str]:
    low, middle, high = (
        _short(ratio) for ratio in (result.ratio_low, result.ratio, result.ratio_high)
    )
    return [
        result.name, result.against, f"{_short(result.ours_seconds)} s",
        f"{_short(result.other_seconds)} s", f"{middle}× ({low}, {high})",
        "" if result.reach is None else f"≥ {_short(result.reach)}×",
    ]  # fmt: skip


def _short(number: float) -> str:
    """Three digits, and no exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _print_rows(columns: list[str], rows: list[list[str]]) -> None:
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
