"""Every check that a deployment relies on, from the bytes of `bundle.json` to a first answer.

`read_bundle` checks the manifest and the files, `load_bundle` builds the parts and checks them, too:
`Predictor.load` and `BundleValidator` both go through it, so that nothing is served that was not checked.
No pickle is read: weights are safetensors, the policy is JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from streetvision.artifacts import config_hash, json_text, sha256_file
from streetvision.errors import UserError
from streetvision.json_schema import schema_errors

if TYPE_CHECKING:
    from streetvision.decision.policy import Policy
    from streetvision.models.classifier import ClassifierConfig, RoadworkClassifier
    from streetvision.models.fusion import Fusion

BUNDLE_JSON = "bundle.json"
SCHEMA = Path(__file__).parent / "schemas/bundle.schema.json"
MAX_JSON_BYTES = 4 * 2**20
# Keys of `bundle.json` that name what `export.onnx` and `export.int8` add, where they did.
ONNX_KEYS = ("onnx_model", "onnx_int8_model", "onnx_fusion")
# No part starts with a dot, so none is `..`; a part is what every file system takes.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class BundleManifest:
    """A checked `bundle.json`; `document` is its content."""

    folder: Path
    document: dict[str, Any]

    @property
    def policy_path(self) -> Path:
        """The active policy's JSON."""
        return self.folder / str(self.document["policy"]["policy_path"])

    @property
    def model_path(self) -> Path:
        """The classifier's weights."""
        return self.folder / str(self.document["model_checkpoint"])

    @property
    def fusion_path(self) -> Path:
        """The weights of a trained fusion; the folder where the mode has none."""
        return self.folder / str(self.document["cvfm_weights"] or "")

    def policy(self) -> Policy:
        """The active policy, after every check; raises `UserError` with the key that is wrong."""
        from streetvision.decision.policy import policy_from_document
        from streetvision.decision.validator import PolicyValidator

        content = _parsed(_json_bytes(self.policy_path), self.policy_path)
        with _named(self.policy_path):
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
        file; the policy; names, shapes and finiteness of the weights; that the model gives an answer.

        Raises
        ------
        UserError
            Names the key, file or tensor that is wrong.
        """
        from streetvision.bundle.archive import bundle_folder

        with bundle_folder(Path(bundle)) as folder:
            load_bundle(folder)


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` with the hash of its other keys as `sha256`: no other file vouches for it."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return content | {"sha256": config_hash(content)}


def read_bundle(folder: Path) -> BundleManifest:
    """Read and check a bundle folder: `bundle.json` and the SHA-256 of every file.

    Raises
    ------
    UserError
        Names the key or file that is wrong.
    """
    document = parse_manifest(_json_bytes(folder / BUNDLE_JSON), folder)
    for name, expected in document["files"].items():
        path = folder / name
        # A link is as good as a file (DVC may make one): the content is checked.
        if not path.is_file():
            raise UserError(f"bundle {folder}: file {name} is missing")
        if sha256_file(path) != expected:
            raise UserError(f"bundle {folder}: {name} was changed after export (SHA-256 differs)")
    return BundleManifest(folder, document)


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
    used = [document["policy"]["policy_path"], document["model_checkpoint"]]
    optional = ("cvfm_weights", *ONNX_KEYS)
    used += [document[key] for key in optional if document.get(key) is not None]
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
    from streetvision.bundle.parts import build_model, build_views, check_answer

    manifest = read_bundle(folder)
    document = manifest.document
    policy = manifest.policy()
    place = folder / BUNDLE_JSON
    with _named(place):
        model, config = build_model(document, manifest.model_path)
        fusion = build_views(document, manifest.fusion_path, model)
        check_answer(model, config, fusion, policy)
    return Bundle(document, model, config, fusion, policy)


def _check_schema(document: Mapping[str, Any], place: Path) -> None:
    with _named(place):
        errors = schema_errors(document, SCHEMA)
        if errors:
            raise UserError("; ".join(errors))


def _json_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path} is missing; the stage `export` makes it")
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes")
    return data


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
