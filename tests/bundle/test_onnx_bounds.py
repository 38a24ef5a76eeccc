"""ONNX models that ask for more than a picture needs are refused before a runtime sees them."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streetvision.bundle import onnx_bounds
from streetvision.bundle.limits import (
    GRAPH_BASE_BYTES,
    GRAPH_BYTES_A_BYTE,
    GRAPH_BYTES_A_NUMBER,
    MAX_GRAPH_BYTES,
)
from streetvision.bundle.onnx_bounds import check_model
from streetvision.bundle.onnx_session import open_session
from streetvision.core.errors import UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

PLACE = Path("bundle/model.onnx")
SIDE = 32
PIXELS = SIDE * SIDE * 3


def model(*nodes: Any, **constants: Any) -> Any:
    """A model of images uint8 [B, 32, 32, 3] → logits [?] with these nodes and initializers."""
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch"])
    weights = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    ]
    graph = helper.make_graph(list(nodes), "graph", [images], [logits], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def node(kind: str, given: str, made: str = "logits", **attributes: Any) -> Any:
    return helper.make_node(kind, given.split(), made.split(), **attributes)


def mean(given: str = "images") -> list[Any]:
    """Nodes that make logits of what has the shape of the images."""
    return [
        node("Cast", given, "number", to=TensorProto.FLOAT),
        node("ReduceMean", "number axes", keepdims=0),
    ]


AXES = np.array([1, 2, 3])


def refusal(document: Any, rows: int = 1) -> str:
    """The one line, which came soon and without the memory that the model asks for."""
    data = document if isinstance(document, bytes) else document.SerializeToString()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(UserError) as caught:
        open_session(data, PLACE, rows)
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    text = str(caught.value)
    assert "\n" not in text
    assert str(PLACE) in text
    return text


def test_a_plain_model_runs() -> None:
    session = open_session(model(*mean(), axes=AXES).SerializeToString(), PLACE, 4)
    images = np.full((2, SIDE, SIDE, 3), 7, np.uint8)
    np.testing.assert_allclose(session.run(None, {"images": images})[0], [7, 7])


@pytest.mark.parametrize(
    "nodes",
    [
        [node("ConstantOfShape", "size", "much"), node("ReduceSum", "much")],
        [node("Constant", "", "one", value_float=1.0), node("Expand", "one size", "much")],
        [node("Tile", "images times", "much")],
        [node("Range", "zero many step", "much")],
        [node("Cast", "images", "x", to=TensorProto.FLOAT), node("Pad", "x pads", "much")],
        # Sizes that are computed: of the images' shape, and of numbers.
        [node("Shape", "images", "shape"), node("Mul", "shape times", "size2"),
         node("ConstantOfShape", "size2", "much")],
        [node("Mul", "size size", "size2"), node("Expand", "zero size2", "much")],
    ],
)  # fmt: skip
def test_small_models_that_need_gigabytes(nodes: list[Any]) -> None:
    constants = {
        "axes": AXES, "size": np.array([700, 10**6]), "times": np.array([1, 1000, 100, 10]),
        "zero": np.array(0), "many": np.array(10**9), "step": np.array(1),
        "pads": np.array([0, 0, 0, 0, 0, 30000, 30000, 0]),
    }  # fmt: skip
    text = refusal(model(*nodes, *mean(), **constants))
    assert "needs more than" in text


def test_memory_grows_with_the_batch() -> None:
    """Each image against each other: little for one, too much for a thousand."""
    nodes = [
        node("Cast", "images", "x", to=TensorProto.FLOAT),
        node("Reshape", "x flat", "rows"), node("Transpose", "rows", "columns", perm=[1, 0]),
        node("Unsqueeze", "rows first", "a"), node("Unsqueeze", "rows second", "b"),
        node("Sub", "a b", "apart"), node("ReduceMean", "apart axes", keepdims=0),
    ]  # fmt: skip
    constants = {
        "flat": np.array([-1, PIXELS]), "first": np.array([0]), "second": np.array([1]),
        "axes": np.array([0, 2]),
    }  # fmt: skip
    document = model(*nodes, **constants)
    check_model(document.SerializeToString(), PLACE, 64, 64)
    assert "for a batch of 1024" in refusal(document, 1024)


def test_the_bound_of_memory_is_where_it_is_said() -> None:
    """Results held at once: the float image, and a block of zeros beside it."""

    def held(extra: int) -> bytes:
        nodes = [
            node("Cast", "images", "number", to=TensorProto.FLOAT),
            node("ConstantOfShape", "size", "zeros"), node("ReduceSum", "zeros", "zero", keepdims=0),
            node("ReduceMean", "number axes", "mean", keepdims=0), node("Add", "mean zero"),
        ]  # fmt: skip
        return bytes(model(*nodes, axes=AXES, size=np.array([extra])).SerializeToString())

    size = len(held(10**8))
    # Alive with the zeros: the number image, 4 bytes a pixel.
    fits = (GRAPH_BASE_BYTES + (GRAPH_BYTES_A_NUMBER - 4) * PIXELS + GRAPH_BYTES_A_BYTE * size) // 4
    check_model(held(fits - 2), PLACE)  # and two numbers: their sum, the mean
    with pytest.raises(UserError, match="needs more than"):
        check_model(held(fits - 1), PLACE)


def test_results_that_are_no_longer_needed_take_no_memory() -> None:
    nodes = [node("Cast", "images", "x0", to=TensorProto.FLOAT)]
    nodes += [node("Relu", f"x{n}", f"x{n + 1}") for n in range(2000)]
    nodes.append(node("ReduceMean", "x2000 axes", keepdims=0))
    check_model(model(*nodes, axes=AXES).SerializeToString(), PLACE, 8, 8)


@pytest.mark.parametrize(
    ("nodes", "operations"),
    [
        ([node("MatMul", "x w")], 2 * SIDE * SIDE * 3 * 5),
        ([node("Transpose", "x", "y", perm=[0, 3, 1, 2]), node("Conv", "y k", pads=[1] * 4)],
         2 * SIDE * SIDE * 5 * 27 + 2 * PIXELS),
        ([node("Transpose", "x", "y", perm=[0, 3, 1, 2]), node("MaxPool", "y", kernel_shape=[30, 30])],
         9 * 3 * 900 + 2 * PIXELS),
        ([node("Einsum", "x w", equation="bhwc,co->bhwo")], 2 * SIDE * SIDE * 3 * 5),
        ([node("Reshape", "x rows", "y"), node("Gemm", "y w")], 2 * SIDE * SIDE * 3 * 5 + 2 * PIXELS + 2),
    ],
)  # fmt: skip
def test_operations_are_counted(
    nodes: list[Any], operations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = node("Cast", "images", "x", to=TensorProto.FLOAT)
    data = model(
        cast, *nodes, w=np.zeros((3, 5), np.float32), k=np.zeros((5, 3, 3, 3), np.float32),
        rows=np.array([-1, 3]),
    ).SerializeToString()  # fmt: skip
    monkeypatch.setattr(onnx_bounds, "MAX_OPERATIONS", operations + 2 * PIXELS)
    check_model(data, PLACE, 6, 6)
    with pytest.raises(UserError, match="operations an image"):
        check_model(data, PLACE, 6, 3)  # two views an image
    monkeypatch.setattr(onnx_bounds, "MAX_OPERATIONS", operations + 2 * PIXELS - 1)
    with pytest.raises(UserError, match="operations an image"):
        check_model(data, PLACE)


def test_products_without_end_are_refused() -> None:
    """A small file: the weights are computed."""
    big = [
        node("ConstantOfShape", "size", "w"), node("Cast", "images", "x", to=TensorProto.FLOAT),
        node("ReduceSum", "x", "sum", keepdims=0), node("Add", "w sum", "w0"),
    ]  # fmt: skip
    big += [node("MatMul", f"w{n} w", f"w{n + 1}") for n in range(1400)]
    document = model(*big, *mean(), axes=AXES, size=np.array([2000, 2000]))
    assert "operations an image" in refusal(document)


LOOP = helper.make_graph(
    [node("Identity", "go", "again"), node("Identity", "x", "y")], "body",
    [helper.make_tensor_value_info("n", TensorProto.INT64, []),
     helper.make_tensor_value_info("go", TensorProto.BOOL, []),
     helper.make_tensor_value_info("x", TensorProto.INT64, [])],
    [helper.make_tensor_value_info("again", TensorProto.BOOL, []),
     helper.make_tensor_value_info("y", TensorProto.INT64, [])],
)  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([node("Loop", "many yes zero", "never", body=LOOP)], "operator Loop, which is not allowed"),
        ([node("NonZero", "images", "where")], "operator NonZero, which is not allowed"),
        ([node("ImageDecoder", "images", "x")], "operator ImageDecoder, which is not allowed"),
        ([helper.make_node("EPContext", ["images"], ["x"], domain="com.microsoft", ep_cache_context="/x")],
         "com.microsoft.EPContext, which is not allowed"),
        # How much is known only of the pixels.
        ([node("ReduceMax", "images", "top", keepdims=0), node("Cast", "top", "size", to=TensorProto.INT64),
          node("Unsqueeze", "size zero", "size1"), node("ConstantOfShape", "size1", "much")],
         "depends on the image"),
        ([node("Relu", "nothing", "x")], "nothing comes from nowhere"),
        ([node("Conv", "images zero", "x")], "Conv cannot be understood"),
    ],
)  # fmt: skip
def test_what_has_no_bound_is_refused(nodes: list[Any], said: str) -> None:
    constants = {"many": np.array(2**62), "yes": np.array(True), "zero": np.array(0)}
    assert said in refusal(model(*nodes, *mean(), axes=AXES, **constants))


def outside(tensor: Any) -> Any:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    place = tensor.external_data.add()
    place.key, place.value = "location", "weights.bin"
    return tensor


def in_a_constant(document: Any, tensor: Any) -> None:
    document.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))


def in_a_subgraph(document: Any, tensor: Any) -> None:
    body = onnx.GraphProto()
    body.CopyFrom(LOOP)
    body.initializer.append(tensor)
    document.graph.node.insert(0, helper.make_node("Loop", ["m", "c", "x"], ["y"], body=body))


def in_a_function(document: Any, tensor: Any) -> None:
    inner = helper.make_node("Constant", [], ["c"], value=tensor)
    document.functions.append(
        helper.make_function("mine", "F", [], ["c"], [inner], [helper.make_opsetid("", 20)])
    )


def in_a_sparse_one(document: Any, tensor: Any) -> None:
    document.graph.sparse_initializer.append(
        helper.make_sparse_tensor(tensor, numpy_helper.from_array(np.array([0]), "i"), [5])
    )


def in_training(document: Any, tensor: Any) -> None:
    document.training_info.add().initialization.initializer.append(tensor)


def in_an_initializer(document: Any, tensor: Any) -> None:
    document.graph.initializer.append(tensor)


@pytest.mark.parametrize(
    "hide",
    [in_an_initializer, in_a_constant, in_a_subgraph, in_a_function, in_a_sparse_one, in_training],
)
@pytest.mark.parametrize("marked", [True, False])
def test_data_elsewhere_are_found_wherever_they_are_named(
    hide: Any, marked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where onnxruntime looks for them, of a model without a place
    (tmp_path / "weights.bin").write_bytes(np.ones(1, np.float32).tobytes())
    tensor = numpy_helper.from_array(np.ones(1, np.float32), "w")
    document = model(*mean(), axes=AXES)
    hide(document, outside(tensor))
    if not marked:
        data = document.SerializeToString()
        # Only named, with data that would be there: nobody writes this, and no runtime need read it.
        document = onnx.load_model_from_string(data.replace(b"\x70\x01", b"\x70\x00"))
    text = refusal(document)
    assert "data in another file" in text or "more than one plain graph" in text or "Loop" in text


def test_other_formats_and_sizes_are_refused() -> None:
    good = model(*mean(), axes=AXES)
    data = good.SerializeToString()
    for wrong in (b"", b"no model", data[: len(data) // 2], b"\x00\x00\x00\x00ORTM" + bytes(60)):
        assert "cannot be run by onnxruntime" in refusal(wrong)
    good.doc_string = "x" * MAX_GRAPH_BYTES
    assert "bytes besides its weights" in refusal(good)
    good.doc_string = ""
    good.graph.initializer[0].dims[0] = 2**40
    assert "has other data than its shape" in refusal(good)


def test_names_in_a_model_give_no_orders_to_a_terminal() -> None:
    """Found by fuzzing: an operator whose name breaks the line."""
    graph = helper.make_graph([helper.make_node("No\nsuch\x1b[2J", ["x"], ["y"])], "graph", [], [])
    with pytest.raises(UserError) as caught:
        check_model(helper.make_model(graph).SerializeToString(), Path("model.onnx"), 1)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [b"images", b"number", b"ReduceMean", b"batch"])
def test_a_name_that_is_no_text(name: bytes) -> None:
    """Protobuf hands such a name over as bytes."""
    whole = model(*mean(), axes=AXES).SerializeToString()
    assert name in whole
    damaged = whole.replace(name, b"\xff" * len(name), 1)
    with pytest.raises(UserError, match=r"^bundle/model.onnx holds a name that is no text$"):
        check_model(damaged, PLACE)
