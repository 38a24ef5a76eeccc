"""Linear probes: what a frozen backbone's features tell, before and after adaptation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streetvision.core.errors import UserError
from streetvision.core.params import Probe, Train
from streetvision.data.store import Split
from streetvision.data.transforms import Preprocessing
from streetvision.explora.adapted import PASSTHROUGH
from streetvision.models.backbone import initial_backbone
from streetvision.models.classifier import RoadworkClassifier, pick_device, score_split
from streetvision.models.weights import load_weights
from streetvision.stats.bootstrap import (
    Interval,
    paired_group_interval,
)
from streetvision.stats.metrics import all_metrics
from streetvision.stats.paired import same_mcc_p

_REPORTED = ("accuracy", "log_loss", "mcc", "roc_auc")


def linear_probe(
    features_fit: NDArray[np.float32],
    labels_fit: NDArray[np.int64],
    features_read: NDArray[np.float32],
    inverse_l2: float = 1.0,
) -> NDArray[np.float64]:
    """Fit balanced logistic regression on standardised features; probabilities [M] of roadwork.

    Parameters
    ----------
    features_fit, labels_fit : [N, D] and [N] in {0, 1}
    features_read : [M, D], standardised by mean and deviation of `features_fit`
    inverse_l2 : C of scikit-learn, larger is less regularised

    Raises
    ------
    UserError
        `labels_fit` holds one class only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels_fit)) < 2:
        raise UserError(f"a linear probe needs both classes; its {len(labels_fit)} images have one")
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=inverse_l2, class_weight="balanced", max_iter=5000)
    )
    model.fit(features_fit, labels_fit)
    return np.asarray(model.predict_proba(features_read)[:, 1], dtype=np.float64)


def backbone_features(
    backbone: nn.Module,
    preprocessing: Preprocessing,
    split: Split,
    batch_size: int,
    device: torch.device,
) -> NDArray[np.float32]:
    """Features [N, D] of a frozen backbone for the global view of each image of a split."""
    model = RoadworkClassifier(backbone).to(device).eval()
    model.to(memory_format=torch.channels_last)
    _, features = score_split(model, preprocessing, split, batch_size, device)
    return features.astype(np.float32)


def probe_report(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    labels: NDArray[np.int64],
    groups: NDArray[np.object_],
    method: str,
    *,
    n_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Compare probe probabilities [M] before and after adaptation, paired over groups [M].

    `finding` says in words what the interval of the difference in MCC, after minus before, allows to say.
    """
    gain = paired_group_interval(labels, before, after, groups, n_resamples=n_resamples, seed=seed)
    scores = {"before": all_metrics(labels, before), "after": all_metrics(labels, after)}
    report: dict[str, Any] = {
        name: {key: found[key] for key in _REPORTED if key in found}
        for name, found in scores.items()
    }
    return report | {
        "method": method,
        "finding": _finding(gain, method),
        "difference": {
            "mcc": gain.value,
            **({"low": gain.low, "high": gain.high} if gain.low is not None else {}),
            "interval_method": gain.method,
            "effective_groups": gain.effective_groups,
            "same_mcc_p": same_mcc_p(
                labels, before, after, groups, float(labels.mean()), seed=seed
            ),
            "log_loss": scores["after"]["log_loss"] - scores["before"]["log_loss"],
        },
        "read_images": len(labels),
        "read_groups": len(set(groups)),
    }


def probe_backbones(
    train: Train,
    probe: Probe,
    fit_split: Split,
    read_split: Split,
    adapted: Path,
    method: str,
    *,
    seed: int,
    root: Path,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """Content of `metrics/probe.json`: `train.backbone` as it starts against the weights in `adapted`.

    Probes are fitted on `fit_split` (both on the same rows) and read on `read_split`. `method` is how
    `adapted` came about; after `passthrough` it is the same backbone, whose features are computed once.
    """
    backbone, _, _, preprocessing = initial_backbone(train, seed, root)
    fit_split = fit_split.draw(probe.max_images, seed)
    place = pick_device(device)

    def probabilities() -> NDArray[np.float64]:
        features = [
            backbone_features(backbone, preprocessing, split, batch_size, place)
            for split in (fit_split, read_split)
        ]
        return linear_probe(features[0], fit_split.labels, features[1], probe.inverse_l2)

    before = probabilities()
    after = before
    if method != PASSTHROUGH:
        load_weights(backbone, adapted)
        after = probabilities()
    report = probe_report(
        before, after, read_split.labels, read_split.groups, method,
        n_resamples=probe.n_resamples, seed=seed,
    )  # fmt: skip
    return report | {
        "fit_images": len(fit_split),
        "fit_groups": len(set(fit_split.groups)),
        "inverse_l2": probe.inverse_l2,
    }


def _finding(gain: Interval, method: str) -> str:
    if method == PASSTHROUGH:
        return "explora is off: before and after are one and the same backbone"
    if gain.low is None or gain.high is None:
        return "no interval, so nothing can be said about the sign"
    if gain.low > 0:
        return "adaptation helps: the interval lies above 0"
    if gain.high < 0:
        return "adaptation harms: the interval lies below 0"
    return "inconclusive: the interval holds 0"
