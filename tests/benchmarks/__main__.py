"""Run all benchmarks, or those named; prints a table and writes `results.json` beside this file."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from streetvision.artifacts import write_json_atomic
from tests.benchmarks.cases import CASES


def main() -> int:
    """Run the benchmarks named on the command line."""
    names = sys.argv[1:] or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        sys.stderr.write(f"bench: {unknown[0]} is not one of {', '.join(CASES)}\n")
        return 2
    print("| what | against | ours | other | ratio (of 5 pairs: least, largest) |")
    print("|---|---|---|---|---|")
    results = {}
    for name in names:
        result = CASES[name]()
        results[name] = asdict(result)
        print(
            f"| {result.name} | {result.against} | {result.ours_seconds:.3g} s "
            f"| {result.other_seconds:.3g} s | {result.ratio:.3g}× "
            f"({result.ratio_low:.3g}, {result.ratio_high:.3g}) |"
        )
    machine = {"cpus": os.cpu_count(), "machine": platform.machine()}
    write_json_atomic(
        Path(__file__).parent / "results.json", {"machine": machine, "results": results}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
