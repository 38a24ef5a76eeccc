from __future__ import annotations

import base64
import io
import json
import math
import pickle
import unicodedata
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from streetvision.core.errors import UserError
from streetvision.core.params import CsvSource, FolderSource, ParquetSource, SyntheticSource
from streetvision.core.schema import RAW_SCHEMA
from streetvision.data.walk import NOT_AN_IMAGE
from streetvision.sources.files import plan_csv
from streetvision.sources.labels import LabelReader
from streetvision.sources.natix import find_columns, find_parquet, plan_parquet, translate
from streetvision.sources.parts import slices
from streetvision.sources.sources import plan_source


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade % 256, 40, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def rows_of(plan) -> list[dict]:
    """All rows, after each part went through pickle, as it does on its way to a worker."""
    parts = [pickle.loads(pickle.dumps(part)) for part in plan.parts]
    rows = [row for part in parts for row in part.read()]
    assert sum(part.n_rows for part in parts) == len(rows)
    pa.Table.from_pylist(rows, RAW_SCHEMA)
    assert {name for row in rows for name in row} <= set(RAW_SCHEMA.names)
    assert len({row["id"] for row in rows}) == len(rows)
    return rows


def plan(source, root: Path, shard_images: int = 3, seed: int = 7):
    return plan_source(source, root, shard_images=shard_images, seed=seed)


@given(n=st.integers(0, 50), size=st.integers(1, 12))
def test_slices_cover_every_row_once(n, size):
    parts = list(slices(n, size))
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(n))
    assert all(stop - start == size for start, stop in parts[:-1])


# --------------------------------------------------------------------------- synthetic


def test_synthetic_rows_depend_on_seed_and_index_only(tmp_path):
    source = SyntheticSource(kind="synthetic", images=7, cities=4, width_px=64, height_px=64)
    rows = rows_of(plan(source, tmp_path))
    assert [row["id"] for row in rows] == [f"synthetic-{i:06d}" for i in range(7)]
    assert rows == rows_of(plan(source, tmp_path, shard_images=5))
    other = rows_of(plan(source, tmp_path, seed=8))
    assert all(a["image"] != b["image"] for a, b in zip(rows, other, strict=True))
    for row in rows:
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (64, 64)
        assert (row["scene_description"] is not None) == (row["label"] == 1)
        assert (row["evidence_box"] is not None) == (row["label"] == 1)
        assert row["group"]
        assert row["drive"]


# --------------------------------------------------------------------------- folder


def test_folder_takes_classes_groups_and_images(tmp_path):
    root = tmp_path / "street"
    put(root / "roadwork/a.JPG", jpeg(1))
    put(root / "roadwork/berlin/night/b.png")
    put(root / "roadwork/berlin/._b.png")
    put(root / "none/berlin/c.webp")
    put(root / "none/notes.txt")
    put(root / "unsure/d.jpg")
    made = plan(FolderSource(kind="folder", name="f", path="street"), tmp_path)
    found = {r["image"]["path"]: (r["label"], r["group"]) for r in rows_of(made)}
    assert found == {
        "none/berlin/c.webp": (0, "berlin"),
        "roadwork/a.JPG": (1, None),
        "roadwork/berlin/night/b.png": (1, "berlin"),
    }
    rows = rows_of(made)
    assert [row["id"] for row in rows] == sorted(f"f/{name}" for name in found)
    assert rows[1]["image"]["bytes"] == jpeg(1)
    assert made.ignored_files == 1  # the text; hidden files are none of anybody's


def test_folder_needs_both_classes(tmp_path):
    put(tmp_path / "street/roadwork/a.jpg")
    put(tmp_path / "street/empty_road/b.jpg")
    source = FolderSource(kind="folder", path="street")
    with pytest.raises(UserError, match=r"no folder named none or None or 0; .*empty_road, roadw"):
        plan(source, tmp_path)
    source = FolderSource(kind="folder", path="street", negative_folders=["empty_road"])
    assert [row["label"] for row in rows_of(plan(source, tmp_path))] == [0, 1]


def test_an_image_under_both_classes_is_kept_twice_and_said(tmp_path, caplog):
    put(tmp_path / "pool/x.jpg", jpeg(1))
    for name in ("roadwork/g0", "none/g1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.jpg").symlink_to(tmp_path / "pool/x.jpg")
    put(tmp_path / "none/g1/y.jpg", jpeg(2))
    (tmp_path / "roadwork/g0/y.jpg").hardlink_to(tmp_path / "none/g1/y.jpg")
    put(tmp_path / "roadwork/g0/z.jpg", jpeg(3))
    rows = rows_of(plan(FolderSource(kind="folder", name="f"), tmp_path))
    # A linked file is in the group in which its link stands.
    assert sorted((r["image"]["path"], r["label"], r["group"]) for r in rows) == [
        ("none/g1/x.jpg", 0, "g1"), ("none/g1/y.jpg", 0, "g1"), ("roadwork/g0/x.jpg", 1, "g0"),
        ("roadwork/g0/y.jpg", 1, "g0"), ("roadwork/g0/z.jpg", 1, "g0"),
    ]  # fmt: skip
    assert (
        'source "f": 2 images are linked under both classes and kept with both labels: '
        "roadwork/g0/x.jpg and none/g1/x.jpg and others"
    ) in caplog.text


def test_what_is_left_out_is_said_in_one_line(tmp_path, caplog):
    for name in ("roadwork/a.jfif", "roadwork/b", "none/c.JPE"):
        put(tmp_path / name, jpeg(1))
    put(tmp_path / "none/d.heic", b"\0\0\0\x18ftypheic")
    put(tmp_path / "none/e.txt")
    put(tmp_path / "loose.jpg", jpeg(2))
    with put(tmp_path / "none/huge.jpg").open("wb") as file:
        file.truncate(3 * 2**30)
    made = plan(FolderSource(kind="folder", name="f"), tmp_path)
    assert [row["id"] for row in rows_of(made)] == [
        "f/none/c.JPE",
        "f/roadwork/a.jfif",
        "f/roadwork/b",
    ]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        'source "f": left out: 1 .txt, 1 HEIC, 1 images outside of the class folders, 1 larger than the '
    )
    assert made.ignored_files == 4


def test_names_that_nobody_chose_are_valid_text(tmp_path):
    names = [
        "stra\udcdfe.jpg",
        " blank.jpg",
        "two\nlines.jpg",
        "\x1b[31m.jpg",
        "back\\slash.jpg",
        "=1.jpg",
    ]
    names.append("x" * 251 + ".jpg")
    for name in names:
        put(tmp_path / "roadwork/gr\udcffuppe" / name, jpeg(1))
    put(tmp_path / "none/a.jpg", jpeg(2))
    rows = rows_of(plan(FolderSource(kind="folder", name="f"), tmp_path))
    assert len(rows) == 8
    assert {row["group"] for row in rows} == {None, r"gr\udcffuppe"}
    assert {row["id"].rpartition("/")[2] for row in rows} == {
        r"stra\udcdfe.jpg", " blank.jpg", r"two\nlines.jpg", r"\x1b[31m.jpg", r"back\\slash.jpg", "=1.jpg",
        "x" * 251 + ".jpg", "a.jpg",
    }  # fmt: skip


def test_one_name_in_two_spellings_is_one_group(tmp_path):
    for folder, form in (("roadwork", "NFC"), ("none", "NFD")):
        put(tmp_path / folder / unicodedata.normalize(form, "Zürich") / "a.jpg", jpeg(1))
    rows = rows_of(plan(FolderSource(kind="folder", name="f"), tmp_path))
    assert {row["group"] for row in rows} == {unicodedata.normalize("NFC", "Zürich")}
    wanted = FolderSource(
        kind="folder", positive_folders=[unicodedata.normalize("NFC", "Straßenbäu")]
    )
    (tmp_path / "roadwork").rename(tmp_path / unicodedata.normalize("NFD", "Straßenbäu"))
    assert sorted(row["label"] for row in rows_of(plan(wanted, tmp_path))) == [0, 1]


@pytest.mark.parametrize("path", ["../street", "/etc", "a/../../street"])
def test_paths_outside_the_root_are_refused(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    put(tmp_path / "street/none/a.jpg")
    for source in (
        FolderSource(kind="folder", path=path),
        CsvSource(kind="csv", path=path),
        CsvSource(kind="csv", path="x.csv", images=path),
        ParquetSource(kind="parquet", path=path),
    ):
        with pytest.raises(UserError, match="must be a path below"):
            plan(source, root)


def test_missing_and_empty_sources_are_named(tmp_path):
    put(tmp_path / "street/roadwork/readme.txt")
    put(tmp_path / "street/none/readme.txt")
    put(tmp_path / "empty.csv", b"file,label\n")
    pq.write_table(pa.table({"image": [b""], "label": [1]}).slice(0, 0), tmp_path / "e.parquet")
    (tmp_path / "hollow").mkdir()
    cases = [
        (FolderSource(kind="folder", path="nowhere"), "nowhere is missing"),
        (FolderSource(kind="folder", path="street"), 'source "folder" holds no images'),
        (CsvSource(kind="csv", path="nowhere.csv"), "nowhere.csv does not exist"),
        (CsvSource(kind="csv", path="empty.csv"), "holds no images"),
        (ParquetSource(kind="parquet", path="nowhere"), "nowhere is missing"),
        (ParquetSource(kind="parquet", path="hollow"), "holds no .parquet files"),
        (ParquetSource(kind="parquet", path="e.parquet"), "holds no images"),
        (ParquetSource(kind="parquet", path="empty.csv"), "not a readable Parquet file"),
    ]
    for source, message in cases:
        with pytest.raises(UserError, match=message) as error:
            plan(source, tmp_path)
        assert "\n" not in str(error.value)


# --------------------------------------------------------------------------- csv


def make_csv(root: Path, content: str, *images: str):
    put(root / "labels.csv", content.encode())
    for image in images:
        put(root / "images" / image, image.encode())
    return CsvSource(kind="csv", name="c", path="labels.csv", images="images")


def test_csv_maps_known_columns_and_keeps_the_rest(tmp_path):
    source = make_csv(
        tmp_path,
        "\ufefffile,label,group,weather,gps,latitude,longitude,licence,source\n"
        'a.jpg,1,berlin,rain,"52.5, 13.4",,,CC0,dashcam\n'
        "./sub/b.jpg,0,,,,48.1,11.6,,\n"
        "c.jpg,,,,,,,,\n",
        "a.jpg",
        "sub/b.jpg",
        "c.jpg",
    )
    a, b, c = rows_of(plan(source, tmp_path))
    assert (a["id"], a["source"], a["label"], a["group"]) == ("c/a.jpg", "c", 1, "berlin")
    assert (a["latitude"], a["longitude"], a["weather"]) == (52.5, 13.4, "rain")
    assert json.loads(a["extra"]) == {"licence": "CC0", "source": "dashcam"}
    assert a["image"] == {"bytes": NOT_AN_IMAGE, "path": "a.jpg"}
    assert (b["id"], b["label"], b["group"], b["extra"]) == ("c/sub/b.jpg", 0, None, None)
    assert (b["latitude"], b["longitude"]) == (48.1, 11.6)
    assert c["label"] is None
    assert "latitude" not in c


def test_csv_finds_images_beside_itself_and_in_other_spellings(tmp_path):
    put(tmp_path / "sub/images/a.jpg", jpeg(1))
    put(tmp_path / f"sub/{unicodedata.normalize('NFD', 'ü')}.JPG", jpeg(2))
    put(tmp_path / "sub/deep/c.jpg", jpeg(3))
    put(tmp_path / "images/d.jpg", jpeg(4))
    put(
        tmp_path / "sub/labels.csv",
        "Image Path;Label\na.jpg;1\nü.jpg;0\ndeep\\c.jpg;1\nd.jpg;0\n".encode("utf-16"),
    )
    source = CsvSource(kind="csv", name="c", path="sub/labels.csv", images="images")
    rows = rows_of(plan(source, tmp_path))
    assert [row["image"]["bytes"] for row in rows] == [jpeg(1), jpeg(2), jpeg(3), jpeg(4)]
    assert [row["id"] for row in rows] == ["c/a.jpg", "c/ü.jpg", "c/deep/c.jpg", "c/d.jpg"]
    put(tmp_path / "sub/labels.csv", b"file,label\na.jpg,1\nimages/a.jpg,0\n")
    with pytest.raises(UserError, match=r"line 3: images/a.jpg is already in line 2"):
        plan(source, tmp_path)


def test_csv_rows_of_one_real_file_with_two_labels_are_said(tmp_path, caplog):
    source = make_csv(tmp_path, "file,label\na.jpg,1\nb.jpg,0\n", "a.jpg")
    (tmp_path / "images/b.jpg").symlink_to("a.jpg")
    assert len(rows_of(plan(source, tmp_path))) == 2
    assert "1 images are linked under both classes" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column file, label; its columns are none"),
        ("name,label\n", "no column file; its columns are name, label"),
        ("file,group\n", "no column label"),
        ("file,label,label\n", "names a column twice"),
        ("file,label\na.jpg,1\nb.jpg,maybe\n", 'line 3: label "maybe": cannot tell'),
        ("file,label\na.jpg,1\nb.jpg\n", "line 3: 1 cells, but the header names 2 columns"),
        ("file,label\na.jpg,1\n./a.jpg,0\n", "line 3: a.jpg is already in line 2"),
        ("file,label\n,1\n", "line 2: the column file is empty"),
        ("file,label\n../labels.csv,1\n", "line 2: .* must be a path below"),
        ("file,label\n/etc/passwd,1\n", "line 2: .* must be a path below"),
        ("file,label\na.jpg,1\nx.jpg,0\ny.jpg,0\n", r"line 3: .*x.jpg is missing \(2 of 3 are\)"),
        ("file,label,gps\na.jpg,1,here\n", "line 2: .*not a latitude and a longitude"),
        ("file,label,latitude,longitude\na.jpg,1,91,0\n", "line 2: .*not a latitude"),
        ('file,label\n"a.jpg,1\n', "line 2: .*is a quote not closed"),
        ("file,label\na\udcff.jpg,1\n", "line 2 is not UTF-8 .byte 0xFF"),
    ],
)
def test_csv_mistakes_name_the_line(tmp_path, content, message):
    source = make_csv(tmp_path, "", "a.jpg")
    (tmp_path / "labels.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as error:
        plan_csv(source, tmp_path, 3)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------- parquet


def parquet_rows(tmp_path: Path, columns: dict, **options) -> list[dict]:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, tmp_path / "x.parquet", **options)
    return rows_of(plan_parquet("p", [tmp_path / "x.parquet"], 2))


ENCODED = base64.b64encode(jpeg(5)).decode()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("image", [{"bytes": jpeg(5), "path": "a.jpg"}]),
        ("front_Image", pa.array([{"path": "a.jpg", "bytes": jpeg(5)}])),
        ("image_bytes", [jpeg(5)]),
        ("image", pa.array([jpeg(5)], pa.large_binary())),
        ("image", pa.array([jpeg(5)], pa.binary_view())),
        ("image", [ENCODED]),
        ("image", [f"data:image/jpeg;base64,{ENCODED}"]),
        ("image", [base64.encodebytes(jpeg(5))]),
        ("image", pa.array([ENCODED]).dictionary_encode()),
        ("image", [{"bytes": ENCODED}]),
    ],
)
def test_image_column_is_found_and_unwrapped(tmp_path, name, values):
    (row,) = parquet_rows(tmp_path, {"image_id": ["7"], "label": [1], name: values})
    assert row["image"]["bytes"] == jpeg(5)
    assert json.loads(row["extra"]) == {"image_id": "7"}


def test_images_that_cannot_be_told_stay_and_nulls_stay_null(tmp_path):
    texts = parquet_rows(tmp_path, {"image": ["no base64!", "", None], "label": [1, 0, 1]})
    assert [row["image"]["bytes"] for row in texts] == [b"no base64!", b"", None]
    structs = parquet_rows(
        tmp_path, {"image": [{"bytes": None, "path": "gone.jpg"}, None], "label": [1, 0]}
    )
    assert [row["image"]["bytes"] for row in structs] == [None, None]
    assert structs[0]["image"]["path"] == "gone.jpg"


@pytest.mark.parametrize(
    ("name", "values", "labels"),
    [
        ("label", [1, 0, None, 1], [1, 0, None, 1]),
        ("Labels", [True, False, None, True], [1, 0, None, 1]),
        ("label", [1.0, 0.0, math.nan, 1.0], [1, 0, None, 1]),
        ("label", [Decimal(1), Decimal(0), None, Decimal(1)], [1, 0, None, 1]),
        ("labels", ["Roadwork", "none", None, "NONE"], [1, 0, None, 0]),
        ("label", [b"Roadwork", b"None", None, b"1"], [1, 0, None, 1]),
        ("label", ["1", "0", "", "1.0"], [1, 0, None, 1]),
        (
            "label",
            pa.array(["road work", "clear", None, "clear"]).dictionary_encode(),
            [1, 0, None, 0],
        ),
        ("scene_description", ["cones", "", None, " "], [1, 0, 0, 0]),
        ("Scene Description", ["cones", "nan", "N/A", "None"], [1, 0, 0, 0]),
        ("sceneDescription", ["cones", "no roadwork", "No roadwork visible.", "-"], [1, 0, 0, 0]),
    ],
)
def test_labels_of_every_kind(tmp_path, name, values, labels):
    rows = parquet_rows(tmp_path, {"image": [b"x"] * 4, name: values})
    assert [row["label"] for row in rows] == labels
    assert [row["extra"] for row in rows] == [None] * 4


def test_a_slip_in_a_label_is_kept_and_shown(tmp_path):
    labels = ["Roadwork", "no roadwork"] * 8 + ["no roadwrok"]
    rows = parquet_rows(tmp_path, {"image": [b"x"] * 17, "label": labels})
    assert [row["label"] for row in rows] == [1, 0] * 8 + [None]
    assert [json.loads(row["extra"] or "{}") for row in rows[-2:]] == [{}, {"label": "no roadwrok"}]


def test_a_description_that_may_deny_roadwork_is_no_label(tmp_path):
    texts = ["cones", None] * 8 + ["No lane is closed, but cones stand about"]
    *_, row = parquet_rows(tmp_path, {"image": [b"x"] * 17, "scene_description": texts})
    assert row["label"] is None
    assert json.loads(row["extra"])["label"].startswith("No lane")
    with pytest.raises(UserError, match="cannot tell what the labels mean"):
        parquet_rows(tmp_path, {"image": [b"x"] * 4, "scene_description": texts[-4:]})


def test_a_label_is_not_overruled_by_the_description(tmp_path):
    columns = {"image": [b"x"] * 2, "label": [None, 0], "scene_description": ["cones", "drums"]}
    rows = parquet_rows(tmp_path, columns)
    assert [(r["label"], r["scene_description"]) for r in rows] == [(None, "cones"), (0, "drums")]


def labelled_table(names: object, labels: list, layout: str = "names") -> pa.Table:
    """A table whose class names stand beside it, as versions of `datasets` and its cards write them."""
    by_number = {str(number): name for number, name in enumerate(names)}
    features = {
        "names": {"label": {"names": names, "_type": "ClassLabel"}},
        "numbers": {"label": {"names": by_number, "num_classes": 2, "_type": "ClassLabel"}},
        "card": [{"name": "label", "dtype": {"class_label": {"names": by_number}}}],
    }[layout]
    table = pa.table({"image": [b"x"] * len(labels), "label": labels})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return table.replace_schema_metadata(metadata)


@pytest.mark.parametrize("layout", ["names", "numbers", "card"])
@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["None", "Roadwork"], [0, 1]),
        (["Roadwork", "None"], [1, 0]),
        (["construction", "clear"], [1, 0]),
    ],
)
def test_class_names_in_the_metadata_decide_what_a_number_means(tmp_path, names, labels, layout):
    rows = parquet_rows(tmp_path, labelled_table(names, [0, 1], layout))
    assert [row["label"] for row in rows] == labels


def test_class_names_that_are_not_sure_are_asked_for(tmp_path):
    pq.write_table(labelled_table(["roadwork", "street"], [0, 1]), tmp_path / "x.parquet")
    with pytest.raises(
        UserError, match=r'x\.parquet: cannot tell .*"street" \(1 rows: not understood\)'
    ):
        plan(ParquetSource(kind="parquet", path="x.parquet"), tmp_path)
    source = ParquetSource(kind="parquet", path="x.parquet", negative_classes=["Street"])
    assert [row["label"] for row in rows_of(plan(source, tmp_path))] == [1, 0]
    with pytest.raises(
        ValidationError, match="both in positive_classes and negative_classes: street"
    ):
        ParquetSource(
            kind="parquet", path="x", positive_classes=["street"], negative_classes=["street"]
        )
    source = make_csv(tmp_path, "file,label\na.jpg,barrier\nb.jpg,street\n", "a.jpg", "b.jpg")
    with pytest.raises(UserError, match='line 2: label "barrier": cannot tell'):
        plan(source, tmp_path)
    names = {"positive_classes": ["barrier"], "negative_classes": ["street"]}
    source = CsvSource(**source.model_dump() | names)
    assert [row["label"] for row in rows_of(plan(source, tmp_path))] == [1, 0]


def test_files_that_do_not_agree_on_what_0_means(tmp_path):
    pq.write_table(labelled_table(["Roadwork", "None"], [0, 1]), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"y"] * 2, "label": [0, 1]}), tmp_path / "b.parquet")
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    with pytest.raises(
        UserError, match=r"a\.parquet calls its labels Roadwork, None, .*b\.parquet does not say"
    ):
        plan_parquet("p", files, 10)
    pq.write_table(labelled_table(["None", "Roadwork"], [0, 1]), tmp_path / "b.parquet")
    assert [row["label"] for row in rows_of(plan_parquet("p", files, 10))] == [1, 0, 0, 1]


# One site in shards of different types: whole numbers become floating where one is missing.
SITES = [
    pa.array([1, 2]), pa.array([1.0, None, 2.0]), pa.array(["1", "2.0", "nan", ""]), pa.array([b"1", b"2"]),
    pa.array([Decimal("1.00"), Decimal(2)]), pa.array(["1", "2"]).dictionary_encode(),
]  # fmt: skip


@pytest.mark.parametrize("column", ["group", "drive"])
def test_one_site_has_one_name_in_all_shards(tmp_path, column):
    files = []
    for number, sites in enumerate(SITES):
        files.append(tmp_path / f"{number}.parquet")
        columns = {"image": [b"x"] * len(sites), "label": [1] * len(sites), column: sites}
        pq.write_table(pa.table(columns), files[-1])
    rows = rows_of(plan_parquet("p", files, 100))
    assert {row[column] for row in rows} == {"1", "2", None}
    assert sum(row[column] is None for row in rows) == 3
    times = [pa.array([np.datetime64("2024-05-01", unit)]) for unit in ("s", "us", "ns")]
    for number, days in enumerate([pa.array([date(2024, 5, 1)]), *times, pa.array(["2024-05-01"])]):
        pq.write_table(pa.table({"image": [b"x"], "label": [1], column: days}), files[number])
    assert {row[column] for row in rows_of(plan_parquet("p", files[:5], 100))} == {"2024-05-01"}


def test_names_have_one_spelling_in_every_source(tmp_path):
    names = [unicodedata.normalize(form, "Zürich") for form in ("NFC", "NFD")]
    put(tmp_path / f"f/roadwork/{names[0]}/a.jpg", jpeg(1))
    put(tmp_path / f"f/none/{names[1]}/b.jpg", jpeg(2))
    source = make_csv(
        tmp_path, f"file,label,group\na.jpg,1,{names[0]}\nb.jpg,0,{names[1]}\n", "a.jpg", "b.jpg"
    )
    pq.write_table(
        pa.table({"image": [b"x"] * 2, "label": [0, 1], "group": names}), tmp_path / "x.parquet"
    )
    for each in (
        source, FolderSource(kind="folder", path="f"), ParquetSource(kind="parquet", path="x.parquet")
    ):  # fmt: skip
        assert [row["group"] for row in rows_of(plan(each, tmp_path))] == [names[0]] * 2


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.float16()])
def test_ids_that_a_float_cannot_hold_are_refused(tmp_path, kind):
    bound = {pa.float64(): 2.0**53, pa.float32(): 2.0**24, pa.float16(): 2.0**11}[kind]
    for value, right in ((bound - 1, True), (bound, False)):
        sites = pa.array(np.array([value, 1.0]).astype(kind.to_pandas_dtype()), kind)
        table = pa.table({"image": [b"x"] * 2, "label": [0, 1], "group": sites})
        pq.write_table(table, tmp_path / "x.parquet")
        if right:
            rows = rows_of(plan_parquet("p", [tmp_path / "x.parquet"], 10))
            assert [row["group"] for row in rows] == [str(int(value)), "1"]
        else:
            with pytest.raises(UserError, match=r"x\.parquet: column group: .* too large"):
                plan_parquet("p", [tmp_path / "x.parquet"], 10)


def test_positions_that_are_not_understood_are_said_and_kept(tmp_path, caplog):
    gps = ["52.5N, 13.4E", "u33dc0", None, "nan", "grid 33U"]
    columns = {
        "image": [b"x"] * 5,
        "label": [1, 0] * 2 + [1],
        "gps": gps,
        "group": [None] * 4 + ["a"],
    }
    rows = parquet_rows(tmp_path, columns)
    assert [row.get("latitude") for row in rows] == [52.5, None, None, None, None]
    kept = [json.loads(row["extra"] or "{}").get("gps") for row in rows]
    assert kept == [None, "u33dc0", None, None, "grid 33U"]
    assert (
        '2 of 5 positions are given but not understood, such as "u33dc0"; 1 of these' in caplog.text
    )


def test_columns_by_any_spelling_of_their_names(tmp_path):
    columns = {"image": [b"x"], "Label": [1], "timeOfDay": ["night"], "GPSLatitude": ["33.8"]}
    columns |= {"GPS Latitude-Ref": ["S"], "gps_longitude": [151.2], "Weather Condition": ["rain"]}
    (row,) = parquet_rows(tmp_path, columns)
    assert (row["latitude"], row["longitude"]) == (-33.8, 151.2)
    assert (row["daytime"], row["weather"], row["extra"]) == ("night", "rain", None)
    with pytest.raises(UserError, match="names a column twice: label, Label"):
        parquet_rows(tmp_path, {"image": [b"x"], "label": [1], "Label": [0]})


def test_text_that_is_not_utf8_is_one_line(tmp_path):
    names = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    with pytest.raises(UserError, match=r"x\.parquet is damaged: .*utf-8"):
        parquet_rows(tmp_path, {"image": [b"x"], "label": [1], "group": names})


@pytest.mark.parametrize(
    "columns",
    [
        {"latitude": [52.5], "longitude": [13.4]},
        {"Lat": ["52.5"], "lng": ["13.4"]},
        {"gps": ["52.5, 13.4"]},
        {"GPS": ["(52.5,13.4)"]},
        {"gps": [[52.5, 13.4]]},
        {"gps": pa.array([[52.5, 13.4]], pa.list_(pa.float64(), 2))},
        {"gps": [{"longitude": 13.4, "latitude": 52.5}]},
        {"gps": [{"Lat": 52.5, "Lng": 13.4}]},
        {"gps": [[52.5, 13.4]], "latitude": [math.nan], "longitude": [None]},
    ],
)
def test_positions_of_every_kind(tmp_path, columns):
    (row,) = parquet_rows(tmp_path, {"image": [b"x"], "label": [1], **columns})
    assert (row["latitude"], row["longitude"]) == (52.5, 13.4)


@pytest.mark.parametrize("gps", ["", "52.5", "a,b", "91,0", "0,181", "nan,nan", "1,2,3", None])
def test_a_position_that_is_none_stays_null(tmp_path, gps):
    column = pa.array([gps], pa.string())
    (row,) = parquet_rows(tmp_path, {"image": [b"x"], "label": [1], "gps": column})
    assert row.get("latitude") is None
    assert row.get("longitude") is None


def test_context_columns_and_extra(tmp_path):
    (row,) = parquet_rows(
        tmp_path,
        {
            "image": [b"x"],
            "label": [1],
            "Time of Day": ["night"],
            "weather": pa.array(["rain"]).dictionary_encode(),
            "scene": pa.array([None], pa.string()),
            "speed": [12.5],
            "heading": [math.inf],
            "camera": [""],
            "thumbnail": [b"bytes"],
            "boxes": [[1, 2]],
        },
    )
    assert (row["daytime"], row["weather"], row["scene"]) == ("night", "rain", None)
    assert json.loads(row["extra"]) == {"speed": 12.5}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"photo": [b"x"], "label": [1]}, r"no image column .*columns: photo \(binary\), label"),
        ({"image": [1], "label": [1]}, r"no image column .*image \(int64\)"),
        ({"image": [{"path": "a"}], "label": [1]}, "no image column"),
        (
            {"image": [b"x"], "class": [1]},
            r"no label, labels or scene_description; .*class \(int64",
        ),
        ({"image": [b"x"], "labels": [[1]]}, "column labels must hold numbers"),
    ],
)
def test_wrong_columns_are_listed(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        parquet_rows(tmp_path, columns)


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [jpeg(i) * 50 for i in range(20)], "label": [1] * 20}), file)
    data = bytearray(file.read_bytes())
    data[100:4000] = bytes(3900)
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.parquet is damaged"):
        rows_of(plan_parquet("p", [file], 5))


def test_parquet_is_found_as_everything_is(tmp_path):
    table = pa.table({"image": [b"x"], "label": [1]})
    for name in ("data/train.parquet", ".ipynb_checkpoints/train.parquet", "b.PARQUET"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / name)
    (tmp_path / "data/up").symlink_to("..")
    found = find_parquet(tmp_path, "here")
    assert found == [tmp_path / "b.PARQUET", tmp_path / "data/train.parquet"]


@pytest.mark.parametrize("shard_images", [1, 4, 7, 100])
@pytest.mark.parametrize("row_group", [1, 3, 100])
def test_shards_cross_files_and_row_groups(tmp_path, shard_images, row_group):
    sizes, first = [5, 0, 9, 1], 0
    for number, size in enumerate(sizes):
        names = [f"image {first + i}".encode() for i in range(size)]
        table = pa.table(
            {"image": pa.array(names, pa.binary()), "label": pa.array([1] * size, pa.int64())}
        )
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=row_group)
        first += size
    source = ParquetSource(kind="parquet", name="p", path=".")
    made = plan(source, tmp_path, shard_images)
    rows = rows_of(made)
    assert [row["image"]["bytes"] for row in rows] == [f"image {i}".encode() for i in range(15)]
    assert [row["id"] for row in rows] == [f"p-{i:06d}" for i in range(15)]
    assert all(part.n_rows == shard_images for part in made.parts[:-1])


def test_our_own_shards_can_be_read_again(tmp_path):
    source = SyntheticSource(kind="synthetic", images=4, cities=4, width_px=64, height_px=64)
    rows = rows_of(plan(source, tmp_path))
    table = pa.Table.from_pylist(rows, RAW_SCHEMA)
    pq.write_table(table, tmp_path / "x.parquet")
    again = rows_of(plan_parquet("p", [tmp_path / "x.parquet"], 10))
    for before, after in zip(table.to_pylist(), again, strict=True):
        for name in set(RAW_SCHEMA.names) - {"id", "source", "extra"}:
            if name == "evidence_box" and before[name]:
                np.testing.assert_allclose(after[name], before[name])
            else:
                assert after[name] == before[name], name
        assert json.loads(after["extra"]) == {"id": before["id"], "source": "synthetic"}


def test_translate_needs_no_file():
    columns = find_columns(pa.schema([("image", pa.binary()), ("label", pa.int8())]), "here")
    labels = LabelReader.learn([({1: 1}, ())])
    row = translate({"image": b"x", "label": 1}, columns, labels)
    assert (row["image"]["bytes"], row["label"], row["extra"]) == (b"x", 1, None)
