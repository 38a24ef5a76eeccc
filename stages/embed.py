"""Cache logits and features, one file a split: `python -m stages.embed`."""

from __future__ import annotations

from stages.common import Stage, run_stage
from streetvision.data.store import CONTRACT


def embed(stage: Stage) -> None:
    """Classifier on TRAIN's fusion part, VAL_SELECT and VAL_CALIB → `data/embeddings`."""
    from streetvision.data.embeddings import write_embeddings
    from streetvision.data.store import open_split
    from streetvision.models.classifier import load_classifier, pick_device, score_split

    params, paths = stage.params, stage.paths
    model, config = load_classifier(paths.classifier)
    device = pick_device(params.hardware.device)
    model.to(device)
    written = []
    for name in CONTRACT["embed"]:
        split = open_split("embed", name, paths.split(name))
        logits, features = score_split(
            model, config.preprocessing, split, params.embed.batch_size, device
        )
        written.append(write_embeddings(paths.embeddings(name), split, logits, features))
    inputs = [paths.classifier, *(paths.split(name) for name in CONTRACT["embed"])]
    stage.write_manifest(stage.config(), inputs, written, {})


if __name__ == "__main__":
    run_stage("embed", __doc__, embed)
