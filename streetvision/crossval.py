"""Leave one group out: on data with few groups, the only estimate that ranks anything.

Each group with both classes is held out in turn. The rest is divided by group into TRAIN, VAL_SELECT and
VAL_CALIB as `prepare` divides it; the classifier is trained, its policy calibrated, and the held-out group
decided at 0.5, all with the code of the stages. Nothing of the held-out group is seen before. Groups of one
class stay in TRAIN. The pooled decisions are compared, paired over groups, with what a user would try first:
logistic regression, classes balanced, on the same backbone's frozen global-view features, same folds.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streetvision.artifacts import (
    ArtifactSchema,
    scratch_folder,
    write_csv_atomic,
    write_json_atomic,
)
from streetvision.data.store import Split, open_split
from streetvision.errors import UserError
from streetvision.imports import code_sha256
from streetvision.params import Params
from streetvision.progress import progress

log = logging.getLogger(__name__)

ROLES = ("train", "val_select", "val_calib")
MODELS = ("pipeline", "baseline")


def leave_one_group_out(
    params: Params, paths: ArtifactSchema, output: Path | None
) -> dict[str, Any]:
    """Run all folds, one after the other, and return the report.

    A fold that is finished is not run again after an interruption. With `output`, `crossval.json` and
    `predictions.csv` are written there.

    Raises
    ------
    UserError
        Fewer than 4 groups have both classes.
    """
    from streetvision.data.sources import plan_source

    local_root = paths.root / params.data.local_root
    config = params.model_dump(
        mode="json", exclude={"gates", "hardware", "evaluate", "challenge", "export", "sweep"}
    )
    inputs = [
        repr(
            plan_source(
                source, local_root, shard_images=params.data.shard_images, seed=params.seed
            ).inputs
        )
        for source in params.data.sources
    ]
    key = {
        "config": config,
        "inputs": inputs,
        "code": code_sha256("streetvision.crossval", paths.root),
    }
    with scratch_folder(paths.scratch, "crossval", key) as scratch:
        split = open_split("crossval", "whole", _prepared(params, local_root, scratch))
        groups = mixed_groups(split)
        if len(groups) < 4:
            raise UserError(
                f"leave one group out needs at least 4 groups with both classes; there are {len(groups)}"
            )
        features = None
        folds = []
        for number, group in enumerate(groups):
            path = scratch / f"fold-{number:03d}.json"
            if not path.exists():
                if features is None:
                    features = frozen_features(params, split, paths.root)
                log.info("fold %d of %d: %s held out", number + 1, len(groups), group)
                fold = _run_fold(params, split, str(group), features, paths.root, scratch)
                write_json_atomic(path, fold)
            folds.append(json.loads(path.read_text()))
        report, predictions = summarise(split, folds, params)
        if output is not None:
            write_json_atomic(output / "crossval.json", report)
            write_csv_atomic(output / "predictions.csv", predictions)
    return report


def mixed_groups(split: Split) -> list[str]:
    """Names of the groups with both classes, sorted."""
    return sorted(
        str(group)
        for group in set(split.groups)
        if len(set(split.labels[split.groups == group].tolist())) == 2
    )


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


def _prepared(params: Params, local_root: Path, scratch: Path) -> Path:
    """Ingest and prepare all images as one file in `scratch`."""
    from streetvision.data.ingest import ingest_sources
    from streetvision.data.prepare import prepare_whole

    path = scratch / "whole.arrow"
    if not path.exists():
        (scratch / "prepare").mkdir(exist_ok=True)
        ingest_sources(
            list(params.data.sources), local_root, scratch / "raw", scratch / "ingest",
            shard_images=params.data.shard_images, seed=params.seed,
            workers=params.hardware.workers, progress=progress,
        )  # fmt: skip
        prepare_whole(
            scratch / "raw",
            path,
            scratch / "prepare",
            params.data,
            params.hardware.workers,
            progress,
        )
    return path


def _run_fold(
    params: Params,
    split: Split,
    group: str,
    features: NDArray[np.float32],
    root: Path,
    scratch: Path,
) -> dict[str, Any]:
    """Train, calibrate and decide with one group held out; JSON of ids and probabilities."""
    from streetvision.data.loader import EvaluationImages
    from streetvision.data.split import split_groups
    from streetvision.decision.policy import fit_policy
    from streetvision.models.classifier import pick_device
    from streetvision.models.probe import linear_probe
    from streetvision.models.selection import predict_logits
    from streetvision.models.training import build_classifier, train_classifier

    held_out = split.groups == group
    rest = np.flatnonzero(~held_out)
    shares = {role: params.data.fractions[role] for role in ROLES}
    fractions = {role: share / sum(shares.values()) for role, share in shares.items()}
    roles = split_groups(split.groups[rest], split.labels[rest], fractions, 0.0, params.seed).split
    parts = {role: split.select(rest[roles == role]) for role in ROLES}
    folder = scratch / f"train-{group}".replace("/", "_")
    result = train_classifier(
        lambda chosen, seed: build_classifier(chosen, params.data.square_crop, seed, root),
        params.train, parts["train"], parts["val_select"], seed=params.seed, scratch=folder,
        hardware=params.hardware, compile_settings=params.compile,
    )  # fmt: skip
    device = pick_device(params.hardware.device)
    trained, preprocessing = result.model.to(device), result.config.preprocessing

    def logits(part: Split) -> NDArray[np.float64]:
        images = EvaluationImages(part, preprocessing)
        return predict_logits(trained, images, preprocessing, device).astype(np.float64)

    calib = parts["val_calib"]
    policy, _ = fit_policy(
        logits(calib), calib.labels, calib.groups,
        params.decision.served_prior, params.decision.n_resamples, params.seed,
        params.decision.calibrator,
    )  # fmt: skip
    test = split.select(np.flatnonzero(held_out))
    found = logits(test)
    return {
        "group": group,
        "ids": test.ids.tolist(),
        "logit": found.tolist(),
        "pipeline": policy.deployed_probability(found).tolist(),
        "baseline": linear_probe(
            features[~held_out], split.labels[~held_out], features[held_out]
        ).tolist(),
        "images": {role: len(part) for role, part in parts.items()},
        "groups": {role: len(set(part.groups)) for role, part in parts.items()},
    }


def summarise(
    split: Split, folds: list[dict[str, Any]], params: Params
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Pool the folds: report (scalar leaves) and the columns of `predictions.csv`."""
    from streetvision.evaluation.bootstrap import (
        group_intervals,
        group_sign_flip_test,
        paired_group_interval,
    )
    from streetvision.evaluation.metrics import all_metrics

    row_of = {name: row for row, name in enumerate(split.ids.tolist())}
    rows = np.array([row_of[name] for fold in folds for name in fold["ids"]])
    labels, groups = split.labels[rows], split.groups[rows]
    probability = {
        name: np.array([p for fold in folds for p in fold[name]], dtype=np.float64)
        for name in MODELS
    }
    report: dict[str, Any] = {
        "images": len(rows),
        "groups": len(folds),
        "images_always_in_train": len(split) - len(rows),
        "seed": params.seed,
    }
    n_resamples = params.evaluate.n_resamples
    for name, values in probability.items():
        intervals = group_intervals(
            labels, values, groups, n_resamples=n_resamples, seed=params.seed
        )
        wanted = ("mcc", "accuracy", "roc_auc", "fnr", "fpr", "ece", "log_loss")
        report[name] = {key: intervals[key].value for key in wanted}
        report[name]["mcc_low"], report[name]["mcc_high"] = (
            intervals["mcc"].low,
            intervals["mcc"].high,
        )
        report[name]["interval_method"] = intervals["mcc"].method
    gain = paired_group_interval(
        labels, probability["baseline"], probability["pipeline"], groups,
        n_resamples=n_resamples, seed=params.seed,
    )  # fmt: skip
    report["gain"] = {
        "mcc": gain.value,
        "low": gain.low,
        "high": gain.high,
        "sign_flip_p": group_sign_flip_test(
            labels, probability["baseline"], probability["pipeline"], groups, seed=params.seed
        ),
    }
    report["by_group"] = {
        str(fold["group"]): {
            "images": len(fold["ids"]),
            "positives": int(labels[groups == fold["group"]].sum()),
            **{
                name: all_metrics(labels[groups == fold["group"]], np.array(fold[name]))["mcc"]
                for name in MODELS
            },
        }
        for fold in folds
    }
    columns = {"id": split.ids[rows].tolist(), "group": groups.tolist(), "label": labels.tolist()}
    columns |= {name: values.tolist() for name, values in probability.items()}
    return report, columns


def render(report: dict[str, Any]) -> str:
    """The report as a Markdown table and two sentences."""
    lines = [
        "| held-out group | images | positives | MCC, pipeline | MCC, baseline |",
        "|---|---|---|---|---|",
    ]
    for group, row in report["by_group"].items():
        lines.append(
            f"| {group} | {row['images']} | {row['positives']} "
            f"| {row['pipeline']:.3f} | {row['baseline']:.3f} |"
        )
    pooled = [f"{report[n]['mcc']:.3f} [{_ends(report[n], 'mcc_')}]" for n in MODELS]
    lines.append(f"| **pooled** | {report['images']} | | **{pooled[0]}** | **{pooled[1]}** |")
    gain, auc = report["gain"], [report[name]["roc_auc"] for name in MODELS]
    text = (
        f"Paired over {report['groups']} groups, the pipeline gains {gain['mcc']:+.3f} MCC "
        f"[{_ends(gain, '')}] (sign-flip p = {gain['sign_flip_p']:.3f}); "
        f"ROC-AUC {auc[0]:.3f} against {auc[1]:.3f}. Baseline: balanced logistic regression on "
        "frozen global-view features of the same backbone, same folds."
    )
    lines += ["", text]
    return "\n".join(lines)


def _ends(interval: dict[str, Any], prefix: str) -> str:
    low, high = interval[f"{prefix}low"], interval[f"{prefix}high"]
    return "no interval" if low is None else f"{low:.3f}, {high:.3f}"
