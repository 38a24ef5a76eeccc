"""CSV files as spreadsheets and libraries write them: read where it is sure how, else one clear line."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streetvision.core.errors import UserError
from streetvision.core.escaping import from_csv_cell
from streetvision.sources.csv_table import MAX_TABLE_BYTES, parse_csv, read_csv

WANTED = {"file": ("filename", "file_name", "path"), "label": ("labels",)}
PLAIN = "file,label,note\na.jpg,1,x\nb.jpg,0,\n"


def cells(data: str | bytes) -> list[dict[str, str]]:
    table = parse_csv(data.encode() if isinstance(data, str) else data, "t.csv", WANTED)
    return [row for _, row in table.records()]


@pytest.mark.parametrize(
    "data",
    [
        PLAIN.encode(), PLAIN.encode("utf-8-sig"), PLAIN.encode("utf-16"), PLAIN.encode("utf-16-le"),
        PLAIN.encode("utf-16-be"), PLAIN.encode("utf-32"), PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace("\n", "\r").encode(), PLAIN.replace(",", ";"), PLAIN.replace(",", "\t"),
        PLAIN.replace(",", "|"), PLAIN.replace(",", ", "), "sep=;\n" + PLAIN.replace(",", ";"),
        "SEP=;\r\n" + PLAIN.replace(",", ";"), "\ufeffsep=,\n" + PLAIN, "\n\n" + PLAIN, ",,\r\n" + PLAIN,
        PLAIN + "\n,,\n", PLAIN.replace("file,label", "File , LABEL"), PLAIN.rstrip("\n"),
        PLAIN.replace("file,label", '"file","label"'), PLAIN.replace("file,", "filename,"),
        PLAIN.replace("file,label", "File Name,Labels"), PLAIN.replace("x\n", "x,,\n"),
        PLAIN.replace("\n", ",\n"),
    ],
)  # fmt: skip
def test_dialects(data: str | bytes) -> None:
    assert cells(data) == [
        {"file": "a.jpg", "label": "1", "note": "x"}, {"file": "b.jpg", "label": "0", "note": ""},
    ]  # fmt: skip


def test_lines_are_those_of_the_file() -> None:
    table = parse_csv(b'\r\nsep=;\r\nfile;label\r\n"a\r\nb";1\r\n\r\nc;0\r\n', "t.csv", WANTED)
    assert [line for line, _ in table.rows] == [4, 7]
    assert table.column("file") == ["a\r\nb", "c"]


def test_cells_stay_as_they_are_until_they_are_asked_for() -> None:
    table = parse_csv(b'file,label\n" a.jpg",1\n', "t.csv", WANTED)
    assert table.column("file") == [" a.jpg"]
    assert next(table.records()) == (2, {"file": "a.jpg", "label": "1"})


def test_a_column_of_the_name_itself_comes_first() -> None:
    assert cells("path,file,label\nq,a.jpg,1\n") == [{"path": "q", "file": "a.jpg", "label": "1"}]


def test_a_cell_may_be_huge() -> None:
    note = "x" * 300_000  # Python's own limit is 131,072
    assert cells(f"file,label,note\na.jpg,1,{note}\n")[0]["note"] == note


def test_columns_without_a_name_are_left_out() -> None:
    # As pandas writes the index.
    assert cells(",file,label\n0,a.jpg,1\n1,b.jpg,0\n")[1] == {"file": "b.jpg", "label": "0"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "t.csv has no column file, label; its columns are none"),
        (b"a,b\n1,2\n", "t.csv has no column file, label; its columns are a, b"),
        (b"file;b\n1;2\n", "t.csv has no column file, label; its columns are file;b"),
        (b"file,label,Label\n", "t.csv names a column twice: label and Label"),
        (b"file,label,x,x\n", "t.csv names a column twice: x"),
        (b"path,filename,label\n", "t.csv: path and filename may each be the column file; call one"),
        (b"file,label\na.jpg\n", "t.csv line 2: 1 cells, but the header names 2 columns"),
        (b"file,label\na.jpg,1,2\n", "t.csv line 2: 3 cells"),
        (b"\nfile,label\na,1\nstra\xdfe,1\n", "t.csv line 4 is not UTF-8 (byte 0xDF); save the file as UTF-8"),
        (b'file,label\na,1\n"b,0\nc,1\nd,1\n', "t.csv line 3: unexpected end of data; is a quote not closed?"),
        (b"file,label\na\0,1\n", "t.csv line 2 holds a zero byte"),
        (b"\xff\xfef", "t.csv is damaged: it begins as utf-16-le"),
        (b"fi\x1b[2Jle,label\n", r"t.csv has no column file; its columns are fi\x1b[2Jle, label"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(data: bytes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        cells(data)
    assert str(caught.value).startswith(message)
    assert str(caught.value).isprintable()


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(UserError, match=r"pipe\.csv is not a regular file"):
        read_csv(tmp_path / "pipe.csv", WANTED)
    with (tmp_path / "sparse.csv").open("wb") as file:
        file.truncate(MAX_TABLE_BYTES + 1)
    with pytest.raises(UserError, match=r"sparse\.csv is larger than the 256 MiB that a table may"):
        read_csv(tmp_path / "sparse.csv", WANTED)


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@given(
    rows=st.lists(st.tuples(TEXTS, st.sampled_from("01"), TEXTS), max_size=5),
    dialect=st.sampled_from([",", ";", "\t", "|"]),
    ends=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_what_the_standard_writer_writes_is_read(
    rows: list[tuple[str, str, str]], dialect: str, ends: str, encoding: str
) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=dialect, lineterminator=ends, quoting=csv.QUOTE_ALL)
    writer.writerows([("file", "label", "note"), *rows])
    table = parse_csv(buffer.getvalue().encode(encoding), "t.csv", WANTED)
    assert [row for _, row in table.rows] == [tuple(map(from_csv_cell, row)) for row in rows]


@given(st.binary(max_size=60))
def test_any_bytes_are_a_table_or_one_line(data: bytes) -> None:
    for start in (b"", b"file,label\n", b"file;label\r"):
        try:
            parse_csv(start + data, "t.csv", WANTED)
        except UserError as error:
            assert str(error).isprintable()  # noqa: PT017
