"""Training: reproducible, resumable bit for bit, the best epoch is returned, mistakes are told."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import log_loss, matthews_corrcoef

from streetvision.data.loader import EvaluationImages
from streetvision.data.store import open_split
from streetvision.errors import UserError
from streetvision.models import selection
from streetvision.models.selection import predict_logits
from streetvision.models.task import ClassifierTask
from streetvision.models.training import TrainingResult, build_classifier, fit_classifier
from streetvision.params import Hardware, Train

State = dict[str, torch.Tensor]
Fit = Callable[..., TrainingResult]
# Everything random is on, and the optimiser has momentum: whatever a resume forgets, shows.
RESUMED = {"epochs": 3, "dropout": 0.3, "label_smoothing": 0.1}


@pytest.fixture
def fit(tmp_path: Path, tiny_train: Train, tiny_splits: dict[str, Path]) -> Fit:
    """Train on the tiny splits with some parameters changed; `scratch` names a folder."""

    def run(scratch: str = "", seed: int = 7, workers: int = 0, **changes: Any) -> TrainingResult:
        train = tiny_train.model_copy(update=changes)
        model, config = build_classifier(train, square_crop=False, seed=seed, root=tmp_path)
        folder = tmp_path / (scratch or f"fresh-{len(list(tmp_path.iterdir()))}")
        folder.mkdir(exist_ok=True)
        return fit_classifier(
            model, config, train,
            open_split("train", "train", tiny_splits["train"]),
            open_split("train", "val_select", tiny_splits["val_select"]),
            seed=seed, scratch=folder, hardware=Hardware(device="cpu", workers=workers),
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
    model, _ = build_classifier(train, square_crop=False, seed=7, root=Path())
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --------------------------------------------------------------------------- the same again


def test_one_seed_gives_one_result_whatever_the_workers(fit: Fit) -> None:
    first = fit(dropout=0.3)
    torch.manual_seed(99)
    assert_same(first, fit(dropout=0.3))
    assert_same(first, fit(dropout=0.3, workers=2))
    assert fit(seed=8, dropout=0.3).history != first.history


@pytest.mark.parametrize("step", [0, 3, 4, 8])
def test_a_failed_run_goes_on_to_the_same_result(
    step: int, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(**RESUMED)
    real = ClassifierTask.training_step
    steps = []

    def failing(task: ClassifierTask, batch: Any, index: int) -> torch.Tensor:
        steps.append(index)
        if len(steps) > step:
            raise RuntimeError("power cut")
        return real(task, batch, index)

    monkeypatch.setattr(ClassifierTask, "training_step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        fit("scratch", **RESUMED)
    monkeypatch.setattr(ClassifierTask, "training_step", real)
    assert_same(whole, fit("scratch", **RESUMED))


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
import torch
from streetvision.data.store import open_split
from streetvision.models.selection import EpochSelection
from streetvision.models.training import build_classifier, fit_classifier
from streetvision.params import Hardware
torch.set_num_threads(1)
train, splits, scratch = pickle.loads(bytes.fromhex(sys.argv[1]))
real = EpochSelection.on_train_epoch_end
def killing(self, trainer, task):
    if trainer.current_epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, trainer, task)
EpochSelection.on_train_epoch_end = killing
model, config = build_classifier(train, False, 7, Path())
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


# --------------------------------------------------------------------------- what is trained


def test_trainable_head_changes_no_backbone_tensor(fit: Fit, tiny_train: Train) -> None:
    result = fit(trainable="head")
    before = initial(tiny_train)
    for name, tensor in state(result).items():
        assert torch.equal(tensor, before[name]) == name.startswith("backbone."), name
    assert result.metrics["trainable_parameters"] == 65
    assert result.metrics["parameters"] == sum(p.numel() for p in result.model.parameters())


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
    model, config = build_classifier(tiny_train, square_crop=False, seed=7, root=tmp_path)
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
