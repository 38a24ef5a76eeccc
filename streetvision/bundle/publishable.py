"""What of a bundle goes to the hub: files of known names, each of which says nothing that was not checked.

A pickle may run code where it is loaded, and stock tools load `model.pth` and `scrc_params.pkl`. So each is
published only as a copy: what it holds must equal the safetensors or JSON file beside it, and is told without
running anything.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streetvision.bundle.export import FUSION_WEIGHTS
from streetvision.bundle.onnx_session import ONNX_FILES
from streetvision.bundle.validate import ONNX_KEYS, file_of
from streetvision.core.artifacts import json_text, read_json, sha256_file
from streetvision.core.errors import UserError
from streetvision.decision.pickling import dump_policy_pickle
from streetvision.fusion import fusion
from streetvision.models.classifier import WEIGHTS

if TYPE_CHECKING:
    import torch

    from streetvision.bundle.validate import Bundle

POLICY, POLICY_PICKLE, MODEL_PICKLE = "scrc_params.json", "scrc_params.pkl", "model.pth"
# By the key of `bundle.json` that names the file: a name may be no other.
FILES = {
    "policy": POLICY, "model_checkpoint": WEIGHTS, "cvfm_weights": FUSION_WEIGHTS,
    **dict(zip(ONNX_KEYS, ONNX_FILES, strict=True)),
}  # fmt: skip
# What each pickle is a copy of.
PICKLES = {POLICY_PICKLE: POLICY, MODEL_PICKLE: WEIGHTS, fusion.WEIGHTS: FUSION_WEIGHTS}
FOLDED_FILES = {"config.json", "model.safetensors", "preprocessor_config.json"}
# What `torch.save` writes, below a folder of any name.
_RECORD = re.compile(
    r"[\w.-]+/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|"
    r"\.data/serialization_id|data/\d+)"
)
# Words and numbers of a fold's record, which stand in the card.
_PLAIN = re.compile(r"[\w.+ -]{1,100}", re.ASCII)


def check_publishable(folder: Path, document: Mapping[str, Any]) -> None:
    """Check that a bundle folder, which `BundleValidator` passes, holds nothing but known, equal files.

    Raises
    ------
    UserError
        Names the file that is not published.
    """
    for key, name in FILES.items():
        found = file_of(document, key)
        if found not in {None, name}:
            raise UserError(f'{folder}: {key} is "{found}"; only {name} is published')
    used = {name for key, name in FILES.items() if file_of(document, key) is not None}
    known = used | {pickled for pickled, twin in PICKLES.items() if twin in used}
    if odd := sorted(document["files"].keys() - known):
        raise UserError(
            f"{folder}: {odd[0]} is none of the files that are published ({', '.join(sorted(known))})"
        )
    for pickled, twin in PICKLES.items():
        if pickled not in document["files"]:
            continue
        same = _same_policy if twin == POLICY else _same_tensors
        if not same(folder / pickled, folder / twin):
            raise UserError(
                f"{folder}: {pickled} holds something else than {twin}, so it is not published; export again"
            )


def check_fold(folded: Path, parts: Bundle) -> dict[str, Any]:
    """Check that a folder is what `fold` makes of a bundle; return its record.

    Raises
    ------
    UserError
        It was folded from another bundle; a file is missing, was changed, or is none that `fold` writes.
    """
    from streetvision.bundle.affine import Affine, exact_affine
    from streetvision.bundle.folded import RECORD
    from streetvision.bundle.hf_format import hf_model
    from streetvision.bundle.parts import tensors

    record = read_json(folded / RECORD, "python -m streetvision fold")
    again = f"{folded} is not what `fold` makes of this bundle"
    try:
        if record["bundle_sha256"] != parts.document["sha256"]:
            raise UserError(f"{folded} was folded from another bundle; run `fold` again")
        files: dict[str, str] = record["files"]
        if odd := sorted(files.keys() - FOLDED_FILES):
            raise UserError(f"{folded}: {odd[0]} is none of the files that `fold` writes")
        for name, expected in files.items():
            if not (folded / name).is_file() or sha256_file(folded / name) != expected:
                raise UserError(f"{folded}: {name} is missing or was changed; run `fold` again")
        affine = Affine(float(record["slope"]), float(record["intercept"]))
        exact = exact_affine(parts.policy)
        made = hf_model(parts.model, parts.config, affine)
        written = {"config.json": made.config, "preprocessor_config.json": made.processor}
        texts = {name: json_text(text) for name, text in written.items() if text is not None}
        state = tensors((folded / WEIGHTS).read_bytes(), folded / WEIGHTS)
        said = {
            "kind": made.kind, "needs_transformers": made.needs, "other_shapes": made.other_shapes,
            "architecture": parts.config.backbone.split(".")[0],
            "calibrator": parts.policy.calibrator.kind,
        }  # fmt: skip
        whole = (
            files.keys() == {WEIGHTS, *texts}
            and all((folded / name).read_text() == text for name, text in texts.items())
            and _equal(state, made.state)
            and (affine == exact if exact else 0 < affine.slope < math.inf)
            and math.isfinite(affine.intercept)
            and (record["approximation"] is None) == (exact is not None)
            and all(record[key] == value for key, value in said.items())
            and _plain({key: value for key, value in record.items() if key not in {"files", *said}})
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{again} ({type(error).__name__}: {error}); run `fold` again") from error
    if not whole:
        raise UserError(f"{again}; run `fold` again")
    return record


def _same_policy(pickled: Path, twin: Path) -> bool:
    """Whether a pickle is what `export` writes of the JSON file beside it, byte by byte: it is not loaded."""
    return pickled.read_bytes() == dump_policy_pickle(json.loads(twin.read_text()))


def _same_tensors(pickled: Path, twin: Path) -> bool:
    """Whether a file of `torch.save`, with nothing else in it, holds the tensors of a safetensors file."""
    import torch
    from safetensors.torch import load_file

    try:
        with pickled.open("rb") as file, zipfile.ZipFile(file) as archive:
            file.seek(0)
            start = file.read(4)
            records = archive.infolist()
            plain = start == b"PK\x03\x04" and not archive.comment
        names = [record.filename for record in records]
        plain = plain and len(set(names)) == len(names)
        plain = plain and len({name.split("/")[0] for name in names}) == 1
        for record in records:  # stored as they are: what is read is no larger than the file
            plain = plain and record.compress_type == zipfile.ZIP_STORED
            plain = plain and _RECORD.fullmatch(record.filename) is not None
        if not plain:
            return False
        state = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception:  # a damaged or hostile pickle raises nearly anything
        return False
    return isinstance(state, dict) and _equal(state, load_file(twin))


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    import torch

    return one.keys() == other.keys() and all(
        type(one[name]) is torch.Tensor
        and one[name].dtype == tensor.dtype
        and torch.equal(one[name], tensor)
        for name, tensor in other.items()
    )


def _plain(value: object) -> bool:
    """Whether a document holds numbers, and words without markup."""
    if isinstance(value, Mapping):
        return all(_plain(key) and _plain(inner) for key, inner in value.items())
    if isinstance(value, str):
        return _PLAIN.fullmatch(value) is not None
    return value is None or isinstance(value, int | float)
