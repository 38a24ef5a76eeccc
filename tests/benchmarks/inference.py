"""A ViT-B of random weights on one image of 224 × 224 pixels, on the CPU: against what there is, and alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tests.benchmarks.data import picture
from tests.benchmarks.runner import Result, Table, compare

if TYPE_CHECKING:
    from streetvision.bundle.onnx_predictor import OnnxPredictor
    from streetvision.bundle.predictor import Predictor
    from streetvision.fusion.fusion import Fusion
    from streetvision.models.classifier import ClassifierConfig, RoadworkClassifier

MODEL = "vit_base_patch16_224"
SIDE = 224
THREADS = 2
# Model, height and width of its input, and images a run, of what ten views are timed with.
VIEWED = (("street_resnet", 96, 128, 10), ("vit_small_patch16_224", SIDE, SIDE, 1))
# Views of an image → their grid, and how many images are timed with each engine.
LATENCY_VIEWS = {1: (1, 50), 10: (3, 8)}
# What many threads share one predictor of, for how long, and when their memory is first looked at.
SHARED_MODEL, CALLERS, SHARED_SECONDS, SETTLED_SECONDS = "resnet18", 8, 30.0, 15.0


def inference() -> list[Table]:
    """`Predictor` against transformers' pipeline, and onnxruntime, float32 and int8, against torch."""
    from streetvision.bundle.onnx_export import export_network, quantise

    ours = torch_predictor()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    rows = [_row("Predictor", "transformers' pipeline", ours, hugging_face(), image)]
    if not has_onnx():
        rows.append(
            ["onnxruntime", "torch", "not measured: the extra onnx is not installed", "", ""]
        )
    else:
        data = export_network(ours.model, ours.preprocessing, features=False)
        versions = {
            "onnxruntime": data,
            "onnxruntime, dynamic int8": quantise(data, "dynamic", []),
            "onnxruntime, static int8": quantise(data, "static", [pixels[None]]),
        }
        for version, content in versions.items():
            onnx = onnx_predictor(ours, content)
            rows.append(_row(version, "torch", onnx, ours, image))
    columns = ["what", "against", "ours", "other", "ratio (of 5 pairs: least, largest)"]
    return [Table(f"One prediction, {MODEL}, batch 1, on the CPU", columns, rows)]


def views() -> list[Result]:
    """The ten views of an image in one call against a call for each view, cut from the image alike."""
    from streetvision.data.views import views_of

    results = []
    for model, height, width, images in VIEWED:
        ten, one = (torch_predictor(grid, model, height, width) for grid in (3, 1))
        image = picture(0, (4 * width, 4 * height))
        shown = views_of(image, ten.preprocessing, ten.fusion.config.grid).boxes
        boxes = [tuple(box) for box in np.rint(shown * np.tile(image.size, 2)).astype(int).tolist()]

        def ours(ten: Predictor = ten, image: Image.Image = image, images: int = images) -> None:
            for _ in range(images):
                ten(image)

        def other(
            one: Predictor = one,
            image: Image.Image = image,
            boxes: Any = boxes,
            images: int = images,
        ) -> None:
            for _ in range(images):
                for box in boxes:
                    one(image.crop(box))

        results.append(
            compare(
                f"ten views of an image, {model} {width} × {height}",
                "ten calls of a predictor of one view", ours, other, reach=1.5,
            )
        )  # fmt: skip
    return results


def latency() -> list[Table]:
    """What `export.timed_images` times, a process each: p50, p95, p99 and the peak of memory."""
    from streetvision.bundle.engines import shipped_engines
    from streetvision.bundle.timing import time_bundle

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for views, (grid, images) in LATENCY_VIEWS.items():
            bundle = _bundle(Path(folder) / str(views), grid)
            with _environment(OMP_NUM_THREADS=str(THREADS)):
                timed = time_bundle(bundle, shipped_engines(bundle), images)
            for engine, found in timed.items():
                times = [f"{found[name]:,.0f} ms" for name in ("p50_ms", "p95_ms", "p99_ms")]
                memory = f"{found.get('peak_memory_mb', float('nan')):,.0f} MB"
                rows.append([str(views), engine, *times, memory, f"{found['load_ms']:,.0f} ms"])
    columns = ["views", "engine", "p50", "p95", "p99", "peak memory", "loading"]
    shown = ", ".join(str(images) for _, images in LATENCY_VIEWS.values())
    title = f"Latency of {MODEL}, batch 1, {THREADS} threads, {shown} images; int8 is dynamic"
    return [Table(title, columns, rows)]


def shared() -> list[Table]:
    """Threads that share one predictor for half a minute: wrong answers, and memory that is not given back."""
    import threading
    import time

    from streetvision.bundle.predictor import Predictor

    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (side, SIDE, 3), dtype=np.uint8))
        for side in range(SIDE, SIDE + 64, 4)
    ]
    with tempfile.TemporaryDirectory() as folder:
        predictor = Predictor.load(_bundle(Path(folder), 2, SHARED_MODEL, onnx=False), "cpu")
    wanted = [predictor(image) for image in images]
    counts = np.zeros((CALLERS, 2), dtype=np.int64)  # calls, wrong answers
    stop = time.perf_counter() + SHARED_SECONDS

    def ask(caller: int) -> None:
        own = np.random.default_rng(caller)
        while time.perf_counter() < stop:
            chosen = int(own.integers(len(images)))
            wrong = abs(predictor(images[chosen]) - wanted[chosen]) > 1e-6
            counts[caller] += (1, wrong)

    threads = [threading.Thread(target=ask, args=(caller,)) for caller in range(CALLERS)]
    for thread in threads:
        thread.start()
    time.sleep(SETTLED_SECONDS)
    settled = _resident_mb()
    for thread in threads:
        thread.join()
    calls, wrong = counts.sum(axis=0)
    row = [f"{calls:,}", str(wrong), f"{settled:,.0f} MB", f"{_resident_mb():,.0f} MB"]
    title = f"{CALLERS} threads, one predictor ({SHARED_MODEL}, 5 views), {SHARED_SECONDS:.0f} s"
    first = f"memory after {SETTLED_SECONDS:.0f} s"
    return [Table(title, ["predictions", "wrong", first, "at the end"], [row])]


def _resident_mb() -> float:
    """Memory of this process that is in RAM now; Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def torch_predictor(
    grid: int = 1, model: str = MODEL, height: int = SIDE, width: int = SIDE
) -> Predictor:
    """A predictor of random weights on the CPU; several views are averaged."""
    import torch

    from streetvision.bundle.predictor import Predictor
    from streetvision.decision.calibrators import PlattMap
    from streetvision.decision.policy import Policy

    policy = Policy(PlattMap(1.0, 0.0), 0.5, 0.5)
    network = _classifier(model, height, width)
    return Predictor(*network, _fusion(grid), policy, 1, torch.device("cpu"))


def onnx_predictor(like: Predictor, model: bytes | None = None) -> OnnxPredictor:
    """The same in onnxruntime, of an ONNX `model` or the float32 one."""
    from streetvision.bundle.onnx_export import export_network
    from streetvision.bundle.onnx_predictor import OnnxPredictor
    from streetvision.bundle.onnx_session import Network

    data = model or export_network(like.model, like.preprocessing, features=False)
    network = Network(data, Path("model.onnx"), like.preprocessing, features=False)
    return OnnxPredictor(network, like.preprocessing, like.fusion, like.policy, 1)


def _fusion(grid: int) -> Fusion:
    from streetvision.core.params import Cvfm, ViewGrid
    from streetvision.fusion.fusion import Fusion, FusionConfig

    mode = "single" if grid == 1 else "simple_mean"
    return Fusion(FusionConfig.of(mode, Cvfm(), ViewGrid(grid=grid), 0))


def _classifier(
    model: str = MODEL, height: int = SIDE, width: int = SIDE
) -> tuple[RoadworkClassifier, ClassifierConfig]:
    import torch

    from streetvision.data.transforms import Preprocessing
    from streetvision.models.backbone import resolve
    from streetvision.models.classifier import ClassifierConfig

    torch.manual_seed(0)
    name, arguments, mean, std = resolve(model, height, width)
    preprocessing = Preprocessing(height, width, "crop", mean, std)
    config = ClassifierConfig(name, arguments, preprocessing)
    return config.build().eval(), config


def _bundle(folder: Path, grid: int, model: str = MODEL, *, onnx: bool = True) -> Path:
    """A bundle as `export` writes it, with ONNX models where these can be made; several views are averaged."""
    from streetvision.bundle.export import export_bundle
    from streetvision.core.artifacts import write_bytes_atomic, write_json_atomic
    from streetvision.core.params import Export
    from streetvision.decision.calibrators import PlattMap
    from streetvision.decision.pickling import dump_policy_pickle
    from streetvision.decision.policy import Policy, scrc_document
    from streetvision.fusion.fusion import save_fusion
    from streetvision.models.classifier import save_classifier

    save_classifier(*_classifier(model), folder / "classifier")
    save_fusion(_fusion(grid), folder / "cvfm")
    # Everything is roadwork: with random weights decisions at 0.5 would hang on the last digit.
    policy = Policy(PlattMap(1.0, 5.0), 0.5, 0.5)
    document = scrc_document(policy, {"metrics": {"before": {}, "after": None}})
    write_json_atomic(folder / "scrc_params.json", document)
    write_bytes_atomic(folder / "scrc_params.pkl", dump_policy_pickle(document))
    make_onnx = None
    if onnx and has_onnx():
        from streetvision.bundle.onnx_gate import GateImages
        from streetvision.bundle.onnx_gate import make_onnx as make

        images = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("black", "white")]
        gate = GateImages(lambda: images, lambda: images, np.array([0, 1]), lambda: images)
        settings = Export(onnx=True, int8="dynamic", max_mcc_drop=2)
        make_onnx = partial(make, settings=settings, images=gate)
    export_bundle(
        folder / "classifier", folder / "scrc_params.json", folder / "scrc_params.pkl",
        folder / "bundle", cvfm=folder / "cvfm", batch_size=1, make_tar=False, make_onnx=make_onnx,
    )  # fmt: skip
    return folder / "bundle"


def has_onnx() -> bool:
    """Whether the extra onnx is installed."""
    return all(find_spec(name) is not None for name in ("onnx", "onnxruntime", "onnxscript"))


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """What processes that are started meanwhile find in their environment."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def hugging_face() -> Callable[[Any], object] | None:
    """The same architecture as transformers serves it."""
    if find_spec("transformers") is None:
        return None
    from transformers import (
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
        pipeline,
    )

    model = ViTForImageClassification(ViTConfig(num_labels=2)).eval()
    processor = ViTImageProcessor()
    serve: Callable[[Any], object] = pipeline(
        "image-classification", model=model, image_processor=processor, device="cpu"
    )
    return serve


def _row(
    what: str,
    against: str,
    ours: Callable[[Any], object],
    other: Callable[[Any], object] | None,
    image: Image.Image,
) -> list[str]:
    if other is None:
        return [what, against, "not measured: transformers is not installed", "", ""]
    found = compare(what, against, lambda: ours(image), lambda: other(image))
    ratio = f"{found.ratio:.3g}× ({found.ratio_low:.3g}, {found.ratio_high:.3g})"
    return [
        what, against, f"{found.ours_seconds * 1e3:.3g} ms", f"{found.other_seconds * 1e3:.3g} ms",
        ratio,
    ]  # fmt: skip
