"""Writing a bundle: model, fusion, policy and everything needed to use them, under one manifest."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streetvision.bundle.onnx_session import ONNX_FILES, OnnxParts
from streetvision.bundle.validate import BUNDLE_JSON, BundleValidator, sealed
from streetvision.core.artifacts import (
    read_json,
    sha256_file,
    write_atomic,
    write_bytes_atomic,
    write_json_atomic,
)
from streetvision.core.errors import UserError
from streetvision.core.schema import CLASS_NAMES
from streetvision.decision.policy import policy_from_document
from streetvision.fusion import fusion
from streetvision.models.classifier import CONFIG, WEIGHTS, ClassifierConfig, load_weights_into

if TYPE_CHECKING:
    from streetvision.bundle.predictor import Predictor

FORMAT_VERSION = 1
# What the predictor reads; `cvfm_weights.pth` beside it holds the same numbers in a pickle.
FUSION_WEIGHTS = "cvfm_weights.safetensors"


def export_bundle(
    classifier: Path,
    scrc_params: Path,
    scrc_pickle: Path,
    output: Path,
    *,
    cvfm: Path,
    batch_size: int,
    make_tar: bool,
    make_onnx: Callable[[Predictor, Path], OnnxParts] | None = None,
) -> dict[str, Any]:
    """Write the bundle folder from its parts and read it back through all checks.

    Parameters
    ----------
    make_onnx
        Writes ONNX models of a predictor on the CPU into a folder: `onnx_gate.make_onnx` with its settings.

    Returns
    -------
    Content of `metrics/export.json`: bytes, number of files, what `cost.prediction_cost` counts, and what
    `make_onnx` measured.

    Raises
    ------
    UserError
        Lists every missing artifact and the stage that makes it.
    """
    import torch
    from safetensors.torch import save_file

    from streetvision.bundle.cost import prediction_cost
    from streetvision.bundle.predictor import Predictor

    needed = {
        classifier / WEIGHTS: "train",
        classifier / CONFIG: "train",
        cvfm / fusion.CONFIG: "cvfm",
        scrc_params: "calibrate",
        scrc_pickle: "calibrate",
    }
    missing = [f"{path} (stage `{stage}`)" for path, stage in needed.items() if not path.is_file()]
    if missing:
        raise UserError(f"a bundle needs {', '.join(missing)}")
    config = ClassifierConfig.from_dict(read_json(classifier / CONFIG, "train"))
    model = load_weights_into(config, classifier / WEIGHTS)
    views = fusion.load_fusion(cvfm, lambda: model.head)
    copied = [classifier / WEIGHTS, scrc_params, scrc_pickle]
    if views.network is not None:
        copied.append(cvfm / fusion.WEIGHTS)
    output.mkdir(parents=True, exist_ok=True)
    # DVC empties the folder first; by hand an old file would stay.
    for old in (fusion.WEIGHTS, FUSION_WEIGHTS, *ONNX_FILES):
        (output / old).unlink(missing_ok=True)
    for source in copied:
        write_atomic(output / source.name, partial(shutil.copyfile, source))
    names = ["model.pth", *(source.name for source in copied)]
    if views.network is not None:
        # Fitted and stored in float32: nothing is lost.
        state = {
            name: value.float().contiguous() for name, value in views.network.own_state().items()
        }
        write_atomic(output / FUSION_WEIGHTS, partial(save_file, state))
        names.append(FUSION_WEIGHTS)
    # A plain state dict beside the safetensors file, for tools that read nothing else.
    buffer = io.BytesIO()
    torch.save(dict(model.state_dict()), buffer)
    write_bytes_atomic(output / "model.pth", buffer.getvalue())
    policy = policy_from_document(read_json(scrc_params, "calibrate"))
    onnx = OnnxParts({}, {})
    if make_onnx is not None:
        cpu = torch.device("cpu")
        onnx = make_onnx(Predictor(model, config, views, policy, batch_size, cpu), output)
        names += onnx.files.values()
    names.sort()
    cost = prediction_cost(
        model, config.preprocessing, views, second_pass=policy.hard_images is not None
    )
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "policy_type": "scrc",
        "policy": {"policy_type": "scrc", "policy_path": scrc_params.name},
        "model_checkpoint": WEIGHTS,
        "cvfm_weights": FUSION_WEIGHTS if views.network is not None else None,
        "classifier": config.to_dict(),
        "views": views.config.to_dict(),
        "class_names": list(CLASS_NAMES),
        "parameters": cost["parameters"],
        "batch_size": batch_size,
        "files": {name: sha256_file(output / name) for name in names},
        **onnx.files,
    }
    write_json_atomic(output / BUNDLE_JSON, sealed(document))
    BundleValidator().validate(output)
    size = sum((output / name).stat().st_size for name in [*names, BUNDLE_JSON])
    if make_tar:
        write_atomic(
            output / "bundle.tar.gz", lambda path: _tar(output, [BUNDLE_JSON, *names], path)
        )
    return {**cost, "bytes": size, "files": len(names) + 1, **onnx.metrics}


def _tar(folder: Path, names: list[str], path: Path) -> None:
    """A tar.gz whose bytes depend on the files' content alone: no times, owners or file name.

    `bundle.json` comes first: it tells whoever unpacks what else may be there.
    """
    with (
        path.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name in names:
            info = tarfile.TarInfo(name)
            data = (folder / name).read_bytes()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
