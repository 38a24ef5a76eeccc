"""Phase 6, the deployable bundle: `python -m stages.export`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from stages.common import Stage, run_stage
from streetvision.core.artifacts import write_json_atomic
from streetvision.data.store import CONTRACT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from PIL.Image import Image

    from streetvision.bundle.onnx_gate import GateImages


def export(stage: Stage) -> None:
    """Classifier, fusion and policy → `models/bundle`; ONNX models only if they answer as torch does."""
    from streetvision.bundle.export import export_bundle

    params, paths = stage.params, stage.paths
    make_onnx = None
    if params.export.onnx:
        from streetvision.bundle.onnx_gate import make_onnx as make

        make_onnx = partial(make, settings=params.export, images=_images(stage))
    metrics = export_bundle(
        paths.classifier, paths.scrc_params, paths.scrc_pickle, paths.bundle,
        cvfm=paths.cvfm, batch_size=params.embed.batch_size, make_tar=params.export.make_tar,
        make_onnx=make_onnx,
    )  # fmt: skip
    write_json_atomic(paths.metric("export"), metrics)
    if params.export.timed_images:
        from streetvision.bundle.engines import shipped_engines
        from streetvision.bundle.timing import time_bundle

        engines = shipped_engines(paths.bundle)
        timing = time_bundle(paths.bundle, engines, params.export.timed_images)
        write_json_atomic(paths.export_timing, timing)
    inputs = [paths.classifier, paths.cvfm, paths.scrc_params, paths.scrc_pickle]
    inputs += [paths.split(name) for name in CONTRACT["export"]]
    stage.write_manifest(stage.config(), inputs, [paths.bundle, paths.metric("export")], metrics)


def _images(stage: Stage) -> GateImages:
    """VAL_CALIB and VAL_SELECT as they are served: as `decision.fit_on` says."""
    from streetvision.bundle.onnx_gate import RANGE_IMAGES, GateImages
    from streetvision.data.served_images import served_images
    from streetvision.data.store import Split, open_split

    params = stage.params

    def served(split: Split) -> Iterable[Image]:
        if params.decision.fit_on == "clean":
            return map(split.image, range(len(split)))
        return served_images(split, params.subnet, 1, params.seed, params.hardware.workers)

    calib, select = (
        open_split("export", name, stage.paths.split(name)) for name in ("val_calib", "val_select")
    )
    ranges = partial(served, calib.draw(RANGE_IMAGES, params.seed))
    return GateImages(partial(served, calib), partial(served, select), select.labels, ranges)


if __name__ == "__main__":
    run_stage("export", __doc__, export)
