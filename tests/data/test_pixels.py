"""What is not pixels decides on nothing; whole scans are read, half ones are not; costs are bounded."""

from __future__ import annotations

import io
import re
import struct
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from streetvision.data import pixels
from streetvision.data.pixels import (
    MAX_DECODE_SECONDS,
    PREPARE_DECODE_SECONDS,
    UnusableImageError,
    decode_upright,
    image_parts,
    is_image,
    upright_rgb,
    without_metadata,
)
from tests.data.odd_images import (
    JPEG_END,
    bombs,
    encode,
    in_jpeg,
    in_png,
    in_webp,
    picture,
    png_chunk,
    rare_modes,
    scans,
    spoilt_metadata,
    webp_chunk,
)

LIMIT = 50_000_000
SPOILT = list(spoilt_metadata())
MODES = list(rare_modes())


def outcome(data: bytes, limit: int = LIMIT) -> Image.Image | str:
    try:
        return decode_upright(data, limit)
    except UnusableImageError as error:
        return error.reason


def apart(a: Image.Image | str, b: Image.Image | str) -> int:
    """Largest difference of two images in grey levels."""
    assert not isinstance(a, str), a
    assert not isinstance(b, str), b
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


# --------------------------------------------------------------------------- metadata


@pytest.mark.parametrize(("whole", "spoilt"), [s[1:] for s in SPOILT], ids=[s[0] for s in SPOILT])
def test_metadata_do_not_decide_on_pixels(whole: bytes, spoilt: bytes) -> None:
    expected = decode_upright(whole, LIMIT)
    assert apart(outcome(spoilt), expected) == 0
    kept = without_metadata(spoilt)
    assert len(kept) <= len(whole) + 18  # of an extended WebP, its header
    assert apart(outcome(kept), expected) == 0


def gps() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0110] = "SERIAL-4711"
    exif.get_ifd(0x8825)[1] = "SERIAL-N"
    return exif


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_of_metadata_only_the_orientation_is_kept(kind: str, orientation: int | None) -> None:
    exif = gps()
    if orientation is not None:
        exif[0x0112] = orientation
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    if kind != "BMP":
        options["exif"] = exif
    data = encode(picture(), kind, **options)
    assert (b"SERIAL" in data) == (kind != "BMP")
    kept = without_metadata(data)
    assert b"SERIAL" not in kept
    assert apart(outcome(kept), outcome(data)) == 0
    assert without_metadata(kept) == kept
    with Image.open(io.BytesIO(kept)) as shown:  # an intact file for any reader
        shown.load()
        turned = kind in {"JPEG", "PNG", "WEBP"} and (orientation or 1) > 1
        assert dict(shown.getexif()) == ({0x0112: orientation} if turned else {})


def test_an_orientation_in_xmp_or_text_counts() -> None:
    packet = b'<x tiff:Orientation="6"/>'
    upright = picture().transpose(Image.Transpose.ROTATE_270)
    png = encode(picture(), "PNG")
    block = "4d4d002a00000008" + "0001" + "0112000300000001" + "00060000"
    hexadecimal = f"\nexif\n   22\n{block}".encode()
    for chunk in (
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet),
        png_chunk(b"tEXt", b"Raw profile type exif\0" + hexadecimal),
    ):
        for behind in (False, True):
            assert apart(outcome(in_png(png, chunk, behind=behind)), upright) == 0
    jpeg = encode(picture(), "JPEG")
    turned = outcome(in_jpeg(jpeg, (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)))
    plain = decode_upright(jpeg, LIMIT)
    assert apart(turned, plain.transpose(Image.Transpose.ROTATE_270)) == 0
    webp = encode(picture(), "WEBP", lossless=True)
    extended = in_webp(webp, (60, 40), 4, b"", webp_chunk(b"XMP ", packet))
    assert apart(outcome(extended), upright) == 0


# --------------------------------------------------------------------------- modes


@pytest.mark.parametrize(("data", "expected"), [m[1:] for m in MODES], ids=[m[0] for m in MODES])
def test_rare_modes_equal_their_8_bit_twins(data: bytes, expected: np.ndarray) -> None:
    wanted = Image.fromarray(expected)
    assert apart(outcome(data), wanted) <= 1
    assert apart(upright_rgb(Image.open(io.BytesIO(data)), LIMIT), wanted) <= 1


@pytest.mark.parametrize("mode", ["La", "LAB", "PA", "1"])
def test_rare_modes_of_pil_images(mode: str) -> None:
    image = picture().convert({"La": "LA", "PA": "P"}.get(mode, "RGB")).convert(mode)
    twin = picture().convert({"La": "L"}.get(mode, mode)).convert("RGB")
    assert apart(upright_rgb(image, LIMIT), twin) <= 1


def test_premultiplied_grey_lies_on_black() -> None:
    image = Image.merge("LA", [Image.new("L", (32, 32), 200), Image.new("L", (32, 32), 128)])
    assert (
        apart(upright_rgb(image.convert("La"), LIMIT), Image.new("RGB", (32, 32), (100,) * 3)) <= 1
    )


# --------------------------------------------------------------------------- whole or not


@pytest.mark.parametrize("restarts", [0, 1])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("quality", "subsampling"), [(30, 2), (75, 0), (96, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_judged_by_its_scan(
    mode: str, quality: int, subsampling: int, progressive: bool, restarts: int
) -> None:
    rng = np.random.default_rng(quality)
    noisy = np.asarray(picture(130, 90)) + rng.integers(-20, 21, (90, 130, 1))
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)
    options = {"quality": quality, "progressive": progressive, "restart_marker_rows": restarts}
    data = encode(image, "JPEG", **options, **({} if mode == "L" else {"subsampling": subsampling}))
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    for whole in (data, data[:-2], data[:-1], data + b"\xff\xd8\xff behind", data[:-2] + bytes(99)):
        assert apart(outcome(whole), expected) == 0
    start = data.index(b"\xff\xda") + 14
    for share in (0.05, 0.3, 0.5, 0.7, 0.9):
        half = data[: start + int((len(data) - start) * share)]
        for end in (b"", JPEG_END, JPEG_END + bytes(50), JPEG_END + data):
            assert outcome(half + end) in {"truncated", "corrupt"}, (share, end[:9])


def test_scans_of_one_colour_each_and_a_lost_last_scan() -> None:
    """A JPEG that is not progressive but has a scan for each colour, cut out of a progressive one's headers."""
    data = encode(picture(), "JPEG", progressive=True)
    cuts = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    assert len(cuts) == 10
    for lost in (1, 2, 5):
        # Up to the tables of the scan that is lost.
        assert outcome(data[: cuts[-lost]] + JPEG_END) == "truncated"


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_half_of_other_formats_is_refused(kind: str) -> None:
    data = encode(picture(), kind)
    for share in (0.3, 0.5, 0.9):
        assert outcome(data[: int(len(data) * share)]) in {"truncated", "corrupt"}
    if kind == "PNG":
        end = data[-12:]
        assert outcome(data[: len(data) // 2] + end) in {"truncated", "corrupt"}
        shorter = data[41:-16][: len(data) // 2]
        assert outcome(data[:33] + png_chunk(b"IDAT", shorter) + end) == "truncated"
    if kind == "WEBP":
        body = data[20 : len(data) // 2]
        content = b"WEBP" + webp_chunk(data[12:16], body)
        made = b"RIFF" + len(content).to_bytes(4, "little") + content
        assert outcome(made) in {"truncated", "corrupt"}


# --------------------------------------------------------------------------- costs


def test_bombs_are_refused_at_once() -> None:
    for name, data in bombs():
        start = time.process_time()
        found = outcome(data)
        assert isinstance(found, str), name
        # Milliseconds here; what a busy machine with other things to do takes is not the point.
        assert time.process_time() - start < 2, name
        if is_image(data):
            with pytest.raises(UnusableImageError):
                without_metadata(data)


def test_scans_are_bounded_by_what_they_cost() -> None:
    small = encode(picture(64, 64), "JPEG", progressive=True)
    assert image_parts(scans(small, 400), LIMIT).size == (64, 64)
    assert outcome(scans(small, 600)) == "too costly"
    large = encode(Image.new("L", (6000, 4000)), "JPEG", progressive=True)
    assert image_parts(large, LIMIT).nanoseconds < 0.3 * MAX_DECODE_SECONDS * 1e9
    assert outcome(scans(large, 450)) == "too costly"


def test_each_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(), "PNG")
    monkeypatch.setattr(pixels, "MAX_FILE_BYTES", len(data) - 1)
    assert outcome(data) == "too costly"
    assert reason_of_opened(data) == "too costly"
    monkeypatch.undo()
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        with pytest.raises(UnusableImageError, match="too costly"):
            decode_upright(encode(picture(), kind), LIMIT, 1e-6)
    progressive = scans(encode(picture(), "JPEG", progressive=True), 600)
    assert reason_of_opened(progressive) == "too costly"


def reason_of_opened(data: bytes) -> str:
    with pytest.raises(UnusableImageError) as caught:
        upright_rgb(Image.open(io.BytesIO(data)), LIMIT)
    return caught.value.reason


def test_a_camera_s_largest_pictures_are_within_the_bounds() -> None:
    """12 and 50 megapixels of a phone as JPEG, 24 of a camera as PNG; by their headers, nothing is decoded."""
    jpeg = encode(picture(64, 48), "JPEG", quality=95)
    place = jpeg.index(b"\xff\xc0") + 5
    grown = jpeg[:place] + (6120).to_bytes(2, "big") + (8160).to_bytes(2, "big") + jpeg[place + 4 :]
    assert image_parts(grown[:-2] + bytes(25_000_000), LIMIT).size == (8160, 6120)
    assert image_parts(claiming(6000, 4000), LIMIT).size == (6000, 4000)


def claiming(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header says more than there is; nothing of it is decoded here."""
    data = bytearray(encode(picture(64, 48), "PNG"))
    data[16:26] = struct.pack(">IIBB", width, height, depth, colour)
    return bytes(data)


def lossless(width: int, height: int) -> bytes:
    """A WebP without loss that claims this size."""
    data = encode(picture(64, 48), "WEBP", lossless=True)
    return in_webp(data, (width, height), 0, b"", b"")


@pytest.mark.parametrize(
    "data",
    [claiming(5400, 5400), claiming(10_000, 10_000, 16, 6), lossless(10_000, 10_000)],
    ids=["PNG of 29 megapixels", "PNG of 100 megapixels, 16 bits, RGBA", "WebP of 100 megapixels"],
)
def test_training_data_may_take_longer_than_an_answer(data: bytes) -> None:
    with pytest.raises(UnusableImageError, match="too costly"):
        image_parts(data, 10**8)
    parts = image_parts(data, 10**8, PREPARE_DECODE_SECONDS)
    assert parts.nanoseconds < PREPARE_DECODE_SECONDS * 1e9
    assert without_metadata(data, PREPARE_DECODE_SECONDS)
    with pytest.raises(UnusableImageError, match="too many pixels"):
        image_parts(data, parts.size[0] * parts.size[1] - 1, PREPARE_DECODE_SECONDS)


def test_scans_and_parts_are_bounded_however_long_it_may_take() -> None:
    small = encode(picture(64, 64), "JPEG", progressive=True)
    for data in (scans(small, 600), in_jpeg(small, *[(0xFE, b"")] * 70_000)):
        with pytest.raises(UnusableImageError, match="too costly"):
            image_parts(data, LIMIT, PREPARE_DECODE_SECONDS)
    large = encode(Image.new("L", (6000, 4000)), "JPEG", progressive=True)
    assert image_parts(scans(large, 450), LIMIT, PREPARE_DECODE_SECONDS).scans


@given(
    data=st.lists(st.sampled_from([0, 1, 0x7F, 0xD0, 0xD7, 0xD8, 0xDA, 0xFE, 0xFF]), max_size=600),
    place=st.integers(0, 9),
    padding=st.sampled_from([0, 200, 2**18]),
)
def test_markers_are_what_a_regular_expression_finds(
    data: list[int], place: int, padding: int
) -> None:
    text = bytes(padding) + bytes(data)
    for pattern, restarts in ((rb"\xff[\x01-\xfe]", True), (rb"\xff[\x01-\xcf\xd8-\xfe]", False)):
        match = re.compile(pattern).search(text, place)
        found = pixels._next_marker(text, place, restarts=restarts)
        assert found == (match.start() if match else len(text))
    assert pixels._restarts(text) == len(re.findall(rb"\xff[\xd0-\xd7]", text))


@pytest.mark.parametrize("pair", [b"\xff\xff", b"\xff\0", b"\xff\xd0"])
def test_a_scan_of_what_begins_like_markers_costs_little(pair: bytes) -> None:
    """A regular expression takes several seconds for 32 MiB of restarts."""
    data = encode(picture(64, 64), "JPEG", progressive=True, restart_marker_blocks=1)
    start = time.process_time()
    with suppress(UnusableImageError):
        image_parts(data[:-2] + pair * 2**24, LIMIT)
    assert time.process_time() - start < 3


def test_formats_are_a_list() -> None:
    for _, data in bombs():
        if not is_image(data):
            assert outcome(data) == "not an image"
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        assert is_image(encode(picture(), kind))
    assert not is_image(b"BMW is no bitmap, and II*x no TIFF")


def test_an_opened_file_of_another_format_is_never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.open(io.BytesIO(encode(picture(), "GIF")))
    monkeypatch.setattr(type(image), "load", lambda _: pytest.fail("Pillow's reader was run"))
    with pytest.raises(UnusableImageError, match="not an image"):
        upright_rgb(image, LIMIT)


def test_an_image_that_the_caller_has_scaled_or_moved_on_stays_so(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(picture(400, 320), "JPEG"))
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft("RGB", (100, 80))
        assert upright_rgb(image, LIMIT).size == (100, 80)
    with Image.open(tmp_path / "a.jpg") as image:
        found = upright_rgb(image, LIMIT)
        assert image.size == (400, 320)
        image.load()  # the caller's file is as it was
        assert apart(found, image) == 0
