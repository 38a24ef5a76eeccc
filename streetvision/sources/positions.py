"""Positions on the Earth as people, devices and libraries write them, read into decimal degrees."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from streetvision.sources.values import is_missing, stripped

Point = tuple[float, float]  # latitude and longitude, degrees

# Columns of `read_position`; a reference says with a letter which hemisphere, as in EXIF.
POSITION_COLUMNS = ("latitude", "longitude", "latitude_ref", "longitude_ref", "gps")
_MAX_CHARACTERS = 1000  # of a position; longer ones are something else

# One spelling each of the signs for degrees, minutes (') and seconds (").
_SIGNS = str.maketrans(
    {
        "º": "°", "˚": "°", "∘": "°", "′": "'", "’": "'", "‘": "'", "´": "'", "ʹ": "'", "″": '"', "”": '"',
        "“": '"', "ʺ": '"', "−": "-", "，": ",", "；": ";",
    }
)  # fmt: skip
_WORDS = {
    r"(?<=\d)\s*d(?=\s*\d|$)": "°", r"(?<=\d)m(?=\s*[\dNSEW]|$)": "'", r"(?<=\d)s(?=\s*[NSEW])": '"',
    r"''": '"', r"\s*\b(degrees?|deg)\b\.?": "°", r"\s*\b(minutes?|min)\b\.?": "'",
    r"\s*\b(seconds?|sec)\b\.?": '"', r"\bnorth\b": "N", r"\bsouth\b": "S", r"\beast\b": "E",
    r"\bwest\b": "W",
}  # fmt: skip
_NUMBER = r"(?:\d+(?:[.,]\d*)?|[.,]\d+)"
_DECIMAL = re.compile(rf"([+-]?)({_NUMBER}(?:[eE][+-]?\d+)?)°?")
_SEXAGESIMAL = re.compile(
    rf"([+-]?)(\d+(?:\.0*)?)\s*°\s*(?:({_NUMBER})\s*'?\s*(?:({_NUMBER})\s*\"?)?)?"
    rf"|([+-]?)(\d+):({_NUMBER})(?::({_NUMBER}))?"
)
# Without any sign only beside a letter: two bare numbers are a latitude and a longitude.
_BARE = re.compile(rf"()(\d+(?:\.0*)?)[\s-]+({_NUMBER})(?:[\s-]+({_NUMBER}))?")
_LETTER = re.compile(r"(?<![A-Za-z])[NSEW](?![A-Za-z])", re.IGNORECASE)

_EMPTY_WKT = re.compile(r"POINT\s*(?:Z|M|ZM)?\s*EMPTY", re.IGNORECASE)
_WKT = re.compile(
    r"(?:SRID\s*=\s*4326\s*;\s*)?POINT\s*(?:Z|M|ZM)?\s*\(\s*(\S+)\s+(\S+?)(?:\s+\S+?){0,2}\s*\)",
    re.IGNORECASE,
)
_GEO_URI = re.compile(
    r"geo:([^,;]+),([^,;?]+)(?:,[^,;?]+)?(?:;(?!crs=(?!wgs84)).*)?(?:\?.*)?", re.IGNORECASE
)
_ISO_6709 = re.compile(
    r"([+-]\d{1,2}(?:\.\d+)?)([+-]\d{1,3}(?:\.\d+)?)(?:[+-]\d+(?:\.\d+)?)?(?:CRS.*)?/?"
)
_NAMED = re.compile(r"['\"]?\b(lat(?:itude)?|lo?ng?(?:itude)?)\b['\"]?\s*[:=]?", re.IGNORECASE)


def read_position(values: Mapping[str, object]) -> Point | None:
    """Position of one row, or None where none is given.

    Parameters
    ----------
    values
        By `POSITION_COLUMNS`, any of them missing. `latitude` and `longitude` are numbers or angles
        (`52.5`, `52,5`, `52.5° N`, `52°31'12"N`, `52:31:12`); `gps` is a text, list or struct with both:
        two angles with `,`, `;` or a blank between, latitude first unless letters say otherwise; `lat: …,
        lon: …`; JSON; GeoJSON's and WKT's points, which have the longitude first; a `geo:` URI; ISO 6709.

    Raises
    ------
    ValueError
        Something is given but not understood, or out of range; the message is what is given.
    """
    angles = [
        None
        if is_missing(values.get(name))
        else _with_letter(values[name], values.get(f"{name}_ref"))
        for name in ("latitude", "longitude")
    ]
    understood = True
    for read, value in ((_pair, angles), (_one_value, values.get("gps"))):
        try:
            if (point := read(value)) is not None:
                return point
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            understood = False
    if not understood:
        given = (values.get(name) for name in ("latitude", "longitude", "gps"))
        raise ValueError(", ".join(str(each) for each in given if not is_missing(each)))
    return None


def _with_letter(angle: object, reference: object) -> object:
    """The angle with its hemisphere's letter, if there is one."""
    if is_missing(reference):
        return angle
    parts = angle if isinstance(angle, list | tuple) else [angle]
    return f"{' '.join(str(part) for part in parts)} {stripped(str(reference))[:1]}"


def _is_empty(value: object) -> bool:
    """Whether a list or struct holds nothing, or a text only words for it."""
    if isinstance(value, dict):
        return _is_empty(list(value.values()))
    if isinstance(value, list | tuple):
        return all(is_missing(each) or _is_empty(each) for each in value)
    if isinstance(value, str):
        return all(is_missing(each) for each in re.split(r"[,;\s]", value.strip("()[] ")))
    return False


# --------------------------------------------------------------------------- both in one value


def _pair(both: Any) -> Point | None:
    """Latitude and longitude from two angles; None where neither is given."""
    if len(both) != 2:
        raise ValueError
    if all(is_missing(each) for each in both):
        return None
    latitude, longitude = _angle(both[0], "NS"), _angle(both[1], "EW")
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):  # also refuses NaN
        raise ValueError
    return latitude, longitude


def _one_value(value: Any) -> Point | None:
    if isinstance(value, bytes):
        value = value.decode()
    if is_missing(value) or _is_empty(value):
        return None
    if isinstance(value, str):
        return _from_text(value)
    if isinstance(value, dict):
        return _from_struct(value)
    if isinstance(value, list | tuple):
        return _pair(value)
    raise ValueError


def _from_struct(struct: Mapping[str, Any]) -> Point | None:
    """GeoJSON's point, or fields whose names begin with lat, and lon or lng, EXIF's among them."""
    fields = {re.sub(r"^gps|[\s_-]", "", str(name).lower()): each for name, each in struct.items()}
    if str(fields.get("type")).lower() == "feature" and isinstance(fields.get("geometry"), dict):
        return _from_struct(fields["geometry"])
    if "coordinates" in fields:
        if str(fields.get("type")).lower() != "point":
            raise ValueError
        return _pair(list(reversed(fields["coordinates"][:2])))
    both = []
    for begin in (("lat",), ("lon", "lng")):
        names = [name for name in fields if name.startswith(begin) and not name.endswith("ref")]
        references = [
            fields[name] for name in fields if name.startswith(begin) and name.endswith("ref")
        ]
        if len(names) != 1:
            raise ValueError
        both.append(_with_letter(fields[names[0]], next(iter(references), None)))
    return _pair(both)


def _from_text(value: str) -> Point | None:
    if len(value) > _MAX_CHARACTERS:
        raise ValueError
    value = stripped(value)
    if value[0] in "{[":
        try:
            return _one_value(json.loads(value))
        except json.JSONDecodeError:
            pass  # as Python or NumPy print it
    if _EMPTY_WKT.fullmatch(value):
        return None
    if found := _WKT.fullmatch(value):
        return _pair([found[2], found[1]])
    if found := _GEO_URI.fullmatch(value) or _ISO_6709.fullmatch(value):
        return _pair([found[1], found[2]])
    value = value.strip("()[]{} ")
    named = _NAMED.split(value)
    if len(named) == 5 and not named[0].strip():
        both = {named[at][:2].lower(): named[at + 1].strip(",;& ") for at in (1, 3)}
        return _pair([both["la"], both["lo"] if "lo" in both else both["ln"]])
    return _pair(_halves(_plain(value)))


def _plain(value: str) -> str:
    """One spelling of signs and words."""
    value = value.translate(_SIGNS)
    for word, sign in _WORDS.items():
        value = re.sub(word, sign, value, flags=re.IGNORECASE)
    return value


def _halves(value: str) -> list[str]:
    """Two angles of one text, latitude first."""
    letters = [found.start() for found in _LETTER.finditer(value)]
    if len(letters) == 2:
        cut = letters[1] if letters[0] == 0 else letters[0] + 1
        halves = [value[:cut].strip(",;/ "), value[cut:].strip(",;/ ")]
        return halves if value[letters[0]].upper() in "NS" else halves[::-1]
    for separator in (r"[;|]", r",\s+", r",", r"\s+(?=[+-]?\d[\d.,]*\s*°)", r"\s+"):
        halves = re.split(rf"\s*{separator}\s*", value)
        if len(halves) == 2:
            return halves
    raise ValueError


# --------------------------------------------------------------------------- one angle


def _angle(value: object, letters: str) -> float:
    """Degrees of one angle; `letters`: its positive and its negative direction."""
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list | tuple) and len(value) == 3:
        return _sum("", *(str(each) for each in value))
    if not isinstance(value, str) or len(value) > _MAX_CHARACTERS:
        raise ValueError
    text = _plain(stripped(value))
    found = [match.group() for match in _LETTER.finditer(text)]
    sign = 1
    if found:
        bare = _LETTER.sub("", text).strip()
        outside = text[0] == found[0] or text[-1] == found[0]
        if len(found) > 1 or not outside or found[0].upper() not in letters or bare[:1] == "-":
            raise ValueError
        sign, text = (1 if found[0].upper() == letters[0] else -1), bare
    if match := _DECIMAL.fullmatch(text):
        return sign * _sum(match[1], match[2])
    match = _SEXAGESIMAL.fullmatch(text) or (_BARE.fullmatch(text) if found else None)
    if match is None:
        raise ValueError
    parts = [part for part in match.groups() if part is not None]
    return sign * _sum(*parts)


def _sum(sign: str, degrees: str, minutes: str = "0", seconds: str = "0") -> float:
    """Degrees of degrees, minutes and seconds; only the last given has decimals."""
    whole = re.match(r"\d*", degrees)
    if whole is None or len(whole[0]) > 3:  # `5231.2` is NMEA's degrees and minutes
        raise ValueError
    d, m, s = (float(part.replace(",", ".")) for part in (degrees, minutes, seconds))
    if (
        not (0 <= m < 60 and 0 <= s < 60)
        or (m and not d.is_integer())
        or (s and not m.is_integer())
    ):
        raise ValueError
    return math.copysign(d + m / 60 + s / 3600, -1 if sign == "-" else 1)
