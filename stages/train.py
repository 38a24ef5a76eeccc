"""Phase 1, train the classifier: `python -m stages.train`."""

from __future__ import annotations

from stages.common import Stage, run_stage
from streetvision.artifacts import write_csv_atomic, write_json_atomic


def train(stage: Stage) -> None:
    """TRAIN without its fusion part → `models/classifier`; the epoch is chosen on VAL_SELECT."""
    from streetvision.data.store import open_split
    from streetvision.models.classifier import save_classifier
    from streetvision.models.training import build_classifier, fit_classifier

    params, paths = stage.params, stage.paths
    inputs = {name: paths.split(name) for name in ("train", "val_select")}
    splits = {name: open_split("train", name, path) for name, path in inputs.items()}
    config = stage.config()
    model, classifier = build_classifier(
        params.train, params.data.square_crop, params.seed, paths.root
    )
    with stage.scratch(config, stage.upstream("prepare")) as scratch:
        result = fit_classifier(
            model, classifier, params.train, splits["train"], splits["val_select"],
            seed=params.seed, scratch=scratch, device=params.hardware.device,
            workers=params.hardware.workers,
        )  # fmt: skip
        save_classifier(result.model, result.config, paths.classifier)
        history = {key: [row[key] for row in result.history] for key in result.history[0]}
        write_csv_atomic(paths.plot("training.csv"), history)
        write_json_atomic(paths.metric("train"), result.metrics)
        outputs = [paths.classifier, paths.plot("training.csv"), paths.metric("train")]
        stage.write_manifest(config, list(inputs.values()), outputs, result.metrics)


if __name__ == "__main__":
    run_stage("train", __doc__, train)
