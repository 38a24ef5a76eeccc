"""What is compared: recipes (the plain baselines) and variants, each one change of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from streetvision.core.errors import UserError
from streetvision.core.params import Params, check_params, leaves
from streetvision.presets import merge, preset_changes, value

BASELINE = "baseline"
Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """Parameters laid over the recipe; compared, seed by seed, with the variant `against`."""

    name: str
    topic: str
    changes: Changes
    against: str = BASELINE

    @property
    def change(self) -> str:
        """The changed parameters in words, less those that only choose sizes."""
        if self.name == BASELINE:
            return "none"
        return ", ".join(f"{key} = {value(self.changes, key)}" for key in leaves(self.changes))


@dataclass(frozen=True)
class Comparison:
    """One table: a recipe on one kind of data, and its variants, the baseline first.

    `folds` 1 splits as `prepare` does; 3 and more rotate the groups with both classes (`data.rotate`),
    5 and more also where they are `calibrated`.
    With `pretraining` (changes to the recipe), the backbone starts from weights trained so before.
    `seconds` is what a run took on one core of the machine it was planned on, `adaptation_seconds` what
    adapting took besides; the estimate starts from them.
    """

    name: str
    data: str
    title: str
    recipe: Changes
    variants: tuple[Variant, ...]
    folds: int = 1
    calibrated: bool = False
    pretraining: Changes | None = None
    seconds: float = 1.0
    adaptation_seconds: float = 0.0

    def params(self, variant: Variant, seed: int, place: Changes | None = None) -> Params:
        """The checked parameters of one run; `place` holds what the machine adds."""
        document = Params().model_dump(mode="json")
        for changes in (self.recipe, place or {}, variant.changes, {"seed": seed}):
            document = merge(document, changes)
        return check_params(document, f"evidence {self.name}/{variant.name}")


SIZES = ("smoke", "cpu", "large")
DATA = ("synthetic", "photos")


def comparisons(size: str) -> list[Comparison]:
    """All tables at a size: `smoke` tests the code, `cpu` takes 90 minutes on two cores, `large` a GPU.

    Raises
    ------
    UserError
        Unknown size.
    """
    if size not in SIZES:
        raise UserError(f'--size "{size}" is not one of {", ".join(SIZES)}')
    return [_resnet(size), _vit(size), _photos(size)]


def _train(name: str, topic: str, against: str = BASELINE, **changes: Any) -> Variant:
    return Variant(name, topic, {"train": changes}, against)


def _explora(name: str, objective: str, **train: Any) -> Variant:
    changes: dict[str, Any] = {"explora": {"enabled": True, "objective": objective}}
    return Variant(name, "adaptation", changes | ({"train": train} if train else {}))


BASE = Variant(BASELINE, "", {})
OBJECTIVES = (
    _explora("explora_simclr", "simclr"),
    _explora("explora_byol", "byol"),
    _explora("explora_swav", "swav"),
    _explora("explora_byol_swav", "byol_swav"),
)
LOSSES = (
    _train("focal", "loss", loss="focal"),
    _train("weighted_ce", "loss", loss="weighted_ce"),
    _train("label_smoothing", "loss", label_smoothing=0.1),
    _train("balanced_sampler", "loss", balanced_sampler=True),
)
AUGMENTATIONS = (
    _train("trivial_augment", "augmentation", augmentation="trivial_augment"),
    _train("augmix", "augmentation", augmentation="augmix"),
    _train("erasing", "augmentation", erasing_probability=0.25),
    _train("mixup", "augmentation", mixup_alpha=0.2),
    _train("cutmix", "augmentation", cutmix_alpha=1.0),
    # Judged, as all are, on what `crop` sends, too.
    Variant(
        "challenge",
        "augmentation",
        {"subnet": {"validator": "crop"}, "train": {"served_probability": 0.5}},
    ),
)
HEAD = _train("mlp_head", "head", head="mlp")
GROKFAST = _train("grokfast", "optimisation", grokfast=True)
AVERAGES = (
    _train("ema", "optimisation", weight_average="ema", ema_decay=0.99),
    _train("swa", "optimisation", weight_average="swa"),
)
LAYER_DECAY = _train("layer_decay", "trainable part", layer_decay=0.7)
PARTS = (
    _train("head", "trainable part", trainable="head"),
    _train("last_block", "trainable part", trainable="last_n_blocks", last_n_blocks=1),
    _train("lora", "trainable part", trainable="lora"),
    _train("dora", "trainable part", trainable="dora"),
    _train("lora_rslora", "trainable part", trainable="lora", lora={"rslora": True}),
)

# A run may not depend on which epoch looked best on the images that the variants are compared on; and the
# challenge augmentation is a variant.
_FAIR: Changes = {"choose_epoch": "last", "served_probability": 0.0}


def _synthetic(images: int, cities: int, **other: Any) -> Changes:
    source = {"kind": "synthetic", "name": "synthetic", "images": images, "cities": cities}
    return {
        "sources": [source | other],
        "fusion_fraction": 0.0,
        "train_fraction": 0.7,
        "val_select_fraction": 0.14,
        "val_calib_fraction": 0.02,
        "val_test_fraction": 0.14,
    }


_SCENES: dict[str, Changes] = {
    "smoke": {**_synthetic(200, 50, width_px=96, height_px=72, positive_share=0.5), "side_px": 32},
    "cpu": _synthetic(6000, 480),
    "large": _synthetic(20000, 1000),
}
_TINY: Changes = {"height_px": 32, "width_px": 48, "batch_size": 16}


def _pretraining(size: str, train: Changes) -> Changes:
    """Supervised, on other scenes than those of the runs."""
    images, cities = {"smoke": (200, 50), "cpu": (12000, 300), "large": (40000, 1000)}[size]
    scenes = _SCENES[size]["sources"][0] | {"images": images, "cities": cities}
    return {"data": {"sources": [scenes]}, "train": train}


def _resnet(size: str) -> Comparison:
    """Convolutional network: losses, augmentations, averages, ExPLoRA.

    It is pretrained on other scenes, as a backbone for photographs would be on other photographs. From
    random weights so few epochs end at a VAL_SELECT MCC between .45 and .73, by the seed alone.
    """
    smoke = size == "smoke"
    train: Changes = {
        **_FAIR,
        **(_TINY if smoke else {}),
        "backbone": "street_resnet_tiny" if smoke else "street_resnet",
        "epochs": {"smoke": 3, "cpu": 3, "large": 12}[size],
    }
    explora: Changes = {
        "epochs": {"smoke": 1, "cpu": 2, "large": 10}[size],
        "batch_size": 32 if smoke else 128,
    }
    precision = (_train("fp32", "precision", precision="fp32"),)
    return Comparison(
        "synthetic-resnet",
        "synthetic",
        "Rendered scenes, street_resnet pretrained on other scenes",
        {"data": _SCENES[size], "train": train, "explora": explora},
        (BASE, *OBJECTIVES, LAYER_DECAY, *LOSSES, *AUGMENTATIONS, HEAD, GROKFAST, *AVERAGES,
         *precision),
        pretraining=_pretraining(size, {"epochs": {"smoke": 1, "cpu": 6, "large": 30}[size]}),
        seconds=52,
        adaptation_seconds=67,
    )  # fmt: skip


def _vit(size: str) -> Comparison:
    """A small transformer that is pretrained on other scenes: trainable parts, adapters, ExPLoRA, Muon.

    Adapters on random weights would be meaningless; and a plain ViT learns nothing from so few scenes.
    """
    smoke = size == "smoke"
    train: Changes = {
        **_FAIR,
        **(_TINY if smoke else {}),
        "backbone": "street_xcit",
        "epochs": {"smoke": 3, "cpu": 4, "large": 10}[size],
        "learning_rate": 0.001,
        "precision": "fp32",
    }
    explora: Changes = {
        "epochs": {"smoke": 1, "cpu": 2, "large": 10}[size],
        "batch_size": 32 if smoke else 128,
        "precision": "fp32",
    }
    scenes = _SCENES[size] if size != "cpu" else _synthetic(3600, 480)
    # A learning rate of 0.002 left it at chance in one run of two.
    start: Changes = {
        "epochs": {"smoke": 1, "cpu": 8, "large": 30}[size],
        "warmup_fraction": 0.1,
    }
    variants = (
        BASE,
        OBJECTIVES[0],
        *PARTS,
        _train(
            "lora_pissa", "trainable part", against="lora",
            trainable="lora", lora={"init": "pissa"},
        ),
        _train(
            "lora_fast", "trainable part", against="lora", trainable="lora", learning_rate=0.004
        ),
        _explora_lora(),
        _train("muon", "optimisation", optimiser="muon"),
    )  # fmt: skip
    return Comparison(
        "synthetic-xcit",
        "synthetic",
        "Rendered scenes, street_xcit (a small transformer) pretrained on other scenes",
        {"data": scenes, "train": train, "explora": explora},
        variants,
        pretraining=_pretraining(size, start),
        seconds=52,
        adaptation_seconds=62,
    )


def _explora_lora() -> Variant:
    """As in the ExPLoRA paper: adapt, then fine-tune with LoRA."""
    changes = {"explora": {"enabled": True}, "train": {"trainable": "lora"}}
    return Variant("explora_then_lora", "adaptation", changes, against="lora")


def _photos(size: str) -> Comparison:
    """The photographs, MobileNetV2 pretrained on ImageNet, sites held out in turn; no variant twice over.

    Muon has no hidden matrix there.
    """
    large = size == "large"
    fast = _train(
        "lora_fast", "trainable part", against="lora", trainable="lora", learning_rate=0.0015
    )
    parts = [each for each in PARTS if each.name != "lora_rslora"]  # the transformer has it
    variants = (BASE, *OBJECTIVES, *parts, fast, LOSSES[0], *AUGMENTATIONS, AVERAGES[0])
    # A run takes nearly a minute there, and the table is to take less than two hours.
    left_out = {*(each.name for each in OBJECTIVES[1:]), fast.name, "erasing", "mixup", "cutmix"}
    preset = preset_changes("photos")
    side = {"smoke": 32, "cpu": 160, "large": 256}[size]
    changes: Changes = {
        "train": {
            **_FAIR,
            "height_px": side,
            "width_px": side,
            "epochs": {"smoke": 1, "cpu": 4, "large": 5}[size],
            # A third of the photographs is few: small batches give more steps.
            **({"batch_size": 16, "learning_rate": 0.00015} if size == "cpu" else {}),
        },
        "explora": {
            "epochs": {"smoke": 1, "cpu": 2, "large": 10}[size],
            "batch_size": 64,
            "learning_rate": 0.0003,
        },
    }
    return Comparison(
        "photos-mobilenet",
        "photos",
        "Photographs, MobileNetV2 pretrained on ImageNet",
        merge(preset, changes),
        variants if large else tuple(each for each in variants if each.name not in left_out),
        folds=10 if large else 3,
        seconds=45,
        adaptation_seconds=40,
    )  # fmt: skip


def named(found: list[Comparison], data: str, names: list[str] | None) -> list[Comparison]:
    """The comparisons on `data` (or `all`), with only the named variants, the baseline always.

    Raises
    ------
    UserError
        Unknown data or variant.
    """
    if data not in {*DATA, "all"}:
        raise UserError(f'--data "{data}" is not one of {", ".join((*DATA, "all"))}')
    chosen = [each for each in found if data in {each.data, "all"}]
    if names is None:
        return chosen
    known = {variant.name for each in chosen for variant in each.variants}
    unknown = sorted(set(names) - known)
    if unknown:
        raise UserError(f'--variants: "{unknown[0]}" is not one of {", ".join(sorted(known))}')
    return [_only(each, names) for each in chosen]


def _only(comparison: Comparison, names: list[str]) -> Comparison:
    """With what the named variants are compared against."""
    wanted = {BASELINE, *names}
    wanted |= {variant.against for variant in comparison.variants if variant.name in names}
    kept = tuple(variant for variant in comparison.variants if variant.name in wanted)
    return replace(comparison, variants=kept)


def every_run(comparison: Comparison, seeds: int) -> Iterator[tuple[Variant, int, int]]:
    """Variant, seed and fold of each run; all variants with one seed before the next seed."""
    for seed in range(seeds):
        for variant in comparison.variants:
            for fold in range(comparison.folds):
                yield variant, seed, fold
