"""Every check that a deployment relies on, from the bytes of `bundle.json` to a first answer.

`read_bundle` checks the manifest and the files, `load_bundle` builds the parts and checks them, too:
`Predictor.load` and `BundleValidator` both go through it, so that nothing is served that was not checked.
No pickle is read: weights are safetensors, the policy is JSON. What is used of a file are the bytes that were
hashed: each is read once, so that nothing can be put in its place in between.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from streetvision.bundle.limits import MAX_FILE_BYTES, MAX_JSON_BYTES, MAX_PASS_PIXELS
from streetvision.core.artifacts import config_hash, json_text
from streetvision.core.errors import UserError
from streetvision.core.json_schema import schema_errors

if TYPE_CHECKING:
    from streetvision.decision.policy import Policy
    from streetvision.fusion.fusion import Fusion
    from streetvision.models.classifier import ClassifierConfig, RoadworkClassifier

BUNDLE_JSON = "bundle.json"
SCHEMA = Path(__file__).parent / "schemas/bundle.schema.json"
# Keys of `bundle.json` that name what `export.onnx` and `export.int8` add, where they did.
ONNX_KEYS = ("onnx_model", "onnx_int8_model", "onnx_fusion")
# No part starts with a dot, so none is `..`; a part is what every file system takes.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class BundleManifest:
    """A checked `bundle.json`, and the bytes of the files that were asked for.

    Attributes
    ----------
    document: content of `bundle.json`
    contents: bytes whose SHA-256 is right, by the key of `bundle.json` that names the file; whoever uses
        them takes them out, so that they are in memory no longer than it takes
    """

    folder: Path
    document: dict[str, Any]
    contents: dict[str, bytes]

    def path(self, key: str) -> Path:
        """The file that a key names: `policy`, `model_checkpoint`, `cvfm_weights` or one of `ONNX_KEYS`."""
        return self.folder / str(file_of(self.document, key))

    def policy(self) -> Policy:
        """The active policy, after every check; raises `UserError` with the key that is wrong."""
        from streetvision.decision.policy import policy_from_document
        from streetvision.decision.validator import PolicyValidator

        place = self.path("policy")
        content = _parsed(self.contents.pop("policy"), place)
        with _named(place):
            PolicyValidator().validate(content)
            return policy_from_document(content)


@dataclass(frozen=True)
class Bundle:
    """The parts of a checked bundle, on the CPU."""

    document: dict[str, Any]
    model: RoadworkClassifier
    config: ClassifierConfig
    fusion: Fusion
    policy: Policy


class BundleValidator:
    """Checks a bundle as `Predictor.load` does: nothing passes here that would not load there."""

    def validate(self, bundle: Path | str) -> None:
        """Check a bundle folder or a `bundle.tar.gz`.

        The seal and the schema of `bundle.json`; one active policy; relative paths; the SHA-256 of every
        file; the policy; names, shapes and finiteness of the weights; what an answer costs; that the model
        gives one. ONNX models likewise, each with the bundle's own views and batch.

        Raises
        ------
        UserError
            Names the key, file or tensor that is wrong.
        """
        from streetvision.bundle.archive import bundle_folder

        with bundle_folder(Path(bundle)) as folder:
            document = load_bundle(folder).document
            if any(key in document for key in ONNX_KEYS):
                from streetvision.bundle.onnx_predictor import check_onnx

                check_onnx(folder)


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` with the hash of its other keys as `sha256`: no other file vouches for it."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return content | {"sha256": config_hash(content)}


def file_of(document: Mapping[str, Any], key: str) -> str | None:
    """The name of the file that a key of `bundle.json` stands for, None without one."""
    found = document["policy"]["policy_path"] if key == "policy" else document.get(key)
    return None if found is None else str(found)


def read_bundle(folder: Path, *keys: str) -> BundleManifest:
    """Read and check a bundle folder: `bundle.json` and the SHA-256 of every file, each read once.

    Parameters
    ----------
    keys
        Those of the files whose bytes are wanted.

    Raises
    ------
    UserError
        Names the key or file that is wrong.
    """
    document = parse_manifest(_json_bytes(folder / BUNDLE_JSON), folder)
    wanted = {key: file_of(document, key) for key in keys}
    contents: dict[str, bytes] = {}
    for name, expected in document["files"].items():
        path = folder / name
        # A link is as good as a file (DVC may make one): the content is checked.
        if not path.is_file():
            raise UserError(f"bundle {folder}: file {name} is missing")
        if name in wanted.values():
            data = _bytes(path, MAX_JSON_BYTES if name.endswith(".json") else MAX_FILE_BYTES)
            contents |= dict.fromkeys((key for key in keys if wanted[key] == name), data)
            found = hashlib.sha256(data).hexdigest()
            del data
        else:
            found = _sha256(path, MAX_FILE_BYTES)
        if found != expected:
            raise UserError(f"bundle {folder}: {name} was changed after export (SHA-256 differs)")
    return BundleManifest(folder, document, contents)


def parse_manifest(data: bytes, bundle: Path) -> dict[str, Any]:
    """Check the bytes of a `bundle.json`: seal, schema, names of files; errors call it by `bundle`.

    Raises
    ------
    UserError
        Names the key that is wrong.
    """
    place = bundle / BUNDLE_JSON
    document = _parsed(data, place)
    try:
        whole = data == json_text(sealed(document)).encode()
    except (ValueError, RecursionError):  # NaN, lone surrogates: no export writes that
        whole = False
    if not whole:
        raise UserError(
            f"bundle {bundle}: {BUNDLE_JSON} was changed after export (SHA-256 differs)"
        )
    _check_schema(document, place)
    files: Mapping[str, str] = document["files"]
    keys = ("policy", "model_checkpoint", "cvfm_weights", *ONNX_KEYS)
    used = [name for key in keys if (name := file_of(document, key)) is not None]
    for name in [*files, *used]:
        if not _NAME.fullmatch(name):
            raise UserError(
                f'{place}: path "{name}" must stay inside the bundle: names of letters, digits, ".", "_" '
                'and "-", with "/" between folders'
            )
    for name in used:
        if name not in files:
            raise UserError(f'{place}: "{name}" has no SHA-256 in files')
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    if clash := sorted((folders | {BUNDLE_JSON}) & files.keys()):
        raise UserError(f'{place}: "{clash[0]}" cannot be a file of the bundle')
    return document


def load_bundle(folder: Path) -> Bundle:
    """Check a bundle folder in every way and build its parts; runs no stored code.

    Raises
    ------
    UserError
        Names the key, file or tensor that is wrong.
    """
    from streetvision.bundle.parts import (
        build_model,
        build_views,
        check_answer,
        check_cost,
        tensors,
    )

    manifest = read_bundle(folder, "policy", "model_checkpoint", "cvfm_weights")
    document = manifest.document
    policy = manifest.policy()
    place = folder / BUNDLE_JSON
    with _named(place):
        check_views(document)
        path = manifest.path("model_checkpoint")
        # Their bytes are gone before there is a model to fill: twice the weights at most are in memory.
        state = tensors(manifest.contents.pop("model_checkpoint"), path)
        model, config = build_model(document, state, path)
        del state
        check_cost(model, config, document)
        path = manifest.path("cvfm_weights")
        trained = manifest.contents.pop("cvfm_weights", None)
        fusion = build_views(
            document, None if trained is None else tensors(trained, path), path, model
        )
        check_answer(model, config, fusion, policy)
    return Bundle(document, model, config, fusion, policy)


def check_views(document: Mapping[str, Any]) -> None:
    """Bound the pixels that go through the network at once: all views of an image, or a batch of images.

    Raises
    ------
    UserError
        They are more than `MAX_PASS_PIXELS`.
    """
    fit = document["classifier"]["preprocessing"]
    each = fit["height"] * fit["width"]
    views, batch = views_of_grid(document), document["batch_size"]
    for count, what in ((views, "views an image"), (batch if views == 1 else 1, "images a batch")):
        if count * each > MAX_PASS_PIXELS:
            raise UserError(
                f"{count} {what} of {fit['width']} x {fit['height']} pixels are too many: "
                f"{MAX_PASS_PIXELS:,} pixels may go through the network at once"
            )


def views_of_grid(document: Mapping[str, Any]) -> int:
    """How many views of an image a bundle's network sees."""
    from streetvision.core.params import ViewGrid
    from streetvision.data.views import view_names

    return len(view_names(ViewGrid(**document["views"]["grid"])))


def _check_schema(document: Mapping[str, Any], place: Path) -> None:
    with _named(place):
        errors = schema_errors(document, SCHEMA)
        if errors:
            raise UserError("; ".join(errors))


def _json_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path} is missing; the stage `export` makes it")
    return _bytes(path, MAX_JSON_BYTES)


def _bytes(path: Path, limit: int) -> bytes:
    """The content of a file; UserError if it is larger than `limit` bytes."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        # It may grow meanwhile.
        data = file.read(size + 1) if size <= limit else b""
    if max(size, len(data)) > limit:
        raise UserError(f"{path} is larger than {limit:,} bytes")
    return data


def _sha256(path: Path, limit: int) -> str:
    """Hex SHA-256 of a file's content, which is not kept; UserError if it is larger than `limit` bytes."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise UserError(f"{path} is larger than {limit:,} bytes")
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(data: bytes, place: Path) -> dict[str, Any]:
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{place} must hold a JSON object")
    return document


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """Say in which file the error is, unless it says so itself; a recursion is deep JSON."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if str(place.parent) in text else f"{place}: {text}") from error
    except RecursionError as error:
        raise UserError(f"{place} is nested too deeply") from error
