"""Single values of a table as this package reads them, whichever source they are from: text and keys."""

from __future__ import annotations

import datetime as dt
import math
import re
import unicodedata
from decimal import Decimal

# What people and libraries write where there is nothing: pandas' list (`read_csv`, na_values), dashes,
# JSON's empty values, and what `str` makes of None, NaN and NaT. Compared without regard to case.
MISSING = frozenset(
    {
        "", "#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan", "<na>", "n/a",
        "n.a.", "na", "nan", "nat", "nil", "none", "null", "undefined", "-", "--", "---", "–", "—", "?",
        "[]", "{}",
    }
)  # fmt: skip

# Blanks that `str.strip` leaves: zero-width space and joiners, the byte order mark.
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
# Whole numbers as pandas writes them once a column has become floating: `7.0`, `1e+16`.
_FLOATED = re.compile(r"[+-]?(\d+\.0|\d(\.\d+)?e\+\d+)")
# Beyond these not every whole number is one: two ids of a column may have become the same float.
EXACT_IN_FLOAT64 = 2**53


def stripped(value: str) -> str:
    """Text in Unicode's composed form (NFC), its blanks single and none around it.

    macOS decomposes names (NFD), so one name has two spellings that look the same.
    """
    return " ".join(unicodedata.normalize("NFC", value).strip(_INVISIBLE).split())


def is_missing(value: object) -> bool:
    """Whether a value says nothing: null, NaN, or a word for it."""
    if value is None or value != value:  # noqa: PLR0124 (NaN and NaT, of any library)
        return True
    return isinstance(value, str) and stripped(value).casefold() in MISSING


def text(value: object) -> str | None:
    """Text of a description or of a condition; None where there is none."""
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if is_missing(value):
        return None
    return unicodedata.normalize("NFC", str(value)).strip(f"{_INVISIBLE} \t\r\n\f\v\xa0") or None


def key(value: object, exact_below: int = EXACT_IN_FLOAT64) -> str | None:
    """Name of a group or drive, the same however its source stored it; None where there is none.

    One site is 1 in a column of integers and 1.0 in one that a missing value made floating, so whole
    numbers have no decimals, in text, too, but only in the spelling that pandas gives a whole float
    (`7.0`, `1e+16`): `1.10` and `1.1` are versions, `007` is a name. Two names that become one only
    keep more images together. Text is composed (NFC); midnight is its date.

    Parameters
    ----------
    value
        Of any kind that a table may hold.
    exact_below
        Up to here its column's type holds every whole number.

    Raises
    ------
    ValueError
        A floating number that is larger, where neighbouring integers are the same float, or a value
        that is no single one.
    """
    if is_missing(value):
        return None
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if isinstance(value, str):
        value = stripped(value)
        if not _FLOATED.fullmatch(value):
            return value or None
        value = float(value)
    if isinstance(value, float):
        if math.isfinite(value) and abs(value) >= exact_below:
            raise ValueError(
                f"{value!r} is too large for a floating number to be exact, so several names may "
                "have become one: store them as integers or text"
            )
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, Decimal):
        whole = value == value.to_integral_value()
        return str(int(value)) if whole else format(value.normalize(), "f")
    if isinstance(value, dt.datetime) and value.tzinfo is None:
        midnight = value.time() == dt.time()
        return str(value.date() if midnight else value)
    if isinstance(value, list | dict | tuple):
        raise ValueError(f"{value!r:.60} is not one name")  # noqa: TRY004 (one kind of error)
    return stripped(str(value)) or None
