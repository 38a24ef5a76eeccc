from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from streetvision.core.errors import UserError
from streetvision.core.params import CsvSource, ParquetSource, SyntheticSource
from streetvision.core.progress import no_progress
from streetvision.core.schema import RAW_SCHEMA
from streetvision.data.pixels import decode_upright
from streetvision.sources import ingest
from streetvision.sources.ingest import ingest_sources, write_shard
from tests.data.odd_images import encode, picture

SYNTHETIC = SyntheticSource(kind="synthetic", images=22, cities=5, width_px=64, height_px=64)
CSV = CsvSource(kind="csv", name="photos", path="labels.csv")
PARQUET = ParquetSource(kind="parquet", name="natix", path="natix.parquet")

# Rendering is slowed down so that the kill falls between the first and the last shard.
KILLED = """
import sys, time
from pathlib import Path
from streetvision.sources import ingest
from streetvision.core.params import SyntheticSource

if __name__ == "__main__":
    root, workers = Path(sys.argv[1]), int(sys.argv[2])
    source = SyntheticSource(kind="synthetic", images=22, cities=5, width_px=64, height_px=64)
    if workers == 1:
        whole = ingest.write_shard
        ingest.write_shard = lambda part, path: (time.sleep(0.3), whole(part, path))
    ingest.ingest_sources(
        [source], root, root / "raw", root / "scratch", shard_images=2, seed=7, workers=workers,
        progress=lambda shards, total, _: (print("shard", flush=True) or s for s in shards),
    )
"""


@pytest.fixture
def local_root(tmp_path: Path) -> Path:
    root = tmp_path / "local"
    root.mkdir()
    (root / "labels.csv").write_text(
        "file,label,group\n" + "".join(f"{i}.jpg,1,a\n" for i in range(7))
    )
    for i in range(7):
        (root / f"{i}.jpg").write_bytes(b"\xff\xd8\xff" + f"photo {i}".encode())
    table = pa.table(
        {"image": [f"row {i}".encode() for i in range(5)], "label": [0, 1, None, 0, 1]}
    )
    pq.write_table(table, root / "natix.parquet")
    return root


def run(sources, local_root: Path, output: Path, **options) -> dict:
    options = {"shard_images": 6, "seed": 7, "workers": 1} | options
    scratch = options.pop("scratch", output.with_name(output.name + "-scratch"))
    return ingest_sources(sources, local_root, output, scratch, **options)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_sources_are_concatenated_in_one_schema(local_root, tmp_path):
    shown: list[tuple[int, str]] = []

    def progress(items, total, description):
        shown.append((total, description))
        return items

    report = run(
        [SYNTHETIC, CSV, PARQUET],
        local_root,
        tmp_path / "raw",
        progress=progress,
    )
    names = sorted(path.name for path in (tmp_path / "raw").iterdir())
    assert names == [
        *(f"00-synthetic-{i:05d}.parquet" for i in range(4)),
        *(f"01-photos-{i:05d}.parquet" for i in range(2)),
        "02-natix-00000.parquet",
    ]
    tables = [pq.read_table(tmp_path / "raw" / name) for name in names]
    assert all(table.schema.equals(RAW_SCHEMA) for table in tables)
    table = pa.concat_tables(tables)
    assert len(set(table["id"].to_pylist())) == table.num_rows == 34
    assert table["source"].to_pylist() == ["synthetic"] * 22 + ["photos"] * 7 + ["natix"] * 5
    assert table["label"].to_pylist()[22:] == [1] * 7 + [0, 1, None, 0, 1]
    assert [s["rows"] for s in report["sources"].values()] == [22, 7, 5]
    size = sum(path.stat().st_size for path in (tmp_path / "raw").iterdir())
    assert report["total"] == {"rows": 34, "shards": 7, "bytes": size, "ignored_files": 0}
    assert shown == [(7, "shards")]


def test_bytes_do_not_depend_on_workers(local_root, tmp_path):
    sources = [SYNTHETIC, CSV, PARQUET]
    run(sources, local_root, tmp_path / "one")
    run(sources, local_root, tmp_path / "two", workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    run(sources, local_root, tmp_path / "other", seed=8)
    different = digests(tmp_path / "other").items() ^ digests(tmp_path / "one").items()
    assert {name for name, _ in different} == {f"00-synthetic-{i:05d}.parquet" for i in range(4)}


def test_a_mistake_in_a_worker_stays_one_line(local_root, tmp_path, monkeypatch):
    whole = ingest.plan_source

    def plan_then_lose(source, *arguments, **options):
        plan = whole(source, *arguments, **options)
        (local_root / "5.jpg").unlink(missing_ok=True)
        return plan

    monkeypatch.setattr(ingest, "plan_source", plan_then_lose)
    with pytest.raises(UserError, match=r"5\.jpg does not exist"):
        run([CSV], local_root, tmp_path / "raw", shard_images=2, workers=2)
    assert not (tmp_path / "raw").exists()


class Suicide:
    """A part whose worker is killed, as the kernel does when memory runs out."""

    n_rows = 1

    def read(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_reported(tmp_path):
    jobs = {"a.parquet": Suicide(), "b.parquet": Suicide()}
    with pytest.raises(UserError, match="worker processes was killed"):
        ingest._write_shards(jobs, tmp_path, 2, no_progress)


def group_is_alive(group: int) -> bool:
    """Whether the process group has a member that is no zombie."""
    listing = subprocess.check_output(["ps", "-A", "-o", "pgid=,stat="], text=True)
    members = [line.split() for line in listing.splitlines()]
    return any(int(pgid) == group and not state.startswith("Z") for pgid, state in members)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_rerun_gives_the_same_bytes(tmp_path, workers):
    root = tmp_path / "killed"
    root.mkdir()
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, script, root, str(workers)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (root / "raw").exists()
    deadline = time.monotonic() + 10
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, "orphaned workers go on"
        time.sleep(0.05)
    finished = {p.name: p.stat().st_mtime_ns for p in (root / "scratch").glob("*.parquet")}
    assert 1 <= len(finished) <= 11
    (root / "scratch/.00-synthetic-00010.parquet.x.tmp").write_bytes(b"left behind")

    source = SyntheticSource(kind="synthetic", images=22, cities=5, width_px=64, height_px=64)
    options = {"shard_images": 2, "seed": 7}
    run([source], root, root / "raw", scratch=root / "scratch", **options)
    run([source], root, tmp_path / "whole", **options)
    assert digests(root / "raw") == digests(tmp_path / "whole")
    assert sorted(p.name for p in (root / "scratch").iterdir()) == [".inputs.sha256"]
    kept = {name: (root / "raw" / name).stat().st_mtime_ns for name in finished}
    assert kept == finished


def test_shards_of_other_inputs_are_not_resumed(local_root, tmp_path):
    scratch = tmp_path / "scratch"
    options = {"scratch": scratch, "shard_images": 4}
    run([CSV], local_root, tmp_path / "raw", **options)
    first = digests(tmp_path / "raw")
    for name in first:  # as if the run had been killed just before the shards were moved
        (tmp_path / "raw" / name).replace(scratch / name)
    (local_root / "2.jpg").write_bytes(b"\xff\xd8\xffanother photo")
    run([CSV], local_root, tmp_path / "raw", **options)
    second = digests(tmp_path / "raw")
    assert {name for name in first if first[name] != second[name]} == {"00-photos-00000.parquet"}


def test_stale_shards_are_deleted(local_root, tmp_path):
    run([CSV], local_root, tmp_path / "raw", shard_images=1)
    (tmp_path / "raw/ingest.manifest.json").write_text("{}")
    run([CSV], local_root, tmp_path / "raw", shard_images=7)
    names = sorted(path.name for path in (tmp_path / "raw").iterdir())
    assert names == ["00-photos-00000.parquet", "ingest.manifest.json"]


class Rows:
    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.n_rows = len(sizes)

    def read(self):
        for index, size in enumerate(self.sizes):
            yield {"id": str(index), "source": "s", "image": {"bytes": bytes(size), "path": None}}


def test_row_groups_are_bounded_in_rows_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "ROW_GROUP_BYTES", 1000)
    write_shard(Rows([1] * 600 + [400] * 7), tmp_path / "x.parquet")
    file = pq.ParquetFile(tmp_path / "x.parquet")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sizes == [250, 250, 103, 3, 1]
    assert [len(v["bytes"]) for v in file.read()["image"].to_pylist()] == [1] * 600 + [400] * 7


def test_raw_images_keep_no_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0110] = "SERIAL-4711"
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[1] = "SERIAL-N"
    given = {kind: encode(picture(), kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")}
    given["broken"] = b"no image"

    class Images:
        n_rows = len(given)

        def read(self) -> Iterator[dict[str, Any]]:
            for name, data in given.items():
                yield {"id": name, "source": "s", "image": {"bytes": data, "path": None}}

    write_shard(Images(), tmp_path / "a.parquet")
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    for row in rows:
        before, after = given[row["id"]], row["image"]["bytes"]
        assert b"SERIAL" not in after
        if row["id"] == "broken":
            assert after == before
        else:
            assert b"SERIAL" in before
            assert np.array_equal(decode_upright(after, 10**6), decode_upright(before, 10**6))
