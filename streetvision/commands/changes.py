"""What a change is worth: two revisions, a gate, a report, a sweep."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streetvision.commands.common import PARAMS, Add, say
from streetvision.core.errors import UserError

if TYPE_CHECKING:
    from streetvision.core.params import Gates
    from streetvision.review.experiments import Run
    from streetvision.review.gates import Timing
    from streetvision.review.revisions import Revision

log = logging.getLogger(__name__)


def register(add: Add) -> None:
    """Add these commands."""
    _reviewing(add)
    _add_report(add("report", _report, "what a change does, on one page with pictures"))
    _add_sweep_summary(
        add("sweep-summary", _sweep_summary, "experiments over seeds; the winner, corrected")
    )


def _reviewing(add: Add) -> None:
    """The commands that judge a change."""
    compare = add("compare", _compare, "is a change real? Two revisions on the same test images")
    _add_revisions(compare)
    compare.add_argument("--md", type=Path, help="also write the report as Markdown")
    compare.add_argument("--json", type=Path, help="also write every number as JSON")
    compare.add_argument(
        "--output", type=Path, help="folder for changed.png and changed.csv: decisions that changed"
    )
    gate = add("gate", _gate, "may a change be taken? Exit code 1 if a limit of `gates` is broken")
    _add_revisions(gate)
    gate.add_argument(
        "--inconclusive", choices=["fail", "pass"], default="fail",
        help="the exit code where the test set is too small to tell; default: fail",
    )  # fmt: skip
    _add_timing(gate)


def _add_revisions(command: argparse.ArgumentParser) -> None:
    command.add_argument("base", help="a Git revision, branch or tag, or a DVC experiment")
    command.add_argument("head", nargs="?", help="likewise; default: the working tree")


def _add_timing(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--timing", type=Path, nargs=2, metavar=("BASE.json", "HEAD.json"),
        help="latencies: .streetvision/export_timing.json of both, of one machine",
    )  # fmt: skip


def _add_report(report: argparse.ArgumentParser) -> None:
    _add_revisions(report)
    _add_timing(report)
    report.add_argument(
        "--output", type=Path, default=Path("report"), help="folder of report.md; default: report"
    )
    report.add_argument(
        "--plots", action="store_true", help="also `dvc plots diff`, as plots/index.html beside it"
    )


def _add_sweep_summary(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument(
        "revisions", nargs="*", metavar="REV",
        help="experiments, branches or commits; default: HEAD's finished experiments",
    )  # fmt: skip
    sweep.add_argument(
        "--metric", default="metrics/train.json:val_select.mcc",
        help="what chooses, FILE:NAME, never of VAL_TEST; default: %(default)s",
    )  # fmt: skip
    sweep.add_argument(
        "--best", choices=["highest", "lowest"], help="default: lowest for a loss or an error"
    )
    sweep.add_argument("--seeds", default="seed", metavar="PARAMETER", help="the axis of seeds")
    sweep.add_argument("--md", type=Path, help="also write the summary as Markdown")
    sweep.add_argument("--json", type=Path, help="also write every number as JSON")
    sweep.add_argument(
        "--output", type=Path, help="folder for sweep.csv, a row a run, and sweep.png"
    )


def _compare(options: argparse.Namespace) -> None:
    from streetvision.core.artifacts import write_bytes_atomic, write_csv_atomic, write_json_atomic
    from streetvision.review import compare_report
    from streetvision.review.revisions import contact_sheet, review

    found = review(*_sides(options))
    if options.md is not None:
        write_bytes_atomic(options.md, compare_report.markdown_report(found).encode())
    if options.json is not None:
        write_json_atomic(options.json, compare_report.json_report(found))
    if options.output is not None:
        changed = compare_report.changes_table(found.comparison)
        write_csv_atomic(options.output / "changed.csv", changed)
        sheet = contact_sheet(found)
        if sheet is not None:
            write_bytes_atomic(options.output / "changed.png", sheet)
    say(compare_report.text_report(found).rstrip())


def _gate(options: argparse.Namespace) -> int:
    from streetvision.core.params import load_params
    from streetvision.review.gates import gate_report, judge, overall, refusal
    from streetvision.review.revisions import review

    gates = load_params(Path.cwd() / PARAMS).gates
    timings = _timings(options)
    base, head = _sides(options)
    refused_for = refusal(base, head)
    if refused_for is not None:
        say(refused_for)
        return 1
    found = review(base, head)
    results = judge(gates, found, timings)
    say(gate_report(gates, results, found).rstrip())
    refused = {"fail", "inconclusive"} if options.inconclusive == "fail" else {"fail"}
    return int(overall(results) in refused)


def _timings(options: argparse.Namespace) -> tuple[Timing, Timing] | None:
    from streetvision.review.gates import read_timing

    if options.timing is None:
        return None
    return read_timing(options.timing[0]), read_timing(options.timing[1])


def _sides(options: argparse.Namespace) -> tuple[Revision, Revision]:
    from streetvision.review.revisions import Revision

    root = Path.cwd()
    return Revision(root, options.base), Revision(root, options.head)


def _sweep_summary(options: argparse.Namespace) -> None:
    from streetvision.core import git
    from streetvision.core.artifacts import write_bytes_atomic, write_csv_atomic, write_json_atomic
    from streetvision.core.escaping import shortened
    from streetvision.review.experiments import finished
    from streetvision.review.review_plots import plot_parallel_coordinates
    from streetvision.review.sweep_summary import columns, document, render, summarise

    highest = None if options.best is None else options.best == "highest"
    runs = finished(Path.cwd(), options.revisions)
    failed = [] if options.revisions else git.failed_experiments(Path.cwd())
    if failed:
        log.warning(
            "%s failed and %s left out: %s; to see why: dvc queue logs NAME",
            *(("an experiment", "is") if len(failed) == 1 else (f"{len(failed)} experiments", "are")),
            ", ".join(map(shortened, failed)),
        )  # fmt: skip
    summary = summarise(runs, options.metric, options.seeds, highest)
    if options.md is not None:
        write_bytes_atomic(options.md, f"{render(summary, markdown=True)}\n".encode())
    if options.json is not None:
        write_json_atomic(options.json, document(summary))
    if options.output is not None:
        write_csv_atomic(options.output / "sweep.csv", columns(summary))
        write_bytes_atomic(options.output / "sweep.png", plot_parallel_coordinates(summary))
    say(render(summary))


def _report(options: argparse.Namespace) -> None:
    from streetvision.core.artifacts import write_bytes_atomic, write_csv_atomic
    from streetvision.core.params import load_params
    from streetvision.review.change_report import change_report

    root, sides = Path.cwd(), _sides(options)
    gates: Gates | str
    try:
        gates = load_params(root / PARAMS).gates
    except UserError as error:
        gates = str(error)  # two revisions can be told apart all the same
    made = change_report(*sides, gates, _timings(options))
    for name, data in made.pictures.items():
        write_bytes_atomic(options.output / name, data)
    if made.changed is not None:
        write_csv_atomic(options.output / "changed.csv", made.changed)
    say(str(write_bytes_atomic(options.output / "report.md", made.markdown.encode())))
    if options.plots:
        _dvc_plots(root, [each.run for each in sides], options.output / "plots")


def _dvc_plots(root: Path, runs: Sequence[Run], output: Path) -> None:
    """DVC's own page of all plots; left out where it would ask a server that only a revision names."""
    import subprocess
    import sys

    from streetvision.core import git

    for run in runs:
        if run.commit is not None and git.asks_elsewhere(root, run.commit):
            log.warning(
                "`dvc plots diff` is left out: it reads %s with that revision's own .dvc/config and imports, "
                "which are not HEAD's", run.name,
            )  # fmt: skip
            return
    names = [run.name for run in runs if run.commit is not None]
    command = [sys.executable, "-m", "dvc", "plots", "diff", "--out", str(output), "--", *names]
    if subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL, check=False).returncode:
        raise UserError("`dvc plots diff` failed; what it said is above")
