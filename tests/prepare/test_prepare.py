"""Raw shards to split files: content, quarantine, report, determinism, resuming after kill -9."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.common import Stage
from stages.prepare import prepare as stage_prepare
from streetvision.core.artifacts import ArtifactSchema, json_text
from streetvision.core.errors import UserError
from streetvision.core.params import Data, check_params
from streetvision.core.schema import RAW_SCHEMA, SPLIT_SCHEMA, SPLITS
from streetvision.data.store import open_originals
from streetvision.prepare.prepare import prepare_splits, prepare_whole
from tests.pipeline.project import REPOSITORY

SETTINGS = {"side_px": 24, "max_bad_fraction": 0.2}
Row = dict[str, Any]


def photo(seed: int, width: int = 64, height: int = 48, kind: str = "JPEG") -> bytes:
    """Rectangles on a gradient; another picture for every seed."""
    rng = np.random.default_rng(seed)
    pixels = np.linspace(200, 60, height)[:, None, None] * np.ones((1, width, 3))
    for _ in range(20):
        x, y = rng.integers(0, width - 8), rng.integers(0, height - 8)
        shape = rng.integers(4, height // 2, 2)
        pixels[y : y + shape[0], x : x + shape[1]] = rng.integers(0, 256, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def make_rows(n: int = 240, groups: int = 24) -> list[Row]:
    """Usable rows of two sources; `group` cycles, so that groups span shards."""
    return [
        {
            "id": f"row-{k:05d}",
            "image": {"bytes": photo(k), "path": None},
            "label": int((k // groups) % 3 > 0),
            "source": "first" if k % groups < groups // 2 else "second",
            "group": f"city-{k % groups:02d}",
            "weather": "rain" if k % 5 == 0 else None,
            "latitude": 52.0 + k / 100 if k % 2 else None,
            "longitude": 13.0 if k % 2 else None,
            "evidence_box": [0.1, 0.2, 0.5, 0.6] if k % 4 == 0 else None,
        }
        for k in range(n)
    ]


def write_raw(folder: Path, rows: list[Row], shard: int = 100, row_group: int = 30) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ingest.manifest.json").write_text("{}")
    for number, first in enumerate(range(0, len(rows), shard)):
        table = pa.Table.from_pylist(rows[first : first + shard], RAW_SCHEMA)
        pq.write_table(table, folder / f"raw-{number:03d}.parquet", row_group_size=row_group)
    return folder


def prepare(
    raw: Path,
    out: Path,
    workers: int = 1,
    progress: Callable[..., Iterable[Any]] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    scratch = out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    paths = {split: out / f"{split}.arrow" for split in SPLITS}
    options = {} if progress is None else {"progress": progress}
    data = Data(**{**SETTINGS, **settings})
    return prepare_splits(
        raw, paths, out / "val_test_originals.arrow", out / "quarantine.csv", scratch, data, 7, workers,
        **options,
    )  # fmt: skip


def test_the_stage_splits_by_the_splits_own_seed(tmp_path: Path) -> None:
    rows = make_rows()

    def run(name: str, **changes: Any) -> dict[str, bytes]:
        paths = ArtifactSchema(tmp_path / name)
        paths.root.mkdir()
        shutil.copy(REPOSITORY / "dvc.yaml", paths.root)
        write_raw(paths.raw, rows)
        data = SETTINGS | {"split_seed": changes.pop("split_seed")}
        document = {"data": data, "hardware": {"workers": 1}} | changes
        stage_prepare(Stage("prepare", check_params(document, "test"), paths))
        return {split: paths.split(split).read_bytes() for split in SPLITS}

    first = run("first", seed=1, split_seed=7)
    assert run("seed", seed=2, split_seed=7) == first
    assert run("split", seed=1, split_seed=8) != first


def read(out: Path, split: str) -> list[Row]:
    with pa.memory_map(str(out / f"{split}.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
        assert table.schema == SPLIT_SCHEMA
        table.validate(full=True)
        rows: list[Row] = table.to_pylist()
    return rows


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def test_rows_arrive_whole_and_once(tmp_path: Path) -> None:
    rows = make_rows()
    report = prepare(write_raw(tmp_path / "raw", rows), tmp_path)
    by_id = {row["id"]: row for row in rows}
    order = {row["id"]: number for number, row in enumerate(rows)}
    seen: list[str] = []
    for split in SPLITS:
        prepared = read(tmp_path, split)
        numbers = [order[row["id"]] for row in prepared]
        assert numbers == sorted(numbers)
        seen += [row["id"] for row in prepared]
        for row in prepared:
            source = by_id[row["id"]]
            for name in ("label", "source", "group", "weather", "latitude", "drive", "extra"):
                assert row[name] == source.get(name)
            assert row["evidence_box"] == pytest.approx(source["evidence_box"])
            image = Image.open(io.BytesIO(row["image"]))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 24))
            assert (row["width"], row["height"]) == (32, 24)
            assert (row["original_width"], row["original_height"]) == (64, 48)
            original = Image.open(io.BytesIO(source["image"]["bytes"])).resize((32, 24))
            error = np.abs(np.asarray(image, np.int16) - np.asarray(original, np.int16)).mean()
            assert error < 10
            assert split == "train" or not row["fusion"]
    assert sorted(seen) == sorted(by_id)
    assert report["rows_in"] == report["rows_kept"] == 240
    assert (tmp_path / "quarantine.csv").read_text() == "id,source,reason,file,row\n"


def test_the_report_counts_what_the_files_hold(tmp_path: Path) -> None:
    rows = make_rows()
    for k, row in enumerate(rows):  # four places without roadwork, four of it alone
        row["label"] = {0: 0, 1: 1}.get(k % 24 // 4, row["label"])
    report = prepare(write_raw(tmp_path / "raw", rows), tmp_path)
    assert report["groups"]["one_class"] == 8
    prepared = {split: read(tmp_path, split) for split in SPLITS}
    every = [row for rows in prepared.values() for row in rows]
    groups = {split: {row["group"] for row in rows} for split, rows in prepared.items()}

    def count(rows: list[Row]) -> dict[str, int]:
        return {"images": len(rows), "positives": sum(row["label"] for row in rows)}

    for split, rows in prepared.items():
        expected: Row = count(rows) | {"groups": len(groups[split])}
        expected["positive_share"] = expected["positives"] / len(rows)
        labels = [{row["label"] for row in rows if row["group"] == name} for name in groups[split]]
        expected["groups_without_roadwork"] = labels.count({0})
        expected["groups_of_roadwork_alone"] = labels.count({1})
        assert report["splits"][split] == expected
    fusion = [row for row in prepared["train"] if row["fusion"]]
    assert report["fusion"] == count(fusion) | {"groups": len({row["group"] for row in fusion})}
    for name in ("first", "second"):
        assert report["sources"][name] == count([row for row in every if row["source"] == name])
    assert set(report["group_counts"]) == set.union(*groups.values())
    for name, counts in report["group_counts"].items():
        assert counts == count([row for row in every if row["group"] == name])
    assert sum(map(len, groups.values())) == len(set.union(*groups.values()))
    fit = {row["group"] for row in prepared["train"] if not row["fusion"]}
    assert not fit & {row["group"] for row in fusion}
    assert report["shared_groups"] == 0
    assert report["groups"]["images_given"] == 240
    assert json.loads(json_text(report)) == report


def test_reports_do_not_say_where_a_place_is(tmp_path: Path) -> None:
    rows = make_rows()
    for k, row in enumerate(rows):
        row["group"] = None
        row["latitude"], row["longitude"] = 52.1234 + k % 24 / 10, 13.5678 + k % 24 / 10
    rows[3]["label"] = None
    report = prepare(write_raw(tmp_path / "raw", rows), tmp_path)
    assert report["groups"]["images_by_gps"] == 239
    assert len(report["group_counts"]) == 24
    assert all(re.fullmatch("gps:[0-9a-f]{16}", name) for name in report["group_counts"])
    written = json_text(report) + (tmp_path / "quarantine.csv").read_text()
    for row in rows:
        assert f"{row['latitude']:.1f}" not in written
        assert f"{row['longitude']:.1f}" not in written


def test_many_groups_are_summarised(tmp_path: Path) -> None:
    rows = make_rows(240, 120)
    report = prepare(write_raw(tmp_path / "raw", rows), tmp_path)
    assert "group_counts" not in report
    assert report["groups"]["total"] == 120
    assert report["groups"]["median_images"] == 2


def test_unusable_rows_go_to_the_quarantine(tmp_path: Path) -> None:
    rows = make_rows()
    rows[3]["label"] = None
    rows[35]["image"] = {"bytes": rows[35]["image"]["bytes"][:600], "path": None}
    rows[100]["image"] = {"bytes": b"no picture", "path": None}
    rows[131]["image"] = None
    rows[132]["image"] = {"bytes": photo(132, 128, 96), "path": None}
    rows[133]["label"] = 2
    rows[50] |= {"label": None, "extra": '{"label": "no roadwrok", "note": "x"}'}
    # The second source has descriptions, so there they must agree with the label.
    for row in rows:
        if row["source"] == "second":
            row["scene_description"] = "cones" if row["label"] else " "
    rows[84]["scene_description"] = "a digger"
    rows[108]["scene_description"] = None
    report = prepare(write_raw(tmp_path / "raw", rows), tmp_path, max_source_pixels=5000)
    assert (tmp_path / "quarantine.csv").read_text().splitlines() == [
        "id,source,reason,file,row",
        "row-00003,first,label missing,raw-000.parquet,3",
        "row-00035,first,truncated,raw-000.parquet,35",
        'row-00050,first,"label ""no roadwrok"" not understood",raw-000.parquet,50',
        "row-00084,second,label and description in conflict,raw-000.parquet,84",
        "row-00100,first,not an image,raw-001.parquet,0",
        "row-00108,second,label and description in conflict,raw-001.parquet,8",
        "row-00131,first,no image,raw-001.parquet,31",
        "row-00132,second,too many pixels,raw-001.parquet,32",
        "row-00133,second,label not 0 or 1,raw-001.parquet,33",
    ]
    assert report["quarantined"] == {
        "label missing": 1,
        "label not 0 or 1": 1,
        'label "no roadwrok" not understood': 1,
        "truncated": 1,
        "not an image": 1,
        "no image": 1,
        "too many pixels": 1,
        "label and description in conflict": 2,
    }
    kept = {row["id"] for split in SPLITS for row in read(tmp_path, split)}
    gone = {f"row-{k:05d}" for k in (3, 35, 50, 84, 100, 108, 131, 132, 133)}
    assert kept == {row["id"] for row in rows} - gone
    assert report["rows_kept"] == 231


def test_positions_that_were_not_understood_are_counted(tmp_path: Path) -> None:
    rows = make_rows()
    for row in rows[:10]:
        row |= {"latitude": None, "longitude": None, "extra": '{"gps": "u33dc0"}'}
    rows[11]["extra"] = '{"gps": "beside a position"}'  # such as another sensor's
    rows[12]["extra"] = '{"note": "gps"}'
    report = prepare(write_raw(tmp_path / "raw", rows), tmp_path)
    assert report["positions_not_understood"] == 10


def test_too_many_unusable_rows(tmp_path: Path) -> None:
    rows = make_rows(60)
    for row in rows[:2]:
        row["label"] = None
    for row in rows[2:6]:
        row["image"] = {"bytes": b"x", "path": None}
    raw = write_raw(tmp_path / "raw", rows)
    with pytest.raises(UserError) as caught:
        prepare(raw, tmp_path, max_bad_fraction=0.05)
    message = str(caught.value)
    for part in ("6 of 60 rows (10.0%)", "5.0%", '"not an image" (4)', "quarantine.csv"):
        assert part in message
    assert len((tmp_path / "quarantine.csv").read_text().splitlines()) == 7
    assert not (tmp_path / "train.arrow").exists()
    prepare(raw, tmp_path, max_bad_fraction=0.1)  # the limit itself is allowed


def test_near_duplicates_join_groups(tmp_path: Path) -> None:
    rows = make_rows()
    buffer = io.BytesIO()  # the picture of row 0, in city-01
    Image.open(io.BytesIO(photo(0))).resize((128, 96)).save(buffer, "PNG")
    rows[25]["image"]["bytes"] = buffer.getvalue()
    rows[51]["group"] = None
    rows[51]["latitude"] = rows[51]["longitude"] = None
    rows[51]["image"]["bytes"] = rows[2]["image"]["bytes"]
    report = prepare(write_raw(tmp_path / "raw", rows), tmp_path)
    final = {row["id"]: row["group"] for split in SPLITS for row in read(tmp_path, split)}
    assert final["row-00000"] == final["row-00001"] == final["row-00025"] == "city-00"
    assert final["row-00051"] == "city-02"
    assert report["groups"]["joined"] == 1
    assert report["groups"]["images_alone"] == 1
    found = report["duplicates"]
    assert found == {"pairs": 2, "clusters": 2, "images": 4, "largest": 2, "capped": 0}


def test_copies_under_both_labels_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows()
    assert rows[0]["label"] == rows[1]["label"] != rows[30]["label"]
    rows[30]["image"] = rows[0]["image"]
    rows[24]["image"] = rows[25]["image"]  # of one label: nothing to tell
    assert rows[24]["label"] == rows[25]["label"]
    prepare(write_raw(tmp_path / "raw", rows), tmp_path)
    (told,) = [r.getMessage() for r in caplog.records if "copy with the other label" in r.message]
    assert told.startswith(
        "2 images have a copy with the other label, such as row-00000, row-00030"
    )


def test_a_chain_of_near_duplicates_neither_swallows_the_places_nor_leaks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """60 places of 6 images; each has one picture of the next place, too, so that 59 pairs join all."""
    rows = make_rows(360, 60)
    rows.sort(key=lambda row: row["group"])
    for k, row in enumerate(rows):
        row["id"] = f"row-{k:05d}"
    for place in range(59):
        original = Image.open(io.BytesIO(rows[6 * place]["image"]["bytes"]))
        buffer = io.BytesIO()
        original.resize((128, 96)).save(buffer, "JPEG", quality=60)
        rows[6 * place + 11]["image"]["bytes"] = buffer.getvalue()
    report = prepare(write_raw(tmp_path / "raw", rows), tmp_path)
    found = report["groups"]
    assert found["most_joined"] == 4
    assert found["refused"] == found["total"] - 1 == 59 - found["joined"]
    aside = report["quarantined"]["near-duplicate of an image in another group"]
    assert aside == found["refused"]
    assert report["rows_kept"] == 360 - aside
    for split, share in zip(SPLITS, (0.6, 0.1, 0.15, 0.15), strict=True):
        assert abs(report["splits"][split]["images"] / report["rows_kept"] - share) < 0.04

    # No two of the pairs are in two splits, and what is not there is in the quarantine, reason stated.
    where = {row["id"]: split for split in SPLITS for row in read(tmp_path, split)}
    pairs = [(f"row-{6 * k:05d}", f"row-{6 * k + 11:05d}") for k in range(59)]
    assert all(where[a] == where[b] for a, b in pairs if a in where and b in where)
    quarantine = (tmp_path / "quarantine.csv").read_text().splitlines()[1:]
    assert len(quarantine) == aside
    for line in quarantine:
        name, _, reason, _, _ = line.split(",")
        assert reason == "near-duplicate of an image in another group"
        assert name not in where
        assert any(name in pair for pair in pairs)
    assert "one group of up to 4 places (data.duplicate_max_groups = 4)" in caplog.text
    assert f"{aside} of 360 images are set aside" in caplog.text


def test_near_duplicates_do_not_make_one_group_of_most_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two places with 40 % of the images each share one picture: together no split could hold them."""
    rows = make_rows(200, 20)
    for k, row in enumerate(rows):
        row["group"] = f"large-{k % 2}" if k < 160 else f"city-{k % 8}"
    rows[1]["image"]["bytes"] = rows[0]["image"]["bytes"]
    report = prepare(write_raw(tmp_path / "raw", rows), tmp_path)
    assert report["groups"]["largest_images"] == 80
    assert report["groups"]["refused"] == 1
    assert report["quarantined"] == {"near-duplicate of an image in another group": 1}
    assert "51 % of all images" in caplog.text
    assert "large-0" in caplog.text.partition("fractions are missed by a third")[2]


def test_a_whole_keeps_all_images_unless_it_will_be_divided(tmp_path: Path) -> None:
    rows = make_rows(60, 10)
    for row in rows[:10]:  # one picture, in ten places
        row["image"]["bytes"] = rows[0]["image"]["bytes"]
    raw = write_raw(tmp_path / "raw", rows)
    (tmp_path / "scratch").mkdir()
    kept = {}
    for divided in (False, True):
        path = tmp_path / f"{divided}.arrow"
        prepare_whole(raw, path, tmp_path / "scratch", Data(**SETTINGS), 1, divided=divided)
        kept[divided] = read(tmp_path, str(divided))
    assert len(kept[False]) == 60
    groups = {row["group"] for row in kept[False]}
    assert len(groups) == 7  # four of the ten are one
    assert [row["id"] for row in kept[True]] == [
        row["id"] for k, row in enumerate(rows) if not 4 <= k < 10
    ]


def test_jpegs_of_the_right_size_keep_their_bytes(tmp_path: Path) -> None:
    rows = make_rows()
    prepare(write_raw(tmp_path / "raw", rows), tmp_path, side_px=48)
    for row in read(tmp_path, "train"):
        assert row["image"] == photo(int(row["id"][4:]))


def test_workers_and_row_groups_leave_the_files_alone(tmp_path: Path) -> None:
    rows = make_rows()
    seen: list[tuple[str, int]] = []

    def progress(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
        for item in items:
            yield item
            seen.append((description, total))

    report = prepare(write_raw(tmp_path / "raw", rows), tmp_path / "one", 1, progress)
    assert seen.count(("decoding", 10)) == 10
    assert seen.count(("writing val_test", 10)) == 10
    assert prepare(tmp_path / "raw", tmp_path / "two", 2) == report
    write_raw(tmp_path / "other", rows, row_group=100)
    assert prepare(tmp_path / "other", tmp_path / "three", 1) == report
    expected = files(tmp_path / "one")
    assert len(expected) == 6
    assert files(tmp_path / "two") == expected
    assert files(tmp_path / "three") == expected


def test_original_files_of_val_test_are_kept_in_its_order(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", make_rows())
    for limit, name in ((5000, "all"), (7, "some"), (0, "none")):
        report = prepare(raw, tmp_path / name, test_originals=limit)
        found = open_originals("challenge", tmp_path / name / "val_test_originals.arrow")
        test = [row["id"] for row in read(tmp_path / name, "val_test")]
        assert 7 < len(test) < 5000
        assert report["test_originals"] == len(found) == min(limit, len(test))
        assert found.ids.tolist() == [each for each in test if each in set(found.ids)]
        if limit == 7:
            assert found.ids.tolist() != test[:7]  # drawn: neighbours are often of one drive
        for row, each in enumerate(found.ids):
            assert found.image_bytes(row) == photo(int(each[4:]))


def test_batches_are_small(tmp_path: Path) -> None:
    rows = make_rows(40) * 50
    rows = [
        row | {"id": str(k), "image": {"bytes": photo(k, 24, 24)}} for k, row in enumerate(rows)
    ]
    prepare(write_raw(tmp_path / "raw", rows, 2000, 700), tmp_path)
    sizes = []
    for split in SPLITS:
        with pa.memory_map(str(tmp_path / f"{split}.arrow")) as source:
            reader = pa.ipc.open_file(source)
            counts = [reader.get_batch(k).num_rows for k in range(reader.num_record_batches)]
        assert set(counts[:-1]) <= {500}
        sizes += counts
    assert max(sizes) == 500
    assert sum(sizes) == 2000


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_prepare import prepare
if __name__ == "__main__":
    prepare(Path(sys.argv[1]), Path(sys.argv[2]), workers=2)
"""


def test_killed_and_run_again_gives_the_same_files(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", make_rows(1200, 40), 300, 15)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    command = [sys.executable, str(script), str(raw), str(tmp_path / "killed"), str(here)]
    scratch = tmp_path / "killed/scratch"
    with subprocess.Popen(command, env=environment) as process:
        while not list(scratch.glob("raw-*.arrow")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    made = {path: path.stat().st_mtime_ns for path in scratch.glob("raw-*.arrow")}
    assert len(made) < 80
    assert not list((tmp_path / "killed").glob("*.arrow"))

    prepare(raw, tmp_path / "killed")
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    prepare(raw, tmp_path / "whole")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_users_mistakes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        prepare(tmp_path / "empty", tmp_path)
    (tmp_path / "none").mkdir()
    pq.write_table(RAW_SCHEMA.empty_table(), tmp_path / "none/raw.parquet")
    with pytest.raises(UserError, match="hold no rows"):
        prepare(tmp_path / "none", tmp_path)
    rows = make_rows(30)
    rows[20]["id"] = rows[4]["id"]
    with pytest.raises(UserError, match='"row-00004" occurs 2 times'):
        prepare(write_raw(tmp_path / "twice", rows), tmp_path / "b")
    broken = write_raw(tmp_path / "broken", make_rows(30))
    (broken / "raw-000.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"raw-000\.parquet cannot be read"):
        prepare(broken, tmp_path / "c")
    other = tmp_path / "other"
    other.mkdir()
    pq.write_table(pa.table({"id": ["a"], "label": [1]}), other / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet is not in the raw schema.*image, label"):
        prepare(other, tmp_path / "d")


def test_a_split_that_shares_a_group_stops_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streetvision.prepare import prepare as module

    real = module.split_groups

    def leaking(*arguments: Any) -> Any:
        result = real(*arguments)
        quarter = -(-len(result.split) // len(SPLITS))
        result.split[:] = np.repeat(np.array(SPLITS, object), quarter)[: len(result.split)]
        return result

    monkeypatch.setattr(module, "split_groups", leaking)
    with pytest.raises(RuntimeError, match="groups cross the splits"):
        prepare(write_raw(tmp_path / "raw", make_rows()), tmp_path)
