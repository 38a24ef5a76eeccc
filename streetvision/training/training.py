"""Phase 1: fit the classifier on TRAIN, choose the epoch on VAL_SELECT."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streetvision.core.artifacts import main_process, write_json_atomic
from streetvision.core.errors import UserError
from streetvision.core.params import Compile, Hardware, Subnet, Train
from streetvision.data.augment import ServedAugmentation
from streetvision.data.loader import (
    EvaluationImages,
    TrainingImages,
    loader_workers,
    training_loader,
)
from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing, training_transform
from streetvision.models.backbone import initial_backbone
from streetvision.models.classifier import ClassifierConfig, RoadworkClassifier, pick_device
from streetvision.models.loop import CHECKPOINT, LoopSettings, describe, precision, run_loop
from streetvision.models.peft import merge_adapters
from streetvision.training.frozen import (
    AsItIs,
    KeptFeatures,
    TrainingFeatures,
    features_are_constant,
    features_of,
    head_alone,
)
from streetvision.training.gate import conditions_gate, served_probabilities
from streetvision.training.selection import (
    SELECT_BATCH,
    EpochSelection,
    WeightAverage,
    predict_logits,
)
from streetvision.training.task import ClassifierTask, choose_trainable

log = logging.getLogger(__name__)

# Largest difference of a logit (over 1, or over the largest logit) that merging adapters may make.
MERGE_TOLERANCE = 1e-4
MERGE_IMAGES = 16
# What the gate turns off.
PLAIN = {
    "augmentation": "none",
    "erasing_probability": 0.0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "served_probability": 0.0,
}

Build = Callable[[Train, int], tuple[RoadworkClassifier, ClassifierConfig]]


@dataclass(frozen=True)
class TrainingResult:
    """The chosen weights and how they came about.

    `history` has one row an epoch; `select_logits` [N] are those of VAL_SELECT that the epoch was chosen by.
    """

    model: RoadworkClassifier
    config: ClassifierConfig
    history: list[dict[str, float]]
    metrics: dict[str, Any]
    select_logits: NDArray[np.float32]


def build_classifier(
    train: Train, seed: int, root: Path, adapted: Path | None = None
) -> tuple[RoadworkClassifier, ClassifierConfig]:
    """Build the classifier that `train` describes; relative weight files lie below `root`.

    With `train.init_from_explora` the backbone's weights are those in the folder `adapted`, where one is
    given; else those of `train.backbone_checkpoint` or `train.weights`.
    """
    weights: Path | None = None
    if train.init_from_explora and adapted is not None:
        weights = adapted / "backbone.safetensors"
    elif train.backbone_checkpoint != "none":
        weights = root / train.backbone_checkpoint
    backbone, name, arguments, preprocessing = initial_backbone(train, seed, root, weights)
    hidden = train.head_hidden if train.head == "mlp" else None
    model = RoadworkClassifier(backbone, train.dropout, hidden)
    return model, ClassifierConfig(name, arguments, preprocessing, hidden)


def train_classifier(
    build: Build,
    train: Train,
    fit_split: Split,
    select_split: Split,
    *,
    subnet: Subnet,
    seed: int,
    scratch: Path,
    hardware: Hardware,
    compile_settings: Compile,
    stop_after: int | None = None,
) -> TrainingResult:
    """Build and fit the classifier; with `train.augmentation_gate`, without augmentation if that is better.

    The gate trains with and without what `PLAIN` turns off, for as many seeds, and judges by VAL_SELECT's
    images as `train.augmentation_gate_on` has them; its runs keep their results in sub-folders of `scratch`,
    and the run that is wanted in the end goes on from its own.

    Raises
    ------
    UserError
        As `fit_classifier`; or the gate has nothing to compare.
    """

    def fit(augmented: bool, number: int, folder: Path) -> TrainingResult:
        chosen = train if augmented else train.model_copy(update=PLAIN)
        model, config = build(chosen, number)
        return fit_classifier(
            model, config, chosen, fit_split, select_split, subnet=subnet, seed=number,
            scratch=folder, hardware=hardware, compile_settings=compile_settings, stop_after=stop_after,
        )  # fmt: skip

    if not train.augmentation_gate:
        return fit(augmented=True, number=seed, folder=scratch)
    if train.model_copy(update=PLAIN) == train:
        raise UserError(
            "params.yaml: train.augmentation_gate compares with and without augmentation, but none is on "
            f"({', '.join(PLAIN)})"
        )

    def folder(augmented: bool, number: int) -> Path:
        return scratch / f"{'with' if augmented else 'without'}-{number}"

    def score(augmented: bool, number: int) -> dict[str, list[float]]:
        own = folder(augmented, number)
        if not (own / "gate.json").exists():
            log.info("augmentation gate: %s", own.name)
            result = fit(augmented, number, own)
            device = pick_device(hardware.device)
            served = served_probabilities(
                result.model.to(device).eval(), result.config.preprocessing, select_split,
                subnet, seed, device, hardware.workers,
            )  # fmt: skip
            clean = torch.from_numpy(result.select_logits).double().sigmoid()
            found = {"clean": clean.tolist(), "served": served.tolist()}
            if not main_process():
                return found
            write_json_atomic(own / "gate.json", found)
            if number != seed:
                (own / CHECKPOINT).unlink()
        return dict(json.loads((own / "gate.json").read_text()))

    seeds = list(range(seed, seed + train.augmentation_gate))
    runs = {(augmented, number): score(augmented, number)
            for number in seeds for augmented in (False, True)}  # fmt: skip
    gates = conditions_gate(runs, select_split.labels, select_split.groups, seeds)
    augmented = gates[train.augmentation_gate_on].verdict != "fail"
    result = fit(augmented, seed, folder(augmented, seed))
    result.metrics["gate"] = {
        "seeds": len(seeds), "judged_on": train.augmentation_gate_on, "augmented": augmented,
        **{f"on_{condition}": gate.report() for condition, gate in gates.items()},
    }  # fmt: skip
    return result


def fit_classifier(
    model: RoadworkClassifier,
    config: ClassifierConfig,
    train: Train,
    fit_split: Split,
    select_split: Split,
    *,
    subnet: Subnet | None = None,
    seed: int,
    scratch: Path,
    hardware: Hardware | None = None,
    compile_settings: Compile | None = None,
    stop_after: int | None = None,
) -> TrainingResult:
    """Train and return the weights of the chosen epoch (`train.choose_epoch`).

    Checkpoints in `scratch` let a killed run go on to the same result. With `stop_after` it ends after so
    many epochs of the schedule, which stays that of `train.epochs`: what another run knew by then.

    Raises
    ------
    UserError
        TRAIN or VAL_SELECT has one class only, the loss is not finite, or merging changes the logits.
    """
    for split in (fit_split, select_split):
        if len(np.unique(split.labels)) < 2:
            raise UserError(f"{split.name} has images of one class only; training needs both")
    hardware, compile_settings = hardware or Hardware(), compile_settings or Compile()
    preprocessing = config.preprocessing
    choose_trainable(model, train, seed)
    if (
        train.trainable != "dora"
    ):  # peft's takes views of a convolution's adapter, which must be contiguous
        model.to(memory_format=torch.channels_last)
    cost = _cost(model, train, len(fit_split))
    device = pick_device(hardware.device)
    feed = _feed(
        model, train, subnet or Subnet(), fit_split, select_split, preprocessing, seed, device
    )
    loader = training_loader(
        feed.images, train.batch_size, seed, loader_workers(hardware.workers),
        balance=fit_split.labels if train.balanced_sampler else None,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    task = ClassifierTask(feed.model, feed.preprocessing, train, fit_split.labels, compile_settings)
    averaged = train.weight_average != "none"
    average = WeightAverage(train, loader, feed.preprocessing) if averaged else None
    selection = EpochSelection(feed.select_images, feed.preprocessing, train, average, stop_after)
    run_loop(
        task, loader, [selection] if average is None else [average, selection],
        LoopSettings(
            train.epochs, train.precision, train.accumulate_batches, seed, scratch, hardware,
            compile_settings,
        ),
    )  # fmt: skip
    if selection.best is None:
        raise UserError("training ended before its first epoch")
    feed.model.load_state_dict(selection.best)
    chosen = selection.chosen
    metrics = {
        "epochs": len(selection.history),
        "chosen_epoch": int(chosen["epoch"]),
        "train_images": len(fit_split),
        "train_loss": chosen["train_loss"],
        "val_select": {key.removeprefix("val_"): chosen[key] for key in chosen if "val_" in key},
        "trainable_parameters": cost.pop("trainable_parameters"),
    }
    model.cpu().eval()
    if train.trainable in {"lora", "dora"}:
        some = EvaluationImages(select_split, preprocessing)
        metrics["merge"] = {"logit_difference": merge_checked(model, some, preprocessing)}
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    metrics["cost"] = cost
    return TrainingResult(model, config, selection.history, metrics, selection.best_logits)


@dataclass(frozen=True)
class _Feed:
    """What is trained on what: the model on images or, where they never change, its head on features."""

    model: RoadworkClassifier
    preprocessing: Preprocessing
    images: TrainingImages | TrainingFeatures
    select_images: EvaluationImages | KeptFeatures


def _feed(
    model: RoadworkClassifier,
    train: Train,
    subnet: Subnet,
    fit_split: Split,
    select_split: Split,
    preprocessing: Preprocessing,
    seed: int,
    device: torch.device,
) -> _Feed:
    if features_are_constant(train, model, len(fit_split) + len(select_split)):
        log.info("the backbone's features never change: they are computed once")
        # As a training step and as the choice of the epoch compute them.
        bf16 = precision(train.precision, device) == "bf16-mixed"
        fitted, selecting = (
            features_of(model.backbone, split, preprocessing, size, device, bf16=half)
            for split, size, half in (
                (fit_split, train.batch_size, bf16), (select_split, SELECT_BATCH, False),
            )
        )  # fmt: skip
        return _Feed(
            head_alone(model), AsItIs(**vars(preprocessing)),
            TrainingFeatures(fit_split, fitted), KeptFeatures(select_split, selecting),
        )  # fmt: skip
    images = TrainingImages(
        fit_split, preprocessing, training_transform(train), seed,
        ServedAugmentation(train, subnet, preprocessing) if train.served_probability else None,
    )  # fmt: skip
    return _Feed(model, preprocessing, images, EvaluationImages(select_split, preprocessing))


def merge_checked(
    model: RoadworkClassifier, images: EvaluationImages, preprocessing: Preprocessing
) -> float:
    """Merge the adapters in place; return the largest difference this makes to a logit of a few images.

    Raises
    ------
    UserError
        It is above `MERGE_TOLERANCE`, relative to the largest logit where that is above 1.
    """
    rows, device = range(min(MERGE_IMAGES, len(images))), torch.device("cpu")
    before = predict_logits(model, images, preprocessing, device, rows=rows)
    merge_adapters(model.backbone)
    after = predict_logits(model, images, preprocessing, device, rows=rows)
    difference = float(np.abs(after - before).max())
    if not difference <= MERGE_TOLERANCE * max(1.0, float(np.abs(before).max())):
        raise UserError(
            f"merging the adapters changes a logit by {difference:.2g}, more than {MERGE_TOLERANCE:g} "
            "of it: this backbone cannot be trained with these adapters; use another train.trainable"
        )
    return difference


def _cost(model: RoadworkClassifier, train: Train, images: int) -> dict[str, int]:
    """Log and return what a step costs; as if on one device, since devices change no result."""
    batch = min(train.batch_size, images)
    size = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cost = describe(
        model,
        (3, train.height_px, train.width_px),
        images_at_once=batch,
        images_a_step=batch * train.accumulate_batches,
        extra_bytes=4 * size * (train.weight_average != "none") + 4 * trained * train.grokfast,
    )
    log.info(
        "%d parameters, %d of them trained; %.3g FLOPs a step of %d images; peak of memory about %.2f GB",
        size, trained, cost["flops_per_step"], batch * train.accumulate_batches,
        cost["peak_memory_bytes"] / 1e9,
    )  # fmt: skip
    return cost
