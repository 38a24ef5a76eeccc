"""Phase 4a, adapt the backbone to TRAIN's images without labels: `python -m stages.explora`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from stages.common import Stage, run_stage
from streetvision.core.artifacts import main_process, write_csv_atomic, write_json_atomic

if TYPE_CHECKING:
    from streetvision.explora.adapted import AdaptationResult

log = logging.getLogger(__name__)


def explora(stage: Stage) -> None:
    """Images of TRAIN without its fusion part → `models/explora`; watched on images of VAL_SELECT.

    With several devices every rank runs this; the first one writes.
    """
    from streetvision.explora.adapted import pass_through
    from streetvision.models.backbone import initial_backbone

    params, paths = stage.params, stage.paths
    config = stage.config()
    backbone, timm_name, arguments, preprocessing = initial_backbone(
        params.train, params.seed, paths.root
    )
    document = {
        "backbone": timm_name, "arguments": arguments, "preprocessing": preprocessing.to_dict(),
    }  # fmt: skip
    if not params.explora.enabled:
        log.info("explora.enabled is false: the backbone passes through")
        if main_process():
            _write(stage, config, document, pass_through(backbone))
        return
    from streetvision.data.store import open_split
    from streetvision.explora.pretraining import adapt_backbone

    fit, select = (
        open_split("explora", name, paths.split(name)) for name in ("train", "val_select")
    )
    with stage.scratch(config, stage.upstream("prepare")) as scratch:
        result = adapt_backbone(
            backbone, params.explora, fit, select, preprocessing,
            pretrained=params.train.weights != "none", freeze_norm=params.train.freeze_norm,
            seed=params.seed, scratch=scratch, hardware=params.hardware,
            compile_settings=params.compile,
        )  # fmt: skip
        if main_process():
            _write(stage, config, document, result)


def _write(
    stage: Stage, config: dict[str, Any], document: dict[str, Any], result: AdaptationResult
) -> None:
    from streetvision.explora.adapted import HISTORY_COLUMNS, save_adaptation

    paths = stage.paths
    save_adaptation(result, document, paths.explora)
    history = {key: [row[key] for row in result.history] for key in HISTORY_COLUMNS}
    write_csv_atomic(paths.plot("explora.csv"), history)
    write_json_atomic(paths.metric("explora"), result.metrics)
    inputs = [paths.split(name) for name in ("train", "val_select")]
    outputs = [paths.explora, paths.plot("explora.csv"), paths.metric("explora")]
    stage.write_manifest(config, inputs, outputs, result.metrics)


if __name__ == "__main__":
    run_stage("explora", __doc__, explora)
