"""Phase 1, train the classifier: `python -m stages.train`."""

from __future__ import annotations

from stages.common import Stage, run_stage
from streetvision.core.artifacts import main_process, write_csv_atomic, write_json_atomic


def train(stage: Stage) -> None:
    """TRAIN without its fusion part → `models/classifier`; the epoch is chosen on VAL_SELECT.

    With several devices every rank runs this; the first one writes.
    """
    from streetvision.data.store import open_split
    from streetvision.models.classifier import save_classifier
    from streetvision.training.training import build_classifier, train_classifier

    params, paths = stage.params, stage.paths
    inputs = {name: paths.split(name) for name in ("train", "val_select")}
    splits = {name: open_split("train", name, path) for name, path in inputs.items()}
    adapted = paths.explora if params.train.init_from_explora else None
    upstream = stage.upstream("prepare", *(["explora"] if adapted else []))
    config = stage.config()
    with stage.scratch(config, upstream) as scratch:
        result = train_classifier(
            lambda chosen, seed: build_classifier(chosen, seed, paths.root, adapted),
            params.train, splits["train"], splits["val_select"],
            subnet=params.subnet, seed=params.seed, scratch=scratch, hardware=params.hardware,
            compile_settings=params.compile,
        )  # fmt: skip
        if not main_process():
            return
        save_classifier(result.model, result.config, paths.classifier)
        history = {key: [row[key] for row in result.history] for key in result.history[0]}
        write_csv_atomic(paths.plot("training.csv"), history)
        write_json_atomic(paths.metric("train"), result.metrics)
        read = [*inputs.values(), *([adapted] if adapted else [])]
        outputs = [paths.classifier, paths.plot("training.csv"), paths.metric("train")]
        stage.write_manifest(config, read, outputs, result.metrics)


if __name__ == "__main__":
    run_stage("train", __doc__, train)
