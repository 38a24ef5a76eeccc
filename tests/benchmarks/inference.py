"""One image of 224 × 224 pixels on the CPU, with a ViT-B of random weights: ours against what there is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.runner import Table, compare

MODEL = "vit_base_patch16_224"
SIDE = 224


def inference() -> list[Table]:
    """`Predictor` against transformers' pipeline, and onnxruntime, float32 and int8, against torch."""
    import torch

    from streetvision.bundle.onnx_export import export_network, quantise
    from streetvision.bundle.onnx_predictor import OnnxPredictor
    from streetvision.bundle.onnx_session import Network
    from streetvision.bundle.predictor import Predictor
    from streetvision.data.transforms import Preprocessing
    from streetvision.decision.calibrators import PlattMap
    from streetvision.decision.policy import Policy
    from streetvision.models.backbone import resolve
    from streetvision.models.classifier import ClassifierConfig
    from streetvision.models.fusion import Fusion, FusionConfig
    from streetvision.params import Cvfm, ViewGrid

    torch.manual_seed(0)
    name, arguments, mean, std = resolve(MODEL, SIDE, SIDE)
    preprocessing = Preprocessing(SIDE, SIDE, "crop", False, mean, std)
    config = ClassifierConfig(name, arguments, preprocessing)
    fusion = Fusion(FusionConfig.of("single", Cvfm(), ViewGrid(), 0))
    policy = Policy(PlattMap(1.0, 0.0), 0.5, 0.5)
    model = config.build().eval()
    ours = Predictor(model, config, fusion, policy, 1, torch.device("cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    rows = [_row("Predictor", "transformers' pipeline", ours, _pipeline(), image)]
    if find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        rows.append(
            ["onnxruntime", "torch", "not measured: the extra onnx is not installed", "", ""]
        )
    else:
        data = export_network(model, preprocessing, features=False)
        versions = {
            "onnxruntime": data,
            "onnxruntime, dynamic int8": quantise(data, "dynamic", []),
            "onnxruntime, static int8": quantise(data, "static", [pixels[None]]),
        }
        with tempfile.TemporaryDirectory() as folder:
            for version, content in versions.items():
                path = Path(folder) / "model.onnx"
                path.write_bytes(content)
                network = Network(path, preprocessing, features=False)
                onnx = OnnxPredictor(network, preprocessing, fusion, policy, 1)
                rows.append(_row(version, "torch", onnx, ours, image))
    columns = ["what", "against", "ours", "other", "ratio (of 5 pairs: least, largest)"]
    return [Table(f"One prediction, {MODEL}, batch 1, on the CPU", columns, rows)]


def _pipeline() -> Callable[[Any], object] | None:
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
