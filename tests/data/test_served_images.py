"""Distorted images of a split: those of the validator's code, in the split's order, mixed as asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from streetvision.core.params import Challenge, ViewGrid
from streetvision.data.embeddings import read_embeddings, served_id, write_embeddings
from streetvision.data.served_images import served_images
from streetvision.data.store import open_split
from streetvision.data.views import view_names
from streetvision.models.classifier import load_classifier
from streetvision.models.multiview import score_all_views
from streetvision.subnet.profiles import CROP
from streetvision.subnet.served import challenge_rng, mixed_levels, open_jpeg, served_jpeg

if TYPE_CHECKING:
    from tests.conftest import Trained

UNEVEN = Challenge(level_0=0.0, level_1=0.5, level_2=0.1, level_3=0.4)


def test_images_are_those_of_their_level_and_repetition(tiny_splits: dict[str, Path]) -> None:
    split = open_split("embed", "val_calib", tiny_splits["val_calib"]).select(range(9))
    found = list(served_images(split, UNEVEN, 3, seed=5, workers=1))
    assert len(found) == 27
    for row, name in enumerate(split.ids):
        for repeat, level in enumerate(mixed_levels(name, UNEVEN.level_shares, 3, 5)):
            expected = served_jpeg(
                CROP, split.image(row), level, challenge_rng(5, name, level, repeat)
            )
            assert found[3 * row + repeat].tobytes() == open_jpeg(expected).tobytes()


def test_embeddings_keep_the_label_and_group_of_the_image(
    trained: Trained, tiny_splits: dict[str, Path], tmp_path: Path
) -> None:
    model, config = load_classifier(trained.classifier)
    split = open_split("embed", "val_calib", tiny_splits["val_calib"]).select(range(6))
    grid = ViewGrid(grid=2)
    images = served_images(split, Challenge(), 2, seed=5, workers=1)
    device = torch.device("cpu")
    scores = score_all_views(model, config.preprocessing, images, grid, 4, device)
    path = tmp_path / "val_calib_served.arrow"
    found = read_embeddings(
        write_embeddings(path, split, view_names(grid), scores, 2), features=True
    )
    assert found.ids.tolist() == [served_id(name, k) for name in split.ids for k in range(2)]
    np.testing.assert_array_equal(found.groups, split.groups.repeat(2))
    np.testing.assert_array_equal(found.labels, split.labels.repeat(2))
    np.testing.assert_array_equal(found.scores.logits, scores.logits)
    assert found.views == view_names(grid)
