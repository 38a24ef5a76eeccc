"""Cached logits and features are those of the model, in the split's order, under its groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from streetvision.data.embeddings import read_embeddings, write_embeddings
from streetvision.data.store import open_split, read_arrow
from streetvision.errors import UserError
from streetvision.models.classifier import load_classifier, score_split

if TYPE_CHECKING:
    from tests.conftest import Trained

CPU = torch.device("cpu")


def test_round_trip(trained: Trained, tiny_splits: dict[str, Path], tmp_path: Path) -> None:
    model, config = load_classifier(trained.classifier)
    split = open_split("embed", "val_calib", tiny_splits["val_calib"])
    logits, features = score_split(model, config.preprocessing, split, 16, CPU)
    path = write_embeddings(tmp_path / "val_calib.arrow", split, logits, features)
    found = read_embeddings(path)
    np.testing.assert_array_equal(found.ids, split.ids)
    np.testing.assert_array_equal(found.groups, split.groups)
    np.testing.assert_array_equal(found.labels, split.labels)
    np.testing.assert_array_equal(found.logits, logits.astype(np.float64))
    assert found.logits.dtype == np.float64
    table = read_arrow(path, "embed")
    assert table.column_names == ["id", "group", "drive", "view", "label", "logit", "features"]
    assert set(table.column("view").to_pylist()) == {"global"}
    assert table.column("drive").to_pylist() == split.column("drive").tolist()
    np.testing.assert_array_equal(np.array(table.column("features").to_pylist()), features)


def test_logits_and_features_are_the_models(trained: Trained, tiny_splits: dict[str, Path]) -> None:
    model, config = load_classifier(trained.classifier)
    split = open_split("embed", "val_calib", tiny_splits["val_calib"])
    logits, features = score_split(model, config.preprocessing, split, 7, CPU)
    with torch.no_grad():
        for row in range(5):
            pixels = torch.from_numpy(config.preprocessing.apply(split.image(row)).copy())
            inputs = config.preprocessing.normalise(pixels.permute(2, 0, 1)[None])
            feature = model.backbone(inputs)
            logit = feature @ model.head.weight[0] + model.head.bias
            assert logits[row] == pytest.approx(float(logit), abs=1e-5)
            np.testing.assert_allclose(features[row], feature[0].numpy(), atol=2e-3, rtol=2e-3)


def test_an_empty_fusion_part(
    trained: Trained, tmp_path: Path, write_split: Callable[..., Path]
) -> None:
    model, config = load_classifier(trained.classifier)
    split = open_split("embed", "train", write_split(tmp_path / "train.arrow", 8))
    logits, features = score_split(model, config.preprocessing, split, 16, CPU)
    assert (logits.shape, features.shape) == ((0,), (0, 64))
    path = write_embeddings(tmp_path / "embedded.arrow", split, logits, features)
    assert len(read_embeddings(path).logits) == 0


def test_a_missing_file_names_embed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the stage `embed` makes it"):
        read_embeddings(tmp_path / "val_calib.arrow")
