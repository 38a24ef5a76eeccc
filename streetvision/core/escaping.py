"""Names and values of others in what people read: one function a medium, so that a value stays a value.

A file, a group or a branch may be called anything: a formula to a spreadsheet, a picture to Markdown, an order
to a terminal, a screen long.
"""

from __future__ import annotations

import os
import re
from typing import Any

MOST = 80  # characters of a name that are shown
# What a spreadsheet takes for a formula (OWASP, CSV injection), after the mark that says it is none.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_MARK = "'"


def shortened(text: str, most: int = MOST) -> str:
    """A name of at most `most` characters: what is left out in its middle is an ellipsis."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[head + 1 - most :]}"


def terminal(text: str, keep: str = "") -> str:
    r"""Text without control and formatting characters, parts of characters and line breaks, as `\x1b`.

    Those in `keep` stay: a text of many lines keeps its line breaks, a name does not.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode()
        for each in text
    )


def escaped(name: str | os.PathLike[str]) -> str:
    r"""The name of a file as text of one line in UTF-8, from which the name can be told: `\` is `\\`.

    For ids, paths in tables and messages; a byte that is not UTF-8 is `\udc..`, as Python has it.
    """
    return terminal(os.fspath(name).replace("\\", "\\\\"))


def markdown(text: str) -> str:
    """Text that Markdown, as GitHub reads it, shows as it is: in a sentence, a heading or a cell of a table.

    No tag, link, picture, emphasis, formula, code, mention or reference comes of it.
    """
    text = terminal(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*\[\]|~$]", r"\\\g<0>", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it is no emphasis
    text = text.replace("://", ":\\//").replace("www.", "www\\.")
    # A space without width: mentions and references are looked for in the text that is shown.
    return re.sub(r"(?<=[@#])(?=\w)", "&#8203;", text)


def caption(text: str, most: int = MOST) -> str:
    """A name in a picture. `$` is no formula there: `plots` turns them off."""
    return shortened(terminal(text), most)


def csv_cell(value: Any) -> Any:
    """A cell that a spreadsheet takes for text if it is text: `'` goes before what would be a formula.

    `from_csv_cell` takes it off again. Text that is no UTF-8 is escaped.
    """
    if not isinstance(value, str | os.PathLike):
        return value
    text = os.fspath(value)
    if _FORMULA.match(text) and not _NUMBER.fullmatch(text):
        text = _MARK + text
    return text.encode("utf-8", "backslashreplace").decode()


def from_csv_cell(text: str) -> str:
    """What `csv_cell` was given, of text in UTF-8."""
    if text.startswith(_MARK) and _FORMULA.match(text):
        return text[1:]
    return text
