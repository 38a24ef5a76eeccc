"""ONNX models of a bundle in onnxruntime, on the CPU; needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streetvision.core.errors import UserError
from streetvision.core.processes import usable_cores
from streetvision.data.transforms import Preprocessing
from streetvision.fusion.fusion import Fusion, FusionConfig, is_tile, view_places

# The classifier, its int8 version, a trained fusion.
ONNX_FILES = ("model.onnx", "model.int8.onnx", "fusion.onnx")
IMAGES, LOGITS, FEATURES = "images", "logits", "features"
# Those of `models.fusion_networks.ViewTensors`, in its order.
FUSION_INPUTS = ("logits_of_views", "features", "present", "tiles", "places")


@dataclass(frozen=True)
class OnnxParts:
    """What is shipped: names of files by their key in `bundle.json`, and what was measured."""

    files: dict[str, str]
    metrics: dict[str, Any]


def onnx_libraries() -> tuple[Any, Any]:
    """Return onnx and onnxruntime, with which models are made; `UserError` where one is missing."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter uses it)
    except ImportError as error:
        raise UserError(
            f"export.onnx needs {error.name}: pip install 'streetvision[onnx]'"
        ) from error
    return onnx, onnxruntime


class Network:
    """The classifier: inputs uint8 [B, H, W, 3] → logits [B] and, where it has them, features [B, D].

    Parameters
    ----------
    model, place: the file's content, and what errors call it
    batch, views: the largest B is a batch of images with so many views each
    """

    def __init__(
        self,
        model: bytes,
        place: Path,
        preprocessing: Preprocessing,
        *,
        features: bool,
        batch: int = 1,
        views: int = 1,
    ) -> None:
        self.session = open_session(model, place, batch * views, batch)
        inputs = [(each.name, each.type, each.shape[1:]) for each in self.session.get_inputs()]
        wanted = [(IMAGES, "tensor(uint8)", [preprocessing.height, preprocessing.width, 3])]
        outputs = [LOGITS, FEATURES] if features else [LOGITS]
        found = [each.name for each in self.session.get_outputs()]
        if inputs != wanted or found != outputs:
            raise UserError(
                f"{place} takes {inputs} and gives {found}; {wanted} and {outputs} are needed"
            )

    def __call__(
        self, inputs: list[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float16] | None]:
        """One pass; features in float16, as fusion is fitted on them."""
        logits, *features = self.session.run(None, {IMAGES: np.stack(inputs)})
        return logits, features[0].astype(np.float16) if features else None


class OnnxFusion(Fusion):
    """A trained fusion, with its network in onnxruntime in float32; parameters as `Network` has them."""

    def __init__(self, config: FusionConfig, model: bytes, place: Path) -> None:
        super().__init__(config)
        self.session = open_session(model, place)
        inputs = tuple(each.name for each in self.session.get_inputs())
        if inputs != FUSION_INPUTS:
            raise UserError(f"{place} takes {inputs}; {FUSION_INPUTS} are needed")

    def fuse_trained(
        self,
        logits: NDArray[np.float64],
        features: NDArray[Any],
        present: NDArray[np.bool_],
        boxes: NDArray[Any],
    ) -> NDArray[np.float64]:
        """Fused logits [N]."""
        views = (
            logits.astype(np.float32),
            features.astype(np.float32),
            present,
            present & is_tile(boxes),
            view_places(present, boxes).astype(np.float32),
        )
        fused = self.session.run(None, dict(zip(FUSION_INPUTS, views, strict=True)))[0]
        return np.asarray(fused, dtype=np.float64)


def open_session(model: bytes, place: Path, rows: int = 1, images: int = 1) -> Any:
    """Open an ONNX model with as many threads as torch would take: `OMP_NUM_THREADS`, or all cores.

    Parameters
    ----------
    model, place
        The file's content: no other bytes are read, here or by the runtime. What errors call it.
    rows, images
        The largest batch, and how many images it is: `onnx_bounds.check_model` bounds what that takes.

    Raises
    ------
    UserError
        onnx or onnxruntime is not installed, or the file is no model that may be run, or can be.
    """
    from streetvision.bundle.onnx_bounds import check_model

    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "this engine needs onnxruntime: pip install 'streetvision[onnx]'"
        ) from error
    check_model(model, place, rows, images)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.log_severity_level = 3  # errors
    threads = os.environ.get("OMP_NUM_THREADS", "")
    options.intra_op_num_threads = int(threads) if threads.isdigit() else usable_cores()
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds share no base class
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{place} cannot be run by onnxruntime: {reason}") from error
