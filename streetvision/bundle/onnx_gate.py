"""ONNX models for a bundle: made, compared with torch on the images that are served, and kept or not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL.Image import Image

from streetvision.bundle.base import BasePredictor
from streetvision.bundle.onnx_export import export_fusion, export_network, quantise
from streetvision.bundle.onnx_predictor import OnnxPredictor, batch_of
from streetvision.bundle.onnx_session import ONNX_FILES, Network, OnnxFusion, OnnxParts
from streetvision.bundle.predictor import Predictor
from streetvision.core.artifacts import write_bytes_atomic
from streetvision.core.errors import UserError
from streetvision.core.params import Export
from streetvision.data.views import views_of
from streetvision.decision.policy import Policy
from streetvision.models.multiview import batched
from streetvision.stats.metrics import all_metrics, prior_weights

log = logging.getLogger(__name__)
MODEL, INT8_MODEL, FUSION = ONNX_FILES
# Images of VAL_CALIB whose activations the ranges of static int8 are taken from, drawn over all of it.
RANGE_IMAGES = 200


@dataclass(frozen=True)
class GateImages:
    """The images that models are compared on, as they are served; read anew at each call.

    Attributes
    ----------
    calib : VAL_CALIB's; their labels are not needed
    select : VAL_SELECT's
    labels : of VAL_SELECT [N], 1 = roadwork
    ranges : up to `RANGE_IMAGES` of VAL_CALIB's, from anywhere in it
    """

    calib: Callable[[], Iterable[Image]]
    select: Callable[[], Iterable[Image]]
    labels: NDArray[np.int64]
    ranges: Callable[[], Iterable[Image]]


def make_onnx(
    predictor: Predictor, folder: Path, settings: Export, images: GateImages
) -> OnnxParts:
    """Write the ONNX models of `predictor`, which runs on the CPU, into `folder`.

    The float32 model must answer as torch does on VAL_CALIB: logits within
    `settings.max_logit_difference`, and every decision equal. The int8 model ships if its MCC on
    VAL_SELECT, at the served prior, is at most `settings.max_mcc_drop` below torch's.

    Returns
    -------
    parts
        Its metrics are `onnx` and, where int8 was asked for, `onnx_int8`.

    Raises
    ------
    UserError
        The float32 model cannot be made or answers differently: nothing of ONNX is left in `folder`.
    """
    fusion = predictor.fusion
    model = export_network(predictor.model, predictor.preprocessing, features=fusion.needs_features)
    write_bytes_atomic(folder / MODEL, model)
    files = {"onnx_model": MODEL}
    if fusion.network is not None:
        network = export_fusion(fusion.network, fusion.n_views, fusion.config.features)
        write_bytes_atomic(folder / FUSION, network)
        files["onnx_fusion"] = FUSION
    log.info("comparing %s with torch on VAL_CALIB", MODEL)
    onnx = _in_onnxruntime(predictor, folder, MODEL)
    reference, found = logits_of([predictor, onnx], images.calib())
    metrics: dict[str, Any] = {
        "onnx": {"bytes": len(model), **compare(predictor.policy, reference, found)}
    }
    _check_equal(
        metrics["onnx"], settings.max_logit_difference, [folder / n for n in files.values()]
    )
    if settings.int8 == "none":
        return OnnxParts(files, metrics)
    some = (
        views_of(image, predictor.preprocessing, fusion.config.grid).inputs
        for image in images.ranges()
    )
    small = quantise(model, settings.int8, some)
    write_bytes_atomic(folder / INT8_MODEL, small)
    log.info("comparing %s with torch on VAL_SELECT", INT8_MODEL)
    int8 = _in_onnxruntime(predictor, folder, INT8_MODEL)
    reference, found = logits_of([predictor, int8], images.select())
    mcc, int8_mcc = (_mcc(predictor.policy, images.labels, each) for each in (reference, found))
    shipped = mcc - int8_mcc <= settings.max_mcc_drop
    metrics["onnx_int8"] = {
        "kind": settings.int8, "shipped": shipped, "bytes": len(small), "torch_mcc": mcc,
        "mcc": int8_mcc, "mcc_drop": mcc - int8_mcc, **compare(predictor.policy, reference, found),
    }  # fmt: skip
    if shipped:
        files["onnx_int8_model"] = INT8_MODEL
    else:
        (folder / INT8_MODEL).unlink()
        log.warning(
            "%s int8 is not shipped: MCC on VAL_SELECT falls from %.4f to %.4f, by more than %g",
            settings.int8, mcc, int8_mcc, settings.max_mcc_drop,
        )  # fmt: skip
    return OnnxParts(files, metrics)


def logits_of(
    predictors: Iterable[BasePredictor], images: Iterable[Image]
) -> Iterator[NDArray[np.float64]]:
    """Yield each predictor's logits [N] of the same images, which are read once, a batch at a time."""
    each = list(predictors)
    found = [
        [predictor.logits(chunk) for predictor in each]
        for chunk in batched(images, each[0].batch_size)
    ]
    yield from (np.concatenate(parts) for parts in zip(*found, strict=True))


def compare(policy: Policy, reference: ArrayLike, found: ArrayLike) -> dict[str, Any]:
    """Largest difference of logits [N], and the number of decisions that change, of how many images."""
    difference = np.abs(np.asarray(reference) - np.asarray(found))
    changed = policy.decide(reference) != policy.decide(found)
    return {
        "images": len(difference),
        "max_logit_difference": float(difference.max()),
        "changed_decisions": int(changed.sum()),
    }


def _check_equal(found: dict[str, Any], allowed: float, files: list[Path]) -> None:
    if found["max_logit_difference"] <= allowed and not found["changed_decisions"]:
        return
    for path in files:
        path.unlink()
    raise UserError(
        f"export.onnx: on VAL_CALIB the ONNX model's logits differ from torch's by up to "
        f"{found['max_logit_difference']:.2g} (export.max_logit_difference allows {allowed:g}) and "
        f"{found['changed_decisions']} of {found['images']} decisions change (0 may); "
        "set export.onnx to false to export without it"
    )


def _in_onnxruntime(predictor: Predictor, folder: Path, model: str) -> OnnxPredictor:
    fusion = predictor.fusion
    if fusion.network is not None:
        fusion = OnnxFusion(fusion.config, (folder / FUSION).read_bytes(), folder / FUSION)
    network = Network(
        (folder / model).read_bytes(), folder / model, predictor.preprocessing,
        features=fusion.needs_features, batch=batch_of(fusion, predictor.batch_size),
        views=fusion.n_views,
    )  # fmt: skip
    return OnnxPredictor(
        network, predictor.preprocessing, fusion, predictor.policy, predictor.batch_size,
        predictor.max_pixels,
    )  # fmt: skip


def _mcc(policy: Policy, labels: NDArray[np.int64], logits: NDArray[np.float64]) -> float:
    weights = prior_weights(labels, policy.served_prior)
    return float(all_metrics(labels, policy.deployed_probability(logits), weights)["mcc"])
