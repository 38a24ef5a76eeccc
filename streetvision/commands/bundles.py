"""What is done with a bundle: evaluate, predict, take it elsewhere."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from streetvision.commands.common import ALARM, Add, add_class_names, class_names, say
from streetvision.core.escaping import escaped

if TYPE_CHECKING:
    from streetvision.evaluation.evaluate import Evaluation

log = logging.getLogger(__name__)


def register(add: Add) -> None:
    """Add these commands."""
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
    _add_natix(add("natix", _natix_install, "serve a bundle on Bittensor Subnet 72"))
    _add_replay(
        add("replay", _replay, "logged challenges through a bundle; alarm if it does badly")
    )


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("bundle", type=Path)
    evaluate.add_argument(
        "data", type=Path,
        help="a split (.arrow), Parquet in the NATIX schema or a folder of it, a CSV (file,label,group), or a "
        "folder of classes",
    )  # fmt: skip
    add_class_names(evaluate)
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
    check.add_argument(
        "--challenges", type=int, default=100, help="timed ones, of three sizes in turn"
    )
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


def _deploying(add: Add) -> None:
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


def _evaluate(options: argparse.Namespace) -> None:
    from streetvision.bundle.predictor import Predictor
    from streetvision.core.artifacts import json_text
    from streetvision.evaluation.evaluate import evaluate_split, write_evaluation
    from streetvision.evaluation.labelled import labelled_images

    predictor = Predictor.load(options.bundle)
    preprocessing = predictor.config.preprocessing
    with labelled_images(options.data, preprocessing, classes=class_names(options)) as split:
        evaluation = evaluate_split(
            predictor, split, options.served_prior,
            n_resamples=options.resamples, mistakes=options.mistakes, seed=options.seed,
        )  # fmt: skip
    if options.output is not None:
        folder = options.output / "plots"
        write_evaluation(evaluation, options.output / "evaluation.json", folder)
        if evaluation.curves:
            _draw_curves(evaluation, options.served_prior, folder)
    say(json_text(evaluation.report).rstrip())


def _draw_curves(evaluation: Evaluation, served_prior: float, folder: Path) -> None:
    """Pictures of the curves: of the pipeline's, DVC's page shows them."""
    from streetvision.core.artifacts import write_bytes_atomic
    from streetvision.review import review_plots

    labels = evaluation.predictions["label"]
    model = {"model": evaluation.predictions["probability"]}
    for name, data in {
        "roc.png": review_plots.overlay_roc(labels, model),
        "precision_recall.png": review_plots.overlay_precision_recall(labels, model, served_prior),
        "reliability.png": review_plots.overlay_reliability(labels, model, served_prior),
    }.items():
        write_bytes_atomic(folder / name, data)


def _predict(options: argparse.Namespace) -> int:
    from streetvision.bundle.engines import load_predictor
    from streetvision.bundle.predict import find_images, predict_files, write_predictions
    from streetvision.core.progress import progress
    from streetvision.core.schema import CLASS_NAMES

    predictor = load_predictor(options.bundle, options.engine, options.device)
    paths = find_images(options.images)
    done = []
    for each in progress(predict_files(predictor, paths), len(paths), "scoring"):
        done.append(each)
        if each.error:
            log.warning("%s", each.error)
        elif options.csv is None:
            say(f"{each.probability:.6f}\t{CLASS_NAMES[each.decision or 0]}\t{escaped(each.path)}")
    if options.csv is not None:
        write_predictions(done, options.csv)
    failed = sum(bool(each.error) for each in done)
    log.info("%d of %d images scored, %d failed", len(done) - failed, len(done), failed)
    return int(failed > 0)


def _fold(options: argparse.Namespace) -> None:
    from streetvision.bundle.folded import describe, fold_bundle
    from streetvision.core.artifacts import ArtifactSchema

    record = fold_bundle(
        options.bundle, options.output, approximate=options.approximate,
        embeddings=options.embeddings, project=ArtifactSchema(Path.cwd()),
    )  # fmt: skip
    say(f"{options.output} is written.\n{describe(record)}")


def _publish(options: argparse.Namespace) -> None:
    import time

    from streetvision.bundle.publish import Submission, check_repo, publication, upload
    from streetvision.core.artifacts import ArtifactSchema

    check_repo(options.repo)
    submission = Submission(
        options.name or options.repo.split("/")[1], options.description, options.model_version,
        options.hotkey, int(time.time()), options.backbone_licence, options.data_licence,
    )  # fmt: skip
    project = ArtifactSchema(Path.cwd())
    with publication(options.bundle, submission, project, options.output, options.folded) as files:
        for name, path in sorted(files.items()):
            say(f"{path.stat().st_size:>12,}  {name}")
        if not options.upload:
            say(f"Nothing was uploaded; the cards are in {options.output}, --upload publishes.")
            return
        message = f"{submission.name} {submission.version}"
        say(upload(options.repo, files, message, private=options.private or None))


def _natix_install(options: argparse.Namespace) -> None:
    from streetvision.bundle.natix.install import install

    installed = install(options.bundle, options.checkout)
    changed = "".join(f"\n  {name}" for name in installed.changed) or " nothing, all is there"
    say(f"written into {options.checkout}:{changed}")
    for name in installed.needed:
        say(
            f"no miner starts there without {name}: the subnet's own detectors import it and its "
            "requirements.miner.txt lacks it"
        )
    say("set in its miner.env:")
    say("\n".join(installed.miner_env))


def _natix_check(options: argparse.Namespace) -> int:
    from streetvision.bundle.natix.check import check

    findings = check(options.bundle, options.challenges, options.python, options.device)
    for finding in findings:
        say(f"{'ok' if finding.ok else 'FAILED':6}  {finding.name}: {finding.found}")
    return int(not all(finding.ok for finding in findings))


def _replay(options: argparse.Namespace) -> int:
    from streetvision.bundle.predictor import Predictor
    from streetvision.core.artifacts import ArtifactSchema
    from streetvision.evaluation.replay import replay

    predictor = Predictor.load(options.bundle or ArtifactSchema(Path.cwd()).bundle)
    stem = (options.output or options.log.parent) / f"{options.log.stem}.replay"
    lines, alarms = replay(
        options.log, predictor.probabilities, stem, options.min_mcc, options.min_accuracy
    )
    say("\n".join(lines + alarms))
    return ALARM if alarms else 0
