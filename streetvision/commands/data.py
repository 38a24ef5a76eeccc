"""Data that nobody expected: drift, wrong labels, leakage."""

from __future__ import annotations

import argparse
from pathlib import Path

from streetvision.commands.common import ALARM, PARAMS, Add, add_class_names, class_names, say
from streetvision.core.errors import UserError


def register(add: Add) -> None:
    """Add these commands."""
    _reviewing_data(add)


def _reviewing_data(add: Add) -> None:
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
        "are; images of challenges belong against val_calib_served.arrow",
    )  # fmt: skip
    drift.add_argument("--alpha", type=float, default=0.05, help="share of false alarms")
    drift.add_argument("--json", action="store_true", help="print JSON")
    drift.add_argument("--output", type=Path, default=report, help="folder of drift.json and .png")
    noise = add("label-noise", _label_noise, "rank labels that look wrong; changes none")
    noise.add_argument(
        "data", type=Path, nargs="?",
        help="what `evaluate` reads; default: what `embed` embedded, that is images that trained nothing",
    )  # fmt: skip
    add_class_names(noise)
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


def _drift(options: argparse.Namespace) -> int:
    from streetvision.bundle.predictor import Predictor
    from streetvision.core.artifacts import (
        ArtifactSchema,
        json_text,
        write_bytes_atomic,
        write_json_atomic,
    )
    from streetvision.review.drift_report import measure_drift, render
    from streetvision.review.images import images_of

    if not 0 < options.alpha < 1:
        raise UserError(f"--alpha is {options.alpha:g}; it must be between 0 and 1")
    paths = ArtifactSchema(Path.cwd())
    reference = options.reference or paths.embeddings("val_calib").relative_to(paths.root)
    predictor = Predictor.load(options.bundle)
    report, picture = measure_drift(
        predictor, options.data, reference, images_of(reference, paths), options.alpha
    )
    write_json_atomic(options.output / "drift.json", report)
    write_bytes_atomic(options.output / "drift.png", picture)
    say(json_text(report).rstrip() if options.json else render(report))
    return ALARM if report["drift"] else 0


def _label_noise(options: argparse.Namespace) -> None:
    from streetvision.core.artifacts import ArtifactSchema, write_bytes_atomic
    from streetvision.review.label_noise import describe, write_doubts
    from streetvision.review.label_noise_run import judge_labels

    if options.images < 1:
        raise UserError("--images must be at least 1")
    paths = ArtifactSchema(Path.cwd())
    doubts, sheet, remarks = judge_labels(
        paths, options.data, options.bundle or paths.bundle, options.predictions, options.images,
        class_names(options),
    )  # fmt: skip
    written = [
        write_doubts(doubts, options.output / "label_noise.csv"),
        write_bytes_atomic(options.output / "label_noise.png", sheet),
    ]
    written_line = f"written: {', '.join(map(str, written))}"
    say("\n".join([*remarks, *describe(doubts), written_line]))


def _leakage(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from streetvision.bundle.predictor import Predictor
    from streetvision.core.artifacts import ArtifactSchema, write_bytes_atomic
    from streetvision.core.params import Data, load_params
    from streetvision.core.schema import SPLITS
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
    say("\n".join([*describe(found), f"written: {', '.join(map(str, written))}"]))
    return ALARM if found.alarm else 0
