"""Fuzzing with coverage: `python tests/fuzz/fuzz_bundle.py TARGET [CORPUS] [-max_total_time=60 …]`.

Targets: `image` (the bytes of an image file), `payload` (text that may carry one), `manifest` (of bundle.json),
`archive` (of the tar within bundle.tar.gz) and `onnx` (of an ONNX model).
Anything but a result or a `UserError` of one line is a finding; atheris stops there and keeps the input. Needs
`pip install atheris`; without it the script says so and ends well, so that it can stand in a list of checks.
What follows the target goes to libFuzzer: https://llvm.org/docs/LibFuzzer.html#options
"""

from __future__ import annotations

import base64
import gzip
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from streetvision.core.errors import UserError

MAX_PIXELS = 10**6


def image(data: bytes) -> None:
    """Bytes of an image file."""
    from streetvision.bundle.inputs import upright_image

    found = upright_image(data, MAX_PIXELS)
    if found.mode != "RGB" or found.width * found.height > MAX_PIXELS:
        raise AssertionError(f"{found.mode} {found.size}")
    from streetvision.data.pixels import decode_upright, is_image, without_metadata

    if is_image(data):  # and no base64 of one
        kept = decode_upright(without_metadata(data), MAX_PIXELS)
        if kept.tobytes() != found.tobytes():
            raise AssertionError("without metadata it is another picture")


def payload(data: bytes) -> None:
    """Text that may carry an image: base64 or a data URL."""
    from streetvision.bundle.inputs import upright_image

    upright_image(b"data:" + data, MAX_PIXELS)


def manifest(data: bytes) -> None:
    """Bytes of bundle.json, sealed where they are an object: past the seal is more to be found."""
    import json

    from streetvision.bundle.validate import parse_manifest, sealed
    from streetvision.core.artifacts import json_text

    try:
        document = json.loads(data)
        data = json_text(sealed(document)).encode()
    except (ValueError, AttributeError, RecursionError):
        pass
    parse_manifest(data, Path("bundle"))


def archive(data: bytes) -> None:
    """Bytes of the tar within bundle.tar.gz; nothing may be written but files in the target."""
    from streetvision.bundle.archive import unpack

    with tempfile.TemporaryDirectory() as home:
        packed, target = Path(home) / "bundle.tar.gz", Path(home) / "target"
        packed.write_bytes(gzip.compress(data, 0))
        target.mkdir()
        try:
            unpack(packed, target)
        finally:
            names = {each.name for each in Path(home).iterdir()}
            odd = [each for each in target.rglob("*") if each.is_symlink()]
            if names != {"bundle.tar.gz", "target"} or odd:
                raise AssertionError(f"written outside: {names}, {odd}")


def onnx(data: bytes) -> None:
    """Bytes of an ONNX model."""
    from streetvision.bundle.onnx_bounds import check_model

    check_model(data, Path("model.onnx"), 4)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "image": image, "payload": payload, "manifest": manifest, "archive": archive, "onnx": onnx,
}  # fmt: skip


def attempt(target: str, data: bytes) -> str:
    """Run a target; returns the error's line, or nothing."""
    try:
        TARGETS[target](data)
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError(str(error)) from error
        return str(error)
    return ""


def seeds(target: str) -> list[bytes]:
    """Something for the fuzzer to start from."""
    from PIL import Image

    if target in {"image", "payload"}:
        pictures = []
        for mode, kind, options in (
            ("RGB", "JPEG", {}),
            ("RGB", "JPEG", {"progressive": True}),
            ("CMYK", "JPEG", {}),
            ("P", "PNG", {}),
            ("LA", "PNG", {}),
            ("RGB", "WEBP", {}),
            ("RGB", "BMP", {}),
            ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ):
            buffer = io.BytesIO()
            Image.linear_gradient("L").resize((24, 20)).convert(mode).save(buffer, kind, **options)
            pictures.append(buffer.getvalue())
        if target == "image":
            return pictures
        return [b"image/png;base64," + base64.b64encode(each) for each in pictures]
    if target == "onnx":
        return [_onnx_model()]
    bundle = _empty_bundle()
    return [bundle] if target == "manifest" else [_tar(bundle)]


def _empty_bundle() -> bytes:
    """A bundle.json that passes all checks of a manifest."""
    from streetvision.bundle.validate import sealed
    from streetvision.core.artifacts import json_text

    preprocessing = {
        "height": 32, "width": 48, "fit": "letterbox", "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    document = {
        "format_version": 1, "policy_type": "scrc", "model_checkpoint": "m.safetensors",
        "policy": {"policy_type": "scrc", "policy_path": "p.json"}, "cvfm_weights": None,
        "classifier": {"backbone": "resnet18", "arguments": {}, "preprocessing": preprocessing},
        "views": {
            "mode": "single", "grid": {"grid": 1, "growth": 0.15, "flip": False}, "features": 0, "options": {}
        },
        "class_names": ["None", "Roadwork"], "parameters": 1, "batch_size": 1,
        "files": {"m.safetensors": "0" * 64, "p.json": "1" * 64},
    }  # fmt: skip
    return json_text(sealed(document)).encode()


def _onnx_model() -> bytes:
    """A model of a few operators whose sizes are computed, too."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Add", ["x", "zeros"], ["y"]),
        helper.make_node("MatMul", ["y", "w"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(np.ones((8, 1), np.float32), "w")],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(made.SerializeToString())


def _tar(bundle: bytes) -> bytes:
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (("bundle.json", bundle), ("m.safetensors", b"abc"), ("p.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def main(arguments: list[str]) -> int:
    """Fuzz a target until a finding or a limit among `arguments`."""
    if not arguments or arguments[0] not in TARGETS:
        sys.stderr.write(
            f"usage: fuzz_bundle.py {'|'.join(TARGETS)} [CORPUS] [-max_total_time=60]\n"
        )
        return 2
    try:
        import atheris
    except ImportError:
        sys.stdout.write("skipped: atheris is not installed (pip install atheris)\n")
        return 0
    warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF blocks
    target = arguments[0]
    with atheris.instrument_imports(include=["PIL", "streetvision"]):
        for data in seeds(target):  # imports what the target imports
            attempt(target, data)
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(seeds(target)):
            (Path(corpus) / str(number)).write_bytes(data)
        rest = arguments[1:] if any(not each.startswith("-") for each in arguments[1:]) else [
            corpus, *arguments[1:]
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *rest], lambda data: attempt(target, data) and None)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
