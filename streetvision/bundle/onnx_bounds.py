"""What an ONNX model takes to run, found before a runtime opens it: nothing is computed but sizes.

A model of 300 bytes can ask for gigabytes (ConstantOfShape, Expand, Tile), for ever (Loop), or for files beside
it (external data). Each operator's result is inferred from those of its inputs by ONNX's own rules; what has
no size before it runs, another graph inside, a custom operator or data elsewhere is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from streetvision.bundle.limits import (
    GRAPH_BASE_BYTES,
    GRAPH_BYTES_A_BYTE,
    GRAPH_BYTES_A_NUMBER,
    MAX_GRAPH_BYTES,
    MAX_OPERATIONS,
)
from streetvision.core.errors import UserError
from streetvision.core.escaping import terminal

# Integers that are computed to know a shape, such as the batch's size; larger tensors are not looked into.
_SHAPE_NUMBERS = 1024
# One multiplication and addition for each number of the result and of what is summed over.
_PRODUCTS = {"MatMul", "MatMulInteger", "QLinearMatMul", "Gemm", "Einsum"}
_CONVOLUTIONS = {"Conv", "ConvInteger", "QLinearConv"}
_POOLS = {"MaxPool", "AveragePool", "LpPool"}
# What torch exports of image networks and the quantiser adds; each reads and writes its numbers once.
_NAMES = """
    Abs Add And ArgMax ArgMin BatchNormalization Cast CastLike Ceil Clip Concat Constant
    ConstantOfShape Cos DepthToSpace DequantizeLinear Div DynamicQuantizeLinear Elu Equal Erf Exp
    Expand Flatten Floor Gather GatherElements GatherND Gelu GlobalAveragePool GlobalMaxPool Greater
    GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf
    IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Max Mean Min Mish Mod Mul Neg
    Not Or PRelu Pad Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round
    ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus SpaceToDepth
    Split Sqrt Squeeze Sub Sum Swish Tanh Tile TopK Transpose Trilu Unsqueeze Where
"""
_PLAIN = frozenset(_NAMES.split())


def check_model(data: bytes, place: Path, rows: int = 1, images: int = 1) -> None:
    """Check that an ONNX model stands alone and bound what it takes to run.

    Parameters
    ----------
    data
        The file's content.
    place
        What errors call it.
    rows
        The largest batch: every size of an input that the model leaves open.
    images
        How many images such a batch is.

    Raises
    ------
    UserError
        No ONNX model; reads other files; holds operators, graphs or functions that are not bounded; needs
        more memory than `GRAPH_BASE_BYTES`, `GRAPH_BYTES_A_NUMBER` for each number of its inputs and
        `GRAPH_BYTES_A_BYTE` for each byte of the file, with one row or with `rows`, or more than
        `MAX_OPERATIONS` an image.
    """
    model = _parsed(data, place)
    _check_alone(model, place)
    _Run(model, place, 1).check(1)
    if rows > 1:
        _Run(model, place, rows).check(images)


def _parsed(data: bytes, place: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise UserError(
            f"this engine needs {error.name}: pip install 'streetvision[onnx]'"
        ) from error
    # What starts like this would be read as onnxruntime's own format, which nothing here looks into.
    if data[4:8] == b"ORTM":
        raise UserError(f"{place} cannot be run by onnxruntime: it is no ONNX model")
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own kind
        raise UserError(f"{place} cannot be run by onnxruntime: it is no ONNX model") from error
    if not model.graph.output:  # such as no bytes at all
        raise UserError(f"{place} cannot be run by onnxruntime: it is no ONNX model")
    weights = sum(len(each.raw_data) for each in model.graph.initializer)
    if len(data) - weights > MAX_GRAPH_BYTES:
        raise UserError(
            f"{place} has {len(data) - weights:,} bytes besides its weights; "
            f"{MAX_GRAPH_BYTES:,} are allowed"
        )
    return model


def _check_alone(model: Any, place: Path) -> None:
    """No data elsewhere, at whatever depth they are named, and one graph of operators that ONNX defines."""
    graphs = 0
    for message in _messages(model):
        kind = message.DESCRIPTOR.name
        if any(
            isinstance(name, bytes) for name in _texts(message)
        ):  # protobuf's for what is no UTF-8
            raise UserError(f"{place} holds a name that is no text")
        if kind == "TensorProto" and (message.external_data or message.data_location):
            raise UserError(f"{place} names data in another file, which nothing vouches for")
        graphs += kind == "GraphProto"
        if graphs > 1 or kind in {"FunctionProto", "SparseTensorProto", "TrainingInfoProto"}:
            raise UserError(f"{place} holds more than one plain graph ({kind})")
        if kind == "NodeProto" and (
            message.domain not in {"", "ai.onnx"}
            or message.op_type not in _PLAIN | _PRODUCTS | _CONVOLUTIONS | _POOLS
        ):
            name = f"{message.domain}.{message.op_type}".removeprefix(".")
            raise UserError(
                f"{place} holds the operator {terminal(name[:100])}, which is not allowed"
            )


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all within it."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for each in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _messages(each)


def _texts(message: Any) -> Iterator[str | bytes]:
    """What a protobuf message, without those within it, has as text."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from [value] if isinstance(value, str | bytes) else value


class _Run:
    """The sizes of everything in a run with `rows` rows."""

    def __init__(self, model: Any, place: Path, rows: int) -> None:
        self.model, self.place, self.rows = model, place, rows
        # By the name of a result: its type, and its numbers where a shape may be made of them.
        self.types: dict[str, Any] = {}
        self.known: dict[str, Any] = {}
        self.constant: set[str] = set()
        self.numbers = 0
        self._add_initializers()
        for each in model.graph.input:
            if each.name not in self.types:
                self._add_input(each)
        self.opset = max(
            [o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}] + [0]
        )

    def check(self, images: int) -> None:
        """Raise `UserError` where memory or operations exceed their bounds."""
        graph = self.model.graph
        allowed = (
            GRAPH_BASE_BYTES
            + GRAPH_BYTES_A_NUMBER * self.numbers
            + GRAPH_BYTES_A_BYTE * self.model.ByteSize()
        )
        last = {name: number for number, node in enumerate(graph.node) for name in node.input}
        last |= {each.name: len(graph.node) for each in graph.output}
        held: dict[str, int] = {}
        total = operations = 0
        for number, node in enumerate(graph.node):
            found = self._results(node)
            operations += self._operations(node, found)
            # A runtime computes what does not depend on the input once, and keeps it.
            if all(name in self.constant for name in node.input if name):
                self.constant.update(found)
            for name, kind in found.items():
                self.types[name] = kind
                held[name] = _bytes(kind)
                total += held[name]
            if total > allowed:
                raise UserError(
                    f"{self.place} needs more than {allowed:,} bytes for a batch of {self.rows}, at "
                    f'"{terminal(next(iter(found))[:100])}" ({node.op_type})'
                )
            if operations > MAX_OPERATIONS * images:
                raise UserError(
                    f"{self.place} takes more than {MAX_OPERATIONS:.0e} operations an image"
                )
            self._compute(node, found)
            for name in {*node.input, *found}:
                if name in held and name not in self.constant and last.get(name, -1) <= number:
                    total -= held.pop(name)

    def _add_initializers(self) -> None:
        from onnx import helper, numpy_helper

        for tensor in self.model.graph.initializer:
            count = math.prod(tensor.dims)
            # Half a byte is the smallest number.
            if count < 0 or count > 2 * tensor.ByteSize():
                raise UserError(
                    f'{self.place}: "{terminal(tensor.name[:100])}" has other data than its shape'
                )
            self.types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            self.constant.add(tensor.name)
            # Of a kind or size that is wrong, the runtime refuses it.
            with suppress(Exception):
                if count <= _SHAPE_NUMBERS:
                    self.known[tensor.name] = numpy_helper.to_array(tensor)

    def _add_input(self, given: Any) -> None:
        tensor = given.type.tensor_type
        shape = [
            dim.dim_value if dim.HasField("dim_value") else self.rows for dim in tensor.shape.dim
        ]
        if not given.type.HasField("tensor_type") or min(shape, default=1) < 0:
            raise UserError(f'{self.place}: the input "{terminal(given.name[:100])}" has no shape')
        from onnx import helper

        self.types[given.name] = helper.make_tensor_type_proto(tensor.elem_type, shape)
        self.numbers += math.prod(shape)

    def _results(self, node: Any) -> dict[str, Any]:
        """The types of a node's results by name, each with a size."""
        import onnx
        from onnx import numpy_helper, shape_inference

        given: dict[str, Any] = {name: self.types.get(name) for name in node.input if name}
        try:
            if missing := [name for name, kind in given.items() if kind is None]:
                raise ValueError(f"{missing[0]} comes from nowhere")
            schema = onnx.defs.get_schema(node.op_type, self.opset)
            known = {
                name: numpy_helper.from_array(self.known[name], name)
                for name in given
                if name in self.known
            }
            found: dict[str, Any] = shape_inference.infer_node_outputs(
                schema, node, given, known, opset_imports=list(self.model.opset_import)
            )
        except Exception as error:  # ONNX's own kinds share no base class
            reason = terminal(" ".join(str(error).split()))[:200]
            raise UserError(
                f"{self.place}: {node.op_type} cannot be understood: {reason}"
            ) from error
        for name in node.output:
            if not name:
                continue
            kind = found.get(name)
            if (
                kind is None
                or not kind.tensor_type.HasField("shape")
                or not all(dim.HasField("dim_value") for dim in kind.tensor_type.shape.dim)
                or min(_shape(kind), default=0) < 0
            ):
                raise UserError(
                    f'{self.place}: the size of "{terminal(name[:100])}" ({node.op_type}) depends on the image'
                )
        return {name: found[name] for name in node.output if name}

    def _operations(self, node: Any, found: dict[str, Any]) -> int:
        shapes: list[list[int]] = [_shape(self.types[name]) if name else [] for name in node.input]
        results = sum(_count(kind) for kind in found.values())
        if node.op_type == "Einsum":
            return 2 * math.prod(_einsum_sizes(node, shapes).values())
        if node.op_type in _PRODUCTS:
            transposed = any(each.name == "transA" and each.i for each in node.attribute)
            summed = shapes[0][0 if transposed else -1] if shapes[0] else 1
            return 2 * results * summed
        if node.op_type in _CONVOLUTIONS:
            weights = shapes[3 if node.op_type == "QLinearConv" else 1]
            return 2 * results * math.prod(weights[1:])
        if node.op_type in _POOLS:
            window: list[int] = next(
                (list(a.ints) for a in node.attribute if a.name == "kernel_shape"), []
            )
            return results * math.prod(window)
        return results + sum(math.prod(shape) for shape in shapes)

    def _compute(self, node: Any, found: dict[str, Any]) -> None:
        """Compute what shapes are made of: few numbers from few numbers."""
        from onnx.reference import ReferenceEvaluator

        if node.op_type in {"Shape", "Size"}:
            shape = np.array(_shape(self.types[node.input[0]]), dtype=np.int64)
            ends = {each.name: each.i for each in node.attribute}
            value = shape[ends.get("start", 0) : ends.get("end", len(shape))]
            self.known[node.output[0]] = shape.prod() if node.op_type == "Size" else value
            return
        few = all(_count(kind) <= _SHAPE_NUMBERS for kind in found.values())
        if not few or not all(name in self.known for name in node.input if name):
            return
        given = {name: self.known[name] for name in node.input if name}
        try:
            values = ReferenceEvaluator(node, opsets={"": self.opset}).run(None, given)
        except Exception:  # not known, then
            return
        self.known |= {
            name: np.asarray(value)
            for name, value in zip(node.output, values, strict=False)
            if name
        }


def _einsum_sizes(node: Any, shapes: list[list[int]]) -> dict[str, int]:
    """The length of each index; of an ellipsis every axis counts as one of its own."""
    equation = next(
        (a.s.decode("ascii", "replace") for a in node.attribute if a.name == "equation"), ""
    )
    terms = equation.replace(" ", "").replace("...", ".").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for number, (term, shape) in enumerate(zip(terms, shapes, strict=False)):
        letters = term if "." not in term and len(term) == len(shape) else range(len(shape))
        for letter, length in zip(letters, shape, strict=True):
            name = letter if isinstance(letter, str) else f"{number}.{letter}"
            sizes[name] = max(length, sizes.get(name, 1))
    return sizes


def _shape(kind: Any) -> list[int]:
    return [dim.dim_value for dim in kind.tensor_type.shape.dim]


def _count(kind: Any) -> int:
    return math.prod(_shape(kind))


def _bytes(kind: Any) -> int:
    from onnx import helper

    try:
        size = helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type).itemsize
    except (KeyError, ValueError):
        size = 16
    return _count(kind) * max(1, int(size))
