"""Decoding against Pillow's full decoder, damaged files, every mode and orientation."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from streetvision.data.pixels import (
    REASONS,
    UnusableImageError,
    decode_upright,
    upright_rgb,
)
from streetvision.data.transforms import Preprocessing
from streetvision.prepare import decode
from streetvision.prepare.decode import (
    DecodedImage,
    decode_image,
    encode_jpeg,
)
from tests.review.pictures import street


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random colour image without symmetry."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def run(data: bytes, side: int = 64, limit: int = 10**8) -> DecodedImage:
    return decode_image(data, side_px=side, max_pixels=limit)


def reason(data: bytes, **options: int) -> str:
    return reason_of(lambda: run(data, **options))


def reason_of(decode_it: Callable[[], object]) -> str:
    with pytest.raises(UnusableImageError) as caught:
        decode_it()
    assert caught.value.reason in REASONS
    return caught.value.reason


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(1200, 900), (900, 1200), (333, 97), (40, 50)])
def test_agrees_with_a_full_decode(kind: str, size: tuple[int, int]) -> None:
    data = encode(picture(*size), kind, quality=95)
    result = run(data)
    shown = result.image
    assert min(shown.size) == 64
    assert abs(max(shown.size) - max(size) * 64 / min(size)) <= 0.5
    assert (result.original_width, result.original_height) == size
    assert shown.mode == "RGB"
    full = Image.open(io.BytesIO(data)).convert("RGB").resize(shown.size, Image.Resampling.BICUBIC)
    assert difference(shown, full) < 2


@pytest.mark.parametrize("size", [(1200, 900), (333, 97), (40, 50)])
def test_resizing_is_pillows_but_for_rounding(size: tuple[int, int]) -> None:
    image = picture(*size)
    found = run(encode(image, "PNG")).image
    wanted = image.resize(found.size, Image.Resampling.BICUBIC)
    apart = np.abs(np.asarray(found, np.int16) - np.asarray(wanted, np.int16))
    assert apart.max() <= 2  # each axis is rounded to whole levels
    assert apart.mean() < 0.1


@pytest.mark.parametrize("side", [32, 96])
def test_resizing_is_bicubic(side: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    found = run(encode(image, "PNG"), side).image
    cubic, linear = (
        image.resize(found.size, way) for way in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
    )  # fmt: skip
    assert difference(found, cubic) < 0.5
    assert difference(found, linear) > 5


@pytest.mark.parametrize(
    ("side", "largest"), [(96, 504), (189, 504), (378, 1008), (600, 2016), (1600, 4032)]
)
def test_a_large_jpeg_is_decoded_at_twice_the_wanted_size_at_least(
    side: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    to_rgb = decode.to_rgb
    monkeypatch.setattr(decode, "to_rgb", lambda im: seen.append(im.size) or to_rgb(im))
    data = encode(picture(4032, 3024))
    result = run(data, side=side)
    assert seen == [(largest, largest * 3 // 4)]
    assert (result.original_width, result.original_height) == (4032, 3024)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_as_pillow_applies_it(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(120, 80), kind, exif=exif, quality=95)
    result = run(data)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright is not None
    assert (result.original_width, result.original_height) == upright.size
    full = upright.convert("RGB").resize(result.image.size, Image.Resampling.BICUBIC)
    assert difference(result.image, full) < 2


def test_damaged_exif_does_not_lose_the_image() -> None:
    plain = picture(120, 80)
    for block in (b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"Exif\x00\x00"):
        assert run(encode(plain, exif=block)).image.size == (96, 64)
    exif = Image.Exif()
    exif[0x0112] = 77
    assert run(encode(plain, exif=exif)).image.size == (96, 64)


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P", "LA", "RGBA", "I;16"])
def test_modes(mode: str) -> None:
    colour = picture(96, 64)
    grey = colour.convert("L")
    expected = colour
    kind = "JPEG" if mode == "CMYK" else "PNG"
    if mode == "I;16":
        # 257 levels a step: keeping the high byte must give back the grey exactly.
        data = encode(Image.fromarray(np.asarray(grey, np.uint16) * 257), "PNG")
        expected = grey
    elif mode in {"LA", "RGBA"}:
        alpha = Image.new("L", colour.size, 255)
        alpha.paste(0, (0, 0, 48, 64))
        layer = (grey if mode == "LA" else colour).copy()
        layer.putalpha(alpha)
        data = encode(layer, "PNG")
        expected = (grey if mode == "LA" else colour).copy()
        expected.paste(0, (0, 0, 48, 64))
    else:
        converted = colour.convert(mode)
        data = encode(converted, kind)
        expected = Image.open(io.BytesIO(data))
    result = run(data).image
    assert result.size == (96, 64)
    assert difference(result, expected.convert("RGB")) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_at_its_own_size_as_pillow_decodes_it(kind: str) -> None:
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        data = encode(picture(120, 80), kind, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        result = decode_upright(data, 120 * 80)
        assert result.mode == "RGB"
        assert np.array_equal(result, upright)
        # An image that is upright says so: a second look does not turn it again.
        assert upright_rgb(result, 10**6) is result
        again = upright_rgb(run(data).image, 10**6)
        assert difference(again, run(data).image) == 0
    assert reason_of(lambda: decode_upright(encode(picture(120, 80), kind), 120 * 80 - 1)) == (
        "too many pixels"
    )


PIL_MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "F"]


@pytest.mark.parametrize("mode", PIL_MODES)
def test_every_mode_of_a_pil_image(mode: str) -> None:
    colour = picture(96, 64)
    given = colour.convert({"PA": "P", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    result = upright_rgb(given, 10**6)
    assert (result.mode, result.size) == ("RGB", (96, 64))
    assert (
        difference(result, given.convert("RGBA" if mode == "RGBa" else "RGB").convert("RGB")) == 0
    )
    if mode != "1":  # dithered
        grey = mode in {"L", "LA", "F"}
        assert difference(result, colour.convert("L").convert("RGB") if grey else colour) < 25


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_integer_modes_are_16_bit_grey(mode: str) -> None:
    levels = np.arange(256, dtype=np.uint16).repeat(16).reshape(64, 64)
    kind = {"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
    given = Image.frombytes(mode, (64, 64), (levels.astype(np.int32) * 257).astype(kind).tobytes())
    assert np.array_equal(np.asarray(upright_rgb(given, 10**6))[..., 0], levels)
    outside = Image.fromarray(np.tile(np.array([-5, 70_000], np.int32), (32, 16)))
    assert np.asarray(upright_rgb(outside, 10**6))[0, :2, 0].tolist() == [0, 255]


def test_the_canvas_of_a_webp_is_checked_before_the_decoder_makes_room_for_it() -> None:
    frames = [Image.new("RGBA", (64, 64), colour) for colour in ("red", "blue")]
    data = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    assert data[12:16] == b"VP8X"
    data[24:30] = b"\xfe\xff\x00" * 2  # 65,535 x 65,535 pixels: 32 GB of canvas
    assert reason(bytes(data)) == "too many pixels"


def test_palette_with_a_transparent_colour_lies_on_black() -> None:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(0, (0, 0, 32, 64))
    result = np.asarray(run(encode(image, "PNG", transparency=0)).image)
    assert (result[:, :32] == 0).all()
    assert (result[:, 32:] == [0, 255, 0]).all()


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert (np.asarray(run(data).image) == [255, 0, 0]).all()


def test_other_formats_are_no_images() -> None:
    for kind in ("GIF", "PPM", "ICO"):
        assert reason(encode(picture(64, 64), kind)) == "not an image"
    assert reason(b"<svg/>") == "not an image"
    assert reason(b"") == "no image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_files(kind: str) -> None:
    data = encode(picture(300, 200), kind)
    assert reason(data[: len(data) // 2]) == "truncated"
    for length in range(12, len(data) * 9 // 10, 101):
        assert reason(data[:length]) in {"truncated", "corrupt"}


def png_header(width: int, height: int) -> bytes:
    """A valid PNG that promises far more pixels than it holds."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body)


def test_size_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(png_header(60_000, 60_000)) == "too many pixels"
    assert reason(encode(picture(100, 100)), limit=9_999) == "too many pixels"
    assert run(encode(picture(100, 100)), limit=10_000).image.size == (64, 64)
    assert reason(encode(picture(15, 100))) == "too small"
    assert run(encode(picture(16, 100))).image.size == (64, 400)
    assert reason(encode(picture(201, 20))) == "too elongated"
    # Pillow's global limit, whatever it is set to, plays no part.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert run(encode(picture(100, 100))).image.size == (64, 64)


ORIGINALS = [encode(picture(48, 32), kind) for kind in ("JPEG", "PNG", "WEBP")]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(ORIGINALS),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=12),
    st.integers(0, 10**6),
)
@pytest.mark.filterwarnings("ignore")
def test_hostile_bytes_give_an_image_or_a_reason(
    original: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(original)
    for place, value in changes:
        data[place % len(data)] = value
    data = data[: len(data) - cut % 7]
    outcome: int | str
    try:
        outcome = min(run(bytes(data), limit=10**6).image.size)
    except UnusableImageError as error:
        outcome = error.reason
    assert outcome in {64, *REASONS}


def test_bytes_are_kept_only_for_an_upright_rgb_jpeg_of_the_very_size() -> None:
    right = picture(96, 64)
    turned = Image.Exif()
    turned[0x0112] = 3
    assert run(encode(right)).jpeg
    assert not run(encode(right), side=32).jpeg
    assert not run(encode(right, "PNG")).jpeg
    assert not run(encode(right.convert("L"))).jpeg
    assert not run(encode(right, exif=turned)).jpeg


def test_encoding_keeps_colour_at_full_resolution() -> None:
    image = Image.new("RGB", (32, 32), (90, 90, 90))
    image.putpixel((16, 16), (255, 120, 0))  # one pixel of a cone
    data = encode_jpeg(image, 95)
    assert data == encode_jpeg(image, 95)
    red, _, blue = np.asarray(Image.open(io.BytesIO(data)))[16, 16].tolist()
    assert red - blue > 150


@pytest.mark.parametrize(("size", "limit"), [((256, 192), 0.1), ((1024, 768), 0.6)])
def test_a_stored_copy_is_what_the_bundle_makes_of_the_picture_itself(
    size: tuple[int, int], limit: float
) -> None:
    """Small things decide: the DCT's own reduction keeps more of their contrast than a bicubic one."""
    rng = np.random.default_rng(3)
    image = street(rng, size)
    for _ in range(40):  # cones of a few stored pixels
        left, top = (int(rng.integers(0, side * 0.95)) for side in size)
        side = size[0] // 40
        image.paste((240, 110, 20), (left, top, left + side, top + 2 * side))
    data = encode(image, quality=90)
    stored = run(data, side=96).image
    with Image.open(io.BytesIO(data)) as whole:
        served = Preprocessing(96, 128, "letterbox", (0.5,) * 3, (0.5,) * 3).apply(whole)
    assert stored.size == (128, 96)
    assert difference(stored, Image.fromarray(served)) < limit
