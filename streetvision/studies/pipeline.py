"""The pipeline on one division of the data, outside DVC: what the stages do, from `explora` to `calibrate`.

A `Fold` has the split files; each step opens them by the role that the split contract gives its stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streetvision.core.params import Params
from streetvision.data.embeddings import Embeddings, read_embeddings, write_embeddings
from streetvision.data.views import view_names
from streetvision.studies.data import Fold
from streetvision.studies.runs import adapt

if TYPE_CHECKING:
    from streetvision.decision.fitting import Passes
    from streetvision.fusion.fusion import Fusion
    from streetvision.models.classifier import ClassifierConfig, RoadworkClassifier
    from streetvision.training.training import TrainingResult


def train_network(
    params: Params, fold: Fold, root: Path, scratch: Path, stop_after: int | None = None
) -> TrainingResult:
    """`explora`, where it is on, and `train`, of which at most `stop_after` epochs.

    Relative weights lie below `root`.
    """
    from streetvision.training.training import build_classifier, train_classifier

    adapted = adapt(params, fold, root, scratch) if params.explora.enabled else None
    return train_classifier(
        lambda chosen, seed: build_classifier(chosen, seed, root, adapted),
        params.train, fold.open("train", "train"), fold.open("val_select", "train"),
        subnet=params.subnet, seed=params.seed, scratch=scratch / "train", hardware=params.hardware,
        compile_settings=params.compile, stop_after=stop_after,
    )  # fmt: skip


def embed_split(
    model: RoadworkClassifier,
    config: ClassifierConfig,
    fold: Fold,
    name: str,
    condition: str,
    params: Params,
) -> Embeddings:
    """`embed`, for one split under one condition; VAL_TEST, which that stage may not see, as `evaluate`."""
    from streetvision.data.served_images import served_images, served_versions
    from streetvision.models.classifier import pick_device
    from streetvision.models.multiview import score_all_views

    split = fold.open(name, "evaluate" if name == "val_test" else "embed")
    repeats = (
        None
        if condition == "clean"
        else served_versions(params.subnet, params.embed.served_repeats)
    )
    images = (
        (split.image(row) for row in range(len(split)))
        if repeats is None
        else served_images(split, params.subnet, repeats, params.seed, params.hardware.workers)
    )
    device = pick_device(params.hardware.device)
    scores = score_all_views(
        model, config.preprocessing, images, params.views, params.embed.batch_size, device
    )
    path = fold.folder / f"{name}-{condition}.embeddings.arrow"
    write_embeddings(path, split, view_names(params.views), scores, repeats)
    return read_embeddings(path, features=True)


def fuse_views(
    model: RoadworkClassifier, config: ClassifierConfig, fold: Fold, params: Params
) -> tuple[Fusion, dict[str, Any]]:
    """`cvfm`: fitted on TRAIN's fusion part and chosen on VAL_SELECT, under `decision.fit_on`."""
    from streetvision.fusion.fitting import LabelledViews, choose_fusion
    from streetvision.fusion.fusion import TRAINED, Fusion, FusionConfig

    mode = params.cvfm.mode
    if mode not in {"auto", *TRAINED}:  # a rule, with nothing to fit
        return Fusion(FusionConfig.of(mode, params.cvfm, params.views, 0)), {"mode": mode}
    fit_on: str = params.decision.fit_on

    def views(name: str) -> LabelledViews:
        found = embed_split(model, config, fold, name, fit_on, params)
        return LabelledViews(found.scores, found.labels, found.groups)

    select = {fit_on: views("val_select")}
    # The threshold of `sweep` is for its report alone.
    return choose_fusion(
        params.cvfm, params.views, views("train"), select, fit_on, model.head.cpu(), 0.5,
        params.seed,
    )  # fmt: skip


def passes(fusion: Fusion, found: Mapping[str, Embeddings], params: Params) -> dict[str, Passes]:
    """What `calibrate` fits on, by condition."""
    from streetvision.decision.fitting import Passes

    unit = params.decision.exchangeable_unit
    return {
        name: Passes(each.logits, fusion.fuse(*each.scores), each.labels, each.units(unit))
        for name, each in found.items()
    }
