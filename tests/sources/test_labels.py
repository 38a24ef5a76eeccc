"""Labels: what is sure is read in every spelling, what is not is refused by its name."""

from __future__ import annotations

import logging
import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streetvision.core.errors import UserError
from streetvision.sources.labels import (
    MAX_UNKNOWN_SHARE,
    SURE_NAMES,
    ClassNames,
    LabelReader,
    class_label,
    denies_roadwork,
    read_labels,
)

POSITIVE = [
    "Roadwork", "roadwork", "road work", "Road Work", "road-work", "ROAD_WORKS", "roadworks", "RoadWork",
    "construction", "Construction Zone", "construction_site", "work zone", "workzone", "road construction",
    "under construction", "has_roadwork", "roadwork present", "positive", "pos", "Yes", "y", "TRUE", "t", "1",
    "LABEL_1", "class 1", " roadwork ",
]  # fmt: skip
NEGATIVE = [
    "None", "none", "no", "No", "no_roadwork", "No road work", "no-roadwork", "NoRoadwork", "not roadwork",
    "non-roadwork", "without roadwork", "no construction", "not_under_construction", "no work zone",
    "roadwork absent", "clear", "negative", "neg", "False", "f", "n", "0", "LABEL_0",
]  # fmt: skip
UNSURE = [
    "street", "unsure", "maybe", "barrier", "-roadwork", "!roadwork", "not sure", "roadwork sign", "roadwork?",
    "construction vehicle", "normal", "2", "-1", "0.5", "10", "01x", "", "roadwrok", "no roadwrok", "road",
]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "label"), [(POSITIVE, 1), (NEGATIVE, 0), (UNSURE, None)], ids=["1", "0", "unsure"]
)
def test_names_of_classes(names, label):
    assert {name: class_label(name) for name in names} == dict.fromkeys(names, label)


@given(
    st.sampled_from(POSITIVE + NEGATIVE), st.sampled_from(["{}", " {} ", "\t{}\n"]), st.booleans()
)
def test_case_and_blanks_do_not_matter(name, around, upper):
    assert class_label(around.format(name.upper() if upper else name.lower())) == class_label(name)


def learn(values, names=(), classes=SURE_NAMES):
    return LabelReader.learn([(values, names)], classes)


@pytest.mark.parametrize(
    "positive", [1, 1.0, True, "1", "1.0", "True", "true", Decimal(1), b"1", "+1", "yes"]
)
@pytest.mark.parametrize("negative", [0, 0.0, False, "0", "0.0", "False", Decimal(0), b"0", "no"])
def test_zero_and_one_however_they_are_stored(positive, negative):
    labels = learn({positive: 5, negative: 3, None: 1, math.nan: 1, "nan": 1, "": 1, "N/A": 2})
    labels.check("here")
    assert (labels.read(positive), labels.read(negative)) == (1, 0)
    for nothing in (None, math.nan, "nan", "", " ", "N/A", "<NA>"):
        assert labels.read(nothing) is None
        assert labels.unknown(nothing) is None
    assert sum(labels.counts.values()) == 8


@pytest.mark.parametrize(
    ("names", "label_of_0"),
    [
        (["None", "Roadwork"], 0), (["Roadwork", "None"], 1), (["roadwork", "no_roadwork"], 1),
        (["construction", "clear"], 1), (["Road work", "No road work"], 1), (["positive", "negative"], 1),
        (["yes", "no"], 1), (["no", "yes"], 0), (["1", "0"], 1), (["0", "1"], 0), (["true", "false"], 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [int, float, str, Decimal])
def test_a_file_says_what_its_numbers_mean(names, label_of_0, kind):
    labels = learn({kind(0): 3, kind(1): 4}, names)
    labels.check("here")
    assert labels.read(kind(0), names) == label_of_0
    assert labels.read(kind(1), names) == 1 - label_of_0


@pytest.mark.parametrize(
    "names", [["roadwork", "street"], ["street", "roadwork"], ["roadwork", "construction"], ["a", "b"],
    ["none", "roadwork", "barrier"], ["-1", "1"], ["no", "none"]],
)  # fmt: skip
def test_classes_that_are_not_sure_are_refused_by_name(names):
    # Also where no row has the odd one: another file of the set may.
    with pytest.raises(UserError, match="cannot tell what the labels mean") as caught:
        learn({0: 3, 1: 4}, names).check("here")
    assert all(f'"{name}"' in str(caught.value) for name in names)
    assert "positive_classes and negative_classes" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [{0: 5, 1: 5, 2: 5}, {1: 9, 2: 9}, {-1: 9, 1: 9}, {0: 9, 255: 9}, {"roadwork": 99, "street": 1}, {"a": 1},
     {"roadwork": 5, "none": 5, "barrier": 5}, {0.5: 3, 1.0: 9}],
)  # fmt: skip
def test_values_that_are_no_two_sure_classes_are_refused(values):
    with pytest.raises(UserError, match="cannot tell what the labels mean"):
        learn(values).check("here")


def test_the_user_says_what_is_not_sure():
    names = ClassNames(["barrier", "cones", "2"], ["Street", "1"])
    labels = learn({"Barrier": 5, "cones": 3, "street": 7}, classes=names)
    labels.check("here")
    assert [labels.read(each) for each in ("barrier", "CONES", "street")] == [1, 1, 0]
    # What the user says comes before what is usual.
    labels = learn({1: 5, 2: 3}, classes=names)
    labels.check("here")
    assert [labels.read(each) for each in (1, 2, "1.0")] == [0, 1, 0]
    learn({0: 1, 1: 2}, ["barrier", "street"], names).check("here")


def test_a_few_slips_pass_and_are_shown():
    few = int(MAX_UNKNOWN_SHARE * 100)
    labels = learn({1: 50, 0: 50 - few, "no roadwrok": few})
    labels.check("here")
    assert labels.read("no roadwrok") is None
    assert labels.unknown("no roadwrok") == "no roadwrok"
    with pytest.raises(UserError, match=rf'"no roadwrok" \({few + 1} rows: not understood\)'):
        learn({1: 50, 0: 49 - few, "no roadwrok": few + 1}).check("here")


@pytest.mark.parametrize(
    ("others", "is_class"),
    [
        (["Roadwork"], True), (["yes"], True), ([], True), (["construction"], True),
        (["0", "1"], False), (["1.0", "0.0"], False), (["True", "False"], False), (["1"], False),
        (["yes", "no"], False), (["roadwork", "no roadwork"], False),
    ],
)  # fmt: skip
def test_none_is_a_class_beside_names_and_nothing_beside_numbers(others, is_class, caplog):
    with caplog.at_level(logging.WARNING):
        labels = learn({**dict.fromkeys(others, 5), "None": 3})
    labels.check("here")
    assert labels.read("None") == (0 if is_class else None)
    assert labels.unknown("None") is None
    assert ("taken for missing" in caplog.text) != is_class


def test_hostile_values_are_shown_in_short():
    labels = learn({"x" * 10**6: 1, "9" * 5000: 1, **{f"name {i}": 1 for i in range(500)}})
    with pytest.raises(UserError, match="494 more") as caught:
        labels.check("here")
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("text", "denied"),
    [("no roadwork", True), ("No roadwork visible.", True), ("There is no construction", True),
     ("no signs of road work", True), ("cones", False), ("no lane is closed, cones", False), ("", False)],
)  # fmt: skip
def test_descriptions_that_deny_roadwork(text, denied):
    assert denies_roadwork(text) == denied


def test_a_short_column_names_the_row_that_is_wrong():
    assert read_labels(["1.0", 0, None, True, "Roadwork"], str.format) == [1, 0, None, 1, 1]
    for odd in ("maybe", 2, [1], {"a": 1}, 0.5):
        with pytest.raises(UserError, match="row 1: "):
            read_labels([1, odd, 0], lambda row, shown: f"row {row}: {shown}")
