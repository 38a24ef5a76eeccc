"""Adaptation without labels: it learns, can be repeated, resumed and divided, and says when it collapses."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from streetvision.core.errors import UserError
from streetvision.core.params import Compile, Explora, Hardware, Lora, Train
from streetvision.data.loader import EvaluationImages, PairImages
from streetvision.data.store import Split, SplitAccessError, open_split, read_arrow, write_arrow
from streetvision.explora import monitor, pretraining, pretraining_task
from streetvision.explora.adapted import (
    HISTORY_COLUMNS,
    AdaptationResult,
    pass_through,
    save_adaptation,
)
from streetvision.explora.monitor import Monitor
from streetvision.explora.pretraining import MERGE_TOLERANCE, adapt_backbone
from streetvision.explora.pretraining_task import AdaptationTask
from streetvision.models.backbone import (
    ARCHITECTURES,
    Architecture,
    build_backbone,
    initial_backbone,
)
from tests.models.ranks import distance, run_ranks

OBJECTIVES = get_args(Explora.model_fields["objective"].annotation)
HEIGHT, WIDTH = 32, 48
# DINOv3 as timm has it, but small; its LayerScale of 1e-5 would hide whatever the blocks do.
DINOV3 = Architecture(
    "vit_small_patch16_dinov3",
    {"embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 1.0, "dynamic_img_size": True},
)
SMALL = Explora(
    enabled=True, epochs=2, batch_size=16, projection_hidden=32, projection_dim=16, prototypes=8,
    precision="fp32", learning_rate=0.003, blur_probability=0.0, lora=Lora(dropout=0.2),
)  # fmt: skip
Adapt = Callable[..., AdaptationResult]
# Share of the way that was trained by which another order of sums may move its end; argued for in
# `test_training.py::test_two_ranks_train_like_one`, where half the gradient makes six times as much.
SAME_WAY = 5e-3


def train_section(backbone: str, **changes: Any) -> Train:
    return Train(backbone=backbone, height_px=HEIGHT, width_px=WIDTH, **changes)


def adapt_splits(
    splits: dict[str, Path],
    folder: Path,
    backbone: str = "street_vit",
    pretrained: bool = True,
    seed: int = 7,
    hardware: dict[str, Any] | None = None,
    freeze_norm: bool = False,
    **changes: Any,
) -> AdaptationResult:
    """Adapt to the images of `splits` with some parameters changed; checkpoints go to `folder`."""
    torch.set_num_threads(1)
    start, _, _, preprocessing = initial_backbone(train_section(backbone), seed=seed, root=folder)
    folder.mkdir(exist_ok=True, parents=True)
    return adapt_backbone(
        start, SMALL.model_copy(update=changes),
        open_split("explora", "train", splits["train"]),
        open_split("explora", "val_select", splits["val_select"]),
        preprocessing, pretrained=pretrained, freeze_norm=freeze_norm, seed=seed, scratch=folder,
        hardware=Hardware(**{"device": "cpu", "workers": 0, **(hardware or {})}),
        compile_settings=Compile(),
    )  # fmt: skip


@pytest.fixture
def adapt(tmp_path: Path, tiny_splits: dict[str, Path]) -> Adapt:
    """`adapt_splits` on the tiny splits; `scratch` names a folder that two runs share."""

    def run(scratch: str = "", **changes: Any) -> AdaptationResult:
        folder = tmp_path / (scratch or f"fresh-{len(list(tmp_path.iterdir()))}")
        return adapt_splits(tiny_splits, folder, **changes)

    return run


def initial(backbone: str = "street_vit", seed: int = 7) -> dict[str, torch.Tensor]:
    model, *_ = initial_backbone(train_section(backbone), seed=seed, root=Path())
    return model.state_dict()


def assert_same(one: AdaptationResult, other: AdaptationResult) -> None:
    assert one.history == other.history
    assert one.metrics == other.metrics
    for kind in ("adapter", "backbone"):
        first, second = (
            result.adapter if kind == "adapter" else result.backbone.state_dict()
            for result in (one, other)
        )
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name


def test_what_is_measured_are_batches_from_anywhere_in_the_split(
    tmp_path: Path, write_split: Callable[..., Path]
) -> None:
    path = write_split(tmp_path / "val_select.arrow", 100)
    split = open_split("explora", "val_select", path)
    _, _, _, preprocessing = initial_backbone(train_section("street_vit"), 7, tmp_path)
    monitor = Monitor(split, preprocessing, torch.nn.Identity(), 16, seed=7)
    images = [image.numpy().tobytes() for image in EvaluationImages(split, preprocessing)]
    rows = [images.index(pair[0].numpy().tobytes()) for pair in monitor.views]
    assert len(set(rows)) == 96
    for start in range(0, 96, 16):  # the negatives of a view are not the frames around it
        assert max(rows[start : start + 16]) - min(rows[start : start + 16]) > 50
    again = Monitor(split, preprocessing, torch.nn.Identity(), 16, seed=7)
    assert torch.equal(again.views, monitor.views)


# --------------------------------------------------------------------------- it learns


# Views that are easy to match: what a correct loss learns within a few steps.
EASY = {
    "backbone": "street_resnet_tiny", "pretrained": False, "learning_rate": 0.01, "crop_min_area": 0.8,
    "flip_probability": 0.0, "jitter_probability": 0.0, "grey_probability": 0.0,
}  # fmt: skip


@pytest.fixture(scope="session")
def colourful_splits(
    tmp_path_factory: pytest.TempPathFactory, write_split: Callable[..., Path]
) -> dict[str, Path]:
    """128 images each that differ in their colours, enough for the largest batch."""
    folder = tmp_path_factory.mktemp("colourful")
    rng = np.random.default_rng(0)
    made = {}
    for name in ("train", "val_select"):
        table = read_arrow(write_split(folder / f"{name}.plain", 128, groups=20), "prepare")
        images = []
        for _ in range(128):
            patches = Image.fromarray(rng.integers(0, 256, (2, 3, 3), dtype=np.uint8))
            data = io.BytesIO()
            patches.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(data, "JPEG")
            images.append(data.getvalue())
        columns = {column: table.column(column) for column in table.column_names}
        made[name] = write_arrow(folder / f"{name}.arrow", {**columns, "image": images})
    return made


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_without_collapse(
    objective: str, colourful_splits: dict[str, Path], tmp_path: Path
) -> None:
    result = adapt_splits(
        colourful_splits, tmp_path, objective=objective, epochs=4, batch_size=32, **EASY
    )
    assert [row["epoch"] for row in result.history] == list(range(5))
    assert result.history[-1]["train_loss"] < 0.6 * result.history[1]["train_loss"]
    assert result.metrics["end"]["loss"] < 0.6 * result.metrics["start"]["loss"]
    assert result.metrics["collapsed"] is False
    assert result.metrics["method"] == result.method == f"{objective} pretraining"
    assert result.metrics["trainable_parameters"] == result.metrics["parameters"]
    assert result.adapter == {}


@pytest.mark.parametrize(("batch_size", "epochs"), [(32, 4), (64, 6), (128, 8)])
def test_the_loss_falls_from_log_2n_minus_1(
    batch_size: int, epochs: int, colourful_splits: dict[str, Path], tmp_path: Path
) -> None:
    result = adapt_splits(colourful_splits, tmp_path, epochs=epochs, batch_size=batch_size, **EASY)
    untrained = math.log(2 * batch_size - 1)
    assert result.history[0]["loss"] == pytest.approx(untrained, abs=0.25)
    assert result.history[-1]["loss"] < untrained - 0.5
    assert result.history[-1]["train_loss"] < untrained - 2
    assert result.metrics["collapsed"] is False


def test_constant_images_collapse_and_it_is_said(
    adapt: Adapt, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        pretraining, "contrastive_transform", lambda *_: lambda image: torch.full_like(image, 90)
    )
    with caplog.at_level(logging.WARNING):
        result = adapt(epochs=1)
    assert result.metrics["collapsed"] is True
    assert "collapsed" in caplog.text


# --------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("norms", [False, True])
def test_adapters_below_and_whole_blocks_above_are_trained(adapt: Adapt, norms: bool) -> None:
    result = adapt(unfreeze_blocks=1, train_norms=norms)
    before, after = initial(), result.backbone.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    lower = {name for name in changed if name.startswith(("blocks.0.", "blocks.1.", "blocks.2."))}
    weights = {name for name in lower if "norm" not in name}
    assert weights
    assert all(
        name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) for name in weights
    )
    assert bool(lower - weights) == norms
    assert {name for name in before if name.startswith("blocks.3.")} <= changed
    assert not any(name.startswith(("patch_embed", "pos_embed")) for name in changed)
    assert result.method == result.metrics["method"] == "explora"
    assert 0 < result.metrics["trainable_parameters"] < result.metrics["parameters"]
    assert any("lora_A" in name for name in result.adapter)
    assert not any("blocks.3" in name and "lora" in name for name in result.adapter)


@pytest.mark.parametrize(
    "backbone", ["street_vit", "dinov3", "street_resnet_tiny", "mobilenetv2_050"]
)
def test_merged_is_unmerged_and_the_adapter_rebuilds_it(
    backbone: str, adapt: Adapt, tiny_splits: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "dinov3", DINOV3)
    result = adapt(backbone=backbone, learning_rate=0.03, epochs=1)
    merge = result.metrics["merge"]
    assert 0 <= merge["feature_difference"] <= MERGE_TOLERANCE == merge["tolerance"]
    again, name, arguments, preprocessing = initial_backbone(
        train_section(backbone), seed=7, root=Path()
    )
    pretraining.add_adapters(again, SMALL.lora, skip_blocks=SMALL.unfreeze_blocks)
    again.load_state_dict(result.adapter, strict=False)
    merged = build_backbone(name, arguments)
    merged.load_state_dict(result.backbone.state_dict())
    image = open_split("explora", "val_select", tiny_splits["val_select"]).image(0)
    batch = preprocessing.normalise(torch.tensor(preprocessing.apply(image)).permute(2, 0, 1)[None])
    with torch.no_grad():
        expected, found = again.eval()(batch), merged.eval()(batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_merge_that_changes_the_features_is_refused(
    adapt: Adapt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "MERGE_TOLERANCE", -1.0)
    with pytest.raises(UserError, match="merging the adapters changes features"):
        adapt(epochs=1)


def test_passing_through_hands_the_backbone_on_as_it_is() -> None:
    backbone, *_ = initial_backbone(train_section("street_vit"), seed=7, root=Path())
    result = pass_through(backbone)
    after = result.backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in initial().items())
    assert result.method == result.metrics["method"] == "passthrough"
    assert (result.adapter, result.history) == ({}, [])
    assert result.metrics["trainable_parameters"] == 0
    assert result.metrics["parameters"] == sum(p.numel() for p in backbone.parameters())


def test_frozen_norms_keep_their_statistics(adapt: Adapt) -> None:
    def statistics(freeze_norm: bool) -> dict[str, torch.Tensor]:
        result = adapt(
            backbone="street_resnet_tiny", objective="byol", freeze_norm=freeze_norm, epochs=1
        )
        state = result.backbone.state_dict()
        return {name: value for name, value in state.items() if "running" in name}

    before = initial("street_resnet_tiny")
    assert all(torch.equal(value, before[name]) for name, value in statistics(True).items())
    assert not any(torch.equal(value, before[name]) for name, value in statistics(False).items())


def test_the_gradient_cache_trains_to_the_same_weights(adapt: Adapt) -> None:
    plain = adapt(lora=Lora(), epochs=1)
    cached = adapt(lora=Lora(), epochs=1, gradient_cache_chunks=4)
    after = cached.backbone.state_dict()
    for name, value in plain.backbone.state_dict().items():
        assert after[name].shape == value.shape
    trained = plain.backbone.state_dict()
    assert distance(after, trained) < SAME_WAY * distance(trained, initial())
    with pytest.raises(UserError, match="freeze_norm"):
        adapt(backbone="street_resnet_tiny", gradient_cache_chunks=2)
    adapt(backbone="street_resnet_tiny", gradient_cache_chunks=2, freeze_norm=True, epochs=1)


def test_accumulation_is_told_to_add_no_negatives(
    adapt: Adapt, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        adapt(accumulate_batches=2, epochs=1)
    assert "adds no negatives" in caplog.text
    assert "30 negatives" in caplog.text
    assert "explora on 48 images" in caplog.text
    assert "of them trained" in caplog.text


# --------------------------------------------------------------------------- the same again


# Everything random is on, and a teacher follows: whatever a resume forgets, shows.
RESUMED = {"objective": "byol_swav", "epochs": 3}


def test_one_seed_gives_one_result_whatever_the_workers(adapt: Adapt) -> None:
    first = adapt(objective="byol_swav")
    torch.manual_seed(99)
    assert_same(first, adapt(objective="byol_swav"))
    assert_same(first, adapt(objective="byol_swav", hardware={"workers": 2}))
    assert adapt(objective="byol_swav", seed=8).history != first.history


@pytest.mark.parametrize(
    ("step", "backbone"),
    [(0, "street_vit"), (2, "street_vit"), (3, "street_resnet_tiny"), (7, "street_resnet_tiny")],
)
def test_a_failed_run_goes_on_to_the_same_result(
    step: int, backbone: str, adapt: Adapt, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        **RESUMED, "backbone": backbone, "pretrained": backbone == "street_vit",
        "hardware": {"checkpoint_minutes": 1e-9},
    }  # fmt: skip
    whole = adapt(**changes)
    real = AdaptationTask.training_step
    steps = []

    def failing(task: AdaptationTask, views: torch.Tensor, index: int) -> torch.Tensor:
        steps.append(index)
        if len(steps) > step:
            raise RuntimeError("power cut")
        return real(task, views, index)

    monkeypatch.setattr(AdaptationTask, "training_step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        adapt("scratch", **changes)
    monkeypatch.setattr(AdaptationTask, "training_step", real)
    assert_same(whole, adapt("scratch", **changes))


def test_the_teacher_follows_each_step_of_the_optimiser(
    adapt: Adapt, monkeypatch: pytest.MonkeyPatch
) -> None:
    decays: list[float] = []
    real = pretraining_task.move_average

    def recording(teacher: Any, student: Any, decay: float) -> None:
        before = [p.clone() for p in teacher.parameters()]
        real(teacher, student, decay)
        decays.append(decay)
        pairs = zip(before, teacher.parameters(), student.parameters(), strict=True)
        for old, new, target in pairs:
            if target.requires_grad:
                torch.testing.assert_close(new, decay * old + (1 - decay) * target)

    monkeypatch.setattr(pretraining_task, "move_average", recording)
    adapt(objective="byol", epochs=2, batch_size=8, accumulate_batches=2, teacher_decay=0.9)
    assert len(decays) == 6  # 48 images, 6 batches an epoch, 2 batches a step
    assert decays[0] == pytest.approx(0.9)
    assert decays == sorted(decays)
    assert decays[-1] < 1


def adapted_ranks(
    splits: dict[str, Path], folder: Path, devices: int
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    result = adapt_splits(splits, folder, lora=Lora(), epochs=2, hardware={"devices": devices})
    return result.history, result.backbone.state_dict()


def test_two_ranks_train_to_the_weights_of_one(
    tiny_splits: dict[str, Path], tmp_path: Path
) -> None:
    history, weights = adapted_ranks(tiny_splits, tmp_path / "one", 1)
    found = run_ranks(adapted_ranks, tiny_splits, tmp_path / "two", 2, folder=tmp_path)
    for other_history, other_weights in found:
        for row, expected in zip(other_history[1:], history[1:], strict=True):
            assert row == pytest.approx(expected, rel=5e-3, abs=1e-3)
        assert distance(other_weights, weights) < SAME_WAY * distance(weights, initial())


# --------------------------------------------------------------------------- labels, mistakes, files


def test_train_is_learned_and_val_select_watched(
    adapt: Adapt, tiny_splits: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}
    for use, module in (("learned", pretraining), ("watched", monitor)):

        def pairs(split: Split, *rest: Any, use: str = use) -> PairImages:
            seen[use] = set(split.ids)
            return PairImages(split, *rest)

        monkeypatch.setattr(module, "PairImages", pairs)
    adapt(epochs=1)
    fit, select = (
        open_split("explora", name, tiny_splits[name]) for name in ("train", "val_select")
    )
    assert seen["learned"] == set(fit.ids)
    assert seen["watched"] <= set(select.ids)
    assert seen["watched"]


def test_no_label_is_read(
    adapt: Adapt, tiny_splits: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = open_split("explora", "train", tiny_splits["train"])
    with pytest.raises(SplitAccessError):
        _ = split.labels
    asked: list[str] = []
    monkeypatch.setattr(Split, "labels", property(lambda self: asked.append(self.name)))
    adapt(epochs=1)
    assert asked == []


def test_a_loss_that_is_not_finite_is_one_clear_line(adapt: Adapt) -> None:
    with pytest.raises(UserError, match=r"diverged.*explora\.learning_rate"):
        adapt(learning_rate=1e30, gradient_clip=0.0, objective="byol")


def test_one_image_is_too_few(
    tiny_splits: dict[str, Path], write_split: Callable[..., Path], tmp_path: Path
) -> None:
    alone = write_split(tmp_path / "val_select.arrow", 1)
    with pytest.raises(UserError, match="val_select holds one image"):
        adapt_splits({**tiny_splits, "val_select": alone}, tmp_path / "scratch")


def test_targets_that_do_not_exist_are_refused(adapt: Adapt) -> None:
    with pytest.raises(UserError, match="attn"):
        adapt(lora=Lora(targets=["nowhere"]))


def test_the_files_rebuild_the_result(adapt: Adapt, tmp_path: Path) -> None:
    folder = tmp_path / "explora"
    result = adapt(epochs=1)
    save_adaptation(result, {"backbone": "some_vit"}, folder)
    for name, state in (("backbone", result.backbone.state_dict()), ("adapter", result.adapter)):
        saved = load_file(folder / f"{name}.safetensors")
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[key], value) for key, value in state.items())
    document = json.loads((folder / "config.json").read_text())
    assert document == {"method": "explora", "backbone": "some_vit"}
    assert all(set(row) == set(HISTORY_COLUMNS) for row in result.history)
    save_adaptation(pass_through(result.backbone), {"backbone": "some_vit"}, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["backbone.safetensors", "config.json"]
