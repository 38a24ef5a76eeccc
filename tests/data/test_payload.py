"""Every spelling of a payload gives the image's bytes; what is none stays as it is."""

from __future__ import annotations

import base64
import textwrap
from urllib.parse import quote

import numpy as np
import pytest

from streetvision.bundle.inputs import upright_image
from streetvision.core.errors import UserError
from streetvision.data.payload import from_base64
from streetvision.sources.labels import LabelReader
from streetvision.sources.natix import translate
from tests.data.odd_images import encode, picture

# Of a length that base64 pads, with both characters that the URL-safe alphabet has others for.
DATA = next(
    data
    for data in (encode(picture(seed=seed), "PNG") for seed in range(99))
    if len(data) % 3 == 1 and {"+", "/"} <= set(base64.b64encode(data).decode())
)
PLAIN = base64.b64encode(DATA).decode()
SAFE = base64.urlsafe_b64encode(DATA).decode()
SPELLINGS = {
    "plain": PLAIN,
    "without padding": PLAIN.rstrip("="),
    "half the padding": PLAIN[:-1],
    "URL-safe": SAFE,
    "URL-safe without padding": SAFE.rstrip("="),
    "in lines": "\n".join(textwrap.wrap(PLAIN, 76)) + "\n",
    "in lines of Windows": "\r\n".join(textwrap.wrap(PLAIN, 64)),
    "blanks about it": f" \t{PLAIN} ",
    "blanks within": " ".join(textwrap.wrap(PLAIN, 4)),
    "a data URL": f"data:image/png;base64,{PLAIN}",
    "a data URL in capitals": f"DATA:IMAGE/PNG;BASE64,{PLAIN}",
    "a data URL with parameters": f"data:image/png;charset=utf-8;name=a.png;base64,{PLAIN}",
    "a data URL with blanks": f" data: image/png ; base64 , {PLAIN}",
    "a data URL without a type": f"data:;base64,{SAFE.rstrip('=')}",
    "a percent-encoded data URL": f"data:image/png;base64,{quote(PLAIN, safe='')}",
    "a data URL of percent-encoded bytes": f"data:image/png,{quote(DATA)}",
    "in quotes": f'"{PLAIN}"',
    "Python's bytes": repr(PLAIN.encode()),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_gives_the_bytes(name: str) -> None:
    text = SPELLINGS[name]
    assert from_base64(text) == from_base64(text.encode()) == DATA
    found = [
        upright_image(text),
        upright_image(text.encode()),
        upright_image(bytearray(text, "ascii")),
    ]
    assert all(np.array_equal(image, upright_image(DATA)) for image in found)
    columns = {"image": "image", "label": "label"}
    row = translate({"image": text, "label": 1}, columns, LabelReader.learn([({1: 1}, ())]))
    assert row["image"]["bytes"] == DATA


def test_images_themselves_are_no_base64() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"):
        data = encode(picture(), kind)
        assert from_base64(data) is data


@pytest.mark.parametrize(
    "text",
    ["", "image 0", "no base64!", "photos/a.jpg", "ab", "-_-", "\ud800", "ß", "drive", "'", "b'"],
)  # fmt: skip
def test_words_stay_words(text: str) -> None:
    assert from_base64(text) == text.encode("utf-8", "surrogatepass")


def test_a_path_is_a_path() -> None:
    with pytest.raises(UserError, match="/9j/4AAQSkZJRg does not exist"):
        upright_image("/9j/4AAQSkZJRg")  # as a JPEG's base64 begins
