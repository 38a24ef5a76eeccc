"""Distorted images of a split: those of the validator's code, in the split's order, mixed as asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch

from streetvision.core.params import Subnet, ViewGrid
from streetvision.data.embeddings import read_embeddings, served_id, write_embeddings
from streetvision.data.served_images import served_images, served_versions
from streetvision.data.store import open_split
from streetvision.data.views import view_names
from streetvision.models.classifier import load_classifier
from streetvision.models.multiview import score_all_views
from streetvision.subnet.profiles import profile
from streetvision.subnet.served import challenge_rng, mixed_levels, open_jpeg, served_jpeg

if TYPE_CHECKING:
    from tests.conftest import Trained

CROP = Subnet(validator="crop")


@pytest.mark.parametrize("validator", ["letterbox", "crop"])
def test_images_are_those_of_their_level_and_repetition(
    tiny_splits: dict[str, Path], validator: Literal["letterbox", "crop"]
) -> None:
    subnet, sender = Subnet(validator=validator, flip_probability=0.5), profile(validator)
    split = open_split("embed", "val_calib", tiny_splits["val_calib"]).select(range(9))
    found = list(served_images(split, subnet, 3, seed=5, workers=1))
    assert len(found) == 27
    for row, name in enumerate(split.ids):
        for repeat, level in enumerate(mixed_levels(name, sender.level_shares, 3, 5)):
            expected = served_jpeg(
                sender, split.image(row), level, challenge_rng(5, name, level, repeat), 0.5
            )
            assert found[3 * row + repeat].tobytes() == open_jpeg(expected).tobytes()


def test_whole_pictures_are_the_stored_ones_once(tiny_splits: dict[str, Path]) -> None:
    split = open_split("embed", "val_calib", tiny_splits["val_calib"]).select([4, 2, 7])
    raw = Subnet(validator="raw")
    assert (served_versions(raw, 3), served_versions(CROP, 3)) == (1, 3)
    found = list(served_images(split, raw, 3, seed=5, workers=2))
    assert [image.tobytes() for image in found] == [split.image(k).tobytes() for k in range(3)]


def test_embeddings_keep_the_label_and_group_of_the_image(
    trained: Trained, tiny_splits: dict[str, Path], tmp_path: Path
) -> None:
    model, config = load_classifier(trained.classifier)
    split = open_split("embed", "val_calib", tiny_splits["val_calib"]).select(range(6))
    grid = ViewGrid(grid=2)
    images = served_images(split, CROP, 2, seed=5, workers=1)
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
