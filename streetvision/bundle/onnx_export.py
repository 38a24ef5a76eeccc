"""The networks of a bundle as ONNX: normalisation within, any batch, and int8 versions of the classifier.

The same weights give the same bytes: what the exporter notes of the code and its paths is taken out.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streetvision.bundle.onnx_session import (
    FEATURES,
    FUSION_INPUTS,
    IMAGES,
    LOGITS,
    onnx_libraries,
)
from streetvision.core.errors import UserError
from streetvision.data.transforms import Preprocessing
from streetvision.fusion.networks import FusionNetwork, ViewTensors
from streetvision.models.classifier import RoadworkClassifier

if TYPE_CHECKING:
    import onnx

Int8 = Literal["dynamic", "static"]
# What a file may hold in protobuf; larger weights would need files beside it.
MAX_BYTES = 2**31 - 1


class _Served(nn.Module):
    """uint8 images [B, H, W, 3] → logits [B] and, if asked for, features [B, D]."""

    def __init__(
        self, model: RoadworkClassifier, preprocessing: Preprocessing, features: bool
    ) -> None:
        super().__init__()
        self.model, self.preprocessing, self.features = model, preprocessing, features

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, features = self.model(self.preprocessing.normalise(images.permute(0, 3, 1, 2)))
        return (logits, features.float()) if self.features else (logits,)


class _ServedFusion(nn.Module):
    """The parts of `ViewTensors` → logits [N]."""

    def __init__(self, network: FusionNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, *views: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(ViewTensors(*views))
        return logits


def export_network(
    model: RoadworkClassifier, preprocessing: Preprocessing, *, features: bool
) -> bytes:
    """Return the classifier on the CPU as an ONNX model: `images` uint8 [B, H, W, 3] → `logits` [B].

    With `features` there is a second output, `features` [B, D], for trained fusion.

    Raises
    ------
    UserError
        onnx or onnxscript is not installed, the exporter does not know the architecture, or the model is
        larger than the 2 GiB that one file may hold.
    """
    images = torch.zeros(2, preprocessing.height, preprocessing.width, 3, dtype=torch.uint8)
    outputs = [LOGITS, FEATURES] if features else [LOGITS]
    network = _Served(model, preprocessing, features).eval()
    dynamic = {IMAGES: {0: torch.export.Dim("batch", min=1)}}
    return _export(network, (images,), [IMAGES], outputs, dynamic)


def export_fusion(network: FusionNetwork, n_views: int, width: int) -> bytes:
    """Return a trained fusion in float32 as an ONNX model: `FUSION_INPUTS` → `logits` [N].

    Raises
    ------
    UserError
        As `export_network`.
    """
    number, switch = torch.zeros(2, n_views), torch.ones(2, n_views, dtype=torch.bool)
    views = (
        number,
        torch.zeros(2, n_views, width),
        switch,
        switch.clone(),
        torch.zeros(2, n_views, 4),
    )
    served = _ServedFusion(copy.deepcopy(network).float()).eval()
    images = torch.export.Dim("images", min=1)
    dynamic = {"views": ({0: images},) * len(views)}
    return _export(served, views, list(FUSION_INPUTS), [LOGITS], dynamic)


def quantise(model: bytes, kind: Int8, batches: Iterable[NDArray[np.uint8]]) -> bytes:
    """Return an int8 version of what `export_network` made.

    Parameters
    ----------
    kind
        `dynamic`: weights of matrix products, their inputs' ranges at run time; `static`: nearly
        everything, with ranges seen on `batches`.
    batches
        Images uint8 [B, H, W, 3]; only `static` reads them.
    """
    onnx, _ = onnx_libraries()
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory(prefix="streetvision-") as name, _quiet():
        source, target = Path(name) / "float.onnx", Path(name) / "int8.onnx"
        source.write_bytes(model)
        if kind == "dynamic":
            quantization.quantize_dynamic(
                source, target, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
            )
        else:

            class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
                def __init__(self) -> None:
                    self.batches = iter(batches)

                def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
                    batch = next(self.batches, None)
                    return None if batch is None else {IMAGES: batch}

            quantization.quantize_static(
                source, target, Reader(), per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
            )  # fmt: skip
        return _bytes(onnx.load(target))


def _export(
    network: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    names: list[str],
    outputs: list[str],
    dynamic: dict[str, Any],
) -> bytes:
    onnx_libraries()
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                network, inputs, dynamo=True, input_names=names, output_names=outputs,
                dynamic_shapes=dynamic, verbose=False,
            )  # fmt: skip
        except Exception as error:  # whatever an operator that it does not know leads to
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"torch cannot export this architecture as ONNX: {reason}") from error
    if program is None:
        raise UserError("torch's exporter returned no ONNX model")
    return _bytes(program.model_proto)


def _bytes(model: onnx.ModelProto) -> bytes:
    """The model without what its exporter noted of code, paths and the order of its work."""
    del model.metadata_props[:]
    graph = model.graph
    # Inferred shapes: runtimes infer them anew, and the quantiser trips over those of what it replaces.
    del graph.value_info[:]
    for item in [
        graph, *graph.node, *graph.initializer, *graph.input, *graph.output,
        *model.functions, *(node for function in model.functions for node in function.node),
    ]:  # fmt: skip
        item.doc_string = ""
        del item.metadata_props[:]
    if model.ByteSize() > MAX_BYTES:
        raise UserError("the model is larger than the 2 GiB that an ONNX file may hold")
    return bytes(model.SerializeToString(deterministic=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hush what the exporter and the quantiser log of each operator, and of how else to call them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
