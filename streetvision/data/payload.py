"""The bytes of an image out of the text that carries them: base64 in its spellings, data URLs."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from streetvision.data.pixels import is_image

_QUOTED = re.compile(rb"b?(['\"])(.*)\1", re.DOTALL)
# So that no whole photograph is copied to find that it is none.
_BASE64_START = re.compile(rb"[A-Za-z0-9+/_\-\s]{4}")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def from_base64(data: bytes | str) -> bytes:
    """What a payload holds: its bytes, decoded where they are base64 from end to end; no image format is.

    Base64 may be broken into lines, in the URL-safe alphabet, without its padding, in quotes (also Python's
    `b'…'`) or the body of a data URL, percent-encoded or not. Anything else comes back as it is.
    """
    given = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    body = given.strip()
    if quoted := _QUOTED.fullmatch(body):
        body = quoted[2].strip()
    if body[:5].lower() == b"data:":
        head, _, body = body[5:].partition(b",")
        body = unquote_to_bytes(body)
        if not head.replace(b" ", b"").lower().endswith(b";base64"):
            return body
    elif not _BASE64_START.match(body):
        return given
    body = b"".join(body.split())
    plain = body.translate(_URL_SAFE).rstrip(b"=")
    plain += b"=" * (-len(plain) % 4)
    try:
        found = base64.b64decode(plain, validate=True)
    except binascii.Error:
        return given
    # Many a word is base64 of something, if its end may be missing.
    return found if plain == body or is_image(found) else given
