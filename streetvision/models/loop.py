"""The training loop of `train` and `explora`: Lightning, with resumption to the batch, ranks and progress."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from streetvision.core.artifacts import write_atomic
from streetvision.core.errors import UserError
from streetvision.core.params import Compile, Hardware
from streetvision.core.progress import LINE_SECONDS
from streetvision.data.loader import EpochSampler
from streetvision.models.classifier import pick_device

log = logging.getLogger(__name__)
CHECKPOINT = "last.ckpt"


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know beside the task and its data; `scratch` holds the checkpoint."""

    epochs: int
    precision: str
    accumulate_batches: int
    seed: int
    scratch: Path
    hardware: Hardware = field(default_factory=Hardware)
    compile: Compile = field(default_factory=Compile)

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return self.hardware.devices * self.hardware.nodes


def run_loop(
    task: lightning.LightningModule,
    loader: DataLoader[Any],
    callbacks: Sequence[Callback],
    settings: LoopSettings,
) -> None:
    """Train `task` on the batches of `loader`, whose `batch_sampler` is an `EpochSampler`.

    A checkpoint is written at the end of each epoch and every `hardware.checkpoint_minutes`, at optimiser
    steps alone; a run that finds one goes on from there, bit for bit on one machine. `callbacks` keep what
    else must survive in their `state_dict`. Before each batch torch's generator is seeded by seed, batch
    and rank. With several ranks every one of them returns, with the same weights; rank 0 alone should write.

    `training_step` returns the loss, or a dictionary with `loss` and, where that is not what should be
    reported, `reported`; `epoch_loss` is the mean of it.

    Raises
    ------
    UserError
        The devices asked for do not exist, or cannot divide a batch, or cannot train this model together.
    KeyboardInterrupt
        Ctrl+C; the last checkpoint stays.
    """
    device = pick_device(settings.hardware.device)
    _check_devices(task, device, settings)
    last = settings.scratch / CHECKPOINT
    if last.exists():
        log.info("resuming from the checkpoint of an interrupted run")
    # They announce devices and tips at every start.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    gpu = device.type == "cuda"
    sampler = cast("EpochSampler", loader.batch_sampler)
    trainer = lightning.Trainer(
        max_epochs=settings.epochs,
        accelerator="gpu" if gpu else "cpu",
        devices=settings.hardware.devices,
        num_nodes=settings.hardware.nodes,
        strategy=DDPStrategy(process_group_backend="nccl" if gpu else "gloo")
        if settings.ranks > 1
        else "auto",
        use_distributed_sampler=False,  # the sampler divides its batches itself
        precision=precision(settings.precision, device),
        accumulate_grad_batches=settings.accumulate_batches,
        callbacks=[*callbacks, Bookkeeping(sampler, settings)],
        plugins=[AtomicCheckpoints()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        # Lightning advises more workers, warns of the non-empty scratch folder, of modules in evaluation
        # mode, and of loaders it cannot position: all intended, the last is done here.
        warnings.filterwarnings("ignore", module=r"lightning\.")
        try:
            trainer.fit(task, loader, ckpt_path=str(last) if last.exists() else None)
        except SystemExit as error:  # Lightning's answer to Ctrl+C
            raise KeyboardInterrupt from error


class Bookkeeping(Checkpoint):  # type: ignore[misc]
    """Seeds, losses of the epoch, position in it, checkpoints, progress; Lightning calls it last."""

    def __init__(self, sampler: EpochSampler, settings: LoopSettings) -> None:
        self.sampler = sampler
        self.settings = settings
        self.position = (0, 0)  # epoch, batches of it
        self.losses: list[torch.Tensor] = []
        self.stepped = 0  # optimiser steps up to the batch before
        self.trainer: Any = None
        self.batches = 0  # of this process
        self.saved = self.line = self.started = time.monotonic()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Tell the sampler its rank, before anything is loaded."""
        del pl_module, stage
        self.trainer = trainer
        self.sampler.shard(trainer.global_rank, trainer.world_size)
        self.sampler.seek(0)

    def state_dict(self) -> dict[str, Any]:
        """Position and losses [ranks, batches] of the epoch; called on every rank."""
        return {"position": self.position, "losses": self._gathered()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the checkpoint ended; Lightning starts to iterate right after."""
        self.position = tuple(state_dict["position"])
        losses = state_dict["losses"]
        mine = (
            losses[self.trainer.global_rank]
            if len(losses) == self.trainer.world_size
            else losses.mean(0)  # another number of ranks
        )
        self.losses = list(mine)
        self.sampler.seek(*self.position)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clocks."""
        del pl_module
        self.stepped = trainer.global_step
        self.saved = self.line = time.monotonic()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start anew; Lightning skips this hook when a run is resumed within an epoch."""
        del pl_module
        self.losses = []
        self.position = (trainer.current_epoch, 0)
        self.sampler.seek(*self.position)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let dropout depend on seed, batch and rank alone.

        Loaders draw from the same generator, and not as often in a resumed run or with workers. Of the seed
        a CPU's generator takes the lowest 32 bits.
        """
        del pl_module, batch
        number = trainer.current_epoch * trainer.num_training_batches + batch_idx
        torch.manual_seed(
            self.settings.seed * 1_000_003 + number + trainer.global_rank * 2_654_435_761
        )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Let the last step of an epoch have the mean gradient of the batches it holds.

        Lightning divides the loss of each batch by `accumulate_batches`, also where fewer are left.
        """
        del trainer, pl_module
        held = self.position[1] % self.settings.accumulate_batches + 1
        if held == self.settings.accumulate_batches:
            return
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.settings.accumulate_batches / held)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the loss; save when it is time and the optimiser has just stepped."""
        del pl_module, batch
        loss = outputs.get("reported")
        if loss is None:
            loss = outputs["loss"] * self.settings.accumulate_batches
        self.losses.append(loss.detach())
        self.position = (trainer.current_epoch, batch_idx + 1)
        self._tell(trainer, batch_idx + 1)
        at_step, self.stepped = trainer.global_step > self.stepped, trainer.global_step
        if at_step and batch_idx + 1 < trainer.num_training_batches and self._due(trainer):
            # Weights that broke are not worth keeping: the epoch's end will say so.
            if math.isfinite(self._mean()):
                self._save(trainer)
            self.saved = time.monotonic()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save; the other callbacks have scored the epoch."""
        del pl_module
        self.position = (trainer.current_epoch + 1, 0)
        self._save(trainer)

    def _due(self, trainer: Any) -> bool:
        due = time.monotonic() - self.saved >= self.settings.hardware.checkpoint_minutes * 60
        if trainer.world_size > 1:  # all save, or none
            flag = torch.tensor(int(due), device=trainer.strategy.root_device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            due = bool(flag)
        return due

    def _save(self, trainer: Any) -> None:
        trainer.save_checkpoint(self.settings.scratch / CHECKPOINT)
        self.saved = time.monotonic()

    def _gathered(self) -> torch.Tensor:
        """Losses [ranks, batches]."""
        device = self.trainer.strategy.root_device
        losses = [loss.to(device) for loss in self.losses]  # some may come from a checkpoint
        mine = torch.stack(losses) if losses else torch.zeros(0, device=device)
        if self.trainer.world_size == 1:
            return mine.cpu()[None]
        gathered = self.trainer.strategy.all_gather(mine)
        return cast("torch.Tensor", gathered).cpu()

    def _mean(self) -> float:
        return float(self._gathered().double().mean())

    def _tell(self, trainer: Any, done: int) -> None:
        """Say after ten batches how long it will take, then once a minute how far it is."""
        now = time.monotonic()
        self.batches += 1
        if self.batches == 1:
            self.started = now  # the first batch is slow (caches, compilation) and measures nothing
            return
        first = self.batches == 10
        if not first and now - self.line < LINE_SECONDS:
            return
        self.line = now
        of_epoch = trainer.num_training_batches
        left = (trainer.max_epochs - trainer.current_epoch) * of_epoch - done
        seconds = (now - self.started) / (self.batches - 1)
        if first:
            log.info("about %s for the %d batches that are left", _duration(left * seconds), left)
            return
        log.info(
            "epoch %d of %d, batch %d of %d, loss %.4f, %.1f images/s, about %s left",
            trainer.current_epoch + 1, trainer.max_epochs, done, of_epoch, float(self.losses[-1]),
            min(self.sampler.batch_size, self.sampler.size) / seconds, _duration(left * seconds),
        )  # fmt: skip


def epoch_loss(trainer: Any) -> float:
    """Mean training loss of the epoch up to now, over batches and ranks; to be called on every rank."""
    return cast("Bookkeeping", trainer.checkpoint_callbacks[0])._mean()


class AtomicCheckpoints(TorchCheckpointIO):  # type: ignore[misc]
    """Writes beside the checkpoint and renames.

    Lightning moves a file from the temporary folder, which may be on another disk, and then a kill
    leaves half a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Replace `path` by `checkpoint` at once."""
        del storage_options
        write_atomic(Path(path), lambda temporary: torch.save(checkpoint, temporary))


def precision(wanted: str, device: torch.device) -> Any:
    """Lightning's name of the precision; BF16 only where the device computes in it."""
    if wanted == "fp32":
        return "32-true"
    if device.type == "cuda":
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capable = torch.cpu._is_avx512_bf16_supported()
    if not capable:
        log.warning("this device has no BF16 arithmetic: training in FP32")
        return "32-true"
    return "bf16-mixed"


def compiled(module: nn.Module, settings: Compile) -> Callable[..., Any]:
    """`module` as a function that runs compiled, for training; the module itself stays as it is.

    So its saved keys are the plain ones, and evaluation, whose last batch is smaller, compiles nothing. Where
    the first call cannot be compiled, one warning is logged and the module runs as it is.
    """
    if not settings.enabled:
        return module.__call__
    function = torch.compile(
        module.forward, mode=settings.mode, fullgraph=settings.fullgraph, dynamic=settings.dynamic
    )
    # The stances about recompilation would forbid the first compilation, too.
    early = "force_eager" if settings.stance == "force_eager" else "default"
    state = {"stance": early, "eager": False}

    def call(*arguments: Any) -> Any:
        if state["eager"]:
            return module(*arguments)
        try:
            with torch.compiler.set_stance(cast("Any", state["stance"])):
                result = function(*arguments)
        except Exception as error:
            if state["stance"] != early or not _is_compiler_error(error):
                raise
            state["eager"] = True
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            log.warning("torch.compile is impossible here, training runs eagerly: %s", reason)
            return module(*arguments)
        state["stance"] = settings.stance
        return result

    return call


def _is_compiler_error(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException) or type(error).__module__.startswith(
        ("torch._dynamo", "torch._inductor", "torch._functorch")
    )


def _check_devices(
    task: lightning.LightningModule, device: torch.device, settings: LoopSettings
) -> None:
    """Refuse what cannot train together; BatchNorm shares its statistics where it can."""
    started = int(os.environ.get("WORLD_SIZE", settings.ranks))
    if started != settings.ranks:
        raise UserError(
            f"{started} processes were started, but params.yaml asks for hardware.devices × "
            f"hardware.nodes = {settings.ranks}"
        )
    if device.type == "cuda" and settings.hardware.devices > torch.cuda.device_count():
        raise UserError(
            f"params.yaml: hardware.devices is {settings.hardware.devices}, "
            f"but torch finds {torch.cuda.device_count()} GPUs here"
        )
    norms = [m for m in task.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if settings.ranks == 1 or not any(norm.training for norm in norms):
        return
    if device.type == "cpu":
        raise UserError(
            f"params.yaml: hardware.devices is {settings.hardware.devices}, but on a CPU the model's "
            "BatchNorm cannot share its statistics (torch's SyncBatchNorm needs GPUs); use one "
            "device, train.freeze_norm, or a backbone without BatchNorm"
        )
    from timm.layers import convert_sync_batchnorm  # unlike torch's, it keeps timm's activations

    convert_sync_batchnorm(task)


def describe(
    model: nn.Module,
    shape: tuple[int, int, int],
    *,
    images_at_once: int,
    images_a_step: int,
    extra_passes: int = 0,
    extra_bytes: int = 0,
) -> dict[str, int]:
    """What a step of training `model` costs, from its architecture alone: no device, no data.

    One forward and backward pass of two images [3, H, W] = `shape` is traced on the meta device; each
    image has `extra_passes` forward passes besides.
    Floating-point operations are those of matrix products, convolutions and attention, a multiplication
    and an addition being two. The peak of memory is, in FP32,

        4 B · parameters + 4 B · trained (gradients) + 8 B · trained (AdamW) + activations + `extra_bytes`,

    activations being what autograd keeps for `images_at_once`; what libraries take on top is not in it.

    Parameters
    ----------
    model: images [B, 3, H, W] → a tensor, or a tuple whose first tensor is what the loss needs
    """
    count = 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    try:
        forward, flops, kept = _trace(model, torch.zeros(count, *shape, device="meta"))
    except (NotImplementedError, RuntimeError):  # something in it needs numbers
        forward, flops, kept = _trace(model, torch.zeros(count, *shape))
    return {
        "parameters": total,
        "trainable_parameters": trained,
        "flops_per_step": (flops + extra_passes * forward) * images_a_step // count,
        "peak_memory_bytes": 4 * total
        + 12 * trained
        + kept * images_at_once // count
        + extra_bytes,
    }


def _trace(model: nn.Module, images: torch.Tensor) -> tuple[int, int, int]:
    """Of one step on `images`: floating-point operations forward and in all, bytes kept for the way back."""
    from torch.utils.flop_counter import FlopCounterMode

    model = copy.deepcopy(model).to(images.device)
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}  # storages stay referenced, or their addresses would be used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with (
        torch.random.fork_rng(devices=[]),
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        outcome = model(images)
        forward = int(counter.get_total_flops())
        (outcome[0] if isinstance(outcome, tuple) else outcome).sum().backward()
    total = int(counter.get_total_flops())
    return forward, total, sum(storage.nbytes() for storage in kept.values())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
