"""Run all benchmarks, or those named; prints tables and writes `results.json` beside this file."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from streetvision.artifacts import write_json_atomic
from tests.benchmarks.calibrators import calibrators
from tests.benchmarks.cases import CASES
from tests.benchmarks.comparison import comparison
from tests.benchmarks.inference import inference, latency, shared
from tests.benchmarks.runner import Table
from tests.benchmarks.training import gpu, memory

# What is measured in something else than seconds prints a table of its own.
TABLES = {
    "calibrators": calibrators, "comparison": comparison, "inference": inference, "latency": latency,
    "memory": memory, "shared": shared, "gpu": gpu,
}  # fmt: skip


def main() -> int:
    """Run the benchmarks named on the command line."""
    known = [*CASES, *TABLES]
    names = sys.argv[1:] or known
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.stderr.write(f"bench: {unknown[0]} is not one of {', '.join(known)}\n")
        return 2
    timed = [name for name in names if name in CASES]
    results = {}
    if timed:
        print("| what | against | ours | other | ratio (of 5 pairs: least, largest) |")
        print("|---|---|---|---|---|")
    for name in timed:
        result = CASES[name]()
        results[name] = asdict(result)
        print(
            f"| {result.name} | {result.against} | {result.ours_seconds:.3g} s "
            f"| {result.other_seconds:.3g} s | {result.ratio:.3g}× "
            f"({result.ratio_low:.3g}, {result.ratio_high:.3g}) |"
        )
    for name in names:
        if name in TABLES:
            tables = TABLES[name]()
            results[name] = {"tables": [asdict(table) for table in tables]}
            for table in tables:
                _print(table)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine()}
    write_json_atomic(
        Path(__file__).parent / "results.json", {"machine": machine, "results": results}
    )
    return 0


def _print(table: Table) -> None:
    print(f"\n{table.title}\n")
    for row in (table.columns, ["---"] * len(table.columns), *table.rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
