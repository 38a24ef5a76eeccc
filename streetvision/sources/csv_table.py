"""Tables of users: CSV in the dialects that spreadsheets and libraries write; one reader for all commands."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streetvision.core.errors import UserError
from streetvision.core.escaping import escaped, from_csv_cell, terminal
from streetvision.data.walk import read_file

# Millions of rows of a label file; what is larger is no such file.
MAX_TABLE_BYTES = 256 * 2**20
_DELIMITERS = (",", ";", "\t", "|")
_BLANK_LINE = re.compile(r"[ \t,;|]*(\r\n|\r|\n)")
# How Excel tells itself the delimiter.
_SEP_LINE = re.compile(r"\"?sep=(.)\"?[ \t]*(\r\n|\r|\n)", re.IGNORECASE)
_SHOWN = 60  # characters of a cell, 20 names of columns
_MARKS = (  # the longer ones first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class CsvTable:
    """The rows of a CSV file.

    Attributes
    ----------
    place : what errors call the file
    header : names of the columns, those asked for as they were asked for
    rows : number of the line in the file, counted from 1, and cells as they stand, one a column
    """

    place: str
    header: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]

    def records(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Line and cells by column, blanks around them taken off, of each row."""
        for line, cells in self.rows:
            yield line, {name: cell.strip() for name, cell in zip(self.header, cells, strict=True)}

    def column(self, name: str) -> list[str]:
        """Cells of one column as they stand."""
        index = self.header.index(name)
        return [cells[index] for _, cells in self.rows]


def read_csv(
    path: Path, required: Mapping[str, Sequence[str]], optional: Mapping[str, Sequence[str]] = {}
) -> CsvTable:
    """Read a CSV file, see `parse_csv`.

    Raises
    ------
    UserError
        It is no regular file or larger than 256 MiB; or as `parse_csv`.
    """
    return parse_csv(read_table_file(path), escaped(path), required, optional)


def read_table_file(path: Path) -> bytes:
    """Read a file of a table in whichever form; UserError as `read_csv`."""
    return read_file(path, MAX_TABLE_BYTES, f"the {MAX_TABLE_BYTES >> 20} MiB that a table may be")


def parse_csv(
    data: bytes | str,
    place: str,
    required: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]] = {},
) -> CsvTable:
    """Parse the content of a CSV file in any of the usual dialects, where it is sure which.

    Read are UTF-8, and UTF-16 or UTF-32 that say so; commas, semicolons, tabs or bars between cells,
    whichever gives the columns that are required; a line `sep=;`, empty lines, any ends of lines; blanks
    after a delimiter; the mark that `escaping.csv_cell` puts before formulas. Case, blanks, hyphens and
    underscores in the names of columns do not matter. Rows without any content and columns without a
    name are left out.

    Parameters
    ----------
    data
        The file's content.
    place
        What errors call it.
    required, optional
        Columns and their other names in the wild. A column of the name itself comes before the others; two of
        the others are refused.

    Raises
    ------
    UserError
        Names the line that is wrong, or what is missing.
    """
    text = data if isinstance(data, str) else decode_text(data, place)
    body, skipped, delimiter = _start(text)
    names = {**required, **optional}
    found: list[str] = []
    for candidate in (delimiter,) if delimiter else _DELIMITERS:
        header = _renamed(_header(body, candidate), names, place)
        if set(required) <= set(header):
            return CsvTable(place, *_rows(body, candidate, header, skipped, place))
        found = found or header
    missing = ", ".join(name for name in required if name not in found)
    listed = ", ".join(terminal(name)[:_SHOWN] for name in found[:20]) or "none"
    raise UserError(f"{place} has no column {missing}; its columns are {listed}")


def decode_text(data: bytes, place: str) -> str:
    """Text of a file in UTF-8, or in UTF-16 or UTF-32 that begins with its mark or is plain from its zeros.

    Raises
    ------
    UserError
        It is none of these; the line of the first byte that is not UTF-8.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is None:
        # Latin letters in UTF-16 have every other byte zero.
        start = data[:64]
        pairs = len(start) // 2
        if pairs and start[: 2 * pairs : 2].count(0) == 0 and start[1::2].count(0) == pairs:
            encoding = "utf-16-le"
        elif pairs and start[: 2 * pairs : 2].count(0) == pairs and start[1::2].count(0) == 0:
            encoding = "utf-16-be"
    try:
        text = data.decode(encoding or "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", data[: error.start])) + 1
        if encoding not in {None, "utf-8"}:
            raise UserError(f"{place} is damaged: it begins as {encoding}, but is not") from error
        raise UserError(
            f"{place} line {line} is not UTF-8 (byte 0x{data[error.start]:02X}); save the file as UTF-8 "
            '("CSV UTF-8" in Excel)'
        ) from error
    if "\0" in text:
        line = len(re.findall(r"\r\n|\r|\n", text[: text.index("\0")])) + 1
        raise UserError(f"{place} line {line} holds a zero byte: it is no text file, or damaged")
    return text


def _start(text: str) -> tuple[str, int, str | None]:
    """What comes after empty lines and a line `sep=`; how many lines are before; that delimiter."""
    position, skipped, delimiter = 0, 0, None
    while True:
        found = _BLANK_LINE.match(text, position)
        if found is None and delimiter is None:
            found = _SEP_LINE.match(text, position)
            delimiter = found[1] if found else None
        if found is None:
            return text[position:], skipped, delimiter
        position, skipped = found.end(), skipped + 1


def _reader(body: str, delimiter: str) -> Iterator[list[str]]:
    # A cell may be as large as the file.
    csv.field_size_limit(MAX_TABLE_BYTES)
    return csv.reader(
        io.StringIO(body, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True
    )


def _header(body: str, delimiter: str) -> list[str]:
    try:
        return [from_csv_cell(name.strip()) for name in next(_reader(body, delimiter), [])]
    except csv.Error:
        return []  # with this delimiter it is none


def _renamed(header: list[str], names: Mapping[str, Sequence[str]], place: str) -> list[str]:
    """The header with the columns that are asked for under their own names."""
    folded = [_folded(name) for name in header]
    result = list(header)
    for name, others in names.items():
        own = [i for i, each in enumerate(folded) if each == _folded(name)]
        like = own or [i for i, each in enumerate(folded) if each in set(map(_folded, others))]
        if len(like) > 1:
            which = " and ".join(terminal(header[i]) for i in like)
            raise UserError(
                f"{place} names a column twice: {which}"
                if own
                else f"{place}: {which} may each be the column {name}; call one of them {name}"
            )
        for index in like:
            result[index] = name
    twice = [name for name, times in Counter(result).items() if name and times > 1]
    if twice:
        raise UserError(f"{place} names a column twice: {terminal(twice[0])}")
    return result


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _rows(
    body: str, delimiter: str, header: list[str], skipped: int, place: str
) -> tuple[tuple[str, ...], tuple[tuple[int, tuple[str, ...]], ...]]:
    """Header and rows of the columns that have a name."""
    named = [index for index, name in enumerate(header) if name]
    reader = _reader(body, delimiter)
    rows = []
    line = skipped  # the last one of the record before
    try:
        next(reader)
        line = skipped + reader.line_num  # type: ignore[attr-defined]
        for cells in reader:
            first, line = line + 1, skipped + reader.line_num  # type: ignore[attr-defined]
            if not any(map(str.strip, cells)):
                continue
            if len(cells) < len(header) or any(map(str.strip, cells[len(header) :])):
                raise UserError(
                    f"{place} line {first}: {len(cells)} cells, but the header names {len(header)} columns"
                )
            rows.append((first, tuple(from_csv_cell(cells[index]) for index in named)))
    except csv.Error as error:
        # An open quote takes the rest of the file for one cell: the line to look at is where it begins.
        raise UserError(f"{place} line {line + 1}: {error}; is a quote not closed?") from error
    return tuple(header[index] for index in named), tuple(rows)
