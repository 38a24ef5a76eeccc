"""Where `label-noise` takes labels, probabilities and pictures from, and what it warns of."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.schema import SPLITS
from streetvision.data.store import CONTRACT, Split, open_split
from streetvision.evaluation.labelled import labelled_images
from streetvision.review.images import bare_id, picture_finder, score_images
from streetvision.review.label_noise import (
    Doubts,
    Labelled,
    contact_sheet,
    embedded_labels,
    find_doubts,
    out_of_group_probability,
    read_predictions,
)
from streetvision.sources.labels import SURE_NAMES, ClassNames


def judge_labels(
    paths: ArtifactSchema,
    data: Path | None,
    bundle: Path,
    predictions: Path | None,
    count: int,
    classes: ClassNames = SURE_NAMES,
) -> tuple[Doubts, bytes, list[str]]:
    """Judge the labels of `data`, of `predictions`, or of what the project embedded.

    Parameters
    ----------
    paths
        Of the project.
    data
        What `evaluate` reads; features come from the bundle unless there are `predictions`.
    bundle
        Read only where there are `data`.
    predictions
        See `read_predictions`.
    count
        Pictures in the contact sheet.
    classes
        What they are called in the data.

    Returns
    -------
    doubts, sheet, remarks
        The sheet is a PNG; remarks are what to know before the result is used.

    Raises
    ------
    UserError
        Something is missing or holds too few groups.
    """
    with ExitStack() as stack:
        own = read_predictions(predictions) if predictions is not None else None
        seen = False
        if data is None:
            names = list(SPLITS if own else CONTRACT["embed"])
            labelled = own or embedded_labels([paths.embeddings(name) for name in names])
            splits = _project_splits(paths, names)
        else:
            from streetvision.bundle.predictor import Predictor

            predictor = Predictor.load(bundle)
            preprocessing = predictor.config.preprocessing
            split = stack.enter_context(labelled_images(data, preprocessing, classes=classes))
            splits = [split]
            seen = own is None
            if own is None:
                sample = score_images(predictor, split)
                probability = out_of_group_probability(sample.features, split.labels, split.groups)
                own = Labelled(split.ids, split.groups, split.labels, probability)
            labelled = own
        doubts = find_doubts(labelled)
        sheet, missing = contact_sheet(doubts, picture_finder(splits), count)
        remarks = _remarks(paths, labelled, by_features=seen)
    if missing:
        remarks.append(
            f"{missing} pictures of the contact sheet were not found; DATA can have them"
        )
    return doubts, sheet, remarks


def _project_splits(paths: ArtifactSchema, names: list[str]) -> list[Split]:
    """Those of these splits that are there, for their pictures."""
    # As `evaluate` opens any split file that a user points at.
    files = [paths.split(name) for name in names]
    return [open_split("evaluate", "val_test", path) for path in files if path.is_file()]


def _remarks(paths: ArtifactSchema, labelled: Labelled, *, by_features: bool) -> list[str]:
    ids = {bare_id(str(name)) for name in labelled.ids}

    def among(stage: str, split: str) -> int:
        path = paths.split(split)
        if not path.is_file():
            return 0
        return len(ids & {bare_id(str(name)) for name in open_split(stage, split, path).ids})

    remarks = []
    if test := among("evaluate", "val_test"):
        remarks.append(
            f"WARNING: {test} of these labels are VAL_TEST's. Mending only those that a model doubts "
            "makes the test agree with models: look at as many that it does not doubt, blind to "
            "what it says, and report the metrics before and after."
        )
    trained = among("train", "train") if by_features else 0
    if trained:
        remarks.append(
            f"WARNING: {trained} of these images trained the backbone with these labels: wrong ones "
            "that it has learned by heart stay hidden. Give --predictions of `crossval`."
        )
    return remarks
