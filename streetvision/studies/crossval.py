"""Leave groups out: on data with few groups, the only estimate that ranks anything.

Each group with both classes is held out in turn (or, of many groups, one part of them after the other). The
rest is divided by group into TRAIN, VAL_SELECT and VAL_CALIB as `prepare` divides it; the classifier is
adapted and trained, views are fused, the policy is calibrated, and what is held out decided at 0.5, all with
the code of the stages. Nothing of it is seen before. Groups of one class are not held out. The pooled decisions
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

from streetvision.core.artifacts import (
    ArtifactSchema,
    config_hash,
    scratch_folder,
    write_csv_atomic,
    write_json_atomic,
)
from streetvision.core.errors import UserError
from streetvision.core.imports import code_sha256
from streetvision.core.params import Params
from streetvision.core.schema import CONDITIONS
from streetvision.data.store import Split, open_split, read_arrow
from streetvision.studies.crossval_report import summarise
from streetvision.studies.data import WHOLE, Fold, prepare_all
from streetvision.studies.leave_out import balanced_parts, held_out_units, mixed_groups, write_parts

log = logging.getLogger(__name__)

ROLES = ("train", "val_select", "val_calib")
# Sections that change no decision of a fold.
_IRRELEVANT = {"gates", "hardware", "evaluate", "export", "sweep", "probe"}
# Up to so many groups, each is held out alone; of more, a part of them at a time.
MAX_ALONE, PARTS = 20, 5
REPORT = "crossval.json"


def fingerprint(params: Params, root: Path) -> dict[str, Any]:
    """What the folds depend on beside the code: parameters, and the files of the sources."""
    from streetvision.sources.sources import plan_source

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
    code = code_sha256("streetvision.studies.crossval", Path(__file__).parents[2])
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
    from streetvision.explora.probe import backbone_features
    from streetvision.models.classifier import pick_device
    from streetvision.training.training import build_classifier

    model, config = build_classifier(params.train, params.seed, root)
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
    from streetvision.explora.probe import linear_probe
    from streetvision.models.classifier import pick_device
    from streetvision.studies.pipeline import embed_split, fuse_views, passes, train_network

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
    from streetvision.fusion.fusion import TRAINED
    from streetvision.prepare.split import split_groups

    rest = np.flatnonzero(~held_out)
    shares = {role: params.data.fractions[role] for role in ROLES}
    fractions = {role: share / sum(shares.values()) for role, share in shares.items()}
    fitted = params.cvfm.mode in {"auto", *TRAINED}
    fusion = params.data.fusion_fraction if fitted else 0.0
    found = split_groups(units[rest], split.labels[rest], fractions, fusion, params.data.split_seed)
    rows = {role: rest[found.split == role] for role in ROLES}
    return rows | {"val_test": np.flatnonzero(held_out)}, rest[found.fusion]
