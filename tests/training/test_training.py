"""Training: reproducible, resumable bit for bit, the best epoch is returned, mistakes are told."""

from __future__ import annotations

import copy
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import log_loss, matthews_corrcoef
from torch.utils.data import Dataset

from streetvision.core.errors import UserError
from streetvision.core.params import Compile, Hardware, Subnet, Train, TrainLora, ViewGrid
from streetvision.data.loader import (
    EpochSampler,
    EvaluationImages,
    Key,
    TrainingImages,
    training_loader,
)
from streetvision.data.served_images import served_images
from streetvision.data.store import open_split
from streetvision.data.transforms import training_transform
from streetvision.data.views import views_of
from streetvision.models.classifier import score
from streetvision.models.peft import merge_adapters
from streetvision.training import gate, selection, training
from streetvision.training.selection import WeightAverage, predict_logits
from streetvision.training.task import ClassifierTask
from streetvision.training.training import (
    TrainingResult,
    build_classifier,
    fit_classifier,
    train_classifier,
)
from tests.models.ranks import distance, run_ranks

State = dict[str, torch.Tensor]
Fit = Callable[..., TrainingResult]
# Everything random is on, and the optimiser has momentum: whatever a resume forgets, shows.
RESUMED = {"epochs": 3, "dropout": 0.3, "label_smoothing": 0.1}
# 48 images, batches of 8, steps of 2 batches.
EPOCH_BATCHES = 6
EVERYTHING = RESUMED | {
    "backbone": "street_vit", "trainable": "full", "head": "mlp", "head_hidden": 8,
    "batch_size": 8, "accumulate_batches": 2, "optimiser": "muon", "grokfast": True,
    "layer_decay": 0.8, "weight_average": "ema", "ema_decay": 0.8, "swa_start_fraction": 0.3,
    "balanced_sampler": True, "mixup_alpha": 0.4, "cutmix_alpha": 0.4, "loss": "focal",
    "augmentation": "trivial_augment", "served_probability": 0.3, "learning_rate": 0.003,
    "choose_epoch": "best_log_loss",
}  # fmt: skip


@pytest.fixture
def fit(
    tmp_path: Path,
    tiny_train: Train,
    tiny_splits: dict[str, Path],
    write_split: Callable[..., Path],
) -> Fit:
    """Train on the tiny splits with some parameters changed; `scratch` names a folder."""

    def run(
        scratch: str = "", seed: int = 7, workers: int = 0, minutes: float = 10,
        labels: list[int] | None = None, stop_after: int | None = None, **changes: Any,
    ) -> TrainingResult:  # fmt: skip
        train = tiny_train.model_copy(update=changes)
        model, config = build_classifier(train, seed=seed, root=tmp_path)
        folder = tmp_path / (scratch or f"fresh-{len(list(tmp_path.iterdir()))}")
        folder.mkdir(exist_ok=True)
        path = tiny_splits["train"]
        if labels is not None:
            path = write_split(folder / "train.arrow", labels=labels)
        return fit_classifier(
            model, config, train,
            open_split("train", "train", path),
            open_split("train", "val_select", tiny_splits["val_select"]),
            seed=seed, scratch=folder,
            hardware=Hardware(device="cpu", workers=workers, checkpoint_minutes=minutes),
            stop_after=stop_after,
        )  # fmt: skip

    return run


def state(result: TrainingResult) -> State:
    return {name: tensor.detach().clone() for name, tensor in result.model.state_dict().items()}


def assert_same(one: TrainingResult, other: TrainingResult) -> None:
    assert one.history == other.history
    assert one.metrics == other.metrics
    first, second = state(one), state(other)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def initial(train: Train) -> State:
    model, _ = build_classifier(train, seed=7, root=Path())
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --------------------------------------------------------------------------- the same again


def test_one_seed_gives_one_result_whatever_the_workers(fit: Fit) -> None:
    first = fit(dropout=0.3)
    torch.manual_seed(99)
    assert_same(first, fit(dropout=0.3))
    assert_same(first, fit(dropout=0.3, workers=2))
    assert fit(seed=8, dropout=0.3).history != first.history


def test_with_everything_on_one_seed_gives_one_result(fit: Fit) -> None:
    first = fit(**EVERYTHING)
    torch.manual_seed(99)
    assert_same(first, fit(**EVERYTHING, workers=2))


@pytest.mark.parametrize(
    ("step", "minutes", "options"),
    [
        (0, 10, RESUMED),
        (4, 10, RESUMED),
        (8, 10, RESUMED),
        (4, 1e-9, RESUMED),
        (8, 1e-9, EVERYTHING),
        (16, 1e-9, EVERYTHING | {"weight_average": "swa", "trainable": "dora"}),
    ],
)
def test_a_failed_run_goes_on_to_the_same_result(
    step: int, minutes: float, options: Any, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(**options)
    real = ClassifierTask.training_step
    steps = []

    def failing(task: ClassifierTask, batch: Any, index: int) -> torch.Tensor:
        steps.append(index)
        if len(steps) > step:
            raise RuntimeError("power cut")
        return real(task, batch, index)

    monkeypatch.setattr(ClassifierTask, "training_step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        fit("scratch", minutes=minutes, **options)
    monkeypatch.setattr(ClassifierTask, "training_step", real)
    steps.clear()
    steps_again = count_steps(monkeypatch)
    assert_same(whole, fit("scratch", **options))
    if minutes < 1:
        assert len(steps_again) < EPOCH_BATCHES * (options["epochs"] - step // EPOCH_BATCHES)


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
import torch
from streetvision.data.store import open_split
from streetvision.training.selection import EpochSelection
from streetvision.training.training import build_classifier, fit_classifier
from streetvision.core.params import Hardware
torch.set_num_threads(1)
train, splits, scratch = pickle.loads(bytes.fromhex(sys.argv[1]))
real = EpochSelection.on_train_epoch_end
def killing(self, trainer, task):
    if trainer.current_epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, trainer, task)
EpochSelection.on_train_epoch_end = killing
model, config = build_classifier(train, 7, Path())
fit_classifier(
    model, config, train, open_split("train", "train", splits["train"]),
    open_split("train", "val_select", splits["val_select"]), seed=7, scratch=scratch,
    hardware=Hardware(device="cpu"),
)
"""


def test_a_killed_run_goes_on_to_the_same_result(
    fit: Fit, tiny_train: Train, tiny_splits: dict[str, Path], tmp_path: Path, repository: Path
) -> None:
    train = tiny_train.model_copy(update=RESUMED)
    (tmp_path / "scratch").mkdir()
    argument = pickle.dumps((train, tiny_splits, tmp_path / "scratch")).hex()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, argument], cwd=repository, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["last.ckpt"]
    assert_same(fit(**RESUMED), fit("scratch", **RESUMED))


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    steps: list[int] = []
    real = ClassifierTask.training_step

    def counting(task: ClassifierTask, batch: Any, index: int) -> torch.Tensor:
        steps.append(index)
        return real(task, batch, index)

    monkeypatch.setattr(ClassifierTask, "training_step", counting)
    return steps


def test_a_run_killed_after_its_last_epoch_does_not_train_again(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit("scratch")
    steps = count_steps(monkeypatch)
    assert_same(whole, fit("scratch"))
    assert steps == []


def test_an_interrupt_stays_an_interrupt(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(ClassifierTask, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit()
    finally:
        signal.signal(signal.SIGINT, handler)


# --------------------------------------------------------------------------- which epoch


def test_the_best_epoch_is_returned(fit: Fit, tiny_splits: dict[str, Path]) -> None:
    result = fit(epochs=5, learning_rate=0.03)
    split = open_split("train", "val_select", tiny_splits["val_select"])
    preprocessing = result.config.preprocessing
    images = EvaluationImages(split, preprocessing)
    logits = predict_logits(result.model, images, preprocessing, torch.device("cpu"))
    best = max(row["val_mcc"] for row in result.history)
    assert len({row["val_mcc"] for row in result.history}) > 1, "nothing to choose from"
    assert matthews_corrcoef(split.labels, logits > 0) == pytest.approx(best, abs=1e-12)
    chosen = result.history[result.metrics["chosen_epoch"]]
    assert chosen["val_mcc"] == best
    probability = 1 / (1 + np.exp(-logits.astype(float)))
    assert log_loss(split.labels, probability) == pytest.approx(chosen["val_loss"], abs=1e-9)
    assert result.metrics["val_select"] == {
        "mcc": chosen["val_mcc"], "loss": chosen["val_loss"], "accuracy": chosen["val_accuracy"]
    }  # fmt: skip
    assert not result.model.training


def record_weights(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """The weights that VAL_SELECT was scored with, epoch by epoch."""
    epochs: list[State] = []
    real = selection.predict_logits

    def recording(model: Any, *rest: Any, **more: Any) -> Any:
        epochs.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return real(model, *rest, **more)

    monkeypatch.setattr(selection, "predict_logits", recording)
    return epochs


def script_mcc(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let VAL_SELECT's MCC be `values`, epoch by epoch."""
    left = iter(values)
    scores = {"log_loss": 0.5, "accuracy": 0.5}
    monkeypatch.setattr(selection, "all_metrics", lambda *_: scores | {"mcc": next(left)})


@pytest.mark.parametrize(
    ("patience", "mcc", "epochs", "chosen"),
    [
        (2, [0.1, 0.5, 0.5, 0.3, 0.2, 0.9], 5, 2),  # the later of equals, and patience from there
        (1, [0.1, 0.0, 0.9], 2, 0),
        (1, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6, 5),
        (0, [0.9, 0.1, 0.1, 0.1, 0.1, 0.1], 6, 0),
        (3, [-0.5, -0.6, -0.7, -0.5, -0.6, -0.7], 6, 3),
    ],
)
def test_patience_and_choice(
    patience: int, mcc: list[float], epochs: int, chosen: int, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    script_mcc(monkeypatch, mcc)
    weights = record_weights(monkeypatch)
    result = fit("scratch", epochs=6, patience_epochs=patience)
    assert [row["epoch"] for row in result.history] == list(range(epochs))
    assert result.metrics["epochs"] == epochs
    assert result.metrics["chosen_epoch"] == chosen
    for name, tensor in state(result).items():
        assert torch.equal(tensor, weights[chosen][name]), name
    # Killed before its result was saved, the run is resumed: it had stopped and trains no more.
    steps = count_steps(monkeypatch)
    assert_same(result, fit("scratch", epochs=6, patience_epochs=patience))
    assert steps == []


def test_a_run_that_is_stopped_has_the_schedule_of_the_whole(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RESUMED | {"epochs": 4, "choose_epoch": "last", "weight_average": "swa",
                         "swa_start_fraction": 0.3, "warmup_fraction": 0.4}  # fmt: skip
    weights = record_weights(monkeypatch)
    whole = fit(**options)
    stopped = fit("scratch", stop_after=2, **options)
    assert stopped.history == whole.history[:2]
    assert stopped.metrics["chosen_epoch"] == 1
    for name, tensor in state(stopped).items():
        assert torch.equal(tensor, weights[1][name]), name
    steps = count_steps(monkeypatch)
    assert_same(stopped, fit("scratch", stop_after=2, **options))
    assert steps == []


# --------------------------------------------------------------------------- what is trained


def test_trainable_head_changes_no_backbone_tensor(fit: Fit, tiny_train: Train) -> None:
    result = fit(trainable="head")
    before = initial(tiny_train)
    for name, tensor in state(result).items():
        assert torch.equal(tensor, before[name]) == name.startswith("backbone."), name
    assert result.metrics["trainable_parameters"] == 65
    assert result.metrics["parameters"] == sum(p.numel() for p in result.model.parameters())


CONSTANT = {
    "trainable": "head", "crop_min_area": 1.0, "flip_probability": 0.0, "colour_jitter": 0.0,
    "epochs": 3, "dropout": 0.3, "head": "mlp", "head_hidden": 8,
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("average", ["none", "ema", "swa"])
def test_kept_features_give_the_result_of_images(
    precision: str, average: str, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = CONSTANT | {"precision": precision, "weight_average": average}
    kept = fit(**changes)
    monkeypatch.setattr(training, "features_are_constant", lambda *_: False)
    recomputed = fit(**changes)
    for name, tensor in state(recomputed).items():
        assert torch.allclose(state(kept)[name], tensor, atol=1e-6), name
    assert np.allclose(kept.select_logits, recomputed.select_logits, atol=1e-5)
    for row, wanted in zip(kept.history, recomputed.history, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)
    assert kept.metrics["cost"] == recomputed.metrics["cost"]
    assert kept.metrics["parameters"] == recomputed.metrics["parameters"]


def test_kept_features_pass_the_backbone_once_and_survive_a_failure(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = fit(**CONSTANT)
    seen: list[int] = []
    features_of = training.features_of

    def counting(backbone: torch.nn.Module, *arguments: Any, **named: Any) -> torch.Tensor:
        hook = backbone.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        try:
            return features_of(backbone, *arguments, **named)
        finally:
            hook.remove()

    monkeypatch.setattr(training, "features_of", counting)
    forward = training.RoadworkClassifier.forward
    calls = 0

    def failing(self: Any, images: torch.Tensor) -> Any:
        nonlocal calls
        calls += images.ndim == 2  # features
        if calls == 7:
            raise RuntimeError("the lights go out")
        return forward(self, images)

    with monkeypatch.context() as broken:
        broken.setattr(training.RoadworkClassifier, "forward", failing)
        with pytest.raises(RuntimeError, match="lights"):
            fit("scratch", **CONSTANT)
    assert_same(undisturbed, fit("scratch", **CONSTANT))
    assert sum(seen) == 2 * (48 + 40)  # TRAIN without its fusion part and VAL_SELECT, in both runs


@pytest.mark.parametrize(
    "change",
    [{"trainable": "full"}, {"flip_probability": 0.5}, {"served_probability": 0.1},
     {"mixup_alpha": 0.2}, {"augmentation": "augmix"}],
)  # fmt: skip
def test_features_that_change_are_not_kept(
    change: dict[str, Any], fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("kept")

    monkeypatch.setattr(training, "features_of", never)
    fit(**(CONSTANT | {"epochs": 1} | change))
    with pytest.raises(AssertionError, match="kept"):
        fit(**(CONSTANT | {"epochs": 1}))


def test_freeze_norm_keeps_the_statistics_alone(fit: Fit, tiny_train: Train) -> None:
    before = initial(tiny_train)
    for freeze in (True, False):
        after = state(fit(freeze_norm=freeze))
        statistics = [name for name in after if "running_" in name or "num_batches" in name]
        assert len(statistics) > 10
        for name in statistics:
            assert torch.equal(after[name], before[name]) == freeze, name
        assert not torch.equal(after["backbone.bn1.weight"], before["backbone.bn1.weight"])


def test_local_weights_are_where_training_starts(
    fit: Fit, tiny_train: Train, tmp_path: Path
) -> None:
    backbone = {
        name.removeprefix("backbone."): tensor + tensor.is_floating_point() * 0.25
        for name, tensor in initial(tiny_train).items()
        if name.startswith("backbone.")
    }
    save_file(backbone, tmp_path / "mine.safetensors")
    result = fit(trainable="head", weights="mine.safetensors")
    for name, tensor in result.model.backbone.state_dict().items():
        assert torch.equal(tensor, backbone[name])
    with pytest.raises(UserError, match=r"yours.pth does not exist"):
        fit(weights="yours.pth")


VIT_LAYERS = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
CONVOLUTIONS = ("conv1.weight", "conv2.weight")


@pytest.mark.parametrize(
    ("backbone", "part", "trained"),
    [
        ("street_vit", {"trainable": "last_n_blocks", "last_n_blocks": 2}, None),
        ("street_resnet_tiny", {"trainable": "last_n_blocks"}, None),
        ("street_vit", {"trainable": "lora"}, VIT_LAYERS),
        ("street_vit", {"trainable": "dora"}, VIT_LAYERS),
        (
            "street_vit",
            {"trainable": "lora", "lora": TrainLora(init="pissa", rslora=True)},
            VIT_LAYERS,
        ),
        ("street_resnet_tiny", {"trainable": "lora"}, CONVOLUTIONS),
        ("street_resnet_tiny", {"trainable": "dora"}, CONVOLUTIONS),
    ],
)
def test_what_is_trained_changes_and_nothing_else(
    backbone: str, part: dict[str, Any], trained: tuple[str, ...] | None, fit: Fit,
    tiny_train: Train, tmp_path: Path,
) -> None:  # fmt: skip
    before = initial(tiny_train.model_copy(update={"backbone": backbone}))
    for name, tensor in before.items():
        if name.endswith(
            "bn2.weight"
        ):  # a fresh residual branch is multiplied by 0: nothing to adapt
            tensor.fill_(1.0)
    weights = {n.removeprefix("backbone."): t for n, t in before.items() if "backbone." in n}
    save_file(weights, tmp_path / "start.safetensors")
    result = fit(backbone=backbone, weights="start.safetensors", **part)
    after = state(result)
    assert after.keys() == before.keys()
    last = ("blocks.2.", "blocks.3.", "fc_norm.", "layer4.")
    for name, tensor in after.items():
        own = name.removeprefix("backbone.")
        if trained is None:
            expected = own.startswith(last)
        else:
            expected = own.startswith(("blocks.", "layer")) and own.endswith(trained)
        changed = not torch.allclose(tensor, before[name], atol=1e-6)
        assert changed == (expected or own.startswith("head.")), name
    share = result.metrics["trainable_parameters"] / result.metrics["parameters"]
    assert 0 < share < 0.95
    assert ("merge" in result.metrics) == (trained is not None)
    if trained is not None:
        assert result.metrics["merge"]["logit_difference"] < 1e-4


def test_a_merge_that_changes_the_logits_is_refused(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(backbone: torch.nn.Module) -> torch.nn.Module:
        merge_adapters(backbone)
        with torch.no_grad():
            backbone.get_submodule("blocks.3.mlp.fc2").weight.mul_(3)
        return backbone

    monkeypatch.setattr(training, "merge_adapters", broken)
    with pytest.raises(UserError, match="merging the adapters changes a logit"):
        fit(backbone="street_vit", trainable="lora", epochs=1)


def spy_on_steps(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a training does: all batches and steps, and of the first step everything."""
    seen = SimpleNamespace(batches=[], weights=[])
    step, clip = ClassifierTask.training_step, ClassifierTask.configure_gradient_clipping

    def training_step(task: ClassifierTask, batch: Any, number: int) -> torch.Tensor:
        seen.batches.append(batch)
        real = task.loss

        def noting(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            value = real(logits, targets)
            if len(seen.batches) == 1:
                seen.logits, seen.targets = logits.detach().double(), targets.double()
                seen.loss = float(value.detach())
            return value

        task.loss = noting
        try:
            return step(task, batch, number)
        finally:
            task.loss = real

    def clipping(task: ClassifierTask, optimizer: Any, *rest: Any, **more: Any) -> None:
        named = {n: p for n, p in task.model.named_parameters() if p.grad is not None}
        raw = {name: p.grad.clone() for name, p in named.items()}
        clip(task, optimizer, *rest, **more)
        if not seen.weights:
            seen.raw, seen.used = raw, {name: p.grad.clone() for name, p in named.items()}
            rates = {
                id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]
            }
            seen.rates = {name: rates[id(p)] for name, p in named.items()}
            seen.initial_rates = {group["initial_lr"] for group in optimizer.param_groups}
        seen.weights.append({name: p.detach().clone() for name, p in named.items()})

    monkeypatch.setattr(ClassifierTask, "training_step", training_step)
    monkeypatch.setattr(ClassifierTask, "configure_gradient_clipping", clipping)
    return seen


def cross_entropy(seen: Any, weights: tuple[float, float], gamma: float = 0.0) -> float:
    p, t = torch.sigmoid(seen.logits), seen.targets
    positive = weights[1] * t * (1 - p) ** gamma * -torch.log(p)
    negative = weights[0] * (1 - t) * p**gamma * -torch.log1p(-p)
    return float((positive + negative).mean())


def is_muons(seen: Any) -> bool:
    """Whether a hidden matrix took the step of torch's own Muon."""
    name = "backbone.blocks.1.mlp.fc1.weight"
    alone = torch.nn.Parameter(seen.weights[0][name].clone())
    alone.grad = seen.used[name].clone()
    rate = seen.rates[name]
    torch.optim.Muon([alone], lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()  # type: ignore[no-untyped-call]
    moved = (seen.weights[1][name] - seen.weights[0][name]).norm()
    # Newton and Schulz's iteration runs in BF16, which is good to 2^-8.
    return bool((seen.weights[1][name] - alone.detach()).norm() < 0.05 * moved)


def images(seen: Any) -> torch.Tensor:
    return torch.cat([batch[0] for batch in seen.batches])


def positive_share(seen: Any) -> float:
    return float(torch.cat([batch[1] for batch in seen.batches]).mean())


# Of 12 images without and 36 with roadwork; what each choice does, in terms of what was seen.
CHOICES: dict[str, tuple[dict[str, Any], Callable[[Any, Any], bool]]] = {
    "ce": ({}, lambda s, _: s.loss == pytest.approx(cross_entropy(s, (1, 1)), rel=1e-4)),
    "focal": (
        {"loss": "focal", "focal_alpha": (0.25, 0.75), "focal_gamma": 2.0},
        lambda s, _: s.loss == pytest.approx(cross_entropy(s, (0.25, 0.75), 2.0), rel=1e-4),
    ),
    "weighted_ce": (
        {"loss": "weighted_ce"},
        lambda s, _: s.loss == pytest.approx(cross_entropy(s, (2, 2 / 3)), rel=1e-4),
    ),
    "muon": ({"optimiser": "muon"}, lambda s, base: is_muons(s) and not is_muons(base)),
    "grokfast": (
        {"grokfast": True, "grokfast_lambda": 2.0},
        lambda s, _: all(torch.allclose(s.used[n], 3 * g, rtol=1e-5) for n, g in s.raw.items()),
    ),
    "mixup": (
        {"mixup_alpha": 1.0},
        lambda s, base: bool(((s.targets % 1) > 0).any()) and not (base.targets % 1).any(),
    ),
    "layer_decay": (  # four blocks, so that the stem has the fifth power
        {"layer_decay": 0.5},
        lambda s, base: min(s.initial_rates) == pytest.approx(min(base.initial_rates) / 32),
    ),
    "accumulate_batches": (
        {"accumulate_batches": 2}, lambda s, base: (len(s.weights), len(base.weights)) == (2, 3)
    ),
    "mlp": (
        {"head": "mlp", "head_hidden": 8},
        lambda s, _: s.weights[0]["hidden.0.weight"].shape == (8, 64),
    ),
    "balanced_sampler": (  # within three standard deviations of a half
        {"balanced_sampler": True},
        lambda s, base: abs(positive_share(s) - 0.5) < 0.22 and positive_share(base) == 0.75,
    ),
    "augmix": (
        {"augmentation": "augmix"}, lambda s, base: not torch.equal(images(s), images(base))
    ),
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_does_what_it_says(
    choice: str, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, says = CHOICES[choice]
    options = {"backbone": "street_vit", "epochs": 1, "gradient_clip": 0.0, "weight_decay": 0.0}
    labels = [0] * 12 + [1] * 36
    found = []
    for each in (changes, {}):
        with monkeypatch.context() as patch:
            seen = spy_on_steps(patch)
            seen.result = fit(**options, **each, labels=labels)
            found.append(seen)
    assert says(*found)
    assert np.isfinite(found[0].result.history[0]["train_loss"])
    assert changes == {} or found[0].result.history != found[1].result.history


def test_training_starts_from_the_adapted_backbone_or_a_checkpoint(
    tiny_train: Train, tmp_path: Path
) -> None:
    other, _ = build_classifier(tiny_train, seed=8, root=tmp_path)
    backbone = other.backbone.state_dict()
    save_file(backbone, tmp_path / "backbone.safetensors")

    def built(adapted: Path | None = None, **changes: Any) -> State:
        train = tiny_train.model_copy(update=changes)
        model, _ = build_classifier(train, 7, tmp_path, adapted)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    fresh = built()
    loaded = built(tmp_path)
    for name, tensor in backbone.items():
        assert torch.equal(loaded[f"backbone.{name}"], tensor)
    assert torch.equal(loaded["head.weight"], fresh["head.weight"])
    options = {"init_from_explora": False, "backbone_checkpoint": "backbone.safetensors"}
    for one, again in ((built(None, **options), loaded), (built(tmp_path, **options), loaded),
                       (built(tmp_path, init_from_explora=False), fresh)):  # fmt: skip
        assert all(torch.equal(one[name], again[name]) for name in again)


def gradients(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """Of each optimiser step, before they are clipped."""
    found: list[list[torch.Tensor]] = []
    real = ClassifierTask.configure_gradient_clipping

    def spying(task: ClassifierTask, *rest: Any, **more: Any) -> None:
        found.append([p.grad.clone() for p in task.parameters() if p.grad is not None])
        real(task, *rest, **more)

    monkeypatch.setattr(ClassifierTask, "configure_gradient_clipping", spying)
    return found


def test_accumulated_batches_have_the_gradient_of_one(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gradients(monkeypatch)
    whole = fit(backbone="street_vit", epochs=1, batch_size=16)
    parts = fit(backbone="street_vit", epochs=1, batch_size=4, accumulate_batches=4)
    assert len(found) == 6
    for one, other in zip(found[0], found[3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert parts.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], rel=1e-3)


@pytest.mark.parametrize(("accumulate", "left"), [(5, 2), (8, 4), (11, 1), (12, 12), (40, 12)])
def test_an_incomplete_accumulation_has_the_gradient_of_what_it_holds(
    accumulate: int, left: int, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights that do not move, so that the last step can be held against one batch of the same images.
    options = {"backbone": "street_vit", "epochs": 1, "learning_rate": 1e-12, "batch_size": 4,
               "crop_min_area": 1.0, "flip_probability": 0.0, "colour_jitter": 0.0}  # fmt: skip
    found = gradients(monkeypatch)
    fit(**options)  # 12 batches of 4, one a step
    single, found[:] = list(found), []
    fit(**options, accumulate_batches=accumulate)
    assert len(found) == -(-12 // accumulate)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in found[-1]]))
    held = [torch.stack(parts).mean(0) for parts in zip(*single[-left:], strict=True)]
    share = float(norm / torch.linalg.vector_norm(torch.cat([g.flatten() for g in held])))
    print(f"the last step of {left} of {accumulate} batches has {share:.4f} of their mean gradient")
    for one, other in zip(found[-1], held, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(norm))


def test_an_incomplete_accumulation_is_a_step_of_the_schedule(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gradients(monkeypatch)
    result = fit(batch_size=4, accumulate_batches=5)  # 12 batches: 5, 5 and 2
    assert len(found) == 2 * 3
    assert result.history[0]["learning_rate"] > 0
    assert result.history[1]["learning_rate"] == pytest.approx(0, abs=1e-12)


def test_the_learning_rate_that_is_shown_is_that_of_the_parameters(fit: Fit) -> None:
    plain = fit()
    factors = fit(layer_decay=0.5, head_learning_rate_factor=10.0)
    assert plain.history[0]["learning_rate"] > 0
    for one, other in zip(plain.history, factors.history, strict=True):
        assert other["learning_rate"] == pytest.approx(one["learning_rate"], rel=1e-12)


# --------------------------------------------------------------------------- averaged weights


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """The weights after each optimiser step."""
    found: list[State] = []
    real = WeightAverage.on_train_batch_end

    def spying(self: WeightAverage, trainer: Any, task: Any, *rest: Any) -> None:
        if trainer.global_step != len(found):
            found.append({n: t.clone() for n, t in task.model.state_dict().items()})
        real(self, trainer, task, *rest)

    monkeypatch.setattr(WeightAverage, "on_train_batch_end", spying)
    return found


def assert_saved_is_evaluated(result: TrainingResult, path: Path) -> None:
    images = EvaluationImages(open_split("train", "val_select", path), result.config.preprocessing)
    logits = predict_logits(result.model, images, result.config.preprocessing, torch.device("cpu"))
    np.testing.assert_allclose(logits, result.select_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_exponential_average(
    decay: float, fit: Fit, tiny_splits: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = record_steps(monkeypatch)
    result = fit(
        weight_average="ema", ema_decay=decay, choose_epoch="last", accumulate_batches=2,
        batch_size=8,
    )  # fmt: skip
    assert len(steps) == 6
    factors = [decay ** (len(steps) - 1 - step) for step in range(len(steps))]
    for name, tensor in state(result).items():
        if tensor.is_floating_point():
            wanted = sum(f * s[name].double() for f, s in zip(factors, steps, strict=True))
            torch.testing.assert_close(tensor.double(), wanted / sum(factors), rtol=1e-5, atol=1e-6)
    assert_saved_is_evaluated(result, tiny_splits["val_select"])


def test_the_stochastic_average(
    fit: Fit, tiny_train: Train, tiny_splits: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = record_steps(monkeypatch)
    options = {"weight_average": "swa", "swa_start_fraction": 0.5, "choose_epoch": "last"}
    result = fit(**options, epochs=4, batch_size=16)
    assert len(steps) == 12
    found = state(result)
    for name, parameter in result.model.named_parameters():
        wanted = torch.stack([step[name].double() for step in steps[6:]]).mean(0)
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-5, atol=1e-6)
    # The statistics are torch's own, over the batches of the last epoch.
    split = open_split("train", "train", tiny_splits["train"])
    preprocessing = result.config.preprocessing
    images = TrainingImages(split, preprocessing, training_transform(tiny_train), 7)
    loader = training_loader(images, 16, 7, 0)
    cast("EpochSampler", loader.batch_sampler).seek(3)
    batches = [preprocessing.normalise(batch) for batch, _ in loader]
    torch.optim.swa_utils.update_bn(batches, result.model)
    for name, tensor in state(result).items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-4, atol=1e-5)
    mean = "backbone.layer4.0.bn1.running_mean"
    assert not torch.allclose(found[mean], steps[-1][mean], atol=0.01)
    result.model.load_state_dict(found)
    assert_saved_is_evaluated(replace(result, model=result.model.eval()), tiny_splits["val_select"])


class Drives(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Frames of 12 drives one after the other; each drive has its own light."""

    def __len__(self) -> int:
        return 192

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        drive, row = key[1] // 16, key[1]
        light = torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(drive))
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1000 + row))
        return (128 + 40 * light + 20 * noise).clamp(0, 255).byte(), torch.tensor(row % 2.0)


@pytest.mark.parametrize("balanced", [False, True])
def test_statistics_of_the_stochastic_average_do_not_depend_on_neighbours(
    balanced: bool, tiny_train: Train
) -> None:
    train = tiny_train.model_copy(update={"weight_average": "swa"})
    model, config = build_classifier(train, seed=7, root=Path())
    labels = np.arange(192) % 2 if balanced else None
    loader = training_loader(Drives(), 16, 7, 0, balance=labels)
    average = WeightAverage(train, loader, config.preprocessing)
    task = cast("ClassifierTask", SimpleNamespace(model=model.train(), device=torch.device("cpu")))
    average.on_train_start(SimpleNamespace(global_step=0), task)
    average.count = 1
    average.evaluated(task, epoch=2)
    assert average.model is not None

    def first_layer(network: torch.nn.Module) -> torch.nn.BatchNorm2d:
        return cast("torch.nn.BatchNorm2d", network.get_submodule("backbone.conv1.1"))

    found = first_layer(average.model)
    # Exact: over every pixel of every image at once, in double precision.
    everything = torch.stack([Drives()[0, row, 0][0] for row in range(192)])
    with torch.no_grad():
        outputs = model.backbone.get_submodule("conv1.0")(
            config.preprocessing.normalise(everything)
        )
    exact = outputs.double().var((0, 2, 3))
    # What neighbours would give: so the data can tell.
    neighbours = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(
        config.preprocessing.normalise(everything).split(16), neighbours
    )
    share = float((found.running_var / exact).mean())
    wrong = float((first_layer(neighbours).running_var / exact).mean())
    print(f"variance of the first layer over the exact one: {share:.3f}, of neighbours {wrong:.3f}")
    assert 0.85 < share < 1.15
    assert wrong < 0.5
    assert all(norm.momentum == 0.1 for norm in average.model.modules()
               if isinstance(norm, torch.nn.BatchNorm2d))  # fmt: skip


def test_the_stochastic_average_takes_turns_with_the_loader(fit: Fit) -> None:
    options = {"weight_average": "swa", "swa_start_fraction": 0.3, "epochs": 3}
    assert_same(fit(**options), fit(**options, workers=2))


def test_an_average_chooses_and_stops_by_what_it_scores(
    fit: Fit, tiny_splits: dict[str, Path]
) -> None:
    result = fit(weight_average="ema", ema_decay=0.7, choose_epoch="best_log_loss", epochs=4)
    losses = [row["val_loss"] for row in result.history]
    assert result.metrics["chosen_epoch"] == int(np.argmin(losses))
    assert_saved_is_evaluated(result, tiny_splits["val_select"])


# --------------------------------------------------------------------------- the gate


def test_the_gate_decides_and_is_resumed(
    tmp_path: Path, tiny_train: Train, tiny_splits: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = [open_split("train", n, tiny_splits[n]) for n in ("train", "val_select")]
    steps = count_steps(monkeypatch)

    real, distorted = gate.augmentation_gate, training.served_probabilities

    def scoring(model: Any, preprocessing: Any, split: Any, *rest: Any) -> Any:
        assert split.ids.tolist() == splits[1].ids.tolist(), "judged on other images"
        return distorted(model, preprocessing, split, *rest)

    monkeypatch.setattr(training, "served_probabilities", scoring)

    def run(scratch: str, low: float, **changes: Any) -> TrainingResult:
        def judged(run: Any, labels: Any, *arguments: Any, **more: Any) -> Any:
            found = real(run, labels, *arguments, **more)
            # What is served decides: images as they are say the contrary.
            bound = low if len(labels) == 4 * len(splits[1]) else -0.2 - low
            return replace(
                found, low=bound, high=bound + 0.01, verdict=gate.gate_verdict(bound, bound + 0.01)
            )

        monkeypatch.setattr(gate, "augmentation_gate", judged)
        steps.clear()
        return train_classifier(
            lambda train, seed: build_classifier(train, seed, tmp_path),
            tiny_train.model_copy(update=changes), *splits, seed=7, scratch=tmp_path / scratch,
            subnet=Subnet(validator="crop"), hardware=Hardware(device="cpu"), compile_settings=Compile(),
        )  # fmt: skip

    noisy = {"mixup_alpha": 0.5, "erasing_probability": 0.5}
    plain, augmented = run("plain", 0), run("augmented", 0, **noisy)
    assert len(steps) == 6
    failed = run("gated", -0.2, **noisy, augmentation_gate=2)
    assert len(steps) == 4 * 6
    found = failed.metrics.pop("gate")
    assert (found["judged_on"], found["augmented"], found["seeds"]) == ("served", False, 2)
    assert [found[f"on_{name}"]["verdict"] for name in ("served", "clean")] == ["fail", "pass"]
    assert_same(plain, failed)
    passed = run("gated", 0.0, **noisy, augmentation_gate=2)
    assert steps == []
    assert passed.metrics.pop("gate")["augmented"]
    assert_same(augmented, passed)
    by_clean = run("gated", 0.0, **noisy, augmentation_gate=2, augmentation_gate_on="clean")
    assert not by_clean.metrics.pop("gate")["augmented"]
    assert_same(plain, by_clean)
    with pytest.raises(UserError, match="none is on"):
        run("nothing", 0.0, augmentation_gate=2)


@pytest.mark.parametrize(("validator", "versions"), [("crop", gate.REPEATS), ("raw", 1)])
def test_the_gate_scores_what_embed_would_score(
    validator: Literal["crop", "raw"], versions: int,
    tmp_path: Path, tiny_train: Train, tiny_splits: dict[str, Path],
) -> None:  # fmt: skip
    """Versions as they are served, one image at a time."""
    split = open_split("train", "val_select", tiny_splits["val_select"])
    model, config = build_classifier(tiny_train, 7, tmp_path)
    subnet = Subnet(validator=validator)
    found = gate.served_probabilities(
        model.eval(), config.preprocessing, split, subnet, 5, torch.device("cpu"), 1
    )
    wanted = []
    for image in served_images(split, subnet, gate.REPEATS, 5, 1):
        [view] = views_of(image, config.preprocessing, ViewGrid()).inputs
        logits, _ = score(model, config.preprocessing, [view], 1, torch.device("cpu"))
        wanted.append(1 / (1 + np.exp(-float(logits[0]))))
    assert len(found) == versions * len(split)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


# --------------------------------------------------------------------------- several devices


def train_as_rank(paths: dict[str, Path], train: Train, scratch: Path, devices: int) -> Any:
    torch.set_num_threads(1)
    model, config = build_classifier(train, 7, scratch)
    result = fit_classifier(
        model, config, train, open_split("train", "train", paths["train"]),
        open_split("train", "val_select", paths["val_select"]), seed=7, scratch=scratch,
        hardware=Hardware(device="cpu", devices=devices),
    )  # fmt: skip
    return result.history, state(result), result.select_logits


def test_two_ranks_train_like_one(
    tiny_train: Train, tiny_splits: dict[str, Path], tmp_path: Path
) -> None:
    train = tiny_train.model_copy(
        update={"backbone": "street_vit", "weight_average": "ema", "accumulate_batches": 2}
    )
    history, weights, logits = train_as_rank(tiny_splits, train, tmp_path / "alone", 1)
    both = run_ranks(train_as_rank, tiny_splits, train, tmp_path / "both", 2, folder=tmp_path)
    trained = distance(weights, initial(train))
    # In another order of sums a gradient is off by the unit roundoff, 6e-8, of the largest one at most, and
    # AdamW divides by the gradient, which for the keys' biases is nothing but rounding (softmax ignores
    # them). Such noise moves the weights by 7e-4 of the way they were trained, logits by 3e-5 and losses by
    # 3e-6; half the gradient moves them by 3e-2, 3e-2 and 7e-3. The limits lie between.
    for other_history, other_weights, other_logits in both:
        for row, other in zip(history, other_history, strict=True):
            for name in ("epoch", "learning_rate", "train_loss", "val_loss"):
                assert other[name] == pytest.approx(row[name], abs=3e-4)
        moved = distance(other_weights, weights) / trained
        print(f"two ranks end {moved:.1e} of the way away from one, logits "
              f"{np.abs(other_logits - logits).max():.1e}")  # fmt: skip
        assert moved < 5e-3
        np.testing.assert_allclose(other_logits, logits, rtol=0, atol=1e-3)
    for name, tensor in both[0][1].items():
        assert torch.equal(tensor, both[1][1][name]), name


# --------------------------------------------------------------------------- optimiser, precision


def test_decay_and_learning_rate_of_each_parameter(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[Any] = []
    real = ClassifierTask.configure_optimizers

    def spying(task: ClassifierTask) -> dict[str, Any]:
        made = real(task)
        groups.extend(made["optimizer"].param_groups)
        return made

    monkeypatch.setattr(ClassifierTask, "configure_optimizers", spying)
    result = fit(epochs=1, weight_decay=0.3, learning_rate=0.001, head_learning_rate_factor=5.0)
    for group in groups:
        flat = {parameter.ndim < 2 for parameter in group["params"]}
        assert flat == {group["weight_decay"] == 0.0}
        assert group["weight_decay"] in {0.0, 0.3}
    head = {id(parameter) for parameter in result.model.head.parameters()}
    for group in groups:
        own = {id(parameter) in head for parameter in group["params"]}
        assert own == {group["initial_lr"] == pytest.approx(0.005)}
    count = sum(p.numel() for group in groups for p in group["params"])
    assert count == result.metrics["trainable_parameters"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("clip", [0.01, 0.0])
def test_gradients_are_clipped_with_a_fused_optimiser(
    precision: str, clip: float, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    norms: list[tuple[float, float]] = []
    kinds = set()
    real = ClassifierTask.configure_gradient_clipping

    def norm(task: ClassifierTask) -> float:
        gradients = [p.grad for p in task.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))

    def spying(task: ClassifierTask, optimizer: Any, *rest: Any, **more: Any) -> None:
        kinds.add((optimizer.defaults["fused"], task.trainer.precision))
        before = norm(task)
        real(task, optimizer, *rest, **more)
        norms.append((before, norm(task)))

    monkeypatch.setattr(ClassifierTask, "configure_gradient_clipping", spying)
    result = fit(precision=precision, gradient_clip=clip)
    assert kinds == {(True, {"fp32": "32-true", "bf16": "bf16-mixed"}[precision])}
    assert len(norms) == 2 * 3
    for before, after in norms:
        assert after == pytest.approx(min(before, clip) if clip else before, rel=1e-4)
    assert max(before for before, _ in norms) > 0.01, "nothing was clipped"
    # Weights and statistics stay in float32.
    assert {t.dtype for t in state(result).values()} == {torch.float32, torch.int64}


# --------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("which", ["train", "val_select"])
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_refused(
    which: str, label: int, tmp_path: Path, tiny_train: Train, tiny_splits: dict[str, Path],
    write_split: Callable[..., Path],
) -> None:  # fmt: skip
    one = write_split(tmp_path / f"{which}.arrow", labels=[label] * 6)
    paths = tiny_splits | {which: one}
    model, config = build_classifier(tiny_train, seed=7, root=tmp_path)
    with pytest.raises(UserError, match=f"{which} has images of one class only"):
        fit_classifier(
            model, config, tiny_train,
            open_split("train", "train", paths["train"]),
            open_split("train", "val_select", paths["val_select"]),
            seed=7, scratch=tmp_path, hardware=Hardware(device="cpu"),
        )  # fmt: skip


def test_a_loss_that_is_no_number_is_told_and_leaves_no_checkpoint(
    fit: Fit, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"diverged in epoch 1: its loss is (nan|inf).*lower train"):
        fit("scratch", learning_rate=1e30, gradient_clip=0.0, warmup_fraction=0.0)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_weights_that_break_in_the_last_step_are_told_too(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, images: Any, *_: Any, **__: Any) -> Any:
        return np.full(len(images), np.nan, np.float32)

    monkeypatch.setattr(selection, "predict_logits", broken)
    with pytest.raises(UserError, match=r"last step broke the weights; lower train.learning_rate"):
        fit()
