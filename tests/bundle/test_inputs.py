"""Whatever a caller passes becomes one upright RGB image, or one clear line; the answer is the same."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from streetvision.bundle.inputs import MAX_PIXELS, upright_image
from streetvision.bundle.predictor import Predictor
from streetvision.core.errors import UserError
from streetvision.core.params import Data
from streetvision.prepare.decode import decode_image

if TYPE_CHECKING:
    from tests.conftest import Trained

T = TypeVar("T")


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> Predictor:
    return Predictor.load(trained.bundle, "cpu")


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        upright_image(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------- what is taken


def test_every_kind_of_source_gets_the_same_answer(predictor: Predictor, tmp_path: Path) -> None:
    image = picture()
    data = encode(image)
    path = tmp_path / "street photo.png"
    path.write_bytes(data)
    array = np.asarray(image)
    expected = predictor(image)
    opaque = np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])
    sources: list[Any] = [
        data, bytearray(data), memoryview(data), path, str(path), array, opaque, image.convert("RGBA"),
        base64.b64encode(data), base64.urlsafe_b64encode(data).decode().rstrip("="),
        np.asfortranarray(array), array[::-1][::-1], Image.open(path), encode(image, "WEBP", lossless=True),
    ]  # fmt: skip
    assert [predictor(source) for source in sources] == [expected] * len(sources)
    np.testing.assert_allclose(predictor.probabilities(sources), expected, atol=1e-6)
    grey = image.convert("L")
    assert predictor(np.asarray(grey)) == predictor(grey) == predictor(grey.convert("RGB"))
    assert predictor(grey) != expected


def test_orientation_is_applied_to_bytes_paths_and_pil_images(predictor: Predictor) -> None:
    image = picture()
    exif = Image.Exif()
    for orientation, turn in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)):
        exif[0x0112] = orientation
        data = encode(image, exif=exif)
        expected = predictor(image.transpose(turn))
        assert predictor(data) == predictor(Image.open(io.BytesIO(data))) == expected
        assert expected != predictor(image)


def test_the_callers_image_is_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    given = Image.open(io.BytesIO(encode(picture().convert("RGBA"), exif=exif)))
    assert upright_image(given).size == (40, 60)
    assert (given.mode, given.size, given.getexif()[0x0112]) == ("RGBA", (60, 40), 6)
    plain = picture()
    assert upright_image(plain) is plain


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animated_file_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert upright_image(data).getpixel((9, 9)) == (255, 0, 0)
    shown = Image.open(io.BytesIO(data))
    shown.seek(1)
    assert upright_image(shown).getpixel((9, 9)) == (0, 0, 255)


def test_the_limit_is_that_of_ingest() -> None:
    assert Data().max_source_pixels == MAX_PIXELS


# --------------------------------------------------------------------------- what is not


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "image is a NoneType; a PIL image, encoded bytes, a path or a uint8 array is needed"),
        (3.5, "image is a float;"),
        ([[0, 1]], "image is a list;"),
        (b"", "image: no image; there are no bytes"),
        (b"<svg/>", "image: not an image; JPEG, PNG, WebP, BMP and TIFF files are read"),
        (encode(picture(), "GIF"), "image: not an image;"),
        (base64.b64encode(encode(picture(), "GIF")), "image: not an image;"),
        (encode(picture())[:1000], "image: truncated; "),
        (picture(15, 40), "image: too small; each side needs at least 16 pixels"),
        (Image.new("RGB", (0, 5)), "image: too small;"),
        (picture(161, 16), "image: too elongated; no side may be more than 10 times the other"),
        (np.zeros((40, 60, 3)), "image is an array of float64 [40, 60, 3]; uint8 [H, W], [H, W, 3] or"),
        (np.zeros((40, 60, 3), np.float32), "image is an array of float32"),
        (np.zeros((40, 60), np.bool_), "image is an array of bool"),
        (np.zeros((40, 60), np.uint16), "image is an array of uint16"),
        (np.zeros((3, 40, 60), np.uint8), "image is an array of uint8 [3, 40, 60]; uint8 [H, W]"),
        (np.zeros((1, 40, 60, 3), np.uint8), "image is an array of uint8 [1, 40, 60, 3]"),
        (np.zeros((40, 60, 2), np.uint8), "image is an array of uint8 [40, 60, 2]"),
        (np.zeros(60, np.uint8), "image is an array of uint8 [60]"),
        (np.uint8(3), "image is a uint8;"),
        (np.zeros((0, 60, 3), np.uint8), "image is an empty array"),
        ("no/such/photo.jpg", "no/such/photo.jpg does not exist"),
        ("a\0b.jpg", r"a\x00b.jpg is not a path: embedded null byte"),
        ("A" * 70_000, "A" * 200 + "… cannot be read: File name too long"),
        ("/dev/zero", "/dev/zero is not a regular file"),
        (Path("/"), "/ is a folder, not a file"),
    ],
    ids=lambda value: str(value)[:20].replace("\0", "0") if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_image_is_one_clear_line(source: Any, message: str) -> None:
    assert refusal(source).startswith(message)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "is not a regular file" in refusal(tmp_path / "pipe.jpg")  # and does not wait for it
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert "cannot be read" in refusal(tmp_path / "loop.jpg")
    (tmp_path / "two\nlines.jpg").write_bytes(b"x")
    assert r"two\nlines.jpg: not an image" in refusal(tmp_path / "two\nlines.jpg")
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**40)  # a terabyte of nothing
    assert "is larger than an image of 1,000 pixels can be" in refusal(
        tmp_path / "huge.jpg", max_pixels=1000
    )


def test_the_limit_on_pixels_holds_for_every_kind(tmp_path: Path, trained: Trained) -> None:
    image = picture()
    (tmp_path / "a.png").write_bytes(encode(image))
    for source in (image, encode(image), tmp_path / "a.png", np.asarray(image), image.convert("F")):
        assert upright_image(source, 2400).size == (60, 40)
        assert "too many pixels; at most 2,399 are read" in refusal(source, max_pixels=2399)
    small = Predictor.load(trained.bundle, "cpu", max_pixels=2399)
    with pytest.raises(UserError, match="too many pixels"):
        small(image)


def test_of_many_images_the_wrong_one_is_named(predictor: Predictor) -> None:
    with pytest.raises(UserError, match=r"^image 1: not an image"):
        predictor.probabilities([picture(), b"nothing"])


# --------------------------------------------------------------------------- hostile


def attempt(call: Callable[[], T]) -> T | str:
    """What `call` returns, or the one line why not."""
    try:
        return call()
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    return said


def originals() -> list[bytes]:
    rotated = Image.Exif()
    rotated[0x0112] = 6
    image = picture(40, 32)
    frames = {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    deep = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    return [
        encode(image, "JPEG"), encode(image.convert("CMYK"), "JPEG"), encode(image, "JPEG", exif=rotated),
        encode(image, "JPEG", progressive=True), encode(image), encode(deep), encode(image.convert("P")),
        encode(image.convert("LA")), encode(image, "PNG", **frames), encode(image, "WEBP"),
        encode(image.convert("RGBA"), "WEBP", **frames), encode(image, "WEBP", lossless=True),
    ]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    original=st.sampled_from(originals()),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=12),
    cut=st.integers(0, 10**6),
)
@pytest.mark.filterwarnings("ignore")
def test_hostile_files_give_an_image_or_one_line(
    original: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(original)
    for place, value in changes:
        # Headers are where most goes wrong.
        data[(place % 64 if place % 2 else place) % len(data)] = value
    data = data[: len(data) - (cut % len(data) if cut % 3 == 0 else 0)]
    found = attempt(lambda: upright_image(bytes(data), 10**5))
    if not isinstance(found, str):
        assert found.mode == "RGB"
        assert found.width * found.height <= 10**5


DTYPES = st.one_of(
    st.just(np.dtype(np.uint8)), arrays.floating_dtypes(), arrays.integer_dtypes(), arrays.boolean_dtypes(),
    arrays.complex_number_dtypes(), arrays.datetime64_dtypes(),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_array_gets_an_answer_or_one_line(data: st.DataObject, predictor: Predictor) -> None:
    dtype = data.draw(DTYPES)
    shape = data.draw(
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=40)
        | st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 5))
    )
    found = attempt(lambda: predictor(np.zeros(shape, dtype)))
    if not isinstance(found, str):
        assert 0 <= found <= 1
        assert dtype == np.uint8
        assert min(shape[:2]) >= 16


BOMBS = """
import io, resource, struct, sys, zlib
import numpy as np
from PIL import Image
from streetvision.bundle.inputs import upright_image
from streetvision.core.errors import UserError

def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

def png(width, height, depth, colour, body, *more):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", body)

packer = zlib.compressobj(9)
flat = b"".join([packer.compress(bytes(2**20)) for _ in range(300)]) + packer.flush()
pixels = zlib.compress(bytes(64 * 193))
jpeg = io.BytesIO()
Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
jpeg = bytearray(jpeg.getvalue())
at = jpeg.index(b"\\xff\\xc0")
jpeg[at + 5 : at + 9] = b"\\xff\\xff\\xff\\xff"
webp = io.BytesIO()
frames = [Image.new("RGBA", (64, 64), colour) for colour in ("red", "blue")]
frames[0].save(webp, "WEBP", save_all=True, append_images=frames[1:])
webp = bytearray(webp.getvalue())
webp[24:30] = b"\\xff\\x3f\\x00" * 2
bombs = {
    "png of 60,000 x 60,000": png(60_000, 60_000, 8, 2, flat),
    "png of more data than pixels": png(64, 64, 8, 2, flat),
    "png with a text bomb": png(64, 64, 8, 2, pixels, chunk(b"zTXt", b"a\\0\\0" + flat)),
    "png with a profile bomb": png(64, 64, 8, 2, pixels, chunk(b"iCCP", b"a\\0\\0" + flat)),
    "jpeg of 65,535 x 65,535": bytes(jpeg),
    "webp of 16,384 x 16,384": bytes(webp),
}
limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, data in bombs.items():
    try:
        upright_image(data, 10**6)
        said = "an image"
    except UserError as error:
        said = str(error)
    print(f"{name}: {said}")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit) // 1024)
"""


def test_bombs_take_no_memory(repository: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(repository)}
    result = subprocess.run(
        [sys.executable, "-c", BOMBS], capture_output=True, text=True, env=environment, check=True
    )
    *said, mib = result.stdout.splitlines()
    assert [line.partition(": image: ")[2].partition(";")[0] for line in said].count(
        "too many pixels"
    ) == 3, said
    assert int(mib) < 60, said


# --------------------------------------------------------------------------- threads


def test_eight_threads_get_the_answers_of_one(predictor: Predictor) -> None:
    sources: list[Any] = [picture(seed=seed) for seed in range(8)]
    sources += [encode(picture(seed=seed), "JPEG") for seed in range(8, 16)]
    sources += [b"no image", np.asarray(picture(seed=17))]

    def answer(source: Any) -> float | str:
        try:
            return predictor(source)
        except UserError as error:
            return str(error)

    expected = [answer(source) for source in sources]
    wrong: list[Any] = []
    done = [0] * 8
    stop = time.monotonic() + 3

    def work(thread: int) -> None:
        rng = np.random.default_rng(thread)
        while time.monotonic() < stop:
            row = int(rng.integers(len(sources)))
            found = answer(sources[row])
            if found != expected[row]:
                wrong.append((row, found))
            done[thread] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert min(done) > 0


def test_a_picture_that_training_takes_may_be_too_costly_for_an_answer() -> None:
    """28 megapixels of one colour in a PNG."""
    data = encode(Image.new("RGB", (5300, 5300), (9, 200, 30)), "PNG", compress_level=1)
    with pytest.raises(
        UserError, match=r"^image: too costly; at most 128 MiB, .* 1\.5 s, .* JPEG$"
    ):
        upright_image(data)
    decoded = decode_image(data, side_px=32, max_pixels=MAX_PIXELS)
    assert (decoded.original_width, decoded.original_height) == (5300, 5300)
    assert decoded.image.getpixel((16, 16)) == (9, 200, 30)
