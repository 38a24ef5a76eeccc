"""The commands of `python -m streetvision`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streetvision.errors import UserError, guarded
from streetvision.processes import keep_freed_memory

if TYPE_CHECKING:
    from streetvision.artifacts import ArtifactSchema
    from streetvision.evaluation.gates import Timing
    from streetvision.evaluation.revisions import Review
    from streetvision.params import Params

PARAMS = "params.yaml"
log = logging.getLogger(__name__)
ALARM = 3  # exit code of `replay`, `drift` and `leakage`
CROSSVAL = Path("report/crossval")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments` (default: the command line) and run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m streetvision", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int | None], text: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    add("doctor", _doctor, "check Python, libraries, GPUs, Git, DVC and disk")
    preset = add("preset", _preset, "print a preset as shell-quoted overrides for `dvc exp run`")
    preset.add_argument("name", nargs="?", help="without a name: list all presets")
    repro = add(
        "repro", _repro, "run `dvc repro`, optionally with a preset; params.yaml stays as it is"
    )
    repro.add_argument("--preset")
    pin = add("pin", _pin, "print the newest commit of a data set on the hub")
    pin.add_argument("repo_id", help="owner/name")
    _add_evaluate(add("evaluate", _evaluate, "evaluate a bundle on labelled images"))
    predict = add("predict", _predict, "score image files; exit status 1 if any could not be read")
    predict.add_argument("bundle", type=Path, help="a bundle folder or bundle.tar.gz")
    predict.add_argument("images", nargs="+", help="files, folders (all below them) and globs")
    predict.add_argument("--csv", type=Path, help="write path, probability, decision, error here")
    predict.add_argument("--device", default="auto", help="auto, cpu or cuda")
    predict.add_argument(
        "--engine", default="torch", help="torch, or onnx or onnx_int8 where the bundle has it"
    )
    _deploying(add)
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
    _add_natix(add("natix", _natix_install, "serve a bundle on Bittensor Subnet 72"))
    _add_replay(
        add("replay", _replay, "logged challenges through a bundle; alarm if it does badly")
    )
    _reviewing(add)
    _reviewing_data(add)
    _add_report(add("report", _report, "what a change does, on one page with pictures"))
    _add_sweep_summary(
        add("sweep-summary", _sweep_summary, "experiments over seeds; the winner, corrected")
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    keep_freed_memory()
    return guarded(f"streetvision {options.command}", lambda: options.run(options))


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("bundle", type=Path)
    evaluate.add_argument(
        "data", type=Path,
        help="a split (.arrow), Parquet in the NATIX schema, a CSV (file,label,group), or a folder of classes",
    )  # fmt: skip
    evaluate.add_argument("--served-prior", type=float, default=0.5)
    evaluate.add_argument("--resamples", type=int, default=2000, help="group-bootstrap resamples")
    evaluate.add_argument("--mistakes", type=int, default=24, help="images in the contact sheet")
    evaluate.add_argument("--seed", type=int, default=7)
    evaluate.add_argument("--output", type=Path, help="folder for evaluation.json and plots")


def _add_natix(natix: argparse.ArgumentParser) -> None:
    parts = natix.add_subparsers(dest="part", required=True)
    text = "write the detector, its YAML and the bundle into a checkout of the subnet's repository"
    install = parts.add_parser("install", help=text, description=text)
    install.add_argument("bundle", type=Path)
    install.add_argument("checkout", type=Path)
    text = "run the installed detector as a miner does: latency, malformed payloads, same answers"
    check = parts.add_parser("check", help=text, description=text)
    check.set_defaults(run=_natix_check)
    check.add_argument("bundle", type=Path)
    check.add_argument("--challenges", type=int, default=100, help="timed ones")
    check.add_argument("--python", default=sys.executable, help="the miner's interpreter")
    check.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def _add_replay(replay: argparse.ArgumentParser) -> None:
    replay.add_argument(
        "log", type=Path, help="CSV or JSON lines: image and, where known, prediction and label"
    )
    replay.add_argument("--bundle", type=Path, help="default: models/bundle")
    replay.add_argument(
        "--min-mcc", type=float, default=0.8, help="over the last 100; below: alarm"
    )
    replay.add_argument("--min-accuracy", type=float, default=0.6, help="over the last 10")
    replay.add_argument("--output", type=Path, help="folder of CSV and plot; default: the log's")


def _reviewing(add: Callable[..., argparse.ArgumentParser]) -> None:
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


def _held_out(add: Callable[..., argparse.ArgumentParser]) -> None:
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


def _deploying(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that take a bundle elsewhere."""
    fold = add("fold", _fold, "write a bundle of one view as a model that stock transformers opens")
    fold.add_argument("bundle", type=Path, help="a bundle folder or bundle.tar.gz")
    fold.add_argument("output", type=Path, help="the new folder")
    fold.add_argument(
        "--approximate",
        action="store_true",
        help="take the nearest affine rule where none is exact",
    )
    fold.add_argument(
        "--embeddings", type=Path,
        help="VAL_CALIB's, to fit that rule on; default: this project's, if they are of this bundle",
    )  # fmt: skip
    publish = add("publish", _publish, "write a bundle's cards; with --upload, put it on the hub")
    publish.add_argument("bundle", type=Path, help="a bundle folder or bundle.tar.gz")
    publish.add_argument("repo", help="owner/name on the hub; made if it is not there")
    publish.add_argument("--hotkey", required=True, help="the miner's SS58 address")
    publish.add_argument("--model-version", required=True, help="X.Y.Z")
    publish.add_argument("--backbone-licence", default="", help="as you acknowledge it")
    publish.add_argument("--data-licence", default="", help="of the training images, likewise")
    publish.add_argument("--name", help="default: the repository's")
    publish.add_argument(
        "--description", default="Roadwork in street images, as a calibrated probability."
    )
    publish.add_argument(
        "--folded", type=Path, help="what `fold` made of the bundle: the repo's root"
    )
    publish.add_argument(
        "--output", type=Path, default=Path("report/publish"), help="folder of the two cards"
    )
    publish.add_argument("--private", action="store_true", help="make a new repository private")
    publish.add_argument("--upload", action="store_true", help="do it; without: say what would be")


def _reviewing_data(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that ask whether data are what they should be."""
    anything = "what `evaluate` reads, or a folder of images, its sub-folders the groups"
    report = Path("report")
    drift = add(
        "drift", _drift, "are new images like those a bundle was calibrated on? alarm if not"
    )
    drift.add_argument("bundle", type=Path, help="a bundle folder or bundle.tar.gz")
    drift.add_argument("data", type=Path, help=f"{anything}; labels are not read")
    drift.add_argument(
        "--reference", type=Path,
        help="the same, or a file of embeddings; default: data/embeddings/val_calib.arrow, images as they "
        "are; images of challenges belong against val_calib_challenge.arrow",
    )  # fmt: skip
    drift.add_argument("--alpha", type=float, default=0.05, help="share of false alarms")
    drift.add_argument("--json", action="store_true", help="print JSON")
    drift.add_argument("--output", type=Path, default=report, help="folder of drift.json and .png")
    noise = add("label-noise", _label_noise, "rank labels that look wrong; changes none")
    noise.add_argument(
        "data", type=Path, nargs="?",
        help="what `evaluate` reads; default: what `embed` embedded, that is images that trained nothing",
    )  # fmt: skip
    noise.add_argument("--bundle", type=Path, help="for the features; default: models/bundle")
    noise.add_argument(
        "--predictions", type=Path,
        help="predictions.csv of `crossval` (or of `evaluate`), instead of the features",
    )  # fmt: skip
    noise.add_argument("--images", type=int, default=24, help="in the contact sheet")
    noise.add_argument(
        "--output", type=Path, default=report, help="folder of label_noise.csv, .png"
    )
    leakage = add("leakage", _leakage, "near neighbours across splits; alarm if they are too near")
    leakage.add_argument(
        "data", type=Path, nargs="*", help=f"two or more: {anything}; default: the project's splits"
    )
    leakage.add_argument("--bundle", type=Path, help="for the features; default: models/bundle")
    leakage.add_argument("--pairs", type=int, default=12, help="in the contact sheet")
    leakage.add_argument("--output", type=Path, default=report, help="folder of leakage.csv, .png")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _doctor(_: argparse.Namespace) -> int:
    from streetvision.doctor import run_checks

    checks = run_checks(Path.cwd())
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = {True: "ok", False: "MISSING OR TOO OLD", None: "optional"}[check.ok]
        _say(f"{check.name:{width}}  {check.found}  ({mark})")
    return int(any(check.ok is False for check in checks))


def _preset(options: argparse.Namespace) -> None:
    import yaml

    from streetvision.presets import load_preset, overrides, preset_names

    if options.name is None:
        _say("\n".join(preset_names()))
        return
    current = yaml.safe_load(Path(PARAMS).read_text()) if Path(PARAMS).exists() else {}
    _say(" ".join(overrides(load_preset(options.name, Path.cwd()), current)))


def _repro(options: argparse.Namespace) -> int:
    from streetvision.repro import reproduce

    return reproduce(Path.cwd(), options.preset)


def _pin(options: argparse.Namespace) -> None:
    from streetvision.data.hub import latest_revision

    _say(latest_revision(options.repo_id))


def _evaluate(options: argparse.Namespace) -> None:
    from streetvision.artifacts import json_text
    from streetvision.bundle.predictor import Predictor
    from streetvision.evaluation.evaluate import evaluate_split, write_evaluation
    from streetvision.evaluation.labelled import labelled_images

    predictor = Predictor.load(options.bundle)
    with labelled_images(options.data, predictor.config.preprocessing) as split:
        evaluation = evaluate_split(
            predictor, split, options.served_prior,
            n_resamples=options.resamples, mistakes=options.mistakes, seed=options.seed,
        )  # fmt: skip
    if options.output is not None:
        write_evaluation(evaluation, options.output / "evaluation.json", options.output / "plots")
    _say(json_text(evaluation.report).rstrip())


def _predict(options: argparse.Namespace) -> int:
    from streetvision.bundle.engines import load_predictor
    from streetvision.bundle.inputs import one_line
    from streetvision.bundle.predict import find_images, predict_files, write_predictions
    from streetvision.data.schema import CLASS_NAMES
    from streetvision.progress import progress

    predictor = load_predictor(options.bundle, options.engine, options.device)
    paths = find_images(options.images)
    done = []
    for each in progress(predict_files(predictor, paths), len(paths), "scoring"):
        done.append(each)
        if each.error:
            log.warning("%s", each.error)
        elif options.csv is None:
            _say(
                f"{each.probability:.6f}\t{CLASS_NAMES[each.decision or 0]}\t{one_line(each.path)}"
            )
    if options.csv is not None:
        write_predictions(done, options.csv)
    failed = sum(bool(each.error) for each in done)
    log.info("%d of %d images scored, %d failed", len(done) - failed, len(done), failed)
    return int(failed > 0)


def _fold(options: argparse.Namespace) -> None:
    from streetvision.artifacts import ArtifactSchema
    from streetvision.bundle.folded import describe, fold_bundle

    record = fold_bundle(
        options.bundle, options.output, approximate=options.approximate,
        embeddings=options.embeddings, project=ArtifactSchema(Path.cwd()),
    )  # fmt: skip
    _say(f"{options.output} is written.\n{describe(record)}")


def _publish(options: argparse.Namespace) -> None:
    import time

    from streetvision.artifacts import ArtifactSchema
    from streetvision.bundle.publish import Submission, check_repo, publication, upload

    check_repo(options.repo)
    submission = Submission(
        options.name or options.repo.split("/")[1], options.description, options.model_version,
        options.hotkey, int(time.time()), options.backbone_licence, options.data_licence,
    )  # fmt: skip
    project = ArtifactSchema(Path.cwd())
    with publication(options.bundle, submission, project, options.output, options.folded) as files:
        for name, path in sorted(files.items()):
            _say(f"{path.stat().st_size:>12,}  {name}")
        if not options.upload:
            _say(f"Nothing was uploaded; the cards are in {options.output}, --upload publishes.")
            return
        message = f"{submission.name} {submission.version}"
        _say(upload(options.repo, files, message, private=options.private or None))


def _crossval(options: argparse.Namespace) -> None:
    from streetvision.artifacts import ArtifactSchema
    from streetvision.crossval import leave_one_group_out
    from streetvision.crossval_report import render

    params, paths = _recipe(options), ArtifactSchema(Path.cwd())
    report = leave_one_group_out(params, paths, options.output, options.folds, options.groups)
    _say(render(report))


def _final_fit(options: argparse.Namespace) -> None:
    from streetvision.artifacts import ArtifactSchema
    from streetvision.final_fit import final_fit

    paths = ArtifactSchema(Path.cwd())
    _say(final_fit(_recipe(options), paths, options.crossval, options.output))


def _recipe(options: argparse.Namespace) -> Params:
    """The parameters of `--preset`, else of the project here."""
    from streetvision.params import load_params
    from streetvision.presets import load_preset

    root = Path.cwd()
    if options.preset:
        return load_preset(options.preset, root)
    if (root / PARAMS).exists():
        return load_params(root / PARAMS)
    raise UserError(f"{root} holds no {PARAMS}; run this in the project's folder")


def _evidence(options: argparse.Namespace) -> None:
    from streetvision.artifacts import ArtifactSchema
    from streetvision.processes import usable_cores

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
    from streetvision.evidence.report import write_evidence
    from streetvision.evidence.training import listing, run_all
    from streetvision.evidence.variants import comparisons, named

    names = options.variants.split(",") if options.variants else None
    chosen = named(comparisons(options.size), options.data, names)
    _list_or_run(options, paths, chosen, (listing, run_all, write_evidence))


def _evidence_decision(options: argparse.Namespace, paths: ArtifactSchema) -> None:
    from streetvision.evidence.decision import listing, run_all, studies
    from streetvision.evidence.decision_report import write_evidence

    chosen = studies(options.size, options.data)
    _list_or_run(options, paths, chosen, (listing, run_all, write_evidence))


def _evidence_ablation(options: argparse.Namespace, paths: ArtifactSchema) -> None:
    from streetvision.evidence.ablation import listing, run_all
    from streetvision.evidence.ablation_report import write_evidence
    from streetvision.evidence.ladder import ladders

    chosen = ladders(options.size, options.data)
    _list_or_run(options, paths, chosen, (listing, run_all, write_evidence))


def _list_or_run(
    options: argparse.Namespace, paths: ArtifactSchema, chosen: Any, steps: tuple[Any, Any, Any]
) -> None:
    listing, run_all, write_evidence = steps
    arguments = (chosen, options.seeds, paths.root, options.scratch, options.workers)
    if options.list:
        _say(listing(*arguments))
        return
    write_evidence(run_all(*arguments), options.out, _command(options), options.workers)
    _say(f"{options.out} is written; its runs are in {options.scratch}")


def _evidence_ece(options: argparse.Namespace, paths: ArtifactSchema) -> None:
    from streetvision.evidence.fresh import measure, write_report
    from streetvision.params import load_params

    if options.list:
        minutes = options.images / 20_000 * 100 / 60  # of one core, with the single view
        _say(f"{options.images:,} scenes of {options.cities} cities: about {minutes:.0f} minutes")
        return
    params = load_params(paths.root / PARAMS)
    bundle = options.bundle or paths.bundle
    report = measure(
        bundle, params, options.images, options.cities, options.scratch, options.workers
    )
    command = (
        f"python -m streetvision evidence ece --images {options.images} --cities {options.cities}"
    )
    _say(write_report(report, options.out, command))


def _natix_install(options: argparse.Namespace) -> None:
    from streetvision.bundle.natix.install import install

    installed = install(options.bundle, options.checkout)
    changed = "".join(f"\n  {name}" for name in installed.changed) or " nothing, all is there"
    _say(f"written into {options.checkout}:{changed}\nset in its miner.env:")
    _say("\n".join(installed.miner_env))


def _natix_check(options: argparse.Namespace) -> int:
    from streetvision.bundle.natix.check import check

    findings = check(options.bundle, options.challenges, options.python, options.device)
    for finding in findings:
        _say(f"{'ok' if finding.ok else 'FAILED':6}  {finding.name}: {finding.found}")
    return int(not all(finding.ok for finding in findings))


def _replay(options: argparse.Namespace) -> int:
    from streetvision.artifacts import ArtifactSchema
    from streetvision.bundle.predictor import Predictor
    from streetvision.evaluation.replay import replay

    predictor = Predictor.load(options.bundle or ArtifactSchema(Path.cwd()).bundle)
    stem = (options.output or options.log.parent) / f"{options.log.stem}.replay"
    lines, alarms = replay(
        options.log, predictor.probabilities, stem, options.min_mcc, options.min_accuracy
    )
    _say("\n".join(lines + alarms))
    return ALARM if alarms else 0


def _compare(options: argparse.Namespace) -> None:
    from streetvision.artifacts import write_bytes_atomic, write_csv_atomic, write_json_atomic
    from streetvision.evaluation import compare_report
    from streetvision.evaluation.revisions import contact_sheet

    found = _review(options)
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
    _say(compare_report.text_report(found).rstrip())


def _gate(options: argparse.Namespace) -> int:
    from streetvision.evaluation.gates import (
        gate_report,
        judge,
        overall,
    )
    from streetvision.params import load_params

    gates = load_params(Path.cwd() / PARAMS).gates
    timings = _timings(options)
    found = _review(options)
    results = judge(gates, found, timings)
    _say(gate_report(gates, results, found).rstrip())
    refused = {"fail", "inconclusive"} if options.inconclusive == "fail" else {"fail"}
    return int(overall(results) in refused)


def _timings(options: argparse.Namespace) -> tuple[Timing, Timing] | None:
    from streetvision.evaluation.gates import read_timing

    if options.timing is None:
        return None
    return read_timing(options.timing[0]), read_timing(options.timing[1])


def _review(options: argparse.Namespace) -> Review:
    from streetvision.evaluation.revisions import Revision, review

    base, head = (Revision(Path.cwd(), name) for name in (options.base, options.head))
    for each in (base, head):
        each.check_evaluated()
    return review(base, head)


def _drift(options: argparse.Namespace) -> int:
    from streetvision.artifacts import (
        ArtifactSchema,
        json_text,
        write_bytes_atomic,
        write_json_atomic,
    )
    from streetvision.bundle.predictor import Predictor
    from streetvision.review.drift_report import measure_drift, render
    from streetvision.review.images import images_of

    if not 0 < options.alpha < 1:
        raise UserError(f"--alpha is {options.alpha:g}; it must be between 0 and 1")
    paths = ArtifactSchema(Path.cwd())
    reference = options.reference or paths.embeddings("val_calib")
    predictor = Predictor.load(options.bundle)
    report, picture = measure_drift(
        predictor, options.data, reference, images_of(reference, paths), options.alpha
    )
    write_json_atomic(options.output / "drift.json", report)
    write_bytes_atomic(options.output / "drift.png", picture)
    _say(json_text(report).rstrip() if options.json else render(report))
    return ALARM if report["drift"] else 0


def _label_noise(options: argparse.Namespace) -> None:
    from streetvision.artifacts import ArtifactSchema, write_bytes_atomic
    from streetvision.review.label_noise import describe, write_doubts
    from streetvision.review.label_noise_run import judge_labels

    if options.images < 1:
        raise UserError("--images must be at least 1")
    paths = ArtifactSchema(Path.cwd())
    doubts, sheet, remarks = judge_labels(
        paths, options.data, options.bundle or paths.bundle, options.predictions, options.images
    )
    written = [
        write_doubts(doubts, options.output / "label_noise.csv"),
        write_bytes_atomic(options.output / "label_noise.png", sheet),
    ]
    written_line = f"written: {', '.join(map(str, written))}"
    _say("\n".join([*remarks, *describe(doubts), written_line]))


def _leakage(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from streetvision.artifacts import ArtifactSchema, write_bytes_atomic
    from streetvision.bundle.predictor import Predictor
    from streetvision.data.schema import SPLITS
    from streetvision.params import Data, load_params
    from streetvision.review.images import open_all
    from streetvision.review.leakage import find_leakage, look_at
    from streetvision.review.leakage_report import contact_sheet, describe, write_pairs

    if options.pairs < 1:
        raise UserError("--pairs must be at least 1")
    paths = ArtifactSchema(Path.cwd())
    sources = options.data or [paths.split(name) for name in SPLITS]
    data = load_params(paths.root / PARAMS).data if (paths.root / PARAMS).exists() else Data()
    predictor = Predictor.load(options.bundle or paths.bundle)
    with ExitStack() as stack:
        splits = open_all(sources, predictor.config.preprocessing, stack)
        looked = [look_at(predictor, split, name) for name, split in splits.items()]
        found = find_leakage(looked, data.duplicate_hash_bits, data.duplicate_pixel_error)
        written = [
            write_pairs(found, options.output / "leakage.csv"),
            write_bytes_atomic(
                options.output / "leakage.png",
                contact_sheet(found, list(splits.values()), options.pairs),
            ),
        ]
    _say("\n".join([*describe(found), f"written: {', '.join(map(str, written))}"]))
    return ALARM if found.alarm else 0


def _sweep_summary(options: argparse.Namespace) -> None:
    from streetvision.artifacts import write_bytes_atomic, write_csv_atomic, write_json_atomic
    from streetvision.evaluation.review_plots import plot_parallel_coordinates
    from streetvision.evaluation.sweep_summary import columns, document, render, summarise
    from streetvision.experiments import finished

    highest = None if options.best is None else options.best == "highest"
    runs = finished(Path.cwd(), options.revisions)
    summary = summarise(runs, options.metric, options.seeds, highest)
    if options.md is not None:
        write_bytes_atomic(options.md, f"{render(summary, markdown=True)}\n".encode())
    if options.json is not None:
        write_json_atomic(options.json, document(summary))
    if options.output is not None:
        write_csv_atomic(options.output / "sweep.csv", columns(summary))
        write_bytes_atomic(options.output / "sweep.png", plot_parallel_coordinates(summary))
    _say(render(summary))


def _report(options: argparse.Namespace) -> None:
    from streetvision.artifacts import write_bytes_atomic, write_csv_atomic
    from streetvision.evaluation.change_report import change_report
    from streetvision.evaluation.revisions import Revision

    root = Path.cwd()
    sides = Revision(root, options.base), Revision(root, options.head)
    made = change_report(*sides, _timings(options))
    for name, data in made.pictures.items():
        write_bytes_atomic(options.output / name, data)
    if made.changed is not None:
        write_csv_atomic(options.output / "changed.csv", made.changed)
    _say(str(write_bytes_atomic(options.output / "report.md", made.markdown.encode())))


def _command(options: argparse.Namespace) -> str:
    """The command line that makes the same document."""
    text = f"python -m streetvision evidence {options.what} --data {options.data} --size {options.size}"
    text += f" --seeds {options.seeds}"
    return text + (f" --variants {options.variants}" if options.variants else "")
