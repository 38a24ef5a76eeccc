"""The loop: resumed anywhere it ends at the same weights, several ranks train like one."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset

from streetvision.core.errors import UserError
from streetvision.core.params import Compile, Hardware
from streetvision.data.loader import EpochSampler, Key
from streetvision.models.backbone import build_backbone, resolve
from streetvision.models.loop import (
    AtomicCheckpoints,
    LoopSettings,
    compiled,
    describe,
    epoch_loss,
    precision,
    run_loop,
)
from tests.models.ranks import run_ranks

CPU = torch.device("cpu")
OFTEN = 1e-9  # minutes between checkpoints: one at every optimiser step


class Numbers(Dataset[torch.Tensor]):
    """Rows of random numbers that depend on their key."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, key: Key) -> torch.Tensor:
        epoch, row, repeat = key
        generator = torch.Generator().manual_seed(epoch * 1000 + row + 10**6 * repeat)
        return torch.randn(6, generator=generator)


class Toy(lightning.LightningModule):
    """Regression with momentum and dropout: whatever a resumed run forgets, shows."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.die_at: int | None = None
        self.steps = 0

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        if self.steps == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps += 1
        return nn.functional.mse_loss(self.model(batch).squeeze(1), batch.sum(1))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Trace(Callback):
    """The loss of each epoch, kept across interruptions."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.found = list(state_dict["found"])

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        del task
        self.found.append(epoch_loss(trainer))


def train(
    scratch: Path,
    die_at: int | None = None,
    *,
    accumulate: int = 1,
    workers: int = 0,
    devices: int = 1,
    dropout: float = 0.3,
    minutes: float = OFTEN,
) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses by epoch, weights, and the batches this call trained on."""
    torch.set_num_threads(1)
    task, trace = Toy(dropout), Trace()
    task.die_at = die_at
    data = Numbers()
    loader = DataLoader(
        data, batch_sampler=EpochSampler(len(data), 8, 7), num_workers=workers,
        persistent_workers=workers > 0, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    hardware = Hardware(device="cpu", devices=devices, checkpoint_minutes=minutes)
    run_loop(task, loader, [trace], LoopSettings(3, "fp32", accumulate, 7, scratch, hardware))
    return trace.found, {k: v.clone() for k, v in task.model.state_dict().items()}, task.steps


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name


CHILD = """
import pickle, sys
from tests.models.test_loop import train
scratch, die_at, options = pickle.loads(bytes.fromhex(sys.argv[1]))
train(scratch, die_at, **options)
"""


# 5 batches an epoch; with 2 accumulated 3 steps, the last of one batch.
@pytest.mark.parametrize(
    ("die_at", "options", "left"),
    [
        (5, {}, 10),
        (9, {"workers": 2}, 6),
        (8, {"accumulate": 2}, 8),
    ],
)
def test_a_killed_run_goes_on_at_its_last_optimiser_step(
    die_at: int, options: dict[str, int], left: int, tmp_path: Path, repository: Path
) -> None:
    whole = train(tmp_path / "whole", **options)
    assert whole[2] == 15
    argument = pickle.dumps((tmp_path / "killed", die_at, options)).hex()
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, argument], cwd=repository, capture_output=True, check=False,
        env=os.environ | {"PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    resumed = train(tmp_path / "killed", **options)
    assert_same(whole, resumed)
    assert resumed[2] == left


def test_checkpoints_change_nothing_and_wait_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []
    real = AtomicCheckpoints.save_checkpoint

    def counting(*arguments: Any, **more: Any) -> None:
        saves.append(1)
        real(*arguments, **more)

    monkeypatch.setattr(AtomicCheckpoints, "save_checkpoint", counting)
    often = train(tmp_path / "often")
    assert len(saves) == 15
    saves.clear()
    assert_same(often, train(tmp_path / "seldom", minutes=60))
    assert len(saves) == 3


def test_the_loss_of_an_epoch_is_that_of_its_own_batches(tmp_path: Path) -> None:
    found: list[list[float]] = []

    class Noting(Toy):
        def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
            loss = super().training_step(batch, number)
            if number == 0:
                found.append([])
            found[-1].append(float(loss.detach()))
            return loss

    trace = Trace()
    loader = DataLoader(Numbers(), batch_sampler=EpochSampler(40, 8, 7))
    settings = LoopSettings(3, "fp32", 2, 7, tmp_path, Hardware(device="cpu"))
    run_loop(Noting(), loader, [trace], settings)
    assert [len(losses) for losses in found] == [5, 5, 5]
    expected = [sum(losses) / 5 for losses in found]
    assert trace.found == pytest.approx(expected, rel=1e-6)
    assert max(expected) > 1.05 * min(expected)


# --------------------------------------------------------------------------- ranks

ALIKE: dict[str, Any] = {"dropout": 0.0, "accumulate": 2}


def train_two(scratch: Path) -> Any:
    return train(scratch, devices=2, **ALIKE)


def assert_close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=1e-6)
    for name, tensor in one[1].items():
        torch.testing.assert_close(other[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", **ALIKE)
    found = run_ranks(train_two, tmp_path / "both", folder=tmp_path)
    for result in found:
        assert result[2] == 15
        assert_close(alone, result)
    assert_same(found[0], found[1])


SCRIPT = """
import sys
from pathlib import Path
import torch
from streetvision.core.artifacts import main_process
from tests.models.test_loop import train_two
scratch = Path(sys.argv[1])
result = train_two(scratch)
torch.save(result, scratch / ("first.pt" if main_process() else "second.pt"))
"""


def test_a_plain_command_starts_its_other_ranks(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path], cwd=repository, check=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(repository)}, timeout=100,
    )  # fmt: skip
    alone = train(tmp_path / "alone", **ALIKE)
    for name in ("first", "second"):
        assert_close(alone, torch.load(tmp_path / f"{name}.pt", weights_only=False))


def test_what_cannot_train_together_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Toy()
    loader = DataLoader(Numbers(), batch_sampler=EpochSampler(40, 8, 7))

    def refusal(**hardware: Any) -> str:
        settings = LoopSettings(1, "fp32", 1, 7, tmp_path, Hardware(**hardware))
        with pytest.raises(UserError) as caught:
            run_loop(task, loader, [], settings)
        return str(caught.value)

    task.model.append(nn.BatchNorm1d(1))
    assert "BatchNorm cannot share its statistics" in refusal(device="cpu", devices=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 processes were started" in refusal(device="cpu", devices=2)


# --------------------------------------------------------------------------- compilation


def test_compilation_is_off_unless_asked_for() -> None:
    module = nn.Linear(2, 1)
    assert compiled(module, Compile()) == module.__call__


def test_without_a_compiler_it_runs_eagerly_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("no C++ compiler")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", unavailable)
    torch.compiler.reset()
    module = nn.Linear(2, 1)
    run = compiled(module, Compile(enabled=True, stance="fail_on_recompile"))
    for count in (4, 3):
        images = torch.randn(count, 2)
        assert torch.equal(run(images), module(images))
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 1
    assert "torch.compile is impossible here" in warned[0]
    assert "no C++ compiler" in warned[0]


def test_a_mistake_in_the_model_is_no_compiler_error() -> None:
    torch.compiler.reset()
    run = compiled(nn.Linear(2, 1), Compile(enabled=True, stance="force_eager"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(torch.randn(4, 3))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_training_is_the_same_and_compiles_once() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 1))
    settings = Compile(enabled=True, fullgraph=True, stance="fail_on_recompile")
    run = compiled(module, settings)
    for _ in range(3):
        images = torch.randn(4, 6)
        module.zero_grad()
        run(images).sum().backward()
        found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        module.zero_grad()
        module(images).sum().backward()
        for gradient, parameter in zip(found, module.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert list(module.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    # Evaluation takes the module itself; a batch of another size would be a recompilation.
    with pytest.raises(RuntimeError, match="recompile"):
        run(torch.randn(3, 6))


# --------------------------------------------------------------------------- cost


def test_cost_of_a_network_counted_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 6 * 6, 1))
    model[0].requires_grad_(requires_grad=False)
    found = describe(model, (3, 8, 8), images_at_once=16, images_a_step=32, extra_bytes=1000)
    convolution, linear = 4 * 3 * 9 * 36, 144
    assert found["parameters"] == 108 + 145
    assert found["trainable_parameters"] == 145
    # Forward, and backward for the linear layer's weight: nothing before it needs a gradient.
    assert found["flops_per_step"] == 32 * 2 * (convolution + 2 * linear)
    passes = describe(model, (3, 8, 8), images_at_once=16, images_a_step=32, extra_passes=2)
    assert passes["flops_per_step"] == 32 * 2 * (3 * convolution + 4 * linear)
    # The linear layer keeps its input.
    assert found["peak_memory_bytes"] == 4 * 253 + 12 * 145 + 16 * 144 * 4 + 1000


@pytest.mark.parametrize("name", ["street_resnet", "street_vit"])
def test_expected_memory_is_what_is_kept(name: str) -> None:
    timm_name, arguments, _, _ = resolve(name, 64, 64)
    model = build_backbone(timm_name, arguments).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = describe(model, (3, 64, 64), images_at_once=8, images_a_step=8)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(torch.randn(8, 3, 64, 64)).sum()
    loss.backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    state = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
    weights = sum(2 * p.nbytes for p in model.parameters())
    real = sum(kept.values()) + state + weights
    assert real / 1.5 < found["peak_memory_bytes"] < real * 1.5


# --------------------------------------------------------------------------- files, precision


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path: Path) -> None:
    plugin = AtomicCheckpoints()
    path = tmp_path / "last.ckpt"
    plugin.save_checkpoint({"epoch": 1}, path)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        plugin.save_checkpoint({"epoch": 2, "broken": lambda: None}, path)
    assert torch.load(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_bf16_falls_back_where_the_device_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert precision("bf16", CPU) == "32-true"
    assert "no BF16" in caplog.text
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert precision("bf16", CPU) == "bf16-mixed"
    assert precision("fp32", CPU) == "32-true"
