"""What a user may point `evaluate` at: a split, Parquet, a CSV or a folder, all with the same images."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streetvision.data.store import open_split
from streetvision.data.transforms import Preprocessing
from streetvision.errors import UserError
from streetvision.evaluation.labelled import labelled_images

HALF = (0.5, 0.5, 0.5)
PREPROCESSING = Preprocessing(32, 48, "letterbox", square_crop=False, mean=HALF, std=HALF)
N = 12


@pytest.fixture
def source(tmp_path: Path, write_split: Callable[..., Path]) -> Path:
    return write_split(tmp_path / "source.arrow", N, size=(60, 40))


def as_folder(source: Path, root: Path) -> Path:
    split = open_split("evaluate", "val_test", source)
    for row in range(N):
        path = root / "mine" / ("none", "roadwork")[split.labels[row]] / f"{row:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(split.image_bytes(row))
    return root / "mine"


def as_csv(source: Path, root: Path, images: str) -> Path:
    split = open_split("evaluate", "val_test", source)
    (root / images).mkdir(parents=True, exist_ok=True)
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "group"])
        for row in range(N):
            (root / images / f"{row:02d}.jpg").write_bytes(split.image_bytes(row))
            writer.writerow([f"{row:02d}.jpg", split.labels[row], split.groups[row]])
    return root / "labels.csv"


def as_parquet(source: Path, root: Path) -> Path:
    split = open_split("evaluate", "val_test", source)
    rows = [
        {
            "image": {"bytes": split.image_bytes(row), "path": f"{row:02d}.jpg"},
            "label": ("None", "Roadwork")[split.labels[row]],
        }
        for row in range(N)
    ]
    root.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "shard.parquet")
    return root / "shard.parquet"


def check(data: Path, source: Path, *, reencoded: bool = True) -> list[str]:
    """All images are there with their labels; returns the groups, in the order of the source."""
    wanted = open_split("evaluate", "val_test", source)
    with labelled_images(data, PREPROCESSING) as split:
        assert len(split) == N
        assert split.labels.sum() == wanted.labels.sum()
        groups = [""] * N
        pictures = [np.asarray(wanted.image(row)).astype(float) for row in range(N)]
        for row in range(N):
            # The nearest picture of the source: ids differ from kind to kind.
            own = np.asarray(split.image(row).resize((60, 40))).astype(float)
            distance = [np.abs(own - picture).mean() for picture in pictures]
            nearest = int(np.argmin(distance))
            assert distance[nearest] < (15 if reencoded else 1e-9)
            assert split.labels[row] == wanted.labels[nearest]
            groups[nearest] = split.groups[row]
    assert all(groups)
    return groups


def test_a_split_file(source: Path) -> None:
    groups = check(source, source, reencoded=False)
    assert groups == open_split("evaluate", "val_test", source).groups.tolist()


def test_a_folder_of_classes(source: Path, tmp_path: Path) -> None:
    check(as_folder(source, tmp_path / "folder"), source)


@pytest.mark.parametrize("images", [".", "images"])
def test_a_csv(source: Path, tmp_path: Path, images: str) -> None:
    groups = check(as_csv(source, tmp_path / "csv", images), source)
    wanted = open_split("evaluate", "val_test", source).groups
    same = [[a == b for b in groups] for a in groups]
    assert same == [[a == b for b in wanted] for a in wanted]


@pytest.mark.parametrize("whole_folder", [False, True])
def test_parquet(source: Path, tmp_path: Path, whole_folder: bool) -> None:
    file = as_parquet(source, tmp_path / "parquet")
    check(file.parent if whole_folder else file, source)


def test_a_relative_path(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(as_folder(source, tmp_path / "folder"))
    check(Path(), source)


def test_nothing_is_left_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folder = as_folder(source, tmp_path / "folder")
    before = sorted(folder.rglob("*"))
    check(folder, source)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert sorted(folder.rglob("*")) == before


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    def refusal(data: Path) -> str:
        with pytest.raises(UserError) as caught, labelled_images(data, PREPROCESSING):
            pass
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in refusal(tmp_path / "nothing")
    assert "is missing" in refusal(tmp_path / "nothing.arrow")
    (tmp_path / "notes.txt").write_text("x")
    assert "is not a split (.arrow), Parquet, a CSV or a folder" in refusal(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty")
    (tmp_path / "broken.parquet").write_bytes(b"x")
    assert "broken.parquet" in refusal(tmp_path / "broken.parquet")
    (tmp_path / "labels.csv").write_text("a,b\n1,2\n")
    assert refusal(tmp_path / "labels.csv")
