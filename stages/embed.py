"""Cache logits and features of all views, two files a split: `python -m stages.embed`."""

from __future__ import annotations

from stages.common import Stage, run_stage
from streetvision.data.store import CONTRACT


def embed(stage: Stage) -> None:
    """Classifier on TRAIN's fusion part, VAL_SELECT and VAL_CALIB → `data/embeddings`.

    Each as it is, and as `subnet.validator` sends it: fusion and the policy are fitted on what is served.
    """
    from streetvision.data.embeddings import write_embeddings
    from streetvision.data.served_images import served_images, served_versions
    from streetvision.data.store import open_split
    from streetvision.data.views import view_names
    from streetvision.models.classifier import load_classifier, pick_device
    from streetvision.models.multiview import score_all_views, score_split_views

    params, paths = stage.params, stage.paths
    model, config = load_classifier(paths.classifier)
    device = pick_device(params.hardware.device)
    model.to(device)
    views = view_names(params.views)
    repeats = served_versions(params.subnet, params.embed.served_repeats)
    written = []
    for name in CONTRACT["embed"]:
        split = open_split("embed", name, paths.split(name))
        scores = score_split_views(
            model, config.preprocessing, split, params.views, params.embed.batch_size, device
        )
        written.append(write_embeddings(paths.embeddings(name), split, views, scores))
        images = served_images(split, params.subnet, repeats, params.seed, params.hardware.workers)
        scores = score_all_views(
            model, config.preprocessing, images, params.views, params.embed.batch_size, device
        )
        path = paths.embeddings(name, "served")
        written.append(write_embeddings(path, split, views, scores, repeats))
    inputs = [paths.classifier, *(paths.split(name) for name in CONTRACT["embed"])]
    stage.write_manifest(stage.config(), inputs, written, {})


if __name__ == "__main__":
    run_stage("embed", __doc__, embed)
