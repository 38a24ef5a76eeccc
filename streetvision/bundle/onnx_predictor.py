"""Inference from a bundle in onnxruntime, without torch: the same answers by the same code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from streetvision.bundle.archive import bundle_folder
from streetvision.bundle.base import BasePredictor
from streetvision.bundle.inputs import MAX_PIXELS
from streetvision.bundle.onnx_session import Network, OnnxFusion
from streetvision.bundle.validate import BundleManifest, check_views, read_bundle
from streetvision.core.errors import UserError
from streetvision.data.transforms import Preprocessing
from streetvision.decision.policy import Policy
from streetvision.fusion.fusion import TRAINED, Fusion, FusionConfig

# Engine → key of `bundle.json` that names its model, and the parameter that makes it.
MODELS = {
    "onnx": ("onnx_model", "export.onnx"),
    "onnx_int8": ("onnx_int8_model", "export.int8"),
}


class OnnxPredictor(BasePredictor):
    """Probability of roadwork for street images, with onnxruntime on the CPU; see `BasePredictor`.

    Examples
    --------
    >>> predictor = OnnxPredictor.load("models/bundle")  # doctest: +SKIP
    >>> predictor("street.jpg")  # doctest: +SKIP
    0.93
    """

    def __init__(
        self,
        network: Network,
        preprocessing: Preprocessing,
        fusion: Fusion,
        policy: Policy,
        batch_size: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(preprocessing, fusion, policy, batch_size, max_pixels)
        self.network = network

    @classmethod
    def load(
        cls, bundle: Path | str, engine: str = "onnx", max_pixels: int = MAX_PIXELS
    ) -> OnnxPredictor:
        """Load a bundle folder or `bundle.tar.gz` that was exported with `export.onnx`.

        Seal, schema, hashes and policy are checked as `Predictor.load` does; of the networks their inputs
        and outputs, what they take to run with the bundle's views and batch, and that they give an answer.

        Parameters
        ----------
        engine
            onnx, or onnx_int8 where the bundle has it.

        Raises
        ------
        UserError
            The bundle is incomplete, was changed, or has no such model; onnxruntime is not installed.
        """
        with bundle_folder(Path(bundle)) as folder:
            key, parameter = MODELS[engine]
            manifest = read_bundle(folder, "policy", key, "onnx_fusion")
            document = manifest.document
            if key not in document:
                raise UserError(
                    f"bundle {bundle} has no {key}: it was exported without {parameter}"
                )
            check_views(document)
            policy = manifest.policy()
            preprocessing = Preprocessing.from_dict(document["classifier"]["preprocessing"])
            fusion = _fusion(manifest)
            batch_size = int(document["batch_size"])
            network = Network(
                manifest.contents.pop(key), manifest.path(key), preprocessing,
                features=fusion.needs_features, batch=batch_of(fusion, batch_size), views=fusion.n_views,
            )  # fmt: skip
        predictor = cls(network, preprocessing, fusion, policy, batch_size, max_pixels)
        predictor.check_answer()
        return predictor

    def run_network(
        self, inputs: list[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float16] | None]:
        """Return logits [B], and features [B, D] where fusion needs them, of inputs [H, W, 3] in one pass."""
        return self.network(inputs)

    def check_answer(self) -> None:
        """Score one grey image; raises `UserError` if what was stored gives no answer."""
        image = Image.new("RGB", (self.preprocessing.width, self.preprocessing.height), "grey")
        try:
            self.probabilities([image])
        except Exception as error:  # onnxruntime's own kinds share no base class
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the parts give no answer: {reason}") from error


def check_onnx(folder: Path) -> None:
    """Load each ONNX model of a checked bundle folder as `OnnxPredictor` does.

    Raises
    ------
    UserError
        One would not load, or onnxruntime is not installed.
    """
    document = read_bundle(folder).document
    for engine, (key, _) in MODELS.items():
        if key in document:
            OnnxPredictor.load(folder, engine)


def batch_of(fusion: Fusion, batch_size: int) -> int:
    """How many images go through the network at once: with several views one, as `network_scores` has it."""
    return 1 if fusion.n_views > 1 else batch_size


def _fusion(manifest: BundleManifest) -> Fusion:
    views: dict[str, Any] = manifest.document["views"]
    config = FusionConfig.from_dict(views)
    model = manifest.contents.pop("onnx_fusion", None)
    if (model is not None) != (config.mode in TRAINED):
        raise UserError(
            f"bundle {manifest.folder}: views.mode {config.mode} "
            f"{'needs' if model is None else 'has no'} onnx_fusion"
        )
    return (
        Fusion(config) if model is None else OnnxFusion(config, model, manifest.path("onnx_fusion"))
    )
