"""Splits are opened by role: nothing undeclared, nothing broken, rows of TRAIN divided without a rest."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from streetvision.core.errors import UserError
from streetvision.core.schema import SPLIT_SCHEMA, SPLITS
from streetvision.data import store
from streetvision.data.store import (
    CONTRACT,
    Access,
    SplitAccessError,
    numbers,
    open_originals,
    open_split,
    read_arrow,
    write_arrow,
)

# The split contract, written out: stage, split, which of its rows, and whether their labels. TRAIN is for
# gradients (its fusion part for fusion alone), VAL_SELECT for choosing models, VAL_CALIB for the decision,
# VAL_TEST for the report; `embed` reads for the stages after it. `export` asks on images of VAL_CALIB whether
# an ONNX model decides as torch's does, and on VAL_SELECT what int8 costs.
AGREED = {
    ("explora", "train"): ("fit", "images"),
    ("explora", "val_select"): ("all", "images"),
    ("probe", "train"): ("fit", "labels"),
    ("probe", "val_select"): ("all", "labels"),
    ("train", "train"): ("fit", "labels"),
    ("train", "val_select"): ("all", "labels"),
    ("embed", "train"): ("fusion", "labels"),
    ("embed", "val_select"): ("all", "labels"),
    ("embed", "val_calib"): ("all", "labels"),
    ("export", "val_select"): ("all", "labels"),
    ("export", "val_calib"): ("all", "images"),
    ("evaluate", "val_test"): ("all", "labels"),
    ("challenge", "val_test"): ("all", "labels"),
}
STAGES = (
    "ingest", "prepare", "explora", "probe", "train", "embed", "sweep", "cvfm", "calibrate", "export",
    "evaluate", "challenge",
)  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SPLITS)
def test_a_stage_sees_what_was_agreed_and_nothing_else(
    stage: str, name: str, tiny_splits: dict[str, Path]
) -> None:
    if (stage, name) not in AGREED:
        with pytest.raises(SplitAccessError, match=f"`{stage}` did not declare the split {name}"):
            open_split(stage, name, tiny_splits[name])
        return
    rows, seen = AGREED[stage, name]
    split = open_split(stage, name, tiny_splits[name])
    # Of TRAIN's eight groups in these files the first two are the fusion part.
    fusion = {"train-g0", "train-g1"}
    every = {f"{name}-g{number}" for number in range(8)}
    wanted = {"all": every, "fit": every - fusion, "fusion": fusion}[rows]
    assert set(split.groups) == wanted
    assert len(split) == len(wanted) * (8 if name == "train" else 5)
    for part in (split, split.select([0])):
        if seen == "labels":
            assert part.labels.tolist() == [int(each[-1]) % 2 for each in part.ids]
        else:
            with pytest.raises(SplitAccessError, match=f"labels of {name} were not declared"):
                _ = part.labels
        with pytest.raises(KeyError):
            part.column("label")


def test_only_challenge_sees_the_original_files(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "originals.arrow", {"id": ["b", "a"], "image": [b"1", b"2"]})
    with pytest.raises(UserError, match="holds no original files: column"):
        open_originals("challenge", write_arrow(tmp_path / "x.arrow", {"id": [1], "image": [b""]}))
    with pytest.raises(UserError, match=r"gone\.arrow is missing; the stage `prepare` makes it"):
        open_originals("challenge", tmp_path / "gone.arrow")
    for stage in (*STAGES, "crossval"):
        if stage == "challenge":
            found = open_originals(stage, path)
            assert found.ids.tolist() == ["b", "a"]
            assert [found.image_bytes(row) for row in range(len(found))] == [b"1", b"2"]
            continue
        with pytest.raises(SplitAccessError, match="did not declare the split val_test_originals"):
            open_originals(stage, path)


def test_no_other_program_has_access() -> None:
    assert {stage for stage, splits in CONTRACT.items() if splits} == {
        *(stage for stage, _ in AGREED), "crossval"
    }  # fmt: skip
    assert CONTRACT["crossval"].keys() == {"whole"}


def test_undeclared_labels_are_refused(
    tiny_splits: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONTRACT, "adapt", {"train": Access(labels=False)})
    split = open_split("adapt", "train", tiny_splits["train"])
    for images_only in (split, split.select([0, 1])):
        with pytest.raises(SplitAccessError, match="labels of train were not declared"):
            _ = images_only.labels
        with pytest.raises(KeyError):
            images_only.column("label")
    assert split.image(0).size == (48, 32)


def test_fit_and_fusion_rows_are_disjoint_and_complete(tiny_splits: dict[str, Path]) -> None:
    path = tiny_splits["train"]
    table = read_arrow(path, "prepare")
    fit = open_split("train", "train", path)
    fusion = open_split("embed", "train", path)
    everything = set(table.column("id").to_pylist())
    assert set(fit.ids) | set(fusion.ids) == everything
    assert len(fit) + len(fusion) == len(everything)
    assert not set(fit.groups) & set(fusion.groups)
    marked = {row["id"]: row["fusion"] for row in table.select(["id", "fusion"]).to_pylist()}
    assert all(marked[name] for name in fusion.ids)
    assert not any(marked[name] for name in fit.ids)


def test_rows_labels_and_images_belong_together(tiny_splits: dict[str, Path]) -> None:
    path = tiny_splits["train"]
    rows = {row["id"]: row for row in read_arrow(path, "prepare").to_pylist()}
    for split in (open_split("train", "train", path), open_split("embed", "train", path)):
        for index, name in enumerate(split.ids):
            row = rows[name]
            assert split.labels[index] == row["label"]
            assert split.groups[index] == row["group"]
            assert split.image_bytes(index) == row["image"]
            assert split.column("weather")[index] == row["weather"]


def test_an_image_is_decoded_to_rgb(tiny_splits: dict[str, Path]) -> None:
    split = open_split("train", "val_select", tiny_splits["val_select"])
    image = split.image(3)
    with Image.open(io.BytesIO(split.image_bytes(3))) as stored:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(stored))
    assert image.mode == "RGB"


@pytest.mark.parametrize("rows", [[3, 0, 3], [], list(range(40)), np.array([39, 1])])
def test_select_takes_rows_in_order(tiny_splits: dict[str, Path], rows: list[int]) -> None:
    split = open_split("train", "val_select", tiny_splits["val_select"])
    chosen = split.select(rows)
    assert len(chosen) == len(rows)
    assert chosen.name == split.name
    for found, row in enumerate(rows):
        assert chosen.ids[found] == split.ids[row]
        assert chosen.groups[found] == split.groups[row]
        assert chosen.labels[found] == split.labels[row]
        assert chosen.image_bytes(found) == split.image_bytes(row)
        assert chosen.column("drive")[found] == split.column("drive")[row]
    np.testing.assert_array_equal(
        chosen.evidence_area(), split.evidence_area()[np.asarray(rows, dtype=int)]
    )


def test_draw_takes_rows_at_random_without_repetition(
    tmp_path: Path, write_split: Callable[..., Path]
) -> None:
    split = open_split("train", "val_select", write_split(tmp_path / "val_select.arrow", 100))
    drawn = split.draw(30, 3)
    rows = [split.ids.tolist().index(each) for each in drawn.ids]
    assert len(rows) == 30
    assert rows == sorted(set(rows))
    assert max(np.diff(rows)) > min(np.diff(rows))
    assert drawn.ids.tolist() == split.draw(30, 3).ids.tolist() != split.draw(30, 4).ids.tolist()
    assert split.draw(101, 3).ids.tolist() == split.ids.tolist()


def test_evidence_area(tmp_path: Path, write_split: Callable[..., Path]) -> None:
    path = write_split(tmp_path / "a.arrow", 4)
    table = read_arrow(path, "prepare")
    boxes = [None, [0.25, 0.5, 0.75, 1.0], [0.5, 0.5, 0.25, 0.75], [0.0, 0.0, 1.0, 1.0]]
    index = table.schema.get_field_index("evidence_box")
    table = table.set_column(index, "evidence_box", pa.array(boxes, pa.list_(pa.float32(), 4)))
    write_arrow(path, {name: table.column(name) for name in table.column_names})
    area = open_split("evaluate", "val_test", path).evidence_area()
    np.testing.assert_array_equal(area, [np.nan, 0.25, 0.0, 1.0])


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 0.5, 0.99, -1])
def test_a_broken_file_is_one_line(
    kept: float, tmp_path: Path, tiny_splits: dict[str, Path]
) -> None:
    data = tiny_splits["val_test"].read_bytes()
    size = kept if isinstance(kept, int) else int(kept * len(data))
    path = tmp_path / "val_test.arrow"
    path.write_bytes(data[:size])
    with pytest.raises(UserError, match="rerun `prepare`"):
        open_split("evaluate", "val_test", path)


@pytest.mark.parametrize("content", [b"not arrow at all" * 100, bytes(1000)])
def test_another_format_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "val_test.arrow"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable Arrow file"):
        open_split("evaluate", "val_test", path)


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing; the stage `prepare` makes it"):
        open_split("evaluate", "val_test", tmp_path / "val_test.arrow")
    with pytest.raises(UserError, match="not a readable Arrow file"):
        open_split("evaluate", "val_test", tmp_path)
    empty = SPLIT_SCHEMA.empty_table()
    path = write_arrow(tmp_path / "empty.arrow", {n: empty.column(n) for n in empty.column_names})
    with pytest.raises(UserError, match="holds no images for stage `evaluate`"):
        open_split("evaluate", "val_test", path)
    path = write_arrow(tmp_path / "other.arrow", {"id": pa.array(["a"]), "logit": pa.array([1.0])})
    with pytest.raises(UserError, match="not a split file: no columns daytime, drive"):
        open_split("evaluate", "val_test", path)


def test_offsets_that_leave_the_file_are_not_followed(
    tmp_path: Path, write_split: Callable[..., Path]
) -> None:
    path = write_split(tmp_path / "x.arrow", 12)
    content = path.read_bytes()
    table = pa.ipc.open_file(content).read_all()
    for name in ("id", "image", "group", "source"):
        chunk = table.column(name).chunk(1)  # of the last two rows
        ends = chunk.buffers()[1].to_pybytes()[:12]
        at = content.rindex(ends) + 8
        for end in (2**30, -(2**30), 2**31 - 1):
            path.write_bytes(
                content[:at] + end.to_bytes(4, "little", signed=True) + content[at + 4 :]
            )
            with pytest.raises(UserError, match="not a readable Arrow file"):
                open_split("evaluate", "val_test", path)
    path.write_bytes(content)
    assert len(open_split("evaluate", "val_test", path)) == 12


def test_compressed_files_are_refused_unread(tmp_path: Path) -> None:
    table = pa.table(
        {"image": [bytes(2**20)] * 50, "name": pa.array(["a", "b"] * 25).dictionary_encode()}
    )
    for codec in ("zstd", "lz4"):
        options = pa.ipc.IpcWriteOptions(compression=codec)
        for columns in (["image"], ["name"]):
            chosen = table.select(columns)
            with pa.ipc.new_file(tmp_path / "x.arrow", chosen.schema, options=options) as writer:
                writer.write_table(chosen)
            before = pa.total_allocated_bytes()
            with pytest.raises(UserError, match=r"x\.arrow is compressed"):
                read_arrow(tmp_path / "x.arrow", "prepare")
            assert pa.total_allocated_bytes() - before < 2**20
    assert read_arrow(write_arrow(tmp_path / "y.arrow", {"a": table["name"]}), "x")[
        "a"
    ].to_pylist() == (["a", "b"] * 25)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.arrow")
    with pytest.raises(UserError, match="no regular file"):
        open_split("evaluate", "val_test", tmp_path / "x.arrow")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", pa.array(["1"] * 4), "column label is string, not int8"),
        ("label", pa.array([0, 1, 7, 1], pa.int8()), "labels other than 0 and 1"),
        ("label", pa.array([0, 1, None, 1], pa.int8()), "column label has missing values"),
        ("image", pa.array(["a"] * 4), "column image is string, not binary"),
        ("group", pa.array(["a", None, "b", "c"]), "column group has missing values"),
        (
            "evidence_box",
            pa.array([[0.1, None, 0.2, 0.3]] * 4, pa.list_(pa.float32(), 4)),
            "has missing",
        ),
        ("fusion", pa.array([1, 0, 1, 0]), "column fusion is int64, not bool"),
    ],
)
def test_a_split_file_of_other_types(
    tmp_path: Path, write_split: Callable[..., Path], column: str, values: pa.Array, message: str
) -> None:
    table = read_arrow(write_split(tmp_path / "x.arrow", 4), "prepare")
    columns = {name: table.column(name) for name in table.column_names}
    path = write_arrow(tmp_path / "y.arrow", columns | {column: values})
    with pytest.raises(UserError, match=message) as caught:
        open_split("evaluate", "val_test", path)
    assert str(caught.value).startswith(f"{path} is not a split file: ")


def test_a_damaged_image_is_named(tmp_path: Path, write_split: Callable[..., Path]) -> None:
    table = read_arrow(write_split(tmp_path / "x.arrow", 4), "prepare")
    columns = {name: table.column(name) for name in table.column_names}
    path = write_arrow(tmp_path / "y.arrow", columns | {"image": pa.array([b"no image"] * 4)})
    split = open_split("evaluate", "val_test", path)
    with pytest.raises(UserError, match="the image x-0002 is damaged"):
        split.image(2)


@given(data=st.binary(max_size=40), places=st.lists(st.integers(0, 10**6), max_size=6))
def test_damage_anywhere_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, places: list[int]
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.arrow"
    table = pa.table(
        {"id": ["a", None, "ccc"], "image": [b"1", b"22", b"333"], "box": [[1.0], [], [2.0, 3.0]]}
    )
    content = bytearray(
        write_arrow(path, {name: table[name] for name in table.column_names}).read_bytes()
    )
    for place, byte in zip(places, data, strict=False):
        content[place % len(content)] = byte
    path.write_bytes(content)
    with suppress(UserError):  # nothing else, and no crash
        read_arrow(path, "prepare").to_pylist()


def test_no_fusion_part_is_no_mistake(tmp_path: Path, write_split: Callable[..., Path]) -> None:
    path = write_split(tmp_path / "train.arrow", 8)
    assert len(open_split("embed", "train", path)) == 0
    assert len(open_split("train", "train", path)) == 8
    path = write_split(tmp_path / "all.arrow", 8, fusion_groups=8)
    with pytest.raises(UserError, match="holds no images for stage `train`"):
        open_split("train", "train", path)


def test_write_arrow_in_batches_and_back(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", {"id": pa.array(range(2500))})
    assert store.read_arrow(path, "x").column("id").to_pylist() == list(range(2500))
    with pa.memory_map(str(path)) as source:
        assert pa.ipc.open_file(source).num_record_batches == 3


def test_numbers_are_those_of_arrow_in_any_number_of_pieces() -> None:
    values = [[1.5, -2.0, 3.0], [], [4.0]]
    column = pa.chunked_array([pa.array(part, pa.float16()) for part in values])
    assert numbers(column).tolist() == [1.5, -2.0, 3.0, 4.0]
    assert numbers(pa.chunked_array([], pa.int8())).tolist() == []
    pairs = pa.FixedSizeListArray.from_arrays(pa.array(range(6), pa.int64()), 2)
    assert numbers(pa.chunked_array([pairs[:1], pairs[1:]])).tolist() == list(range(6))


def test_labels_are_read_without_pandas(tiny_splits: dict[str, Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from streetvision.data.store import open_split; "
        f"split = open_split('train', 'train', Path({str(tiny_splits['train'])!r})); "
        "print(split.labels.sum(), 'pyarrow' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    labels = open_split("train", "train", tiny_splits["train"]).labels
    assert done.stdout.split() == [str(labels.sum()), "True", "False"]
