"""What a recipe is worth: cross-validation, the fit on all data, evidence over seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streetvision.commands.common import PARAMS, Add, say
from streetvision.core.errors import UserError

if TYPE_CHECKING:
    from streetvision.core.artifacts import ArtifactSchema
    from streetvision.core.params import Params

CROSSVAL = Path("report/crossval")


def register(add: Add) -> None:
    """Add these commands."""
    _held_out(add)
    evidence = add("evidence", _evidence, "measure what each part adds, over seeds; resumable")
    evidence.add_argument(
        "what", choices=["training", "decision", "ablation", "ece"],
        help="each part of training; fusion and calibration; the whole pipeline step by step; "
        "the bundle's ECE on new cities",
    )  # fmt: skip
    evidence.add_argument("--out", type=Path, help="default: docs/evidence/<what>.md")
    evidence.add_argument("--data", default="all", help="synthetic, photos or all")
    evidence.add_argument("--size", default="cpu", help="smoke, cpu or large")
    evidence.add_argument("--seeds", type=int, default=3, help="runs of each variant on each fold")
    evidence.add_argument("--workers", type=int, default=0, help="processes; 0 = one a core")
    evidence.add_argument("--variants", help="of training: only these, separated by commas")
    evidence.add_argument("--scratch", type=Path, help="finished runs; a rerun goes on from them")
    evidence.add_argument("--list", action="store_true", help="what would be run, and how long")
    evidence.add_argument("--bundle", type=Path, help="of ece; default: models/bundle")
    evidence.add_argument("--images", type=int, default=20_000, help="of ece: new scenes")
    evidence.add_argument("--cities", type=int, default=80, help="of ece: new cities")


def _held_out(add: Add) -> None:
    """The commands that use all data, a part of the groups held out at a time."""
    crossval = add(
        "crossval", _crossval,
        "leave groups out: train, fuse, calibrate and decide without each in turn; resumable",
    )  # fmt: skip
    crossval.add_argument("--preset", help="default: params.yaml")
    crossval.add_argument(
        "--output", type=Path, default=CROSSVAL, help=f"folder of the results; default: {CROSSVAL}"
    )
    crossval.add_argument(
        "--folds", type=int,
        help="parts the groups are held out in; default: each alone, of more than 20 groups 5 parts",
    )  # fmt: skip
    crossval.add_argument(
        "--groups", default="group", metavar="COLUMN",
        help="what is held out together, such as a city where groups are drives; default: group",
    )  # fmt: skip
    final = add(
        "final-fit", _final_fit,
        "the recipe on all data, for submission; its metrics are those of the cross-validation",
    )  # fmt: skip
    final.add_argument("--preset", help="default: params.yaml")
    final.add_argument("--crossval", type=Path, default=CROSSVAL, help="what `crossval` wrote")
    final.add_argument("--output", type=Path, default=Path("report/final"), help="the new folder")


def _crossval(options: argparse.Namespace) -> None:
    from streetvision.core.artifacts import ArtifactSchema
    from streetvision.studies.crossval import leave_one_group_out
    from streetvision.studies.crossval_report import render

    params, paths = _recipe(options), ArtifactSchema(Path.cwd())
    report = leave_one_group_out(params, paths, options.output, options.folds, options.groups)
    say(render(report))


def _final_fit(options: argparse.Namespace) -> None:
    from streetvision.core.artifacts import ArtifactSchema
    from streetvision.studies.final_fit import final_fit

    paths = ArtifactSchema(Path.cwd())
    say(final_fit(_recipe(options), paths, options.crossval, options.output))


def _recipe(options: argparse.Namespace) -> Params:
    """The parameters of `--preset`, else of the project here."""
    from streetvision.core.params import load_params
    from streetvision.presets import load_preset

    root = Path.cwd()
    if options.preset:
        return load_preset(options.preset, root)
    if (root / PARAMS).exists():
        return load_params(root / PARAMS)
    raise UserError(f"{root} holds no {PARAMS}; run this in the project's folder")


def _evidence(options: argparse.Namespace) -> None:
    from streetvision.core.artifacts import ArtifactSchema
    from streetvision.core.processes import usable_cores

    if options.seeds < 1 or options.workers < 0:
        raise UserError("--seeds must be at least 1, --workers at least 0")
    if min(options.images, options.cities) < 1:
        raise UserError("--images and --cities must be at least 1")
    paths = ArtifactSchema(Path.cwd())
    options.workers = options.workers or usable_cores()
    options.scratch = options.scratch or paths.scratch / "evidence" / options.what
    options.out = options.out or paths.root / f"docs/evidence/{options.what}.md"
    kinds = {
        "training": _evidence_training, "decision": _evidence_decision,
        "ablation": _evidence_ablation, "ece": _evidence_ece,
    }  # fmt: skip
    kinds[options.what](options, paths)


def _evidence_training(options: argparse.Namespace, paths: ArtifactSchema) -> None:
    from streetvision.studies.report import write_evidence
    from streetvision.studies.training import listing, run_all
    from streetvision.studies.variants import comparisons, named

    names = options.variants.split(",") if options.variants else None
    chosen = named(comparisons(options.size), options.data, names)
    _list_or_run(options, paths, chosen, (listing, run_all, write_evidence))


def _evidence_decision(options: argparse.Namespace, paths: ArtifactSchema) -> None:
    from streetvision.studies.decision import listing, run_all, studies
    from streetvision.studies.decision_report import write_evidence

    chosen = studies(options.size, options.data)
    _list_or_run(options, paths, chosen, (listing, run_all, write_evidence))


def _evidence_ablation(options: argparse.Namespace, paths: ArtifactSchema) -> None:
    from streetvision.studies.ablation import listing, run_all
    from streetvision.studies.ablation_report import write_evidence
    from streetvision.studies.ladder import ladders

    chosen = ladders(options.size, options.data)
    _list_or_run(options, paths, chosen, (listing, run_all, write_evidence))


def _list_or_run(
    options: argparse.Namespace, paths: ArtifactSchema, chosen: Any, steps: tuple[Any, Any, Any]
) -> None:
    listing, run_all, write_evidence = steps
    arguments = (chosen, options.seeds, paths.root, options.scratch, options.workers)
    if options.list:
        say(listing(*arguments))
        return
    write_evidence(run_all(*arguments), options.out, _command(options), options.workers)
    say(f"{options.out} is written; its runs are in {options.scratch}")


def _evidence_ece(options: argparse.Namespace, paths: ArtifactSchema) -> None:
    from streetvision.core.params import load_params
    from streetvision.studies.fresh import measure, write_report

    if options.list:
        minutes = options.images / 20_000 * 100 / 60  # of one core, with the single view
        say(f"{options.images:,} scenes of {options.cities} cities: about {minutes:.0f} minutes")
        return
    params = load_params(paths.root / PARAMS)
    bundle = options.bundle or paths.bundle
    report = measure(
        bundle, params, options.images, options.cities, options.scratch, options.workers
    )
    command = (
        f"python -m streetvision evidence ece --images {options.images} --cities {options.cities}"
    )
    say(write_report(report, options.out, command))


def _command(options: argparse.Namespace) -> str:
    """The command line that makes the same document."""
    text = f"python -m streetvision evidence {options.what} --data {options.data} --size {options.size}"
    text += f" --seeds {options.seeds}"
    return text + (f" --variants {options.variants}" if options.variants else "")
