"""The parameters: typed, frozen, unknown keys refused; the defaults are those of `params.yaml`.

One model a section of `params.yaml`; each field says its unit. DVC tracks the leaves (a list is one leaf).
The sections `gates` and `hardware` may not change results and are not tracked.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from streetvision.core.documents import read_yaml
from streetvision.core.errors import UserError


def _no_truth_value(value: object) -> object:
    """YAML reads `yes` and `on` as true, which pydantic would take for 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed")  # noqa: TRY004 (pydantic reports only ValueError)
    return value


Number = Annotated[float, BeforeValidator(_no_truth_value)]
Integer = Annotated[int, BeforeValidator(_no_truth_value)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
OpenFraction = Annotated[Number, Field(gt=0, lt=1)]
Count = Annotated[Integer, Field(ge=1)]
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors, numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --------------------------------------------------------------------------- data


class SyntheticSource(Section):
    """Procedurally rendered street scenes."""

    kind: Literal["synthetic"]
    name: SourceName = "synthetic"
    images: Count = 14000
    cities: Annotated[Integer, Field(ge=1, le=1500)] = 300
    drives_per_city: Annotated[Integer, Field(ge=1, le=64)] = 3
    positive_share: OpenFraction = 0.6
    width_px: Annotated[Integer, Field(ge=64, le=2048)] = 256
    height_px: Annotated[Integer, Field(ge=64, le=2048)] = 192


class FolderSource(Section):
    """Images in class sub-folders of `path`, which is relative to `data.local_root`."""

    kind: Literal["folder"]
    name: SourceName = "folder"
    path: str = "."
    positive_folders: list[str] = ["roadwork", "Roadwork", "1"]
    negative_folders: list[str] = ["none", "None", "0"]


class NamedClasses(Section):
    """What a table calls its classes, beyond 0 and 1 and sure names such as None and Roadwork."""

    positive_classes: list[str] = []
    negative_classes: list[str] = []

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = sorted(set(self.positive_classes) & set(self.negative_classes))
        if both:
            raise ValueError(f"both in positive_classes and negative_classes: {', '.join(both)}")
        return self


class CsvSource(NamedClasses):
    """A CSV with columns file, label, group and any more; files are relative to `images`."""

    kind: Literal["csv"]
    name: SourceName = "csv"
    path: str
    images: str = "."


class ParquetSource(NamedClasses):
    """Parquet files in the NATIX schema as found in the wild: one file or a folder of them."""

    kind: Literal["parquet"]
    name: SourceName = "parquet"
    path: str


class HubSource(NamedClasses):
    """A data set of the Hugging Face hub at a pinned revision (a commit hash)."""

    kind: Literal["hub"]
    name: SourceName = "hub"
    repo_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    # `unpinned` only stands in for a choice not made yet: `ingest` refuses it and says how to pin.
    revision: Annotated[str, Field(pattern=r"^([0-9a-f]{40}|unpinned)$")]
    files: list[str] = ["data/*.parquet"]


Source = Annotated[
    SyntheticSource | FolderSource | CsvSource | ParquetSource | HubSource,
    Field(discriminator="kind"),
]

_SOURCES: dict[str, type[Section]] = {
    "synthetic": SyntheticSource,
    "folder": FolderSource,
    "csv": CsvSource,
    "parquet": ParquetSource,
    "hub": HubSource,
}


class Data(Section):
    """What goes in, how it is prepared and how it is split."""

    local_root: str = Field("data/local", description="folder of all local sources; DVC watches it")
    sources: Annotated[list[Source], Field(min_length=1)] = [SyntheticSource(kind="synthetic")]
    shard_images: Count = Field(1000, description="rows of one raw Parquet shard")
    side_px: Annotated[Integer, Field(ge=16, le=4096)] = Field(
        96, description="stored shorter side, pixels"
    )
    jpeg_quality: Annotated[Integer, Field(ge=1, le=100)] = 92
    max_source_pixels: Count = Field(100_000_000, description="larger images are refused as bombs")
    max_bad_fraction: Fraction = Field(
        0.02, description="more unusable rows than this stop the stage"
    )
    group_by: Literal["given", "gps"] = Field(
        "given", description="given falls back to gps per row"
    )
    gps_cell_m: Annotated[Number, Field(gt=0)] = Field(
        500.0, description="edge of a GPS cell, metres"
    )
    duplicate_hash_bits: Annotated[Integer, Field(ge=0, le=32)] = Field(
        6, description="largest Hamming distance of 64-bit perceptual hashes of a candidate pair"
    )
    duplicate_pixel_error: Fraction = Field(
        0.04, description="largest mean absolute pixel difference (of 1) of a verified pair"
    )
    duplicate_max_cluster: Count = Field(200, description="largest near-duplicate cluster, images")
    duplicate_max_groups: Count = Field(
        4, description="places that near-duplicates join into one group; beyond, they are set aside"
    )
    split_seed: Annotated[Integer, Field(ge=0, le=2**31 - 1)] = Field(
        7,
        description="of the split alone: with another `seed` each image stays in its split, so that no run "
        "chooses by what is another's VAL_TEST",
    )
    test_originals: Annotated[Integer, Field(ge=0)] = Field(
        1000,
        description="files of VAL_TEST's images that are kept as they came, at most, for `challenge`, which "
        "sends them; 0 sends the stored copies",
    )
    train_fraction: OpenFraction = 0.6
    val_select_fraction: OpenFraction = 0.1
    val_calib_fraction: OpenFraction = 0.15
    val_test_fraction: OpenFraction = 0.15
    fusion_fraction: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.15, description="share of TRAIN kept from `train` for fitting fusion"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = sum(self.fractions.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the four split fractions add up to {total:g}, not 1")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ, got {', '.join(names)}")
        return self

    @property
    def fractions(self) -> dict[str, float]:
        """Share of each split, by name."""
        return {
            "train": self.train_fraction,
            "val_select": self.val_select_fraction,
            "val_calib": self.val_calib_fraction,
            "val_test": self.val_test_fraction,
        }


# --------------------------------------------------------------------------- explora, train, embed


class Lora(Section):
    """Low-rank adapters (PEFT): W + alpha / rank · BA; arXiv 2106.09685."""

    rank: Count = 8
    alpha: Annotated[Number, Field(gt=0)] = 16.0
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(0.0, description="before A")
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        ["auto"],
        description="ends of module names; auto: attention and MLP of a ViT, else 1×1 convolutions",
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank); arXiv 2312.03732")


class TrainLora(Lora):
    """The adapters of `train`, which may also start from the principal singular vectors."""

    init: Literal["default", "pissa"] = Field(
        "default", description="pissa: arXiv 2404.02948, for linear layers only"
    )


class Compile(Section):
    """`torch.compile`, of `explora` and `train`; eager with a warning where it is impossible."""

    enabled: bool = False
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "default"
    )
    fullgraph: bool = False
    dynamic: bool = False
    stance: Literal["default", "force_eager", "eager_on_recompile", "fail_on_recompile"] = "default"


class Explora(Section):
    """Phase 4a: self-supervised adaptation of `train.backbone` to TRAIN's images; arXiv 2406.10973."""

    enabled: bool = Field(False, description="false passes the backbone through")
    objective: Literal["simclr", "byol", "swav", "byol_swav"] = "simclr"
    lora: Lora = Lora()
    unfreeze_blocks: Annotated[Integer, Field(ge=0)] = Field(
        1, description="last blocks trained in full beside the adapters"
    )
    train_norms: bool = Field(False, description="train the affine norm parameters, too")
    temperature: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.1, description="of simclr and swav; 0.07 to 0.2 is usual"
    )
    projection_hidden: Count = 256
    projection_dim: Count = 128
    teacher_decay: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.99, description="of byol's EMA teacher, a step"
    )
    prototypes: Annotated[Integer, Field(ge=2)] = Field(64, description="of swav")
    sinkhorn_epsilon: Annotated[Number, Field(gt=0)] = 0.05
    sinkhorn_iterations: Count = 3
    crop_min_area: Annotated[Number, Field(gt=0, le=1)] = 0.2
    flip_probability: Fraction = 0.5
    colour_jitter: Fraction = Field(
        0.4, description="range of brightness, contrast and saturation; hue a quarter of it"
    )
    jitter_probability: Fraction = 0.8
    grey_probability: Fraction = 0.2
    blur_probability: Fraction = 0.5
    epochs: Count = 2
    batch_size: Annotated[Integer, Field(ge=2)] = Field(
        128, description="images of a contrastive batch, over all ranks"
    )
    accumulate_batches: Count = Field(1, description="batches a step; adds no negatives")
    gradient_cache_chunks: Count = Field(
        1, description="chunks that a batch passes the backbone in; the gradient stays the same"
    )
    learning_rate: Annotated[Number, Field(gt=0)] = 0.001
    weight_decay: Annotated[Number, Field(ge=0)] = 0.05
    warmup_fraction: Annotated[Number, Field(ge=0, lt=1)] = Field(0.1, description="of all steps")
    gradient_clip: Annotated[Number, Field(ge=0)] = Field(1.0, description="norm; 0 turns it off")
    precision: Literal["fp32", "bf16"] = "bf16"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.gradient_cache_chunks:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of "
                f"gradient_cache_chunks {self.gradient_cache_chunks}"
            )
        return self


class Probe(Section):
    """Linear probes of the backbone before and after `explora`."""

    inverse_l2: Annotated[Number, Field(gt=0)] = Field(
        0.1, description="C of the logistic regression on standardised features"
    )
    max_images: Count = Field(4000, description="TRAIN images the probes are fitted on, at most")
    n_resamples: Annotated[Integer, Field(ge=100)] = Field(
        2000, description="group-bootstrap resamples"
    )


# Families whose weights are matrices: only these have a PiSSA initialisation.
_LINEAR_FAMILIES = ("vit_", "deit", "eva", "beit", "xcit", "street_vit", "street_xcit")


class Train(Section):
    """Phase 1: the classifier."""

    # What is trained, from where.
    backbone: str = Field("street_resnet", description="timm name or one of ours")
    weights: str = Field(
        "none", description="none, hub, or a file of weights by timm, torch or Lightning"
    )
    init_from_explora: bool = Field(True, description="start from what `explora` wrote")
    backbone_checkpoint: str = Field(
        "none", description="or from this file of weights; none turns it off"
    )
    head: Literal["linear", "mlp"] = "linear"
    head_hidden: Count = Field(256, description="width of the mlp head")
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(0.0, description="before the head")
    trainable: Literal["full", "head", "last_n_blocks", "lora", "dora"] = "full"
    last_n_blocks: Count = Field(1, description="of the backbone, for that choice of trainable")
    lora: TrainLora = TrainLora()
    freeze_norm: bool = Field(
        False, description="keep BatchNorm statistics fixed (folded backbones)"
    )
    # The input.
    height_px: Annotated[Integer, Field(ge=16, le=2048)] = Field(
        96, description="input height, pixels"
    )
    width_px: Annotated[Integer, Field(ge=16, le=2048)] = Field(
        128, description="input width, pixels"
    )
    fit: Literal["letterbox", "crop"] = Field(
        "letterbox", description="how other shapes meet the input"
    )
    # Augmentation.
    crop_min_area: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.6, description="smallest share of the area a training crop keeps"
    )
    flip_probability: Fraction = 0.5
    colour_jitter: Fraction = Field(0.2, description="range of brightness, contrast and saturation")
    augmentation: Literal["none", "trivial_augment", "augmix"] = "none"
    trivial_augment_bins: Annotated[Integer, Field(ge=2)] = 31
    augmix_severity: Annotated[Integer, Field(ge=1, le=10)] = 3
    augmix_width: Count = 3
    augmix_alpha: Annotated[Number, Field(gt=0)] = 1.0
    erasing_probability: Fraction = 0.0
    mixup_alpha: Annotated[Number, Field(ge=0)] = Field(0.0, description="0 turns it off")
    cutmix_alpha: Annotated[Number, Field(ge=0)] = Field(
        0.0, description="0 turns it off; with mixup_alpha, each batch draws one of the two"
    )
    served_probability: Fraction = Field(
        0.0, description="share of images that are shown as `subnet.validator` sends them instead"
    )
    augmentation_gate: Annotated[Integer, Field(ge=0)] = Field(
        0, description="seeds to compare with and without augmentation first; 0 skips the gate"
    )
    augmentation_gate_on: Literal["served", "clean"] = Field(
        "served",
        description="VAL_SELECT's images that the gate judges by: as `subnet.validator` sends them, or as "
        "they are; both are reported",
    )
    # Loss.
    loss: Literal["ce", "weighted_ce", "focal"] = "ce"
    focal_gamma: Annotated[Number, Field(ge=0)] = 2.0
    focal_alpha: Annotated[
        list[Annotated[Number, Field(gt=0)]], Field(min_length=2, max_length=2)
    ] = Field([1.0, 1.0], description="weight of no roadwork, of roadwork")
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    balanced_sampler: bool = Field(False, description="draw both classes equally often")
    # Optimisation.
    epochs: Count = 6
    batch_size: Annotated[Integer, Field(ge=2)] = Field(32, description="over all ranks")
    accumulate_batches: Count = Field(1, description="batches a step")
    optimiser: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: hidden matrices by Muon, the rest by AdamW"
    )
    learning_rate: Annotated[Number, Field(gt=0)] = 0.003
    head_learning_rate_factor: Annotated[Number, Field(gt=0)] = Field(
        1.0, description="the head's learning rate over that of the backbone"
    )
    layer_decay: Annotated[Number, Field(gt=0, le=1)] = Field(
        1.0, description="factor on the learning rate from each block to the one below"
    )
    weight_decay: Annotated[Number, Field(ge=0)] = 0.05
    warmup_fraction: Annotated[Number, Field(ge=0, lt=1)] = Field(0.15, description="of all steps")
    gradient_clip: Annotated[Number, Field(ge=0)] = Field(1.0, description="norm; 0 turns it off")
    grokfast: bool = Field(False, description="amplify slow gradients; arXiv 2405.20233")
    grokfast_alpha: Annotated[Number, Field(ge=0, lt=1)] = Field(0.98, description="EMA's decay")
    grokfast_lambda: Annotated[Number, Field(ge=0)] = Field(2.0, description="EMA's weight")
    weight_average: Literal["none", "ema", "swa"] = "none"
    ema_decay: Annotated[Number, Field(ge=0, lt=1)] = Field(0.999, description="a step")
    swa_start_fraction: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.75, description="of all steps, from where on swa averages"
    )
    choose_epoch: Literal["best_mcc", "best_log_loss", "last"] = Field(
        "best_mcc",
        description="on VAL_SELECT; last where VAL_SELECT is too small to choose on",
    )
    patience_epochs: Annotated[Integer, Field(ge=0)] = Field(
        0, description="stop after so many epochs without a better one; 0 never stops early"
    )
    precision: Literal["fp32", "bf16"] = "bf16"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.patience_epochs and self.choose_epoch == "last":
            raise ValueError("patience_epochs needs choose_epoch best_mcc or best_log_loss")
        if self.loss == "weighted_ce" and self.balanced_sampler:
            raise ValueError("weighted_ce and balanced_sampler would both balance the classes")
        if self.init_from_explora and self.backbone_checkpoint != "none":
            raise ValueError("backbone_checkpoint needs init_from_explora false")
        peft = self.trainable in {"lora", "dora"}
        if peft and self.lora.init == "pissa" and not self.backbone.startswith(_LINEAR_FAMILIES):
            raise ValueError(
                f"lora.init pissa exists for linear layers only, and {self.backbone} is not known "
                f"to have them ({', '.join(_LINEAR_FAMILIES)}…); use default"
            )
        return self


class Embed(Section):
    """Cached logits and features."""

    batch_size: Count = Field(64, description="images a forward pass")
    served_repeats: Annotated[Integer, Field(ge=1, le=100)] = Field(
        4,
        description="versions of each image as `subnet.validator` sends them, its levels mixed; with 4 equal "
        "shares each level once; `raw` has one version",
    )


class ViewGrid(Section):
    """Views of an image beside the global one."""

    grid: Annotated[Integer, Field(ge=1, le=8)] = Field(
        1, description="tiles in a row and in a column; 1 is the global view alone"
    )
    growth: Annotated[Number, Field(ge=0, le=2)] = Field(
        0.15, description="by which each tile is longer and wider than its cell"
    )
    flip: bool = Field(False, description="each view mirrored, too")


class Cvfm(Section):
    """Phase 4c: one logit of all views of an image."""

    mode: Literal[
        "auto", "single", "simple_mean", "topk_mean", "weighted_uncertainty", "content_aware",
        "mlp", "latent", "attention",
    ] = Field("auto", description="auto: the lowest VAL_SELECT log loss, single among them")  # fmt: skip
    top_k: Count = Field(3, description="tiles of topk_mean")
    temperature: Annotated[Number, Field(gt=0)] = Field(
        1.0, description="of weighted_uncertainty; the larger, the more equal are the weights"
    )
    hidden_layers: Annotated[Integer, Field(ge=0, le=4)] = Field(
        0, description="of mlp; 0 is logistic regression"
    )
    hidden_dim: Count = Field(64, description="width of mlp's hidden layers")
    latent_dim: Count = Field(64, description="of latent")
    attention_dim: Count = Field(64, description="width of attention's tokens")
    attention_heads: Count = 4
    reconstruction_weight: Annotated[Number, Field(ge=0)] = Field(
        0.1, description="of latent's reconstruction error beside the cross entropy"
    )
    view_dropout: Fraction = Field(
        0.25, description="share of training images that keep a random number of their tiles only"
    )
    fits: Annotated[Integer, Field(ge=1, le=5)] = Field(
        1,
        description="1: one network on the whole fusion part; more: the mean logit of so many, each "
        "fitted without another fifth of the groups",
    )
    epochs: Count = Field(40, description="of L-BFGS on the whole fusion part")
    patience_epochs: Count = Field(10, description="stop after so many without a better one")
    weight_decay: Annotated[Number, Field(ge=0)] = Field(
        0.05, description="half of it times the squared weights is added to the mean loss"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.attention_dim % self.attention_heads:
            raise ValueError(
                f"attention_dim {self.attention_dim} is not a multiple of "
                f"attention_heads {self.attention_heads}"
            )
        return self


# --------------------------------------------------------------------------- decision


class Sweep(Section):
    """Phase 2: the threshold with the highest MCC on VAL_CALIB."""

    n_thresholds: Annotated[Integer, Field(ge=2, le=1_000_000)] = 5000
    optimize_metric: Literal["mcc"] = "mcc"
    selection: Literal["exact", "bagged_median"] = "exact"
    save_curve: bool = True


class Decision(Section):
    """The deployed decision rule."""

    fit_on: Literal["served", "clean"] = Field(
        "served",
        description="of fusion and policy: images as `subnet.validator` sends them, or as they are; "
        "both are reported",
    )
    served_prior: OpenFraction = Field(0.5, description="share of roadwork among served images")
    n_resamples: Annotated[Integer, Field(ge=100)] = Field(
        2000, description="group-bootstrap resamples"
    )
    calibrator: Literal[
        "auto", "temperature", "platt", "beta", "quadratic", "isotonic", "pchip", "venn_abers",
        "tier_1", "tier_2", "tier_3", "multi_objective",
    ] = Field(
        "platt",
        description="auto: of platt, beta, quadratic and pchip the one with the lowest log loss out of "
        "group folds; tier_1 to tier_3: ensembles; multi_objective: of all these the lowest ECE that "
        "keeps MCC and FNR; temperature, isotonic and venn_abers are reported but cannot be deployed",
    )  # fmt: skip
    hard_image_views: Literal["none", "all"] = Field(
        "none",
        description="all: the global view alone, and all views for the images that it leaves unsure; "
        "none: all views for every image. Nothing to choose where fusion takes a single view",
    )
    hard_image_margin: Annotated[Number, Field(gt=0, lt=0.5)] = Field(
        0.4, description="unsure: a first-pass probability nearer to 0.5 than this"
    )
    exchangeable_unit: Literal["group", "drive"] = Field(
        "group",
        description="what folds, intervals and promises count; there are more drives than groups, but "
        "they take the drives of one group for independent, so that a new group may break them",
    )
    abstention: Literal["none", "scrc_t", "scrc_i"] = Field(
        "none",
        description="accept confident images only, with a promise on the risk among them: scrc_t in "
        "expectation, scrc_i with probability 1 - delta; the calibrator then sees fewer groups",
    )
    control: Literal["error", "fnr"] = Field(
        "error", description="the risk among the accepted: errors, or missed roadwork"
    )
    alpha: OpenFraction = Field(0.05, description="level of that risk")
    delta: OpenFraction = Field(0.1, description="probability that scrc_i may break its promise")
    guarantee_fraction: OpenFraction = Field(
        0.5, description="share of the groups that hold the guarantee, and fit no calibrator"
    )

    @field_validator("calibrator")
    @classmethod
    def _check_deployable(cls, value: str) -> str:
        if value in _REPORTED_ONLY:
            reason, instead = _REPORTED_ONLY[value]
            raise ValueError(f"{reason}, so it is reported but not deployed; use {instead} or auto")
        return value


# Calibrators that no policy may use: why, and the nearest that may.
_REPORTED_ONLY = {
    "temperature": ("a temperature alone has no intercept to match the prior with", "platt"),
    "isotonic": ("an isotonic map is not strictly increasing", "pchip"),
    "venn_abers": ("a Venn–Abers map is not strictly increasing", "pchip"),
}


class Export(Section):
    """Phase 6: the bundle."""

    make_tar: bool = Field(False, description="also write bundle.tar.gz")
    onnx: bool = Field(False, description="also write ONNX models, for onnxruntime without torch")
    max_logit_difference: Annotated[Number, Field(gt=0)] = Field(
        1e-3, description="between torch and ONNX on any VAL_CALIB image; no decision may change"
    )
    int8: Literal["none", "dynamic", "static"] = Field(
        "none", description="also an int8 ONNX model: matrix products alone, or nearly everything"
    )
    max_mcc_drop: Annotated[Number, Field(ge=0, le=2)] = Field(
        0.005, description="of int8 on VAL_SELECT; a model that loses more is not shipped"
    )
    timed_images: Annotated[Integer, Field(ge=0)] = Field(
        0, description="single predictions to time on the CPU, with each engine; 0 times none"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.int8 != "none" and not self.onnx:
            raise ValueError(f"int8 {self.int8} needs onnx: true")
        return self


class Evaluate(Section):
    """The final report."""

    n_resamples: Annotated[Integer, Field(ge=100)] = Field(
        2000, description="group-bootstrap resamples"
    )
    mistakes: Annotated[Integer, Field(ge=0, le=200)] = Field(
        24, description="images in the contact sheet"
    )


class SourceShare(Section):
    """How many of the challenges show images of one source."""

    source: Annotated[str, Field(min_length=1, description="its name in `data.sources`")]
    share: Annotated[Number, Field(ge=0, le=1)]


Validator = Literal["raw", "letterbox", "crop"]  # `streetvision.subnet.profiles` has them


class Subnet(Section):
    """What is served: the validator whose images are trained for, calibrated on and reported first."""

    validator: Validator = Field("raw", description="the era; `python -m streetvision subnet`")
    flip_probability: Fraction = Field(
        0.0, description="of each axis, from level 1 on; the public validators never flip"
    )


class Challenge(Section):
    """What the subnet would pay: VAL_TEST as its validators send it.

    Most of the subnet's images are generated or its own, and none can be made here: who has some names their
    folder or Parquet in `data.sources`, and that source with its share here.
    """

    validators: tuple[Validator, ...] = Field(
        ("raw", "letterbox", "crop"), description="reported after `subnet.validator`"
    )
    source_shares: tuple[SourceShare, ...] = Field(
        (), description="shares of the challenges by source; other sources share the rest by images"
    )
    repeats: Annotated[Integer, Field(ge=1, le=100)] = Field(
        1, description="versions of each image at each level that draws anything"
    )
    n_resamples: Annotated[Integer, Field(ge=100)] = Field(
        2000, description="group-bootstrap resamples"
    )
    simulated_days: Annotated[Integer, Field(ge=2, le=100_000)] = Field(
        1000, description="days in the picture of the reward's distribution"
    )
    challenges_per_day: Annotated[Integer, Field(ge=1, le=10_000)] = Field(
        300, description="an assumption: validators differ"
    )
    rival_accuracy: Fraction = Field(0.95, description="of the miner to beat over a day")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.validators)) < len(self.validators):
            raise ValueError("validators names one twice")
        names = [each.source for each in self.source_shares]
        if len(set(names)) < len(names):
            raise ValueError("source_shares names a source twice")
        if (given := sum(each.share for each in self.source_shares)) > 1 + 1e-6:
            raise ValueError(f"source_shares add up to {given:g}, more than 1")
        return self


class Gates(Section):
    """What `python -m streetvision gate` lets pass, judged on 95 % intervals; None (null) is off."""

    max_mcc_drop: Fraction | None = Field(0.02, description="of MCC on VAL_TEST, base minus head")
    max_accuracy_drop: Fraction | None = Field(
        None, description="of accuracy (a share, at the served prior) likewise"
    )
    max_ece: Fraction | None = Field(0.05, description="expected calibration error of head")
    min_reward: Fraction | None = Field(
        None, description="expected reward per challenge of head, in `metrics/challenge.json`"
    )
    max_latency_growth: Annotated[Number, Field(ge=0)] | None = Field(
        None, description="of the 95 % quantile of latency, as a share: 0.1 is a tenth slower"
    )


class Hardware(Section):
    """What may not change a result, and so never invalidates a stage."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[Integer, Field(ge=0)] = Field(
        0, description="processes, or threads; 0 = one a core"
    )
    devices: Count = Field(1, description="devices a node; on a CPU, processes")
    nodes: Count = 1
    checkpoint_minutes: Annotated[Number, Field(gt=0)] = Field(
        10.0, description="between two checkpoints within an epoch"
    )


class Params(Section):
    """All of `params.yaml`."""

    seed: Annotated[Integer, Field(ge=0, le=2**31 - 1)] = 7
    subnet: Subnet = Subnet()
    data: Data = Data()
    explora: Explora = Explora()
    probe: Probe = Probe()
    train: Train = Train()
    compile: Compile = Compile()
    views: ViewGrid = ViewGrid()
    embed: Embed = Embed()
    cvfm: Cvfm = Cvfm()
    sweep: Sweep = Sweep()
    decision: Decision = Decision()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    challenge: Challenge = Challenge()
    gates: Gates = Gates()
    hardware: Hardware = Hardware()


# --------------------------------------------------------------------------- reading and checking


def load_params(path: Path) -> Params:
    """Read and check `params.yaml`; every leaf of the schema must be there.

    Raises
    ------
    UserError
        Missing file, what `read_yaml` refuses, a missing or unknown key, a value out of range; one line each.
    """
    try:
        document = read_yaml(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold sections of parameters")
    params = check_params(document, path.name)
    missing = sorted(set(leaves(params.model_dump())) - set(leaves(document)))
    if missing:
        raise UserError(f"{path.name}: missing {', '.join(missing)}")
    return params


def check_params(document: Mapping[str, Any], origin: str) -> Params:
    """Validate a nested dictionary; see `load_params` for the errors."""
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        raise UserError("; ".join(_explain(e, origin) for e in error.errors())) from error


def _explain(error: Any, origin: str) -> str:
    """One line for one pydantic error: where, what, what is allowed."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _siblings(location[:-1])
        close = difflib.get_close_matches(location[-1], known, 1)
        hint = f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known)}"
        return f'{origin}: unknown parameter "{key}"; {hint}'
    if error["type"] in {"literal_error", "union_tag_invalid"}:
        context = error["ctx"]
        allowed = str(context.get("expected") or context.get("expected_tags")).replace("'", "")
        value = context.get("tag", error["input"])
        return f'{origin}: {key} "{value}" is not one of {allowed.replace(" or ", ", ")}'
    if error["type"] == "union_tag_not_found":
        return f"{origin}: {key} needs a kind, one of {', '.join(_SOURCES)}"
    shown = "" if isinstance(error["input"], dict | list) else f" (got {error['input']!r})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{origin}: {key}: {message}{shown}"


def _siblings(location: list[str]) -> list[str]:
    """Names a section knows; of `data.sources.<i>.<kind>` those of that kind."""
    model: type[BaseModel] = Params
    for part in location:
        if part in _SOURCES and "sources" in location:
            model = _SOURCES[part]
        elif part in model.model_fields:
            annotation = model.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                model = annotation
    return list(model.model_fields)


def leaves(document: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all values that are not sections."""
    for key, value in document.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{name}.")
        else:
            yield name
