"""What a Parquet file may cost, seen before anything of it is decompressed.

A file of kilobytes can claim 10¹² rows, or hold gigabytes of one repeated byte. The footer's claims are checked
against the file's size; the bytes that a page unpacks to are taken from the page's own header, which is what
Arrow allocates by, not from the footer, which may say something else.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from streetvision.core.errors import UserError

MAX_FOOTER_BYTES = 16 * 2**20  # of the footer, which Arrow holds about fortyfold
MAX_COLUMNS = 1000
# Bytes that one row group's columns unpack to at a time (a page each, and dictionaries), unless they are
# stored in a quarter of that: photographs don't compress, and many writers put hundreds into one page.
MAX_UNPACKED_BYTES = 128 * 2**20
MAX_EXPANSION = 4
MAX_VALUES_PER_ROW = 64  # of a list, on average
# Of values that a file stores once and repeats, in the rows decoded together.
BATCH_BYTES = 64 * 2**20
MAX_TEXT_CHARACTERS = 2**20  # of all texts of one row
# Images of a file's rows together: a file may repeat one, but not grow into a disk full of it.
MAX_REPEATED_BYTES, MAX_REPETITION = 2**30, 16

_MAX_HEADER_BYTES = 16 * 2**20  # of a page's header: Arrow's own limit
_DELTA_BYTE_ARRAY = 7
_MAX_DEPTH = 12  # of a footer's structs and lists; those of its statistics have 8


def check_footer(file: Path) -> None:
    """Refuse a footer that is larger than a table of images needs, before Arrow reads it.

    Raises
    ------
    UserError
        It is above `MAX_FOOTER_BYTES`.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - 8, 0))
        tail = stream.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] == b"PAR1" and MAX_FOOTER_BYTES < length < size:
        raise UserError(
            f"{file}: its footer has {length:,} bytes; at most {MAX_FOOTER_BYTES:,} are read"
        )


def check_claims(file: Path, metadata: Any) -> None:
    """Refuse more columns than are read, and rows that a file of this size cannot hold.

    A row takes a byte at least: images are not all the same.

    Raises
    ------
    UserError
        The rows of the row groups do not add up, or are more than the file has bytes; too many columns.
    """
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if sum(groups) != metadata.num_rows or min(groups, default=0) < 0:
        raise UserError(
            f"{file} is damaged: it claims {metadata.num_rows:,} rows, its row groups {sum(groups):,}"
        )
    size = file.stat().st_size
    if metadata.num_rows > size:
        raise UserError(
            f"{file} claims {metadata.num_rows:,} rows in {size:,} bytes; it is damaged"
        )
    if metadata.num_columns > MAX_COLUMNS:
        raise UserError(
            f"{file} has {metadata.num_columns:,} columns; at most {MAX_COLUMNS:,} are read"
        )


def rows_at_once(file: Path, row_groups: Iterable[int], columns: Iterable[str], limit: int) -> int:
    """Rows that may be decoded together, at most `limit`; refuses what would unpack to too much.

    Parameters
    ----------
    file : the file
    row_groups : numbers of those that will be read
    columns : names of those that will be read, with all that is nested in them
    limit : rows

    Raises
    ------
    UserError
        A row group needs more than `MAX_UNPACKED_BYTES` at a time and `MAX_EXPANSION` times what is stored,
        or has more values than `MAX_VALUES_PER_ROW`; or footer or pages are damaged.
    """
    names = tuple(columns)
    rows = limit
    try:
        found = file.stat()
        groups = _row_groups(file, found.st_size, found.st_mtime_ns)
        with file.open("rb") as stream:
            for number in row_groups:
                read = [
                    each
                    for each in groups[number].chunks
                    if any(f"{each.path}.".startswith(f"{name}.") for name in names)
                ]
                repeated = _check_row_group(file, stream, number, groups[number].n_rows, read)
                rows = min(rows, max(BATCH_BYTES // max(repeated, 1), 1))
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is damaged: its pages have no valid headers") from error
    return rows


def _check_row_group(
    file: Path, stream: BinaryIO, number: int, n_rows: int, chunks: Iterable[_Chunk]
) -> int:
    """Return the bytes of the values that are stored once and may be repeated in every row."""
    unpacked = stored = repeated = 0
    for chunk in chunks:
        pages = list(_pages(stream, chunk))
        dictionary = sum(page.unpacked for page in pages if page.dictionary)
        shared = max((page.unpacked for page in pages if page.shares_prefixes), default=0)
        repeated += max(dictionary, shared)
        largest = max(
            (page for page in pages if not page.dictionary),
            key=lambda page: page.unpacked,
            default=_Page(0, 0, 0),
        )
        unpacked += dictionary + largest.unpacked
        stored += sum(page.stored for page in pages if page.dictionary) + largest.stored
        n_values = sum(page.n_values for page in pages if not page.dictionary)
        if n_values > MAX_VALUES_PER_ROW * n_rows:
            raise UserError(
                f"{file}: {chunk.path} has {n_values:,} values in {n_rows:,} rows; "
                f"at most {MAX_VALUES_PER_ROW} a row are read"
            )
    if unpacked > max(MAX_UNPACKED_BYTES, MAX_EXPANSION * stored):
        raise UserError(
            f"{file}: row group {number} unpacks to {unpacked:,} bytes at a time, stored in {stored:,}; "
            f"at most {MAX_UNPACKED_BYTES:,}, or {MAX_EXPANSION} times what is stored, are read"
        )
    return repeated


# --------------------------------------------------------------------------- footer and page headers


@dataclass(frozen=True)
class _Chunk:
    """A column of one row group: its path with dots, and where its pages lie in the file."""

    path: str
    start: int
    end: int


@dataclass(frozen=True)
class _RowGroup:
    n_rows: int
    chunks: tuple[_Chunk, ...]


@lru_cache(maxsize=4)
def _row_groups(file: Path, size: int, changed_ns: int) -> tuple[_RowGroup, ...]:
    """Read the row groups from the footer of a file of `size` bytes that was last changed then.

    Not by pyarrow's `RowGroupMetaData.column`: in a damaged footer it ends the process.
    """
    with file.open("rb") as stream:
        stream.seek(size - 8)
        length = int.from_bytes(stream.read(4), "little")
        if not 0 < length <= min(size - 8, MAX_FOOTER_BYTES):
            raise ValueError("no footer")
        stream.seek(size - 8 - length)
        footer = _Compact(stream.read(length)).struct()
    groups = []
    for group in _structs(footer, 4):
        chunks = []
        for column in _structs(group, 1):
            about = column.get(3)
            if not isinstance(about, dict):
                raise ValueError("a column that nothing is said of")  # noqa: TRY004 (one kind of error)
            path = about.get(3)
            if not isinstance(path, list) or not all(isinstance(part, bytes) for part in path):
                raise ValueError("a column without a name")
            start = _number(about, 9)
            if 0 < (dictionary := _number(about, 11, 0)) < start:
                start = dictionary
            name = ".".join(part.decode(errors="backslashreplace") for part in path)
            chunks.append(_Chunk(name, start, start + _number(about, 7)))
        groups.append(_RowGroup(_number(group, 3), tuple(chunks)))
    return tuple(groups)


def _structs(fields: dict[int, Any], field: int) -> list[dict[int, Any]]:
    found = fields.get(field)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError("no list of structs")
    return found


@dataclass(frozen=True)
class _Page:
    """What a page's header says: bytes when unpacked and as stored, and values."""

    unpacked: int
    stored: int
    n_values: int
    dictionary: bool = False
    shares_prefixes: bool = False  # a value may repeat the one before without its bytes


def _pages(stream: BinaryIO, chunk: _Chunk) -> Iterator[_Page]:
    """Walk over the pages of a column chunk, which lie one after the other, each behind its header."""
    at = chunk.start
    while at < chunk.end:
        header, length = _page_header(stream, at, chunk.end)
        data = header.get(5) or header.get(8) or header.get(7) or {}
        if not isinstance(data, dict):
            raise ValueError("no page header")  # noqa: TRY004 (one kind of error)
        page = _Page(
            unpacked=_number(header, 2),
            stored=_number(header, 3),
            n_values=_number(data, 1, 0),
            dictionary=header[1] == 2,
            shares_prefixes=data.get(4 if 8 in header else 2) == _DELTA_BYTE_ARRAY,
        )
        yield page
        at += length + page.stored


def _number(fields: dict[int, Any], field: int, default: int | None = None) -> int:
    """A size or a place: a number, not negative."""
    found = fields.get(field, default)
    if type(found) is not int or found < 0:
        raise ValueError("a negative size, or none")
    return found


def _page_header(stream: BinaryIO, at: int, end: int) -> tuple[dict[int, Any], int]:
    """Fields of the header at `at` by their numbers, and its length."""
    size = 256
    while True:
        stream.seek(at)
        data = stream.read(min(size, end - at))
        try:
            reader = _Compact(data)
            header = reader.struct()
        except IndexError:
            if size >= min(_MAX_HEADER_BYTES, end - at):
                raise
            size *= 16
        else:
            if not {1, 2, 3} <= header.keys():
                raise ValueError("no page header")
            return header, reader.at


class _Compact:
    """Reads Thrift's compact protocol, in which Parquet's footers and headers are written.

    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md; the fields are in
    https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Fields by number; doubles are skipped, so their value is None."""
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = kind == 1 if kind in {1, 2} else self._value(kind, depth)
        return fields

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("an endless number")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deep")
        if kind in {1, 2, 3}:  # in lists truth values, too, have a byte each
            return self._byte()
        if kind in {4, 5, 6}:
            return self._integer()
        if kind == 7:
            self._bytes(8)
            return None
        if kind == 8:
            return self._bytes(self._varint())
        if kind in {9, 10}:
            head = self._byte()
            length = self._varint() if head >> 4 == 15 else head >> 4
            if length > len(self.data):  # each takes a byte at least
                raise IndexError
            return [self._value(head & 15, depth + 1) for _ in range(length)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError("a map, or nothing that there is")

    def _bytes(self, length: int) -> bytes:
        self.at += length
        if self.at > len(self.data):
            raise IndexError
        return self.data[self.at - length : self.at]
