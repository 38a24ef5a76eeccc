"""Leave groups out: what fusion gains over the single view where there are too few groups for splits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streetvision.core.artifacts import config_hash, write_atomic
from streetvision.core.errors import UserError
from streetvision.data.store import open_split
from streetvision.studies.data import WHOLE
from streetvision.studies.decision_runs import AUTO, Floats, Run
from streetvision.studies.leave_out import mixed_groups

if TYPE_CHECKING:
    from streetvision.data.views import ViewScores

log = logging.getLogger(__name__)
QUARTERS = 4
# Not modes: plain logistic regression on all views' features, and both regressions on all other groups.
REFERENCE, SINGLE_ALL, REFERENCE_ALL = "reference", "single, all", "reference, all"
REFERENCES = (REFERENCE, SINGLE_ALL, REFERENCE_ALL)


def run_held_out(run: Run, folds: int) -> dict[str, Any]:
    """Hold a part of the groups out: head and fusion on the rest, on features of the frozen backbone.

    No photograph ever moved the backbone, so the head and fusion may be fitted on the same groups. A quarter of
    the other groups, another with each number, is VAL_SELECT, where fusion is stopped and chosen; the rest is
    what the head, logistic regression with balanced classes on the global view, and fusion are fitted on:
    fusion on logits of heads that did not see the group. The reference is the same regression on the
    features of the global view beside the mean of the others.
    """
    from streetvision.data.views import ViewScores
    from streetvision.fusion.fitting import LabelledViews, fit_modes, learnt_scale

    split = open_split("crossval", "whole", run.source / WHOLE)
    names, labels, groups = mixed_groups(split), split.labels, split.groups
    if len(names) < folds:
        raise UserError(f"{folds} parts need as many groups with both classes, not {len(names)}")
    held = np.isin(groups, names[run.part :: folds])
    rest, test = np.flatnonzero(~held), np.flatnonzero(held)
    scores = _features(run)
    halves = np.asarray(scores.features)
    features = halves.astype(np.float32)
    fusion_rows, select_rows = _group_parts(rest, groups, QUARTERS)[run.number]
    head = fit_head(features[fusion_rows, 0], labels[fusion_rows])
    logits = _head_logits(head, features)
    for fitted, read in _group_parts(fusion_rows, groups, 5):
        logits[read] = _head_logits(fit_head(features[fitted, 0], labels[fitted]), features[read])

    def part(rows: NDArray[np.int64]) -> LabelledViews:
        views = ViewScores(logits[rows], halves[rows], scores.content[rows], scores.boxes[rows])
        return LabelledViews(views, labels[rows], groups[rows])

    fusion_part, select, asked = part(fusion_rows), part(select_rows), part(test)
    fits = fit_modes(
        run.params.cvfm, run.params.views, fusion_part, select, head, run.params.seed
    )  # fmt: skip
    fused, losses = {}, {}
    for mode, fit in fits.items():
        scale = learnt_scale(fit.fusion, fusion_part)
        losses[mode] = _log_loss(select.labels, scale(fit.fusion.fuse(*select.scores)))
        if mode == "single":
            fused[mode] = asked.scores.logits[:, 0].tolist()
        else:
            fused[mode] = scale(fit.fusion.fuse(*asked.scores)).tolist()
    beside = np.concatenate([features[:, 0], features[:, 1:].mean(axis=1)], axis=1)
    others = (
        (REFERENCE, beside, fusion_rows), (SINGLE_ALL, features[:, 0], rest),
        (REFERENCE_ALL, beside, rest),
    )  # fmt: skip
    for name, values, rows in others:
        fused[name] = _head_logits(fit_head(values[rows], labels[rows]), values[test]).tolist()
    chosen = min(losses, key=lambda mode: losses[mode])
    return {
        "labels": asked.labels.tolist(),
        "groups": [str(group) for group in asked.groups],
        "logits": fused | {AUTO: fused[chosen]},
        "chosen": chosen,
        "select_log_loss": losses,
        "images": {"fusion part": len(fusion_rows), "VAL_SELECT": len(select_rows)},
    }


def fit_head(features: NDArray[np.float32], labels: NDArray[np.int64]) -> Any:
    """A linear head: balanced logistic regression on standardised features, as one `nn.Linear`."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(features)
    fitted = LogisticRegression(class_weight="balanced", max_iter=5000).fit(
        scale.transform(features), labels
    )
    weight = fitted.coef_[0] / scale.scale_
    head = torch.nn.Linear(features.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight[None]))
        head.bias.fill_(float(fitted.intercept_[0] - weight @ scale.mean_))
    return head


def _head_logits(head: Any, features: NDArray[np.float32]) -> Floats:
    import torch

    with torch.inference_mode():
        found = head(torch.from_numpy(np.ascontiguousarray(features))).squeeze(-1)
    return np.asarray(found.numpy(), dtype=np.float64)


def _group_parts(
    rows: NDArray[np.int64], groups: NDArray[Any], parts: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    from sklearn.model_selection import GroupKFold

    parts = min(parts, len(np.unique(groups[rows])))
    found = GroupKFold(parts).split(rows, groups=groups[rows])
    return [(rows[fitted], rows[read]) for fitted, read in found]


def _log_loss(labels: NDArray[np.int64], logits: Floats) -> float:
    return float(np.logaddexp(0.0, np.where(labels == 1, -logits, logits)).mean())


def _features_file(run: Run) -> Path:
    key = config_hash(
        {
            "train": run.params.train.model_dump(mode="json"),
            "views": run.params.views.model_dump(mode="json"),
        }
    )
    return run.source / f"views-{key[:16]}.npz"


def _features(run: Run) -> ViewScores:
    from streetvision.data.views import ViewScores

    with np.load(_features_file(run)) as stored:
        return ViewScores(*(stored[name] for name in ViewScores._fields))


def make_features(run: Run) -> None:
    """Cache the frozen backbone's features of all views of all images, unless that is done."""
    import torch

    from streetvision.models.classifier import pick_device
    from streetvision.models.multiview import score_split_views
    from streetvision.training.training import build_classifier

    path, params = _features_file(run), run.params
    if path.is_file():
        return
    torch.set_num_threads(1)
    log.info("features of all views of the frozen backbone")
    model, config = build_classifier(params.train, params.seed, run.root)
    device = pick_device(params.hardware.device)
    split = open_split("crossval", "whole", run.source / WHOLE)
    scores = score_split_views(
        model.to(device).eval(), config.preprocessing, split, params.views, 1, device
    )

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **scores._asdict())

    write_atomic(path, write)
