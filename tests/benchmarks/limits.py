"""Where the time goes of what misses its bar: shares of the steps, and of what the processor can do.

Profiling costs a little with every call of a Python function, so the rest of a table is an upper bound.
"""

from __future__ import annotations

import cProfile
import os
import runpy
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

from streetvision.core.params import Data
from tests.benchmarks.data import (
    DECODED,
    PHOTO_SIZE,
    SIDE,
    one_thread,
    photograph,
    picture,
    prepare_stage,
    training_inputs,
    write_raw,
)
from tests.benchmarks.inference import (
    MODEL,
    has_onnx,
    hugging_face,
    onnx_predictor,
    torch_predictor,
)
from tests.benchmarks.inference import SIDE as INPUT
from tests.benchmarks.runner import Table, seconds
from tests.benchmarks.training import bench_splits, fit
from tests.data.odd_images import encode

# Step → the functions that it is, by file and name, or as cProfile names what is not Python. None of a
# table's functions may call another one of it.
Steps = Mapping[str, tuple[str, ...]]
PREPARE: Steps = {
    "reading": ("core.py:iter_batches",),
    "decoding at DCT scale": ("<method 'decode' of 'ImagingDecoder' objects>",),
    "resizing": ("decode.py:_resized",),
    "encoding": ("decode.py:encode_jpeg",),
    "thumbnails for duplicates": ("duplicates.py:make_thumbnail",),
    "writing the splits": ("prepare.py:_write_splits",),
}
ACCESS: Steps = {
    "reading and JPEG decoding": ("store.py:image",),
    "fitting to the input": ("transforms.py:apply",),
    "random crop and resizing": ("_geometry.py:make_params", "_geometry.py:resized_crop_image"),
    "flip": ("_geometry.py:horizontal_flip_image",),
    "colour jitter": ("colour.py:transform",),
}
TRAINING: Steps = {
    "challenges": ("store.py:image", "augment.py:served_view"),
    "other augmentation": ("loader.py:seeded",),
    "scaling the inputs": ("transforms.py:normalise",),
    "network forward": ("classifier.py:forward",),
    "network backward": ("graph.py:_engine_run_backward",),
    "AdamW": ("adam.py:adam",),
}
REST = "the rest"
PHOTOS = 12
TOKENS, WIDTH = 197, 768  # of a ViT-B/16 at 224 pixels
PRODUCTS = (
    (WIDTH, 3 * WIDTH),
    (WIDTH, WIDTH),
    (WIDTH, 4 * WIDTH),
    (4 * WIDTH, WIDTH),
) * 12  # of its blocks
RUNS = 5
PAYLOADS, FUZZ_SECONDS = 10_000, 60
TRAINED, MATRIX = 512, 1024


def limits() -> list[Table]:
    """A table for each bar that is missed."""
    return [_prepare(), _access(), _training(), _prediction()]


def payloads() -> list[Table]:
    """Payloads of all kinds through an installed detector: its memory, and the slowest answer."""
    from streetvision.bundle.natix.check import (
        challenge_image,
        malformed,
        payload,
        running_miner,
        unusual,
    )
    from streetvision.bundle.natix.install import install
    from streetvision.bundle.natix.stand_in import make_checkout
    from tests.bundle.natix.test_detector import random_bundle
    from tests.data.odd_images import bombs, rare_modes, spoilt_metadata

    images = [(f"challenge {seed}", challenge_image(seed)) for seed in range(200)]
    images += [(name, data) for name, *_, data in spoilt_metadata()]
    images += [(name, data) for name, data, _ in rare_modes()]
    images += [*unusual().items(), *bombs(), *large_images()]
    sent = [(name, payload(data)) for name, data in images] + list(malformed().items())
    # What takes more than a megabyte is not sent thousands of times: it would only be read.
    small = [pair for pair in sent if len(pair[1]) < 2**20]
    order = np.random.default_rng(0).permutation(np.arange(PAYLOADS) % len(small))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bundle = random_bundle(folder / "made", 0).bundle
        checkout = make_checkout(folder / "checkout")
        install(bundle, checkout)
        with running_miner(checkout) as miner:
            found = {}
            for name, data in sent:
                answer = miner.ask(data)
                found[name] = (answer.seconds, answer.prediction)
            memory = [answer.peak_mib]
            for number in order.tolist():
                name, data = small[number]
                answer = miner.ask(data)
                found[name] = max(found[name], (answer.seconds, answer.prediction))
                memory.append(answer.peak_mib)
    slowest = sorted(found.items(), key=lambda pair: -pair[1][0])[:8]
    rows = [[name, f"{t:.3f} s", "none" if p < 0 else f"{p:.3f}"] for name, (t, p) in slowest]
    middle = memory[len(memory) // 2]
    title = (
        f"{PAYLOADS:,} payloads of {len(sent)} kinds through the detector: the slowest (reach: below 2 s); "
        f"peak memory when each kind was sent once {memory[0]:,} MiB, half way {middle:,}, "
        f"at the end {memory[-1]:,} (reach: flat)"
    )
    return [Table(title, ["payload", "longest", "answer"], rows)]


def large_images() -> list[tuple[str, bytes]]:
    """The largest of their kind that are decoded."""
    shown = picture(0, (4000, 3000))
    return [
        (f"{kind} of 12 megapixels {options or ''}", encode(shown, kind, **options))
        for kind, options in (
            ("JPEG", {"quality": 95}), ("JPEG", {"quality": 90, "progressive": True}),
            ("PNG", {"compress_level": 1}), ("WEBP", {"quality": 80, "method": 0}),
            ("WEBP", {"lossless": True, "quality": 0, "method": 0}), ("TIFF", {"compression": "tiff_lzw"}),
            ("BMP", {}),
        )
    ]  # fmt: skip


def fuzz() -> list[Table]:
    """Mutations of what is handed in, a minute each: whatever comes is a result or one line, and soon."""
    from tests.fuzz.fuzz_bundle import attempt, seeds

    rng = np.random.default_rng()
    rows = []
    for target in ("image", "payload", "onnx"):
        tried, accepted, slowest, stop = 0, 0, 0.0, time.monotonic() + FUZZ_SECONDS
        originals = seeds(target)
        while time.monotonic() < stop:
            data = bytearray(originals[tried % len(originals)])
            for place in rng.integers(0, len(data), int(rng.integers(1, 9))).tolist():
                change = rng.integers(4)
                if change == 0:
                    data[place : place + int(rng.integers(1, 30))] = b""
                elif change == 1:
                    data[place:place] = data[: int(rng.integers(1, 200))]
                else:
                    data[place : place + 1] = rng.bytes(1)
                if not data:
                    break
            start = time.perf_counter()
            accepted += attempt(target, bytes(data)) == ""
            slowest = max(slowest, time.perf_counter() - start)
            tried += 1
        rows.append([target, f"{tried:,}", f"{accepted:,}", f"{slowest:.3f} s"])
    return [
        Table("Mutated inputs, a minute each", ["target", "tried", "accepted", "slowest"], rows)
    ]


def shares(work: Callable[[], object], steps: Steps) -> dict[str, float]:
    """Share of each step and of the rest in the time of `work`: of several runs the fastest, profiled.

    LookupError where no function of a step's name ran: it was renamed.
    """
    work()
    profiles = [cProfile.Profile() for _ in range(RUNS)]
    for profile in profiles:
        profile.runcall(work)
    whole, spent = min((_spent(profile) for profile in profiles), key=lambda found: found[0])
    return _shares(whole, spent, steps)


def _shares(whole: float, spent: Mapping[str, float], steps: Steps) -> dict[str, float]:
    for name in (name for names in steps.values() for name in names):
        if name not in spent:
            raise LookupError(f"nothing that is called {name} ran")
    found = {step: sum(spent[name] for name in names) / whole for step, names in steps.items()}
    return found | {REST: 1 - sum(found.values())}


def _spent(profile: cProfile.Profile) -> tuple[float, dict[str, float]]:
    """Seconds of all, and of each function with what it calls."""
    spent: dict[str, float] = defaultdict(float)
    for entry in (entries := profile.getstats()):
        code = entry.code
        name = code if isinstance(code, str) else f"{Path(code.co_filename).name}:{code.co_name}"
        spent[name] += entry.totaltime
    return sum(entry.inlinetime for entry in entries), dict(spent)


def _table(title: str, works: Mapping[str, Callable[[], object]], steps: Steps) -> Table:
    found = [shares(work, steps) for work in works.values()]
    rows = [[step, *(f"{each[step]:.1%}" for each in found)] for step in [*steps, REST]]
    return Table(f"{title}: share of the time", ["step", *works], rows)


def _prepare() -> Table:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        raw = write_raw(folder / "raw", [photograph(seed) for seed in range(PHOTOS)])
        work = partial(prepare_stage, raw, folder, Data(side_px=SIDE), 1)
        size = " × ".join(map(str, PHOTO_SIZE))
        return _table(f"`prepare` of {PHOTOS} JPEGs", {f"{size} px to {SIDE}": work}, PREPARE)


def _access() -> Table:
    with one_thread(), ExitStack() as stack:
        works = {
            f"{stored} px to {side}": stack.enter_context(
                training_inputs(stored, side, keep=False)
            )[0]
            for stored, side in DECODED
        }
        return _table("Random access and training transforms, decoded each time", works, ACCESS)


def _training() -> Table:
    """More than half of the default `make repro`."""
    import torch

    from streetvision.core.params import Train

    settings = Train(epochs=2, init_from_explora=False)
    with bench_splits(TRAINED, settings.height_px, settings.width_px) as (splits, folder):
        result = fit(settings, splits, folder)
        found = shares(lambda: fit(settings, splits, folder), TRAINING)
        time = seconds(lambda: fit(settings, splits, folder))
    steps = settings.epochs * (TRAINED // settings.batch_size)
    network = time * (found["network forward"] + found["network backward"])
    rate = steps * result.metrics["cost"]["flops_per_step"] / network / 1e9
    a, b = torch.randn(2, MATRIX, MATRIX).to(torch.bfloat16)
    torch.mm(a, b)
    product = statistics.median(seconds(lambda: torch.mm(a, b)) for _ in range(RUNS))
    title = (
        f"`train`, default network, {steps} steps of {settings.batch_size} images, augmented as by default, in "
        f"{settings.precision}: share of the time; {rate:,.0f} GFLOP/s in the network, "
        f"{2 * MATRIX**3 / product / 1e9:,.0f} in a product of matrices of {MATRIX} × {MATRIX} in bf16"
    )
    rows = [[step, f"{share:.1%}"] for step, share in found.items()]
    return Table(title, ["step", "share"], rows)


def _prediction() -> Table:
    """What a prediction would take if all its operations ran as fast as its blocks' matrix products alone."""
    import torch

    from streetvision.bundle.cost import forward_flops

    ours = torch_predictor()
    pixels = np.random.default_rng(0).integers(0, 256, (INPUT, INPUT, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    flops = forward_flops(ours.model, torch.zeros((1, 3, INPUT, INPUT), device="meta"))
    matrices = [(torch.randn(TOKENS, a), torch.randn(a, b)) for a, b in PRODUCTS]
    # By engine its matrix products, and who predicts with it.
    engines: dict[str, list[Callable[[], object]]] = {
        "torch": [lambda: [torch.mm(a, b) for a, b in matrices], lambda: ours(image)]
    }
    names = {"torch": ["`Predictor`"]}
    other = hugging_face()
    if other is not None:
        engines["torch"].append(lambda: other(image))
        names["torch"].append("transformers' pipeline")
    if has_onnx():
        onnx = onnx_predictor(ours)
        engines["onnxruntime"] = [_onnx_products(), lambda: onnx(image)]
        names["onnxruntime"] = ["`OnnxPredictor`, float32"]
    # One after the other: onnxruntime's threads wait busily for a while.
    rows = [
        row
        for engine, works in engines.items()
        for row in _rates(engine, works, names[engine], flops)
    ]
    title = (
        f"One prediction, {MODEL}, batch 1, {torch.get_num_threads()} threads: {flops / 1e9:.1f} GFLOP, "
        "against the matrix products of its blocks alone"
    )
    return Table(title, ["what", "time", "GFLOP/s", "share that the products are"], rows)


def _rates(
    engine: str, works: list[Callable[[], object]], names: list[str], flops: float
) -> list[list[str]]:
    """Rows of an engine's products, scaled to `flops`, and of who predicts with it."""
    for work in works:
        work()
    times = zip(*[[seconds(work) for work in works] for _ in range(RUNS)], strict=True)
    products, *predictions = (statistics.median(each) for each in times)
    bound = products * flops / sum(2 * TOKENS * a * b for a, b in PRODUCTS)
    shown = {"at the rate of its products": bound, **dict(zip(names, predictions, strict=True))}
    return [
        [f"{engine}: {name}", f"{1e3 * t:,.0f} ms", f"{flops / t / 1e9:,.0f}", f"{bound / t:.0%}"]
        for name, t in shown.items()
    ]


def _onnx_products() -> Callable[[], object]:
    """The matrix products of all blocks in onnxruntime, with weights that it may pack beforehand."""
    from onnx import TensorProto, helper, numpy_helper

    from streetvision.bundle.onnx_session import open_session

    rng = np.random.default_rng(0)
    nodes, inputs, outputs, weights, feed = [], [], [], [], {}
    for i, (a, b) in enumerate(PRODUCTS):
        weight = rng.normal(size=(a, b)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"weight{i}"))
        nodes.append(helper.make_node("MatMul", [f"in{i}", f"weight{i}"], [f"out{i}"]))
        inputs.append(helper.make_tensor_value_info(f"in{i}", TensorProto.FLOAT, [TOKENS, a]))
        outputs.append(helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, [TOKENS, b]))
        feed[f"in{i}"] = rng.normal(size=(TOKENS, a)).astype(np.float32)
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    versions = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=8)
    session = open_session(model.SerializeToString(), Path("products.onnx"))
    return lambda: session.run(None, feed)


def stage_times(stage: str, steps: Steps) -> tuple[float, float, dict[str, float]]:
    """Run a stage twice in this process, in its project as the working directory.

    Returns
    -------
    first, second, steps
        Seconds of the first run, which imports what it needs, and of the second; by step its share of a
        third, profiled.
    """
    arguments, sys.argv = sys.argv, [f"stages.{stage}"]

    def run() -> None:
        with patch.object(os, "_exit", side_effect=SystemExit), suppress(SystemExit):
            runpy.run_module(f"stages.{stage}", run_name="__main__")

    try:
        first, second = (seconds(run) for _ in range(2))
        profile = cProfile.Profile()
        profile.runcall(run)
    finally:
        sys.argv = arguments
    return first, second, _shares(*_spent(profile), steps)
