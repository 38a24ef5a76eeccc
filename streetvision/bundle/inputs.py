"""Whatever a caller has of an image → an upright RGB image, or one clear line why not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from streetvision.core.errors import UserError
from streetvision.core.escaping import escaped, terminal
from streetvision.core.params import Data
from streetvision.data.payload import from_base64
from streetvision.data.pixels import (
    MAX_ASPECT,
    MAX_DECODE_SECONDS,
    MAX_FILE_BYTES,
    MIN_SIDE_PX,
    UnusableImageError,
    decode_upright,
    is_image,
    upright_rgb,
)
from streetvision.data.walk import read_image

ImageInput = (
    Image.Image | bytes | bytearray | memoryview | str | os.PathLike[str] | NDArray[np.uint8]
)
# What `ingest` and `prepare` accept by default is what a bundle answers for.
MAX_PIXELS: int = Data().max_source_pixels
# 16-bit RGBA without compression; a larger file is not read.
_BYTES_A_PIXEL = 8
_SHOWN_CHARACTERS = 200
# Characters; a shorter text is a path, whatever it says in base64.
_SHORTEST_PAYLOAD = 80


def upright_image(
    source: ImageInput, max_pixels: int = MAX_PIXELS, name: str = "image"
) -> Image.Image:
    """Return an upright RGB image; an image that is one already comes back as it is.

    Parameters
    ----------
    source
        A PIL image of any mode (of an animation the frame that it shows); the bytes of a JPEG, PNG, WebP,
        BMP or TIFF file (of an animation the first frame), also in base64 or a data URL, or the path of
        one; or a uint8 array: grey [H, W], RGB [H, W, 3] or RGBA [H, W, 4]. EXIF orientation is applied,
        transparency lies on black.
    max_pixels
        Larger images are refused before they are decoded, as is what `data.pixels` finds too costly.
    name
        What errors call it; a path is called by its own.

    Raises
    ------
    UserError
        Not an image of these kinds; damaged, too large, smaller than 16 pixels or more than 10 times as
        long as wide.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        source = from_base64(bytes(source))
    elif isinstance(source, str) and len(source) >= _SHORTEST_PAYLOAD:
        carried = from_base64(source)
        source = carried if is_image(carried) else source
    if isinstance(source, str | os.PathLike):
        name = escaped(source)
        if len(name) > _SHOWN_CHARACTERS:
            name = f"{name[:_SHOWN_CHARACTERS]}…"
    try:
        if isinstance(source, Image.Image):
            return upright_rgb(source, max_pixels)
        if isinstance(source, np.ndarray):
            return upright_rgb(_from_array(source, name), max_pixels)
        if isinstance(source, str | os.PathLike):
            limit = min(_BYTES_A_PIXEL * max_pixels + 2**20, MAX_FILE_BYTES)
            what = f"an image of {max_pixels:,} pixels can be"
            return decode_upright(read_image(Path(source), limit, what, name), max_pixels)
        if isinstance(source, bytes):
            return decode_upright(source, max_pixels)
    except UnusableImageError as error:
        raise UserError(f"{name}: {_explained(error, max_pixels)}") from error
    raise UserError(
        f"{name} is a {type(source).__name__}; a PIL image, encoded bytes, a path or a uint8 array is needed"
    )


def _explained(error: UnusableImageError, max_pixels: int) -> str:
    allowed = {
        "no image": "there are no bytes",
        "not an image": "JPEG, PNG, WebP, BMP and TIFF files are read",
        "too many pixels": f"at most {max_pixels:,} are read",
        "too small": f"each side needs at least {MIN_SIDE_PX} pixels",
        "too costly": f"at most {MAX_FILE_BYTES >> 20} MiB, and what decodes in {MAX_DECODE_SECONDS:g} s, "
        "is read: make it smaller or a JPEG",
        "too elongated": f"no side may be more than {MAX_ASPECT} times the other",
    }
    # What the decoder said.
    why = allowed.get(error.reason) or terminal(str(error.__cause__ or ""))
    return f"{error.reason}; {why}" if why else error.reason


def _from_array(array: NDArray[np.uint8], name: str) -> Image.Image:
    channels = array.shape[2:]
    if array.dtype != np.uint8 or array.ndim not in {2, 3} or channels not in {(), (3,), (4,)}:
        shape = ", ".join(map(str, array.shape))
        raise UserError(
            f"{name} is an array of {array.dtype} [{shape}]; uint8 [H, W], [H, W, 3] or [H, W, 4] is needed"
        )
    if array.size == 0:
        raise UserError(f"{name} is an empty array")
    return Image.fromarray(np.ascontiguousarray(array))
