"""The recipe on all data, for submission: no group is held out, so its metrics are those of `crossval`.

What needs data that the network has not seen comes from the folds of the cross-validation:

- The number of epochs is the median of those that the folds chose, on the folds' own schedule of learning
  rates, which is stopped there as they were; the last epoch counts.
- The policy is fitted on the folds' logits of the images that they held out, as scikit-learn's
  `CalibratedClassifierCV(ensemble=False)` does (cross-validated logits: Platt 1999, section 2.2). It assumes
  that this network's logits of new images are distributed as those of the folds' networks, which were
  trained the same way on a little less data. There is no network to check that with, and no guarantee as
  that of CV+ (Barber et al. 2021, doi 10.1214/20-AOS1965), so that abstention with a promise is refused.
- A trained fusion keeps its fusion part and a VAL_SELECT from training, since it needs images that this very
  network has not seen; rules of views, and the single view, keep nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streetvision.core.artifacts import (
    ArtifactSchema,
    config_hash,
    read_json,
    scratch_folder,
    write_bytes_atomic,
    write_json_atomic,
)
from streetvision.core.errors import UserError
from streetvision.core.escaping import markdown
from streetvision.core.imports import code_sha256
from streetvision.core.params import Params
from streetvision.core.schema import CONDITIONS
from streetvision.data.store import Split, open_split, read_arrow
from streetvision.sources.csv_table import read_csv
from streetvision.studies.crossval import REPORT, divide, fingerprint, prepared
from streetvision.studies.crossval_report import LOGITS, MODELS
from streetvision.studies.data import Fold
from streetvision.studies.leave_out import held_out_units, mixed_groups, write_parts

if TYPE_CHECKING:
    from streetvision.decision.fitting import Passes

log = logging.getLogger(__name__)
CARD, METRICS, BUNDLE = "card.md", "final_fit.json", "bundle"
# Groups of TRAIN that the log shows in place of VAL_SELECT.
_SHOWN = 2


def final_fit(params: Params, paths: ArtifactSchema, crossval: Path, output: Path) -> str:
    """Train on all groups and write the bundle with its card; returns what was done, in words.

    `crossval` is the folder that `leave_one_group_out` wrote with the same parameters; `output` gets
    `bundle/` (what the predictor, the validator and the subnet's detector take), `card.md` and
    `final_fit.json` besides the parts that the bundle was made of.

    Raises
    ------
    UserError
        There is no cross-validation, it is of other parameters or data, its folds chose different fusions,
        or the recipe needs what only held-out groups could give.
    """
    report = read_json(crossval / REPORT, "crossval")
    key = fingerprint(params, paths.root)
    mode = _check(params, report, config_hash(key))
    logits = _passes(crossval / LOGITS)
    epochs = max(1, round(report["median_epochs"]))
    # `train.epochs` stays: the folds chose their epochs on the way down of that cosine.
    changes = {"choose_epoch": "last", "patience_epochs": 0}
    recipe = params.model_copy(
        update={
            "train": params.train.model_copy(update=changes),
            "cvfm": params.cvfm.model_copy(update={"mode": mode}),
        }
    )
    code = code_sha256("streetvision.studies.final_fit", Path(__file__).parents[2])
    run = key | {"code": code, "epochs": epochs, "mode": mode}
    with scratch_folder(paths.scratch, "final-fit", run) as scratch:
        whole = prepared(params, paths.root, scratch)
        split = open_split("crossval", "whole", whole)
        rows, fusion_rows = _roles(recipe, split, held_out_units(split, report["column"]))
        fold = Fold(scratch / "fold")
        shutil.rmtree(fold.folder, ignore_errors=True)
        write_parts(read_arrow(whole, "prepare"), rows, fusion_rows, fold.folder)
        _fit(recipe, epochs, fold, paths.root, scratch, logits, output)
        kept = len(fusion_rows) + (len(rows["val_select"]) if len(fusion_rows) else 0)
        found = _record(report, params, mode, epochs, len(split) - kept, len(split))
    write_json_atomic(output / METRICS, found)
    text = card(found, report)
    write_bytes_atomic(output / CARD, text.encode())
    return (
        f"{output / BUNDLE} is trained on {found['images_trained_on']} of {found['images']} images, "
        f"{epochs} epochs; {output / CARD} says what was measured, by the cross-validation: "
        f"MCC {report['pipeline']['mcc']:.3f}."
    )


def _check(params: Params, report: Mapping[str, Any], wanted: str) -> str:
    """The mode of fusion, if the cross-validation is of this recipe."""
    if report.get("fingerprint") != wanted:
        raise UserError(
            "the cross-validation is of other parameters or data than these, so its metrics would not be "
            "those of this recipe; run `python -m streetvision crossval` with them first"
        )
    if params.decision.abstention != "none":
        raise UserError(
            f"decision.abstention {params.decision.abstention} promises a risk by groups that the network has "
            "not seen, and the final fit sees all; set it to none, or deploy the bundle of `dvc repro`"
        )
    if params.train.augmentation_gate:
        raise UserError(
            "train.augmentation_gate compares on VAL_SELECT, which the final fit does not have; set it to 0"
        )
    modes: dict[str, int] = report["modes"]
    if len(modes) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(modes.items()))
        raise UserError(
            f"the folds chose different fusions ({counts}), whose logits cannot be calibrated together; set "
            "cvfm.mode to one of them and run the cross-validation again"
        )
    return next(iter(modes))


def _passes(path: Path) -> dict[str, Passes]:
    """The logits of what the folds held out, by condition."""
    from streetvision.decision.fitting import Passes

    if not path.is_file():
        raise UserError(f"{path} is missing; `crossval` makes it")
    wanted = dict.fromkeys(("condition", "single", "fused", "label", "unit"), ())
    rows = [row for _, row in read_csv(path, wanted).records()]

    def column(name: str, condition: str) -> list[str]:
        return [row[name] for row in rows if row["condition"] == condition]

    return {
        each: Passes(
            np.array(column("single", each), dtype=np.float64),
            np.array(column("fused", each), dtype=np.float64),
            np.array(column("label", each), dtype=np.int64),
            np.array(column("unit", each), dtype=object),
        )
        for each in CONDITIONS
    }


def _roles(
    params: Params, split: Split, units: NDArray[np.object_]
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]:
    """Rows of TRAIN and VAL_SELECT, and of the fusion part.

    Without a trained fusion everything is TRAIN; what the log calls VAL_SELECT is then a part of it,
    on which nothing is chosen.
    """
    from streetvision.fusion.fusion import TRAINED

    everything = np.arange(len(split))
    if params.cvfm.mode in TRAINED:
        rows, fusion = divide(params, split, units, np.zeros(len(split), dtype=np.bool_))
        select = rows["val_select"]
        return {"train": np.setdiff1d(everything, select), "val_select": select}, fusion
    sizes = {name: int((units == name).sum()) for name in mixed_groups(split, units)}
    shown = sorted(sizes, key=lambda name: (sizes[name], name))[:_SHOWN]
    log.info("all groups are in TRAIN: what is called VAL_SELECT below is %s, of TRAIN",
             ", ".join(shown))  # fmt: skip
    return (
        {"train": everything, "val_select": np.flatnonzero(np.isin(units, shown))},
        np.empty(0, np.int64),
    )


def _fit(
    params: Params,
    epochs: int,
    fold: Fold,
    root: Path,
    scratch: Path,
    logits: Mapping[str, Passes],
    output: Path,
) -> None:
    """Network, fusion, policy and the bundle of them."""
    from streetvision.bundle.export import export_bundle
    from streetvision.decision.fitting import fit_decision
    from streetvision.decision.pickling import dump_policy_pickle
    from streetvision.decision.policy import scrc_document
    from streetvision.fusion.fusion import save_fusion
    from streetvision.models.classifier import pick_device, save_classifier
    from streetvision.studies.pipeline import fuse_views, train_network

    result = train_network(params, fold, root, scratch / "running", stop_after=epochs)
    save_classifier(result.model, result.config, output / "classifier")
    model = result.model.to(pick_device(params.hardware.device))
    fusion, _ = fuse_views(model, result.config, fold, params)
    save_fusion(fusion, output / "cvfm")
    policy, report, _ = fit_decision(
        logits, params.decision, params.seed, several_views=fusion.n_views > 1
    )
    document = scrc_document(policy, report)
    pickled = output / "policy/scrc_params.pkl"
    write_json_atomic(pickled.with_suffix(".json"), document)
    write_bytes_atomic(pickled, dump_policy_pickle(document))
    export_bundle(
        output / "classifier", pickled.with_suffix(".json"), pickled, output / BUNDLE,
        cvfm=output / "cvfm", batch_size=params.embed.batch_size,
        make_tar=params.export.make_tar,
    )  # fmt: skip


def _record(
    report: Mapping[str, Any], params: Params, mode: str, epochs: int, trained: int, images: int
) -> dict[str, Any]:
    return {
        "metrics_are_of": "cross-validation, not of this bundle",
        "crossval_fingerprint": report["fingerprint"],
        "crossval_code": report["code"],
        "crossval": {name: report[name] for name in MODELS},
        "held_out": report["column"],
        "groups": report["groups"],
        "images": images,
        "images_trained_on": trained,
        "epochs": epochs,
        "mode": mode,
        "policy_fitted_on": f"held-out logits of the folds, {params.decision.fit_on}",
        "seed": params.seed,
        "served_prior": params.decision.served_prior,
    }


_CARD = """\
# A roadwork detector that was trained on all data

**Nothing below was measured of this bundle itself**: no group was held out of its training. The numbers are \
those of a cross-validation of the same recipe (`crossval.json`, fingerprint `{fingerprint}`): {groups} \
groups ({column}) were held out in {folds} parts, each by a network that saw nothing of them. MCC and ROC \
AUC are at the data's own share of roadwork, the log loss at the served one, {prior:g}.

| | images as they are | distorted as the validator does | logistic regression on frozen features |
|---|---|---|---|
| MCC of all decisions, 95 % interval over groups | {pooled} |
| MCC of a part, mean ± standard deviation | {means} |
| ROC AUC | {auc} |
| log loss | {loss} |

- Trained on {trained:,} of {images:,} images for {epochs} epochs, the median of what the folds chose; fusion \
`{mode}`.
- The policy (calibration, threshold) is fitted on the folds' logits of what they held out ({fit_on}), as \
scikit-learn's `CalibratedClassifierCV(ensemble=False)` does. That assumes that this network's logits of new \
images are distributed as those of the folds' networks; nothing here could check it.
- The folds' networks saw less data, so the numbers are rather pessimistic of the network; recipes that were \
chosen by the same cross-validation make them optimistic.
"""


def card(found: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The bundle's card: what it is, and that its metrics are the cross-validation's."""
    models = list(found["crossval"].values())

    def pooled(model: Mapping[str, Any]) -> str:
        if model["mcc_low"] is None:
            return f"{model['mcc']:.3f} (no interval)"
        return f"{model['mcc']:.3f} [{model['mcc_low']:.3f}, {model['mcc_high']:.3f}]"

    return _CARD.format(
        fingerprint=found["crossval_fingerprint"][:12], groups=found["groups"],
        column=markdown(found["held_out"]), folds=len(report["by_fold"]),
        pooled=" | ".join(map(pooled, models)),
        means=" | ".join(f"{m['mcc_mean']:.3f} ± {m['mcc_std']:.3f}" for m in models),
        auc=" | ".join(f"{m['roc_auc']:.3f}" for m in models),
        loss=" | ".join(f"{m['log_loss']:.3f}" for m in models),
        trained=found["images_trained_on"], images=found["images"], epochs=found["epochs"],
        mode=found["mode"], prior=found["served_prior"], fit_on=found["policy_fitted_on"].split(", ")[1],
    )  # fmt: skip
