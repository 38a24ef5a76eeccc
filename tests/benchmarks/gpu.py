"""Training on a GPU: against plain FP32, and against what its matrix multiplication allows."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tests.benchmarks.runner import PAIRS, Table
from tests.benchmarks.training import bench_splits, fit, plain_fit

NOT_MEASURED = "not measured: torch finds no GPU here"
SIDE, IMAGES, BATCH, EPOCHS = 224, 1024, 64, 3
COMPARED = ("vit_base_patch16_dinov3", "vit_large_patch16_dinov3")
BACKBONES = ("vit_small_patch16_dinov3", *COMPARED)
# Precision, and whether the model is compiled.
MODES = {"FP32 eager": ("fp32", False), "BF16": ("bf16", False), "BF16, compiled": ("bf16", True)}


def gpu() -> list[Table]:
    """Random weights, trained in full on images of 224 px whose decoded pixels are kept."""
    import torch

    what = f"Training in full at {SIDE} px, batches of {BATCH}"
    tables = (
        (
            f"{what}: compiled BF16 against a plain FP32 loop, {PAIRS} pairs (least, largest)",
            ["backbone", "ours, images/s", "FP32 eager, images/s", "ratio"],
            [(_pairs, name, "") for name in COMPARED],
        ),
        (
            f"{what}: share of the time that the GPU would need at the rate of a large matrix product",
            ["backbone", "mode", "images/s", "GPU busy", "peak memory", "of the bound"],
            [(_mode, name, mode) for name in BACKBONES for mode in MODES],
        ),
    )
    found = []
    for title, columns, jobs in tables:
        rows = (
            [measure(name, mode) for measure, name, mode in jobs]
            if torch.cuda.is_available()
            else [[NOT_MEASURED, *[""] * (len(columns) - 1)]]
        )
        found.append(Table(title, columns, rows))
    return found


def _settings(name: str, epochs: int, precision: str) -> Any:
    from streetvision.core.params import Train

    return Train.model_validate(
        {
            "backbone": name, "height_px": SIDE, "width_px": SIDE, "batch_size": BATCH,
            "epochs": epochs, "precision": precision, "init_from_explora": False,
            "choose_epoch": "last", "served_probability": 0.0,
        }
    )  # fmt: skip


def _steady(run: Callable[[int], object]) -> float:
    """Images a second beyond the first epoch, in which a model is compiled."""
    times = []
    for epochs in (1, EPOCHS):
        start = time.perf_counter()
        run(epochs)
        times.append(time.perf_counter() - start)
    return (EPOCHS - 1) * IMAGES / (times[1] - times[0])


def _pairs(name: str, _: str) -> list[str]:
    from streetvision.core.params import Compile

    with bench_splits(IMAGES, SIDE, SIDE) as (splits, folder):

        def ours(epochs: int) -> None:
            settings = _settings(name, epochs, "bf16")
            fit(settings, splits, folder, compile_settings=Compile(enabled=True))

        def plain(epochs: int) -> None:
            plain_fit(_settings(name, epochs, "fp32"), splits["train"])()

        ours(1)
        pairs = [(_steady(ours), _steady(plain)) for _ in range(PAIRS)]
    ratios = sorted(a / b for a, b in pairs)
    mine, theirs = (float(np.median(rates)) for rates in zip(*pairs, strict=True))
    spread = f"({ratios[0]:.2f}, {ratios[-1]:.2f})"
    return [name, f"{mine:,.0f}", f"{theirs:,.0f}", f"{np.median(ratios):.2f}× {spread}"]


def _mode(name: str, mode: str) -> list[str]:
    """Images/s, how busy the GPU was in the last half, its peak memory, and the share of the bound."""
    import torch

    from streetvision.core.params import Compile

    precision, compiled = MODES[mode]
    with bench_splits(IMAGES, SIDE, SIDE) as (splits, folder), _busy() as busy:
        cost: dict[str, int] = {}

        def run(epochs: int) -> None:
            settings = _settings(name, epochs, precision)
            result = fit(settings, splits, folder, compile_settings=Compile(enabled=compiled))
            cost.update(result.metrics["cost"])

        run(1)
        torch.cuda.reset_peak_memory_stats()
        rate = _steady(run)
        peak = torch.cuda.max_memory_allocated() / 2**30
        start = time.perf_counter()
        run(4 * EPOCHS)
        share = busy((start + time.perf_counter()) / 2)
    type_ = torch.float32 if precision == "fp32" else torch.bfloat16
    bound = _matmul_rate(type_, torch.device("cuda")) / (cost["flops_per_step"] / BATCH)
    return [
        name, mode, f"{rate:,.0f}", f"{share:.0%}", f"{peak:.1f} GiB",
        f"{rate / bound:.0%} of {bound:,.0f} images/s",
    ]  # fmt: skip


def _matmul_rate(type_: Any, device: Any, size: int = 8192) -> float:
    """Floating-point operations a second of a square matrix product, the best of ten."""
    import torch

    a, b = (torch.randn(size, size, device=device).to(type_) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@contextmanager
def _busy() -> Iterator[Callable[[float], float]]:
    """Sample the driver's share of time in which a kernel ran; yields its mean since a moment."""
    command = [
        "nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits",
        f"--id={os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0]}", "--loop-ms=200",
    ]  # fmt: skip
    samples: list[tuple[float, float]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            samples.extend(
                (time.perf_counter(), float(line) / 100) for line in process.stdout or ()
            )

        threading.Thread(target=read, daemon=True).start()
        yield lambda since: float(np.mean([share for when, share in samples if when >= since]))
        process.terminate()
