"""The ladder of the pipeline: a baseline and, rung by rung, what is laid over what was kept before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from streetvision.presets import merge
from streetvision.studies.variants import (
    BASE,
    OBJECTIVES,
    PARTS,
    Changes,
    Comparison,
    Variant,
    comparisons,
    named,
)


@dataclass(frozen=True)
class Rung:
    """A step of training: the best of its variants on VAL_SELECT is carried on if it helps."""

    name: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Ladder:
    """The ladder on one kind of data.

    `comparison` has the recipe, the data and no variant but the baseline. After training come the rungs
    fusion, calibration and deployed threshold, all in one run a network, which took `views_seconds`
    where it was planned.
    """

    comparison: Comparison
    rungs: tuple[Rung, ...]
    views_seconds: float


def ladders(size: str, data: str) -> list[Ladder]:
    """The ladders of `data` (or `all`): `smoke` tests the code, `cpu` is for two cores, `large` a GPU.

    Raises
    ------
    UserError
        Unknown size or data.
    """
    found = [each for each in comparisons(size) if each.name in _BUILD]
    return [_BUILD[each.name](each, size) for each in named(found, data, None)]


def _adapters(*names: str) -> Rung:
    return Rung("PEFT variant", tuple(each for each in PARTS if each.name in names))


def _challenge(*shares: float) -> Rung:
    variants = (
        Variant(
            f"challenge_{round(100 * share)}", "augmentation",
            {"train": {"served_probability": share}},
        )
        for share in shares
    )  # fmt: skip
    return Rung("augmentation", tuple(variants))


def _decision(size: str, repeats: int) -> Changes:
    """Views are on; each image is distorted so many times."""
    found: dict[str, Any] = {
        "views": {"grid": 3},
        "cvfm": {"mode": "auto"},
        "embed": {"served_repeats": repeats},
    }
    if size == "smoke":
        found |= {
            "views": {"grid": 2},
            "cvfm": {"mode": "auto", "epochs": 3, "latent_dim": 8, "attention_dim": 8},
            "decision": {"n_resamples": 100},
        }
    return found


def _scenes(base: Comparison, size: str) -> Ladder:
    """The comparison's recipe on a split that has a VAL_CALIB and a fusion part."""
    old = base.recipe["data"]
    images = {"smoke": 240, "cpu": 7200, "large": 24000}[size]
    data = {
        "sources": [old["sources"][0] | {"images": images}],
        "train_fraction": 0.58,
        "val_select_fraction": 0.14,
        "val_calib_fraction": 0.14,
        "val_test_fraction": 0.14,
        "fusion_fraction": 0.12,
    }
    # Its weights come from the same scenes as before.
    pretraining = merge({"data": old}, base.pretraining or {})
    recipe = merge(merge(base.recipe, {"data": data}), _decision(size, 1))
    comparison = replace(
        base, recipe=recipe, pretraining=pretraining, variants=(BASE,), calibrated=True,
        seconds=50, adaptation_seconds=55,
    )  # fmt: skip
    objectives = OBJECTIVES if size == "large" else OBJECTIVES[:1]
    rungs = (
        Rung("ExPLoRA", objectives),
        _adapters("last_block", "lora", "lora_rslora"),
        _challenge(0.25, 0.5),
    )
    return Ladder(comparison, rungs, 200)


def _photos(base: Comparison, size: str) -> Ladder:
    """The comparison's recipe with folds that have a VAL_CALIB and a fusion part."""
    comparison = replace(
        base, recipe=merge(base.recipe, _decision(size, 2)), variants=(BASE,),
        folds=10 if size == "large" else 5, calibrated=True, seconds=30, adaptation_seconds=35,
    )  # fmt: skip
    rungs = (Rung("ExPLoRA", OBJECTIVES[:1]), _adapters("last_block", "lora"), _challenge(0.5))
    return Ladder(comparison, rungs, 60)


_BUILD = {"synthetic-resnet": _scenes, "photos-mobilenet": _photos}
