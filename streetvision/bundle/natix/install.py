"""Writing a bundle and the detector that serves it into a checkout of the subnet's repository.

The bundle is copied, not referenced: the next `dvc repro` must not change what a miner loads at its next
start, and the checkout can be moved. Only what the detector reads is copied, so neither `model.pth` nor the
pickled policy. Each bundle gets a folder named by its hash; earlier ones stay, for going back.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from streetvision.bundle.archive import bundle_folder
from streetvision.bundle.natix.layout import Layout, layout_of
from streetvision.bundle.validate import BUNDLE_JSON, file_of, load_bundle
from streetvision.core.artifacts import json_text, sha256_file, write_atomic, write_bytes_atomic
from streetvision.core.errors import UserError

NAME = "StreetVision"
CONFIG = f"{NAME}.yaml"
DETECTOR = "streetvision_detector.py"
# The miner imports the package of the detectors, so that must import this one, which registers itself.
IMPORT = "from .streetvision_detector import StreetVisionDetector  # noqa: F401"
MARKER = "# Written by `python -m streetvision natix install`"


@dataclass(frozen=True)
class Installed:
    """What an installation changed, in its order, relative to the checkout, and what is left to do.

    Attributes
    ----------
    changed : files and folders that were written
    needed : packages that the subnet's own detectors import and its list for miners lacks: without them no
        miner starts
    miner_env : lines of `miner.env`
    """

    changed: tuple[str, ...]
    needed: tuple[str, ...] = ()
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
    layout = layout_of(checkout)
    detectors = checkout / layout.detectors
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
        _write(config, _yaml(weights, layout).encode()),
        _write(detectors / "__init__.py", _with_import(detectors / "__init__.py")),
    ]
    names = tuple(path.relative_to(checkout).as_posix() for path in changed if path)
    return Installed(names, _unlisted(checkout, detectors))


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


def _yaml(weights: str, layout: Layout) -> str:
    """The detector's configuration: the keys that the subnet's base class knows."""
    return (
        f"{MARKER}; run that again to change it.\n"
        "hf_repo: ''  # nothing is downloaded\n"
        f"config_name: {CONFIG}\n"
        f"weights: {weights}  # below {layout.detectors}/weights; the bundle is the folder around it\n"
    )


def _with_import(path: Path) -> bytes:
    """The package's file with the line that imports the detector, after all others; the rest as it was."""
    data, line = path.read_bytes(), IMPORT.encode()
    if line in data.splitlines():
        return data
    end = b"\r\n" if b"\r\n" in data else b"\n"
    return data + (b"" if not data or data.endswith(b"\n") else end) + line + end


def _unlisted(checkout: Path, detectors: Path) -> tuple[str, ...]:
    """Return `transformers` where the stock detector imports it and `requirements.miner.txt` lacks it.

    So it is in v0.4.1. Before v0.4 there is no such file: Poetry's list has it.
    """
    stock, listed = detectors / "vit_detector.py", checkout / "requirements.miner.txt"
    if not (stock.is_file() and listed.is_file()):
        return ()
    imports = re.search(rb"^\s*(from|import) transformers\b", stock.read_bytes(), re.MULTILINE)
    lists = re.search(rb"^\s*transformers\b", listed.read_bytes(), re.MULTILINE)
    return ("transformers",) if imports and not lists else ()
