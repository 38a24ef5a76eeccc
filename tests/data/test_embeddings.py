"""Cached scores of views are those of the model, in the split's order, under its groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest
import torch

from streetvision.core.errors import UserError
from streetvision.core.params import ViewGrid
from streetvision.data.embeddings import read_embeddings, write_embeddings
from streetvision.data.store import open_split, read_arrow, write_arrow
from streetvision.data.views import view_names, views_of
from streetvision.models.classifier import load_classifier, score_split
from streetvision.models.multiview import score_split_views

if TYPE_CHECKING:
    from tests.conftest import Trained

CPU = torch.device("cpu")
GRIDS = [ViewGrid(), ViewGrid(grid=2), ViewGrid(grid=1, flip=True)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(len(view_names(grid))))
def test_round_trip(
    trained: Trained, tiny_splits: dict[str, Path], tmp_path: Path, grid: ViewGrid
) -> None:
    model, config = load_classifier(trained.classifier)
    split = open_split("embed", "val_calib", tiny_splits["val_calib"]).select(range(13))
    scores = score_split_views(model, config.preprocessing, split, grid, 5, CPU)
    names = view_names(grid)
    path = write_embeddings(tmp_path / "val_calib.arrow", split, names, scores)
    found = read_embeddings(path, features=True)
    assert found.views == names
    np.testing.assert_array_equal(found.ids, split.ids)
    np.testing.assert_array_equal(found.groups, split.groups)
    np.testing.assert_array_equal(found.labels, split.labels)
    by_drive = [f"{g}/{d}" for g, d in zip(split.groups, split.column("drive"), strict=True)]
    assert found.units("drive").tolist() == by_drive
    assert found.units("group") is found.groups
    for read, written in zip(found.scores, scores, strict=True):
        assert read is not None
        assert written is not None
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)
    np.testing.assert_array_equal(found.logits, scores.logits[:, 0])
    assert read_embeddings(path).scores.features is None
    table = read_arrow(path, "embed")
    assert table.column_names == [
        "id", "group", "drive", "view", "label", "logit", "content", "box", "features",
    ]  # fmt: skip
    # One row an image and view, the views of an image together.
    assert table.column("view").to_pylist() == list(names) * 13
    assert table.column("drive").to_pylist() == split.column("drive").repeat(len(names)).tolist()


def test_global_logits_are_the_classifiers(trained: Trained, tiny_splits: dict[str, Path]) -> None:
    model, config = load_classifier(trained.classifier)
    split = open_split("embed", "val_calib", tiny_splits["val_calib"])
    single, features = score_split(model, config.preprocessing, split, 16, CPU)
    alone = score_split_views(model, config.preprocessing, split, ViewGrid(), 16, CPU)
    np.testing.assert_array_equal(alone.logits[:, 0], single)
    assert alone.features is not None
    np.testing.assert_array_equal(alone.features[:, 0], features)
    among = score_split_views(model, config.preprocessing, split, ViewGrid(grid=2), 16, CPU)
    np.testing.assert_allclose(among.logits[:, 0], single, atol=1e-5)


def test_logits_and_features_are_the_models(trained: Trained, tiny_splits: dict[str, Path]) -> None:
    model, config = load_classifier(trained.classifier)
    split = open_split("embed", "val_calib", tiny_splits["val_calib"])
    grid = ViewGrid(grid=2)
    scores = score_split_views(model, config.preprocessing, split, grid, 7, CPU)
    assert scores.features is not None
    with torch.no_grad():
        for row in range(5):
            views = views_of(split.image(row), config.preprocessing, grid)
            for number, view in enumerate(views.inputs):
                pixels = torch.from_numpy(view.copy()).permute(2, 0, 1)[None]
                feature = model.backbone(config.preprocessing.normalise(pixels))
                logit = model.head(feature)
                assert scores.logits[row, number] == pytest.approx(float(logit), abs=1e-5)
                np.testing.assert_allclose(
                    scores.features[row, number], feature[0].numpy(), atol=2e-3, rtol=2e-3
                )
            np.testing.assert_array_equal(scores.content[row], views.content)
            np.testing.assert_array_equal(scores.boxes[row], views.boxes)


def test_an_images_views_do_not_depend_on_other_images(
    trained: Trained, tiny_splits: dict[str, Path]
) -> None:
    model, config = load_classifier(trained.classifier)
    split = open_split("embed", "val_calib", tiny_splits["val_calib"])
    grid = ViewGrid(grid=2)
    whole = score_split_views(model, config.preprocessing, split, grid, 16, CPU)
    alone = score_split_views(model, config.preprocessing, split.select([11]), grid, 3, CPU)
    for part, one in zip(whole, alone, strict=True):
        assert part is not None
        assert one is not None
        np.testing.assert_array_equal(part[11], one[0])


def test_an_empty_fusion_part(
    trained: Trained, tmp_path: Path, write_split: Callable[..., Path]
) -> None:
    model, config = load_classifier(trained.classifier)
    split = open_split("embed", "train", write_split(tmp_path / "train.arrow", 8))
    grid = ViewGrid(grid=2)
    scores = score_split_views(model, config.preprocessing, split, grid, 16, CPU)
    assert scores.features is not None
    assert (scores.logits.shape, scores.features.shape) == ((0, 5), (0, 5, 64))
    path = write_embeddings(tmp_path / "embedded.arrow", split, view_names(grid), scores)
    assert len(read_embeddings(path, features=True).logits) == 0


def test_images_that_differ_in_their_views_are_refused(
    trained: Trained, tiny_splits: dict[str, Path], tmp_path: Path
) -> None:
    model, config = load_classifier(trained.classifier)
    split = open_split("embed", "val_calib", tiny_splits["val_calib"]).select(range(4))
    grid = ViewGrid(grid=2)
    scores = score_split_views(model, config.preprocessing, split, grid, 5, CPU)
    path = write_embeddings(tmp_path / "val_calib.arrow", split, view_names(grid), scores)
    table = read_arrow(path, "embed")
    swapped = [0, 1, 2, 3, 4, 5, 7, 6, *range(8, 20)]
    for number, rows in enumerate((list(range(19)), [*range(4), 5, 4, *range(6, 20)], swapped)):
        part = table.take(rows)
        broken = tmp_path / f"{number}.arrow"
        write_arrow(broken, {name: part.column(name) for name in part.column_names})
        with pytest.raises(UserError, match="images differ in their views; rerun `embed`"):
            read_embeddings(broken)


def two_groups() -> dict[str, pa.Array]:
    n = 4
    return {
        "id": pa.array([str(i) for i in range(n)]),
        "group": pa.array(["a", "a", "b", "b"]),
        "drive": pa.array([None, "1", None, "1"]),
        "view": pa.array(["global"] * n),
        "label": pa.array([0, 1, 0, 1], pa.int8()),
        "logit": pa.array(np.zeros(n, np.float32)),
        "content": pa.array([1] * n),
        "box": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4 * n)), 4),
    }


def test_a_group_without_drives_is_one_drive(tmp_path: Path) -> None:
    found = read_embeddings(write_arrow(tmp_path / "some.arrow", two_groups()))
    assert found.drives.tolist() == ["a", "a/1", "b", "b/1"]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", pa.array(["1"] * 4), "column label is string, not int8"),
        ("logit", pa.nulls(4, pa.float32()), "column logit has missing values"),
        ("features", pa.array([[1.0]] * 4), "column features is list"),
    ],
)
def test_a_file_that_holds_no_embeddings(
    tmp_path: Path, column: str, values: pa.Array, message: str
) -> None:
    path = write_arrow(tmp_path / "x.arrow", two_groups() | {column: values})
    with pytest.raises(UserError, match=f"x.arrow holds no embeddings: {message}"):
        read_embeddings(path)
    with pytest.raises(UserError, match="holds no embeddings: no columns features"):
        read_embeddings(write_arrow(tmp_path / "y.arrow", two_groups()), features=True)
    with pytest.raises(UserError, match="holds no embeddings: no columns box, content"):
        read_embeddings(write_arrow(tmp_path / "z.arrow", {"id": pa.array(["a"])}))


def test_a_missing_file_names_embed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the stage `embed` makes it"):
        read_embeddings(tmp_path / "val_calib.arrow")
