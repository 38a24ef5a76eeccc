"""Positions: the usual forms of one place read as that place, and what is not understood never as nothing."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streetvision.sources.positions import read_position

PLACE = (52.5, 13.4)
FORMS = [
    "52.5,13.4", "52.5, 13.4", "(52.5, 13.4)", "[52.5, 13.4]", "[52.5 13.4]", "52.5 13.4", "52.5\t13.4",
    "52.5;13.4", "52.5 ; 13.4", "52.5|13.4", "52,5 13,4", "52,5; 13,4", "52,5, 13,4", "+52.5, +13.4",
    "52.5N, 13.4E", "52.5N 13.4E", "N52.5 E13.4", "N 52.5, E 13.4", "52.5° N, 13.4° E", "52.5°, 13.4°",
    "52.5° 13.4°", "13.4E 52.5N", "E13.4, N52.5", "52,5N 13,4E", "52.5 north, 13.4 East", "52.5n,13.4e",
    "52°30'00\"N 13°24'00\"E", "52°30′0″N, 13°24′0″E", "52° 30' 0\" N 13° 24' 0\" E", "52°30'N 13°24'E",
    "52° 30.0' N, 13° 24.0' E", "52º30'0''N 13º24'0''E", "52°30’00”N 13°24’00”E", "52 30 00 N 13 24 00 E",
    "N 52 30 00, E 13 24 00", "52-30-00N 13-24-00E", "52:30:00N 13:24:00E", "52:30, 13:24",
    "52°30'00\", 13°24'00\"", "52° 30' 00\" 13° 24' 00\"", "52 deg 30' 0\" N, 13 deg 24' 0\" E",
    "52d30m0sN 13d24m0sE", "52°30'0,0\"N 13°24'0,0\"E", '{"lat": 52.5, "lon": 13.4}',
    '{"latitude": "52,5", "longitude": "13,4"}', '{"lng": 13.4, "lat": 52.5}', "{'lat': 52.5, 'lon': 13.4}",
    "{lat: 52.5, lng: 13.4}", '{"type": "Point", "coordinates": [13.4, 52.5]}',
    '{"type": "Point", "coordinates": [13.4, 52.5, 34]}',
    '{"type": "Feature", "geometry": {"type": "Point", "coordinates": [13.4, 52.5]}, "properties": {}}',
    "POINT (13.4 52.5)", "POINT(13.4 52.5)", "point z (13.4 52.5 34)", "SRID=4326;POINT(13.4 52.5)",
    "geo:52.5,13.4", "geo:52.5,13.4,34;u=35", "lat: 52.5, lon: 13.4", "latitude=52.5 longitude=13.4",
    "Lon 13.4, Lat 52.5", "+52.5+013.4/", "+52.5000+013.4000+034.5/",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_one_place_in_every_form(form):
    assert read_position({"gps": form}) == pytest.approx(PLACE, abs=1e-12)
    assert read_position({"gps": form.encode()}) == pytest.approx(PLACE, abs=1e-12)


@pytest.mark.parametrize(
    "value",
    [
        [52.5, 13.4], (52.5, 13.4), ["52,5", "13,4"], {"lat": 52.5, "lon": 13.4}, {"Latitude": 52.5,
        "Lng": 13.4},
        {"type": "Point", "coordinates": [13.4, 52.5]}, {"long": "13.4 E", "lat": "52.5 N"},
        {"GPSLatitude": [52, 30, 0.0], "GPSLatitudeRef": "N", "GPSLongitude": [13, 24, 0],
        "GPSLongitudeRef": "E"},
    ],
)  # fmt: skip
def test_lists_and_structs(value):
    assert read_position({"gps": value}) == pytest.approx(PLACE, abs=1e-12)


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [(52.5, 13.4), ("52.5", " 13.4 "), ("52,5", "13,4"), ("52.5N", "13.4E"), ("N52.5", "E 13.4"),
     ("52°30'", "13°24'"), ("52 30 0 N", "13 24 0 E"), ("52:30:00", "13:24:00"), ([52, 30, 0], [13, 24, 0])],
)  # fmt: skip
def test_columns_of_their_own(latitude, longitude):
    both = {"latitude": latitude, "longitude": longitude}
    assert read_position(both) == pytest.approx(PLACE, abs=1e-12)
    refs = {"latitude_ref": "S", "longitude_ref": "West"}
    if isinstance(latitude, float | list):
        assert read_position(both | refs) == pytest.approx((-52.5, -13.4), abs=1e-12)
    assert read_position({"gps": "here", **both}) == pytest.approx(PLACE, abs=1e-12)
    assert read_position({"gps": "52.5,13.4", "latitude": math.nan, "longitude": None}) == PLACE


@pytest.mark.parametrize(
    ("form", "place"),
    [("33.8S, 151.2E", (-33.8, 151.2)), ("-33.8 -151.2", (-33.8, -151.2)), ("33°48'S 151°12'W", (-33.8,
    -151.2)),
     ("-0:30, -0:15", (-0.5, -0.25)), ("POINT(-151.2 -33.8)", (-33.8, -151.2)), ("−33.8, 151.2", (-33.8,
     151.2)),
     ("90, -180", (90, -180)), ("0.5°S 0.25°W", (-0.5, -0.25)), ("-33.8-151.2/", (-33.8, -151.2))],
)  # fmt: skip
def test_signs(form, place):
    assert read_position({"gps": form}) == pytest.approx(place, abs=1e-12)


@pytest.mark.parametrize(
    "values",
    [{}, {"gps": None}, {"gps": ""}, {"gps": "None"}, {"gps": "nan,nan"}, {"gps": "(None, None)"}, {"gps": []},
     {"gps": [None, None]}, {"gps": [math.nan, math.nan]}, {"gps": {"lat": None, "lon": math.nan}},
     {"gps": '{"lat": null, "lon": null}'}, {"gps": "POINT EMPTY"}, {"latitude": math.nan, "longitude": None},
     {"latitude": "N/A", "longitude": "-"}, {"latitude": None, "longitude": None, "latitude_ref": "N"}],
)  # fmt: skip
def test_no_position_is_none(values):
    assert read_position(values) is None


@pytest.mark.parametrize(
    "gps",
    ["52.5", "a,b", "here", "91,0", "0,181", "1,2,3", "52.5 13.4 34", "52,5,13,4", "103.8, 1.35", "52.5N",
     "52.5O 13.4N", "52.5N 13.4N", "-52.5S, 13.4E", "5231.2N 01324.6E", "52°75'N 13°24'E", "52.5°30'N 13°E",
     "u33dc0", "9F4MGC22+22", "SRID=3857;POINT(1492000 6890000)", "POINT(13.4)", "MULTIPOINT(13.4 52.5)",
     '{"x": 1, "y": 2}', '{"type": "LineString", "coordinates": [[1, 2], [3, 4]]}', "[[1, 2], [3, 4]]",
     "1e400, 2",
     "[" * 900 + "1", "9" * 5000, "true, false", 52.5, True, [1, 2, 3], [52.5, None], {"lat": 52.5},
     b"\xff\xfe"],
)  # fmt: skip
def test_what_is_given_but_not_understood_is_said(gps):
    with pytest.raises(ValueError, match=r"."):
        read_position({"gps": gps})


@pytest.mark.parametrize(
    "values",
    [{"latitude": 52.5}, {"longitude": "13.4"}, {"latitude": "13.4E", "longitude": "52.5N"},
     {"latitude": 525000000, "longitude": 134000000}, {"latitude": 52.5, "longitude": math.inf}],
)  # fmt: skip
def test_half_a_position_is_none(values):
    with pytest.raises(ValueError, match=r"."):
        read_position(values)


DEGREES = st.tuples(st.integers(-89 * 3600, 89 * 3600), st.integers(-179 * 3600, 179 * 3600))


def sexagesimal(seconds: int, letters: str, form: str) -> str:
    minutes, second = divmod(abs(seconds), 60)
    degree, minute = divmod(minutes, 60)
    return form.format(d=degree, m=minute, s=second, letter=letters[seconds < 0])


@given(
    DEGREES,
    st.sampled_from(
        [
            "{d}°{m}'{s}\"{letter}",
            "{d} {m} {s} {letter}",
            "{letter}{d}:{m}:{s}",
            "{letter} {d}° {m}′ {s}″",
        ]
    ),
    st.sampled_from([", ", " ", "; ", ","]),
    st.booleans(),
)
def test_any_place_in_degrees_minutes_and_seconds(place, form, between, turned):
    both = [sexagesimal(place[0], "NS", form), sexagesimal(place[1], "EW", form)]
    found = read_position({"gps": between.join(both[::-1] if turned else both)})
    assert found == pytest.approx((place[0] / 3600, place[1] / 3600), abs=1e-9)


@given(
    st.floats(-90, 90).map(lambda v: round(v, 6)),
    st.floats(-180, 180).map(lambda v: round(v, 6)),
    st.sampled_from(
        [
            "{0},{1}",
            "{0} {1}",
            "{0};{1}",
            "POINT ({1} {0})",
            "geo:{0},{1}",
            "lat={0}, lon={1}",
            "json",
        ]
    ),
)
def test_any_place_in_decimal_degrees(latitude, longitude, form):
    text = json.dumps({"lat": latitude, "lon": longitude})
    if form != "json":
        text = form.format(f"{latitude:f}", f"{longitude:f}")
    assert read_position({"gps": text}) == (latitude, longitude)


ANYTHING = st.recursive(
    st.none() | st.floats() | st.text() | st.integers() | st.booleans() | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=6,
)


@given(ANYTHING, ANYTHING, ANYTHING)
def test_whatever_is_given_is_a_place_nothing_or_said(latitude, longitude, gps):
    try:
        place = read_position({"latitude": latitude, "longitude": longitude, "gps": gps})
    except ValueError:
        return
    assert place is None or (abs(place[0]) <= 90 and abs(place[1]) <= 180)
