"""Leave groups out: on data with few groups, the only estimate that ranks anything.

Each group with both classes is held out in turn (or, of many groups, one part of them after the other). The
rest is divided by group into TRAIN, VAL_SELECT and VAL_CALIB as `prepare` divides it; the classifier is
adapted and trained, views are fused, the policy is calibrated, and what is held out decided at 0.5, all with
the code of the stages. Nothing of it is seen before. Groups of one class stay in TRAIN. The pooled decisions
are compared, paired over groups, with what a user would try first: logistic regression, classes balanced, on
the same backbone's frozen global-view features, same folds.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streetvision.artifacts import (
    ArtifactSchema,
    config_hash,
    scratch_folder,
    write_csv_atomic,
    write_json_atomic,
)
from streetvision.data.leave_out import balanced_parts, held_out_units, mixed_groups, write_parts
from streetvision.data.schema import CONDITIONS
from streetvision.data.store import Split, open_split, read_arrow
from streetvision.errors import UserError
from streetvision.evidence.data import WHOLE, Fold, prepare_all
from streetvision.imports import code_sha256
from streetvision.params import Params

log = logging.getLogger(__name__)

ROLES = ("train", "val_select", "val_calib")
# What is compared: on images as they are, the same distorted as the validator does; the baseline as they are.
MODELS = ("pipeline", "pipeline_challenge", "baseline")
# Sections that change no decision of a fold.
_IRRELEVANT = {"gates", "hardware", "evaluate", "export", "sweep", "probe"}
# Up to so many groups, each is held out alone; of more, a part of them at a time.
MAX_ALONE, PARTS = 20, 5
REPORT, PREDICTIONS, LOGITS = "crossval.json", "predictions.csv", "logits.csv"


def fingerprint(params: Params, root: Path) -> dict[str, Any]:
    """What the folds depend on beside the code: parameters, and the files of the sources."""
    from streetvision.data.sources import plan_source

    local_root = root / params.data.local_root
    inputs = [
        repr(
            plan_source(
                source, local_root, shard_images=params.data.shard_images, seed=params.seed
            ).inputs
        )
        for source in params.data.sources
    ]
    config = params.model_dump(mode="json", exclude=_IRRELEVANT)
    return {"config": config, "inputs": inputs}


def leave_one_group_out(
    params: Params,
    paths: ArtifactSchema,
    output: Path | None,
    folds: int | None = None,
    column: str = "group",
) -> dict[str, Any]:
    """Run all folds, one after the other, and return the report.

    A fold that is finished is not run again after an interruption. With `output`, `crossval.json`,
    `predictions.csv` and `logits.csv` (what `final-fit` calibrates on) are written there.

    Parameters
    ----------
    params, paths
        The recipe, and where the project's scratch is.
    output
        Folder of the results, None for none.
    folds
        Parts that the groups with both classes are held out in; by default each alone, if they are no more
        than 20, else 5.
    column
        What names the groups that are held out: `group`, or a column that is the same in each group.

    Raises
    ------
    UserError
        Fewer than 4 groups have both classes, or there are fewer of them than folds.
    """
    key = fingerprint(params, paths.root)
    code = code_sha256("streetvision.crossval", Path(__file__).parents[1])
    run = key | {"code": code, "folds": folds, "column": column}
    with scratch_folder(paths.scratch, "crossval", run) as scratch:
        split = open_split("crossval", "whole", prepared(params, paths.root, scratch))
        units = held_out_units(split, column)
        parts = held_out_parts(split, units, folds)
        features = None
        found = []
        for number, part in enumerate(parts):
            path = scratch / f"fold-{number:03d}.json"
            if not path.exists():
                if features is None:
                    features = frozen_features(params, split, paths.root)
                name = part[0] if len(part) == 1 else f"{len(part)} groups"
                log.info("fold %d of %d: %s held out", number + 1, len(parts), name)
                fold = _run_fold(params, split, units, part, features, paths.root, scratch)
                write_json_atomic(path, fold | {"groups_held_out": part})
            found.append(json.loads(path.read_text()))
        report, tables = summarise(split, units, found, params)
        report |= {"fingerprint": config_hash(key), "code": code[:12], "column": column}
        if output is not None:
            for name, columns in tables.items():
                write_csv_atomic(output / name, columns)
            write_json_atomic(output / REPORT, report)
    return report


def held_out_parts(split: Split, units: NDArray[np.object_], folds: int | None) -> list[list[str]]:
    """The groups with both classes in as many parts as there are folds.

    Raises
    ------
    UserError
        See `leave_one_group_out`.
    """
    groups = mixed_groups(split, units)
    if len(groups) < 4:
        raise UserError(
            f"leave one group out needs at least 4 groups with both classes; there are {len(groups)}"
        )
    if folds is None:
        folds = len(groups) if len(groups) <= MAX_ALONE else PARTS
    if not 2 <= folds <= len(groups):
        raise UserError(
            f"--folds {folds} is not between 2 and {len(groups)}, the number of groups with both classes"
        )
    if folds == len(groups):
        return [[group] for group in groups]
    parts = balanced_parts({name: int((units == name).sum()) for name in groups}, folds)
    return [sorted(part) for part in parts]


def frozen_features(params: Params, split: Split, root: Path) -> NDArray[np.float32]:
    """Features [N, D] of the untrained-on backbone for the global view of each image."""
    from streetvision.models.classifier import pick_device
    from streetvision.models.probe import backbone_features
    from streetvision.models.training import build_classifier

    model, config = build_classifier(params.train, params.data.square_crop, params.seed, root)
    device = pick_device(params.hardware.device)
    return backbone_features(
        model.backbone, config.preprocessing, split, params.embed.batch_size, device
    )


def prepared(params: Params, root: Path, scratch: Path) -> Path:
    """Ingest and prepare all images as one file in `scratch`."""
    return prepare_all(params.data, root, scratch / "whole", params.hardware.workers, params.seed)


def _run_fold(
    params: Params,
    split: Split,
    units: NDArray[np.object_],
    part: list[str],
    features: NDArray[np.float32],
    root: Path,
    scratch: Path,
) -> dict[str, Any]:
    """Train, fuse, calibrate and decide with some groups held out; JSON of ids, logits and probabilities."""
    from streetvision.decision.fitting import fit_decision
    from streetvision.models.classifier import pick_device
    from streetvision.models.probe import linear_probe
    from streetvision.pipeline import embed_split, fuse_views, passes, train_network

    fold = Fold(scratch / "fold")
    shutil.rmtree(fold.folder, ignore_errors=True)
    held_out = np.isin(units, part)
    rows, fusion_rows = divide(params, split, units, held_out)
    write_parts(read_arrow(scratch / "whole" / WHOLE, "prepare"), rows, fusion_rows, fold.folder)
    # The training of an interrupted fold goes on.
    running = scratch / f"running-{config_hash({'held out': split.ids[held_out].tolist()})[:16]}"
    result = train_network(params, fold, root, running)
    config = result.config
    model = result.model.to(pick_device(params.hardware.device))
    fusion, fused = fuse_views(model, config, fold, params)
    model.to(pick_device(params.hardware.device))  # its head was fused with on the CPU
    calib, test = (
        passes(
            fusion,
            {each: embed_split(model, config, fold, name, each, params) for each in CONDITIONS},
            params,
        )
        for name in ("val_calib", "val_test")
    )
    several = fusion.n_views > 1
    policy, *_ = fit_decision(calib, params.decision, params.seed, several_views=several)
    answers = {
        name: policy.deployed_probability(each.condition(policy.hard_images).logits)
        for name, each in test.items()
    }
    rest = ~held_out
    found = {
        "ids": split.ids[held_out].tolist(),
        "baseline": linear_probe(features[rest], split.labels[rest], features[held_out]).tolist(),
        "mode": fused["mode"],
        "epochs": result.metrics["chosen_epoch"] + 1,
        "images": {name: len(each) for name, each in rows.items() if name != "val_test"},
        "groups": {
            name: len(set(units[each])) for name, each in rows.items() if name != "val_test"
        },
        "conditions": {
            name: {
                "single": each.single.tolist(),
                "fused": each.fused.tolist(),
                "units": each.units.tolist(),
                "pipeline": answers[name].tolist(),
            }
            for name, each in test.items()
        },
    }
    found["images"]["fusion"] = len(fusion_rows)
    for folder in (fold.folder, running):
        shutil.rmtree(folder)
    return found


def divide(
    params: Params, split: Split, units: NDArray[np.object_], held_out: NDArray[np.bool_]
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]:
    """Rows of TRAIN, VAL_SELECT and VAL_CALIB without what is held out, of this, and of the fusion part.

    The parts share no unit [N]: the policy is calibrated on what is as new as what is held out. Where
    fusion is a rule, as the single view is, nothing is kept from training for it.
    """
    from streetvision.data.split import split_groups
    from streetvision.models.fusion import TRAINED

    rest = np.flatnonzero(~held_out)
    shares = {role: params.data.fractions[role] for role in ROLES}
    fractions = {role: share / sum(shares.values()) for role, share in shares.items()}
    fitted = params.cvfm.mode in {"auto", *TRAINED}
    fusion = params.data.fusion_fraction if fitted else 0.0
    found = split_groups(units[rest], split.labels[rest], fractions, fusion, params.seed)
    rows = {role: rest[found.split == role] for role in ROLES}
    return rows | {"val_test": np.flatnonzero(held_out)}, rest[found.fusion]


def summarise(
    split: Split, units: NDArray[np.object_], folds: list[dict[str, Any]], params: Params
) -> tuple[dict[str, Any], dict[str, dict[str, list[Any]]]]:
    """Pool the folds: report (scalar leaves) and the columns of the two tables, by file name."""
    from streetvision.evaluation.bootstrap import (
        group_intervals,
        group_sign_flip_test,
        paired_group_interval,
    )
    from streetvision.evaluation.metrics import all_metrics

    row_of = {name: row for row, name in enumerate(split.ids.tolist())}
    parts = [np.array([row_of[name] for name in fold["ids"]]) for fold in folds]
    repeats = params.embed.challenge_repeats
    rows = np.concatenate(parts)
    # Of each model the rows of each fold's images, and its probabilities.
    seen = {
        name: [np.repeat(p, repeats if name == MODELS[1] else 1) for p in parts] for name in MODELS
    }
    said = {
        "pipeline": [np.array(fold["conditions"]["clean"]["pipeline"]) for fold in folds],
        "pipeline_challenge": [
            np.array(fold["conditions"]["challenge"]["pipeline"]) for fold in folds
        ],
        "baseline": [np.array(fold["baseline"]) for fold in folds],
    }
    report: dict[str, Any] = {
        "images": len(rows),
        "groups": len(set(units[rows])),
        "images_always_in_train": len(split) - len(rows),
        "seed": params.seed,
        "modes": {m: sum(fold["mode"] == m for fold in folds) for m in {f["mode"] for f in folds}},
        "median_epochs": float(np.median([fold["epochs"] for fold in folds])),
    }
    n_resamples = params.evaluate.n_resamples
    by_fold: dict[str, Any] = {}
    for number, (fold, part) in enumerate(zip(folds, parts, strict=True)):
        names = fold["groups_held_out"]
        by_fold[names[0] if len(names) == 1 else f"fold {number + 1}"] = {
            "images": len(part),
            "groups": len(names),
            "positives": int(split.labels[part].sum()),
            "mode": fold["mode"],
            **{
                name: all_metrics(split.labels[seen[name][number]], said[name][number])["mcc"]
                for name in MODELS
            },
        }
    for name in MODELS:
        at = np.concatenate(seen[name])
        intervals = group_intervals(
            split.labels[at], np.concatenate(said[name]), units[at], n_resamples=n_resamples,
            seed=params.seed,
        )  # fmt: skip
        wanted = ("mcc", "accuracy", "roc_auc", "fnr", "fpr", "ece", "ece_debiased", "log_loss")
        report[name] = {key: intervals[key].value for key in wanted}
        report[name]["mcc_low"], report[name]["mcc_high"] = (
            intervals["mcc"].low,
            intervals["mcc"].high,
        )
        report[name]["interval_method"] = intervals["mcc"].method
        each = [row[name] for row in by_fold.values()]
        report[name] |= {"mcc_mean": float(np.mean(each)), "mcc_std": float(np.std(each, ddof=1))}
    labels, groups = split.labels[rows], units[rows]
    pipeline, baseline = (np.concatenate(said[name]) for name in ("pipeline", "baseline"))
    gain = paired_group_interval(
        labels, baseline, pipeline, groups, n_resamples=n_resamples, seed=params.seed
    )
    flip = group_sign_flip_test(labels, baseline, pipeline, groups, seed=params.seed)
    report["gain"] = {
        "mcc": gain.value, "low": gain.low, "high": gain.high, "sign_flip_p": flip,
    }  # fmt: skip
    report["by_fold"] = by_fold
    predictions = {
        "id": split.ids[rows].tolist(), "group": groups.tolist(), "label": labels.tolist(),
        "pipeline": pipeline.tolist(), "baseline": baseline.tolist(),
    }  # fmt: skip
    return report, {PREDICTIONS: predictions, LOGITS: _logits(split, folds, seen)}


def _logits(
    split: Split, folds: list[dict[str, Any]], seen: dict[str, list[NDArray[np.int64]]]
) -> dict[str, list[Any]]:
    """Columns of the raw logits of what was held out, under both conditions."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("id", "unit", "label", "condition", "single", "fused")
    }
    for number, fold in enumerate(folds):
        for condition, model in zip(CONDITIONS, MODELS, strict=False):
            found, at = fold["conditions"][condition], seen[model][number]
            columns["id"] += split.ids[at].tolist()
            columns["unit"] += found["units"]
            columns["label"] += split.labels[at].tolist()
            columns["condition"] += [condition] * len(at)
            columns["single"] += found["single"]
            columns["fused"] += found["fused"]
    return columns


def render(report: dict[str, Any]) -> str:
    """The report as a Markdown table and a few sentences."""
    lines = [
        "| held out | images | positives | MCC, pipeline | MCC, distorted | MCC, baseline |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["by_fold"].items():
        groups = "" if row["groups"] == 1 else f" ({row['groups']} groups)"
        cells = " | ".join(f"{row[model]:.3f}" for model in MODELS)
        lines.append(f"| {name}{groups} | {row['images']} | {row['positives']} | {cells} |")
    means = " | ".join(f"{report[n]['mcc_mean']:.3f} ± {report[n]['mcc_std']:.3f}" for n in MODELS)
    lines.append(f"| mean ± standard deviation | | | {means} |")
    pooled = " | ".join(f"**{report[n]['mcc']:.3f} [{_ends(report[n], 'mcc_')}]**" for n in MODELS)
    lines.append(f"| **pooled** | {report['images']} | | {pooled} |")
    gain, auc = report["gain"], [report[name]["roc_auc"] for name in ("pipeline", "baseline")]
    modes = ", ".join(f"{mode} {count}" for mode, count in sorted(report["modes"].items()))
    text = (
        f"Paired over {report['groups']} groups, the pipeline gains {gain['mcc']:+.3f} MCC "
        f"[{_ends(gain, '')}] (sign-flip p = {gain['sign_flip_p']:.3f}); "
        f"ROC-AUC {auc[0]:.3f} against {auc[1]:.3f}. Baseline: balanced logistic regression on "
        f"frozen global-view features of the same backbone, same folds. Fusions chosen: {modes}; "
        f"median of the chosen epochs {report['median_epochs']:g}."
    )
    lines += ["", text]
    return "\n".join(lines)


def _ends(interval: dict[str, Any], prefix: str) -> str:
    low, high = interval[f"{prefix}low"], interval[f"{prefix}high"]
    return "no interval" if low is None else f"{low:.3f}, {high:.3f}"
