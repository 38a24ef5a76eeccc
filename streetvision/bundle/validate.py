"""Reading a bundle's `bundle.json` with every check that a deployment relies on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from streetvision.artifacts import config_hash, json_text, read_json, sha256_file
from streetvision.errors import UserError

BUNDLE_JSON = "bundle.json"
REQUIRED = (
    "format_version", "policy_type", "policy", "model_checkpoint", "cvfm_weights", "classifier",
    "views", "class_names", "parameters", "batch_size", "files", "sha256",
)  # fmt: skip


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


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` with the hash of its other keys as `sha256`: no other file vouches for it."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return content | {"sha256": config_hash(content)}


def read_bundle(folder: Path) -> BundleManifest:
    """Read and check a bundle folder: keys, one active policy, relative paths, SHA-256 of every file.

    Raises
    ------
    UserError
        Names the key or file that is wrong.
    """
    document = read_json(folder / BUNDLE_JSON, "export")
    missing = [key for key in REQUIRED if key not in document]
    if missing:
        raise UserError(f"{folder / BUNDLE_JSON}: missing {', '.join(missing)}")
    if (folder / BUNDLE_JSON).read_text() != json_text(sealed(document)):
        raise UserError(
            f"bundle {folder}: {BUNDLE_JSON} was changed after export (SHA-256 differs)"
        )
    policy = document["policy"]
    if document["policy_type"] != "scrc" or policy.get("policy_type") != "scrc":
        raise UserError(
            f'{folder / BUNDLE_JSON}: policy_type must be "scrc", the one active policy'
        )
    used = [policy["policy_path"], document["model_checkpoint"]]
    if document["cvfm_weights"] is not None:
        used.append(document["cvfm_weights"])
    _check_files(folder, document["files"], used)
    return BundleManifest(folder, document)


def _check_files(folder: Path, files: Mapping[str, str], used: list[str]) -> None:
    """Refuse paths that leave the bundle, files without a hash, missing and changed ones."""
    for name in [*files, *used]:
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts or "\\" in name:
            raise UserError(f'{folder / BUNDLE_JSON}: path "{name}" must stay inside the bundle')
    for name in used:
        if name not in files:
            raise UserError(f'{folder / BUNDLE_JSON}: "{name}" has no SHA-256 in files')
    for name, expected in files.items():
        path = folder / name
        # A link is as good as a file (DVC may make one): the content is checked.
        if not path.is_file():
            raise UserError(f"bundle {folder}: file {name} is missing")
        if sha256_file(path) != expected:
            raise UserError(f"bundle {folder}: {name} was changed after export (SHA-256 differs)")
