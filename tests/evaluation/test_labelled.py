"""What a user may point `evaluate` at: a split, Parquet, a CSV or a folder, all with the same images."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streetvision.core.errors import UserError
from streetvision.data.store import open_split
from streetvision.data.transforms import Preprocessing
from streetvision.evaluation.labelled import labelled_images
from streetvision.sources.labels import ClassNames

HALF = (0.5, 0.5, 0.5)
PREPROCESSING = Preprocessing(32, 48, "letterbox", mean=HALF, std=HALF)
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


def test_a_csv_whose_own_folder_comes_first(source: Path, tmp_path: Path) -> None:
    table = as_csv(source, tmp_path / "csv", "photos")
    (tmp_path / "csv/images").mkdir()
    text = table.read_text().replace("\n0", "\nphotos/0").replace("\n1", "\nphotos/1")
    table.write_text(text)
    check(table, source)
    table.rename(table.with_suffix(".TSV"))
    table.with_suffix(".TSV").write_text(text.replace(",", "\t"))
    check(table.with_suffix(".TSV"), source)


def test_a_data_set_of_the_hub(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = as_parquet(source, tmp_path / "set")
    for name in ("data", "data/.hidden"):
        (file.parent / name).mkdir()
    (file.parent / "README.md").write_text("x")
    (file.parent / "data/.hidden/train-1.parquet").write_bytes(file.read_bytes())
    file.rename(file.parent / "data/train-00000-of-00001.parquet")
    with caplog.at_level("INFO"):
        check(file.parent, source)
    assert "read as Parquet: data/train-00000-of-00001.parquet" in caplog.text
    assert "several splits" not in caplog.text


def test_splits_read_together_are_said(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = as_parquet(source, tmp_path / "set")
    table = pq.read_table(file)
    file.unlink()
    pq.write_table(table.slice(0, 5), file.parent / "train-0.parquet")
    (file.parent / "test").mkdir()
    pq.write_table(table.slice(5), file.parent / "test/0.parquet")
    check(file.parent, source)
    assert "files of several splits (test, train) are read together" in caplog.text


def test_class_names_of_folders_and_columns(source: Path, tmp_path: Path) -> None:
    names = ClassNames(("travaux",), ("rien",))
    folder = as_folder(source, tmp_path / "folder")
    (folder / "roadwork").rename(folder / "travaux")
    (folder / "none").rename(folder / "rien")
    table = as_csv(source, tmp_path / "csv", "images")
    table.write_text(
        re.sub(r",([01]),", lambda m: f",{('rien', 'travaux')[int(m[1])]},", table.read_text())
    )
    parquet = as_parquet(source, tmp_path / "parquet")
    columns = pq.read_table(parquet).to_pydict()
    columns["label"] = [{"None": "rien", "Roadwork": "travaux"}[name] for name in columns["label"]]
    pq.write_table(pa.table(columns), parquet)
    for data in (folder, table, parquet):
        with labelled_images(data, PREPROCESSING, classes=names) as split:
            assert (len(split), split.labels.sum()) == (N, 6)
        with pytest.raises(UserError), labelled_images(data, PREPROCESSING):
            pass


def test_a_folder_of_one_class(source: Path, tmp_path: Path) -> None:
    folder = as_folder(source, tmp_path / "folder")
    for path in (folder / "none").iterdir():
        path.unlink()
    (folder / "none").rmdir()
    with labelled_images(folder, PREPROCESSING) as split:
        assert set(split.labels) == {1}
    (folder / "empty road").mkdir()  # which may be the other class
    with (
        pytest.raises(UserError, match=r"no folder named none .*; it has empty road, roadwork"),
        labelled_images(folder, PREPROCESSING),
    ):
        pass


def test_a_folder_that_a_table_lists(source: Path, tmp_path: Path) -> None:
    table = as_csv(source, tmp_path / "csv", ".")
    with (
        pytest.raises(UserError, match=r"if labels\.csv lists its images, give that file"),
        labelled_images(table.parent, PREPROCESSING),
    ):
        pass


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.csv", "b.parquet", "c.arrow"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError), labelled_images(tmp_path / name, PREPROCESSING):
            pass
    for label in ("roadwork", "none"):
        (tmp_path / "set" / label).mkdir(parents=True)
        os.mkfifo(tmp_path / "set" / label / "x.jpg")
    with (
        pytest.raises(UserError, match="holds no image"),
        labelled_images(tmp_path / "set", PREPROCESSING),
    ):
        pass


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
