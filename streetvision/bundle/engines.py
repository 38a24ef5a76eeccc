"""A bundle loaded for whatever shall run its network."""

from __future__ import annotations

from pathlib import Path

from streetvision.bundle.base import BasePredictor
from streetvision.bundle.inputs import MAX_PIXELS
from streetvision.core.errors import UserError

# torch, or onnxruntime with what `export.onnx` and `export.int8` add.
ENGINES = ("torch", "onnx", "onnx_int8")


def shipped_engines(folder: Path) -> list[str]:
    """Return the engines that a bundle folder has a model for."""
    from streetvision.bundle.onnx_predictor import MODELS
    from streetvision.bundle.validate import read_bundle

    document = read_bundle(folder).document
    return [name for name in ENGINES if name == "torch" or MODELS[name][0] in document]


def load_predictor(
    bundle: Path | str, engine: str = "torch", device: str = "auto", max_pixels: int = MAX_PIXELS
) -> BasePredictor:
    """Load a bundle for one of `ENGINES`; onnxruntime computes on the CPU.

    Raises
    ------
    UserError
        The engine is unknown or not in the bundle; whatever `load` of the predictors refuses.
    """
    if engine == "torch":
        from streetvision.bundle.predictor import Predictor

        return Predictor.load(bundle, device, max_pixels)
    if engine not in ENGINES:
        raise UserError(f'engine "{engine}" is not one of {", ".join(ENGINES)}')
    if device not in {"auto", "cpu"}:
        raise UserError(f'device "{device}" needs the engine torch; {engine} runs on the CPU')
    from streetvision.bundle.onnx_predictor import OnnxPredictor

    return OnnxPredictor.load(bundle, engine, max_pixels)
