"""Linear probes: against scikit-learn by hand, what the report says, and a backbone that got better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef

from streetvision.core.errors import UserError
from streetvision.core.params import Probe, Train
from streetvision.data.store import Split, open_split
from streetvision.explora.adapted import PASSTHROUGH
from streetvision.explora.probe import (
    backbone_features,
    linear_probe,
    probe_backbones,
    probe_report,
)
from streetvision.models.backbone import build_backbone, initial_backbone, resolve

Floats = NDArray[np.float64]


def test_the_probe_is_balanced_logistic_regression_on_standardised_features() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(90) < 0.3).astype(np.int64)
    scales = [1, 40, 0.01]
    features = (rng.normal(labels[:, None], 1.5, (90, 3)) * scales + 7).astype(np.float32)
    fit, read = features[:60], features[60:]
    mean, deviation = fit.mean(axis=0), fit.std(axis=0)
    share = labels[:60].mean()
    weights = np.where(labels[:60] == 1, 0.5 / share, 0.5 / (1 - share))
    slow = LogisticRegression(C=0.2, max_iter=5000)
    slow.fit((fit - mean) / deviation, labels[:60], sample_weight=weights)
    expected = slow.predict_proba((read - mean) / deviation)[:, 1]
    found = linear_probe(fit, labels[:60], read, 0.2)
    assert np.allclose(found, expected, atol=1e-3)
    assert not np.allclose(found, linear_probe(fit, labels[:60], read, 5.0), atol=1e-3)


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="needs both classes; its 8 images"):
        linear_probe(np.ones((8, 2), np.float32), np.ones(8, np.int64), np.ones((1, 2), np.float32))


def probabilities(labels: NDArray[np.int64], wrong: float, seed: int) -> Floats:
    """Decisions of which a share is wrong."""
    flipped = np.random.default_rng(seed).random(len(labels)) < wrong
    return np.where(labels.astype(bool) ^ flipped, 0.9, 0.1)


@pytest.mark.parametrize(
    ("groups", "wrong", "finding"),
    [
        (80, (0.4, 0.1), "adaptation helps"),
        (80, (0.1, 0.4), "adaptation harms"),
        (80, (0.2, 0.2), "inconclusive"),
        (10, (0.4, 0.05), "adaptation helps"),
        (4, (0.4, 0.1), "no interval"),
    ],
)
def test_report(groups: int, wrong: tuple[float, float], finding: str) -> None:
    labels = np.arange(800) % 2
    names = np.array([f"g{row // 2 % groups}" for row in range(800)], dtype=object)
    before, after = (probabilities(labels, share, seed) for seed, share in enumerate(wrong))
    report = probe_report(before, after, labels, names, "explora", n_resamples=500, seed=0)
    assert report["finding"].startswith(finding)
    difference = report["difference"]
    assert report["before"]["mcc"] == pytest.approx(matthews_corrcoef(labels, before > 0.5))
    assert report["after"]["mcc"] == pytest.approx(matthews_corrcoef(labels, after > 0.5))
    assert difference["mcc"] == pytest.approx(report["after"]["mcc"] - report["before"]["mcc"])
    assert report["read_groups"] == groups
    if groups < 5:
        assert "low" not in difference  # null is no number to compare
        assert difference["interval_method"].startswith("none: rests on 4.0 effective groups")
    else:
        assert difference["low"] < difference["mcc"] < difference["high"]
        method = "group_bootstrap_percentile" if groups >= 60 else "group_jackknife_t"
        assert difference["interval_method"] == method
        assert (difference["same_mcc_p"] < 0.05) == (finding != "inconclusive")


@pytest.fixture
def splits(write_split: Callable[..., Path], tmp_path: Path) -> dict[str, Split]:
    """TRAIN and VAL_SELECT of easy images."""
    sizes = {"train": 60, "val_select": 48}
    return {
        name: open_split("probe", name, write_split(tmp_path / f"{name}.arrow", n, seed=seed))
        for seed, (name, n) in enumerate(sizes.items())
    }


def run(splits: dict[str, Split], train: Train, adapted: Path, method: str) -> dict[str, object]:
    return probe_backbones(
        train, Probe(max_images=50, n_resamples=100), splits["train"], splits["val_select"],
        adapted, method, seed=7, root=adapted.parent, batch_size=16, device="cpu",
    )  # fmt: skip


def test_before_is_the_starting_backbone_and_after_the_adapted_one(
    splits: dict[str, Split], tiny_train: Train, tmp_path: Path
) -> None:
    name, arguments, _, _ = resolve(tiny_train.backbone, tiny_train.height_px, tiny_train.width_px)
    torch.manual_seed(7)
    start = build_backbone(name, arguments)
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    # Every weight zero: features that tell nothing.
    dead = {key: torch.zeros_like(value) for key, value in start.state_dict().items()}
    save_file(dead, tmp_path / "dead.safetensors")

    same = run(splits, tiny_train, tmp_path / "start.safetensors", "explora")
    assert same["before"] == same["after"], "random weights are not those of the seed"
    worse = run(splits, tiny_train, tmp_path / "dead.safetensors", "explora")
    assert worse["before"] == same["before"]
    assert worse["after"]["mcc"] == 0  # type: ignore[index]
    assert worse["before"]["mcc"] > 0  # type: ignore[index]
    assert worse["fit_images"] == 50
    # `train.weights` is where the backbone starts, when it is given.
    weighted = tiny_train.model_copy(update={"weights": "dead.safetensors"})
    assert run(splits, weighted, tmp_path / "start.safetensors", "x")["after"] == same["before"]


def test_it_is_fitted_on_train_and_read_on_val_select(
    splits: dict[str, Split], tiny_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streetvision.explora import probe

    asked: list[tuple[Floats, ...]] = []
    plain = probe.linear_probe
    monkeypatch.setattr(
        probe, "linear_probe", lambda *args: asked.append(args) or plain(*args)
    )  # fmt: skip
    run(splits, tiny_train, tmp_path / "not-read", PASSTHROUGH)
    backbone, _, _, preprocessing = initial_backbone(tiny_train, 7, tmp_path)
    train = splits["train"].draw(50, 7)
    expected = [
        backbone_features(backbone, preprocessing, split, 16, torch.device("cpu"))
        for split in (train, splits["val_select"])
    ]
    [(fit, labels, read, *_)] = asked
    np.testing.assert_array_equal(fit, expected[0])
    np.testing.assert_array_equal(labels, train.labels)
    np.testing.assert_array_equal(read, expected[1])


def test_passthrough_computes_once_and_says_so(
    splits: dict[str, Split], tiny_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streetvision.explora import probe

    calls = []
    plain = probe.backbone_features
    monkeypatch.setattr(
        probe, "backbone_features", lambda *args: calls.append(1) or plain(*args)
    )  # fmt: skip
    report = run(splits, tiny_train, tmp_path / "not-read", PASSTHROUGH)
    assert len(calls) == 2
    assert report["before"] == report["after"]
    assert report["difference"]["mcc"] == 0  # type: ignore[index]
    assert report["difference"]["same_mcc_p"] == 1  # type: ignore[index]
    assert "one and the same" in str(report["finding"])
