"""Writing a bundle and the detector that serves it into a checkout of the subnet's repository.

The bundle is copied, not referenced: the next `dvc repro` must not change what a miner loads at its next
start, and the checkout can be moved. Only what the detector reads is copied, so neither `model.pth` nor the
pickled policy. Each bundle gets a folder named by its hash; earlier ones stay, for going back.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from streetvision.bundle.archive import bundle_folder
from streetvision.bundle.validate import BUNDLE_JSON, file_of, load_bundle
from streetvision.core.artifacts import json_text, sha256_file, write_atomic, write_bytes_atomic
from streetvision.core.errors import UserError

NAME = "StreetVision"
CONFIG = f"{NAME}.yaml"
DETECTORS = "base_miner/detectors"
DETECTOR = "streetvision_detector.py"
# What `neurons/miner.py` imports is this package, so it must import the detector, which registers itself.
IMPORT = "from .streetvision_detector import StreetVisionDetector  # noqa: F401"
MARKER = "# Written by `python -m streetvision natix install`"
CHECKOUT = (
    "base_miner/registry.py", f"{DETECTORS}/__init__.py", f"{DETECTORS}/feature_detector.py",
    f"{DETECTORS}/configs",
)  # fmt: skip


@dataclass(frozen=True)
class Installed:
    """What an installation changed, in its order, relative to the checkout, and the lines of `miner.env`."""

    changed: tuple[str, ...]
    miner_env: tuple[str, ...] = (f"IMAGE_DETECTOR={NAME}", f"IMAGE_DETECTOR_CONFIG={CONFIG}")


def install(bundle: Path, checkout: Path) -> Installed:
    """Copy the files of a bundle, folder or tar.gz, into a subnet checkout, with the detector and its YAML.

    Each step is atomic, and the files before it do no harm without it: an interruption leaves the miner that
    was there. A second installation of the same bundle changes nothing.

    Raises
    ------
    UserError
        `BundleValidator` does not pass the bundle; `checkout` is none; a file of the same name is not ours.
    """
    with bundle_folder(bundle) as folder:
        return _install(folder, load_bundle(folder).document, checkout)


def _install(folder: Path, document: Mapping[str, Any], checkout: Path) -> Installed:
    missing = [name for name in CHECKOUT if not (checkout / name).exists()]
    if missing:
        raise UserError(f"{checkout} is no checkout of the subnet: it has no {', '.join(missing)}")
    detectors = checkout / DETECTORS
    detector, config = detectors / DETECTOR, detectors / "configs" / CONFIG
    for path in (detector, config):
        if path.exists() and not path.read_bytes().startswith(MARKER.encode()):
            raise UserError(f"{path} was not written by this command; move it away first")

    name = f"streetvision-{document['sha256'][:12]}"
    weights = f"{name}/{document['model_checkpoint']}"
    own = Path(__file__).with_name(DETECTOR).read_bytes()
    changed = [
        _copy_bundle(folder, document, detectors / "weights" / name),
        _write(detector, own),
        _write(config, _yaml(weights).encode()),
        _write(detectors / "__init__.py", _with_import(detectors / "__init__.py")),
    ]
    return Installed(tuple(path.relative_to(checkout).as_posix() for path in changed if path))


def _copy_bundle(folder: Path, document: Mapping[str, Any], target: Path) -> Path | None:
    """Copy what the detector reads; None if it is there and whole."""
    named = [file_of(document, key) for key in ("policy", "model_checkpoint", "cvfm_weights")]
    expected = {name: str(document["files"][name]) for name in named if name is not None}
    # As it was checked: the file may be another one by now.
    manifest = json_text(document).encode()
    expected[BUNDLE_JSON] = hashlib.sha256(manifest).hexdigest()
    if all(_holds(target / name, sha256) for name, sha256 in expected.items()):
        return None
    try:
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".streetvision-") as temporary:
            copy = Path(temporary) / "bundle"
            write_bytes_atomic(copy / BUNDLE_JSON, manifest)
            for name, sha256 in expected.items():
                if name != BUNDLE_JSON:
                    write_atomic(copy / name, partial(shutil.copyfile, folder / name))
                if not _holds(copy / name, sha256):
                    raise UserError(f"bundle {folder}: {name} was changed while it was copied")
            if target.is_dir():  # damaged: its name is the hash of what it should hold
                shutil.rmtree(target)
            copy.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _holds(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def _write(path: Path, data: bytes) -> Path | None:
    """Write a file unless it holds just that; return what was written."""
    if path.is_file() and path.read_bytes() == data:
        return None
    return write_bytes_atomic(path, data)


def _yaml(weights: str) -> str:
    """The detector's configuration: the keys that the subnet's base class knows."""
    return (
        f"{MARKER}; run that again to change it.\n"
        "hf_repo: ''  # nothing is downloaded\n"
        f"config_name: {CONFIG}\n"
        f"weights: {weights}  # below {DETECTORS}/weights; the bundle is the folder around it\n"
    )


def _with_import(path: Path) -> bytes:
    """The package's file with the line that imports the detector, after all others."""
    text = path.read_text(encoding="utf-8")
    if IMPORT in text.splitlines():
        return text.encode()
    return f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{IMPORT}\n".encode()
