"""Parquet files that claim or unpack to more than they hold are refused before it costs anything."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streetvision.core.errors import UserError
from streetvision.sources import parquet_bounds
from streetvision.sources.natix import plan_parquet
from streetvision.sources.parquet_bounds import (
    BATCH_BYTES,
    MAX_COLUMNS,
    MAX_REPEATED_BYTES,
    MAX_TEXT_CHARACTERS,
    check_claims,
    check_footer,
    rows_at_once,
)

MIB = 2**20


def varint(value: int) -> bytes:
    """Thrift's zigzag number, as it stands in a footer."""
    value, out = 2 * value, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def with_footer(file: Path, old: bytes, new: bytes) -> Path:
    """Replace bytes of a file's footer, which may change its length."""
    data = file.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[start:-8]
    assert old in footer
    footer = footer.replace(old, new)
    file.write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    return file


def write(path: Path, images: list[bytes], **options) -> Path:
    table = pa.table({"image": pa.array(images, pa.binary()), "label": [1, 0] * (len(images) // 2)})
    pq.write_table(table, path, **options)
    return path


def read_all(file: Path) -> int:
    return sum(1 for part in plan_parquet("p", [file], 1000).parts for _ in part.read())


def test_rows_that_the_file_cannot_hold(tmp_path):
    table = pa.table({"image": [b"x"], "label": [1]})
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False)
    # All i64 fields that are 1: the rows of the file, of the row group, the values of each column.
    file = with_footer(tmp_path / "x.parquet", b"\x16\x02", b"\x16" + varint(10**12))
    assert pq.read_metadata(file).num_rows == 10**12
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"claims 1,000,000,000,000 rows in \d+ bytes"):
        plan_parquet("p", [file], 10)
    assert time.perf_counter() - start < 1


def test_rows_that_the_row_groups_do_not_have(tmp_path):
    pq.write_table(pa.table({"image": [b"x"] * 8, "label": [1] * 8}), tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    footer = data[len(data) - 8 - int.from_bytes(data[-8:-4], "little") :]
    at = footer.index(b"\x16\x10")  # the first is the file's
    file = with_footer(tmp_path / "x.parquet", footer[: at + 2], footer[:at] + b"\x16\x20")
    assert pq.read_metadata(file).num_rows == 16
    with pytest.raises(UserError, match="claims 16 rows, its row groups 8"):
        plan_parquet("p", [file], 10)


@pytest.mark.parametrize("codec", ["zstd", "gzip", "snappy", "brotli", "lz4"])
def test_what_a_page_unpacks_to(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(parquet_bounds, "MAX_UNPACKED_BYTES", MIB)
    file = write(tmp_path / "x.parquet", [bytes(2 * MIB)] * 2, compression=codec)
    with pytest.raises(
        UserError, match=r"row group 0 unpacks to 2,097,\d+ bytes at a time, stored"
    ) as e:
        read_all(file)
    assert "at most 1,048,576, or 4 times what is stored" in str(e.value)


def test_a_footer_that_makes_it_small_is_not_believed(tmp_path):
    file = write(tmp_path / "x.parquet", [bytes(200 * MIB)] * 2, compression="zstd")
    claimed = pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size
    with_footer(file, varint(claimed), varint(100))
    assert pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size == 100
    with pytest.raises(UserError, match=r"unpacks to 209,715,\d+ bytes at a time"):
        read_all(file)


MEASURE = """
import resource, sys
from pathlib import Path
from streetvision.sources.natix import plan_parquet
from streetvision.core.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read = 0
try:
    for part in plan_parquet("p", [Path(sys.argv[1])], 1000).parts:
        for row in part.read():
            read += len(row["image"]["bytes"])
except UserError:
    pass
print(read, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_value_stored_once_and_repeated_takes_no_gigabytes(tmp_path):
    one = pa.array([bytes(32 * MIB)], pa.binary())
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), one)
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": images, "label": [1, 0] * 32}), file, compression="zstd")
    assert file.stat().st_size < 10_000
    script = [sys.executable, "-c", MEASURE, str(file)]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    read, kilobytes = map(int, done.stdout.split())
    assert read == MAX_REPEATED_BYTES  # then the repetition is refused: 64 rows would be 2 GiB
    assert kilobytes < 400_000


@pytest.mark.parametrize("encoding", ["dictionary", "DELTA_BYTE_ARRAY"])
def test_values_that_are_repeated_are_decoded_by_few(tmp_path, encoding):
    options = {} if encoding == "dictionary" else {"column_encoding": {"image": encoding}}
    options["use_dictionary"] = encoding == "dictionary"
    file = write(tmp_path / "x.parquet", [bytes(10 * MIB)] * 4, compression="zstd", **options)
    found = rows_at_once(file, [0], ["image", "label"], 32)
    assert found == (BATCH_BYTES - 1) // (10 * MIB)


def test_photographs_in_one_page_are_no_bomb(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.bytes(MIB) for _ in range(160)]
    for use_dictionary in (True, False):
        file = write(
            tmp_path / "x.parquet", images, compression="zstd", use_dictionary=use_dictionary,
            data_page_size=2**30, dictionary_pagesize_limit=2**30,
        )  # fmt: skip
        assert read_all(file) == 160


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"data_page_size": 100}, {"compression": "gzip"}]
)
def test_pages_add_up_to_what_the_footer_says(tmp_path, version, options):
    rng = np.random.default_rng(1)
    table = pa.table(
        {
            "image": [
                {"bytes": rng.bytes(300) if i % 3 else None, "path": f"a{i}"} for i in range(500)
            ],
            "text": ["cones " * (i % 7) for i in range(500)],
            "box": pa.array([[0.1, 0.2] * (i % 3) for i in range(500)]),
            "label": pa.array([i % 2 for i in range(500)], pa.int8()),
        }
    )
    file = tmp_path / "x.parquet"
    pq.write_table(table, file, data_page_version=version, row_group_size=200, **options)
    metadata = pq.read_metadata(file)
    groups = parquet_bounds._row_groups(file, file.stat().st_size, 0)
    with file.open("rb") as stream:
        for group in range(metadata.num_row_groups):
            assert groups[group].n_rows == metadata.row_group(group).num_rows
            for number in range(metadata.num_columns):
                chunk, own = metadata.row_group(group).column(number), groups[group].chunks[number]
                assert own.path == chunk.path_in_schema
                assert own.end - own.start == chunk.total_compressed_size
                pages = list(parquet_bounds._pages(stream, own))
                saved = chunk.total_uncompressed_size - chunk.total_compressed_size
                assert sum(page.unpacked - page.stored for page in pages) == saved
                values = sum(page.n_values for page in pages if not page.dictionary)
                assert values == chunk.num_values
                assert any(page.dictionary for page in pages) == chunk.has_dictionary_page
    assert rows_at_once(file, range(3), table.column_names, 32) == 32


def test_lists_of_very_many_values(tmp_path):
    boxes = pa.array([[0.5] * 10_000] + [None] * 3, pa.list_(pa.float32()))
    table = pa.table({"image": [b"x"] * 4, "label": [1, 0, 1, 0], "evidence_box": boxes})
    pq.write_table(table, tmp_path / "x.parquet", compression="none")
    with pytest.raises(UserError, match=r"evidence_box.* has 10,003 values in 4 rows; at most 64"):
        read_all(tmp_path / "x.parquet")


def test_texts_of_one_row(tmp_path):
    texts = ["a" * (MAX_TEXT_CHARACTERS + 1), "b"]
    table = pa.table({"image": [b"x"] * 2, "label": [1, 0], "note": texts})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"row 0: its texts have more than 1,048,576 characters"):
        read_all(tmp_path / "x.parquet")


def test_many_columns_and_a_large_footer(tmp_path, monkeypatch):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({f"c{i}": [1] for i in range(MAX_COLUMNS + 1)}), file)
    with pytest.raises(UserError, match=r"has 1,001 columns; at most 1,000"):
        check_claims(file, pq.read_metadata(file))
    check_footer(file)
    monkeypatch.setattr(parquet_bounds, "MAX_FOOTER_BYTES", 1000)
    with pytest.raises(UserError, match=r"its footer has \d+,\d+ bytes; at most 1,000"):
        plan_parquet("p", [file], 10)


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_one_line(tmp_path, seed):
    """Other bytes in the place of a file's: it is read or refused, and nothing else happens.

    In a process of its own: pyarrow ends the one it runs in where a footer's statistics are damaged.
    """
    file = write(tmp_path / "x.parquet", [bytes([i]) * 50 for i in range(20)])
    script = f"""
import random
from contextlib import suppress
from pathlib import Path
from streetvision.core.errors import UserError
from tests.sources.test_parquet_bounds import read_all
file, rng = Path({str(file)!r}), random.Random({seed})
whole = file.read_bytes()
for _ in range(800):
    content = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        first = rng.choice([0, len(content) - 600])
        place = rng.randrange(first, len(content))
        content[place] = rng.choice([rng.randrange(256), 0, 127, 128, 255])
    file.write_bytes(content)
    with suppress(UserError):
        assert read_all(file) == 20
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
