"""Single values: what says nothing, and one name for one group however it is stored."""

from __future__ import annotations

import datetime as dt
import math
import unicodedata
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streetvision.sources.values import is_missing, key, stripped, text

NOTHING = [
    None, math.nan, "", " ", "\u200b", "\ufeff", "None", "none", "nan", "NaN", "NAN", "N/A", "n/a", "NA",
    "null",
    "NULL", "<NA>", "NaT", "-", "--", "–", " nan ", "#N/A", "[]", "{}",
]  # fmt: skip


@pytest.mark.parametrize("value", NOTHING)
def test_words_for_nothing(value):
    assert is_missing(value)
    assert text(value) is None
    assert key(value) is None


@pytest.mark.parametrize(
    "value", ["Nantes", "no", "0", "None of them", "unknown", "nano", "-1", "a-b"]
)
def test_what_only_looks_like_nothing(value):
    assert text(value) == key(value) == value


def test_pandas_words_for_nothing_are_ours():
    readers = pytest.importorskip("pandas._libs.parsers")
    assert all(is_missing(word) for word in readers.STR_NA_VALUES)


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        ([1, 1.0, "1", "1.0", " 1 ", Decimal(1), Decimal("1.00"), b"1"], "1"),
        ([-7, -7.0, "-7.0", Decimal(-7)], "-7"),
        ([0, 0.0, -0.0, "0"], "0"),
        ([10**16 // 2, 5e15, "5e+15"], str(5 * 10**15)),
        ([2.5, "2.5", Decimal("2.50")], "2.5"),
        (
            ["Zürich", unicodedata.normalize("NFD", "Zürich"), "\ufeffZürich", " Zürich\u00a0"],
            "Zürich",
        ),
        (["Bad  Ems", "Bad Ems", "Bad\u00a0Ems", "Bad\tEms"], "Bad Ems"),
        ([dt.date(2024, 5, 1), dt.datetime(2024, 5, 1), "2024-05-01"], "2024-05-01"),  # noqa: DTZ001
    ],
)
def test_one_group_has_one_name(spellings, name):
    assert {key(each) for each in spellings} == {name}


def test_names_that_differ_stay_apart():
    names = ["1", "01", "1.1", "1.10", "1.00", "v1.0", "1e5", "3e10", "berlin", "Berlin", "1,0"]
    assert [key(name) for name in names] == names


@pytest.mark.parametrize(
    "value", [2.0**53, 1.2345678901234568e17, "1.2345678901234568e+17", -(2.0**60)]
)
def test_a_float_that_may_be_several_integers_is_refused(value):
    with pytest.raises(ValueError, match="too large for a floating number to be exact"):
        key(value)
    assert key(int(float(value))) == str(int(float(value)))


def test_a_column_of_single_precision_holds_fewer_integers():
    assert key(2.0**24 - 1, 2**24) == str(2**24 - 1)
    with pytest.raises(ValueError, match="too large"):
        key(2.0**24, 2**24)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, ("a", "b")])
def test_several_values_are_no_name(value):
    with pytest.raises(ValueError, match="is not one name"):
        key(value)


@given(st.floats() | st.text() | st.none() | st.integers() | st.booleans() | st.binary())
def test_text_is_never_empty(value):
    found = text(value)
    assert found is None or found == found.strip() != ""


@given(st.text() | st.integers() | st.floats(-1e15, 1e15) | st.dates() | st.binary(max_size=20))
def test_a_name_names_itself(value):
    try:
        name = key(value)
    except ValueError:
        return
    assert name is None or (key(name) == name == stripped(name) and text(name) is not None)
