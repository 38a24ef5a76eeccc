"""The loop: resumed anywhere it ends at the same weights, several ranks train like one."""

from __future__ import annotations

import os
import pickle
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

from streetvision.data.loader import EpochSampler, Key
from streetvision.models.loop import (
    AtomicCheckpoints,
    LoopSettings,
    epoch_loss,
    precision,
    run_loop,
)
from streetvision.params import Hardware
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
        (2, {}, 13),
        (5, {}, 10),
        (9, {"workers": 2}, 6),
        (8, {"accumulate": 2}, 8),
        (5, {"accumulate": 2}, 10),
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


def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    options = {"dropout": 0.0, "accumulate": 2}
    alone = train(tmp_path / "alone", **options)
    found = run_ranks(train_two, tmp_path / "both", folder=tmp_path)
    for losses, weights, steps in found:
        assert steps == 15
        torch.testing.assert_close(losses, alone[0], rtol=1e-6, atol=1e-6)
        for name, tensor in alone[1].items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
    assert_same(found[0], found[1])


def train_two(scratch: Path) -> Any:
    return train(scratch, devices=2, dropout=0.0, accumulate=2)


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
