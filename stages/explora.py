"""Phase 4a, adapt the backbone to TRAIN's images without labels: `python -m stages.explora`."""

from __future__ import annotations

from stages.common import Stage, run_stage
from streetvision.artifacts import main_process, write_csv_atomic, write_json_atomic


def explora(stage: Stage) -> None:
    """Images of TRAIN without its fusion part → `models/explora`; watched on images of VAL_SELECT.

    With several devices every rank runs this; the first one writes.
    """
    from streetvision.data.store import open_split
    from streetvision.models.backbone import initial_backbone
    from streetvision.models.monitor import HISTORY_COLUMNS
    from streetvision.models.pretraining import adapt_backbone, save_adaptation

    params, paths = stage.params, stage.paths
    inputs = {name: paths.split(name) for name in ("train", "val_select")}
    splits = {name: open_split("explora", name, path) for name, path in inputs.items()}
    config = stage.config()
    backbone, name, arguments, preprocessing = initial_backbone(
        params.train, params.data.square_crop, params.seed, paths.root
    )
    with stage.scratch(config, stage.upstream("prepare")) as scratch:
        result = adapt_backbone(
            backbone, params.explora, splits["train"], splits["val_select"], preprocessing,
            pretrained=params.train.weights != "none", freeze_norm=params.train.freeze_norm,
            seed=params.seed, scratch=scratch, hardware=params.hardware,
            compile_settings=params.compile,
        )  # fmt: skip
        if not main_process():
            return
        document = {
            "backbone": name, "arguments": arguments, "preprocessing": preprocessing.to_dict(),
        }  # fmt: skip
        save_adaptation(result, document, paths.explora)
        history = {key: [row[key] for row in result.history] for key in HISTORY_COLUMNS}
        write_csv_atomic(paths.plot("explora.csv"), history)
        write_json_atomic(paths.metric("explora"), result.metrics)
        outputs = [paths.explora, paths.plot("explora.csv"), paths.metric("explora")]
        stage.write_manifest(config, list(inputs.values()), outputs, result.metrics)


if __name__ == "__main__":
    run_stage("explora", __doc__, explora)
