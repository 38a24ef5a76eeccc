"""Image files that are odd, damaged or hostile, made here: for the tests of decoding and of the detector."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, PngImagePlugin

PNG = b"\x89PNG\r\n\x1a\n"
JPEG_END = b"\xff\xd9"


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth random colour image without symmetry."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --------------------------------------------------------------------------- containers


def png_chunk(name: bytes, body: bytes, *, damaged: bool = False) -> bytes:
    check = zlib.crc32(name + body) ^ damaged
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)


def png(
    width: int, height: int, depth: int, colour: int, pixels: bytes, *chunks: bytes, interlace: int = 0
) -> bytes:  # fmt: skip
    """A PNG of raw rows, each with its filter byte; `chunks` stand before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")
    return PNG + png_chunk(b"IHDR", header) + body


def in_png(data: bytes, chunk: bytes, *, behind: bool) -> bytes:
    """Put a chunk before the pixels of a PNG, or behind them."""
    place = len(data) - 12 if behind else len(PNG) + 25
    return data[:place] + chunk + data[place:]


def in_jpeg(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """Put segments of any content behind a JPEG's start."""
    made = b"".join(bytes([0xFF, name]) + struct.pack(">H", len(b) + 2) + b for name, b in segments)
    return data[:2] + made + data[2:]


def webp_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def in_webp(data: bytes, size: tuple[int, int], flags: int, before: bytes, behind: bytes) -> bytes:
    """A simple WebP as an extended one with chunks about its pixels."""
    canvas = b"".join((side - 1).to_bytes(3, "little") for side in size)
    head = webp_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + canvas)
    content = b"WEBP" + head + before + data[12:] + behind
    return b"RIFF" + struct.pack("<I", len(content)) + content


def scans(data: bytes, times: int) -> bytes:
    """A progressive JPEG with its last scan many times over."""
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * times + JPEG_END


# --------------------------------------------------------------------------- kinds


def spoilt_metadata() -> Iterator[tuple[str, bytes, bytes]]:
    """Name, an intact file, and the same with metadata that are large, damaged or both."""
    image = picture()
    whole = encode(image, "PNG")
    flood = zlib.compress(b"x" * 3_000_000)
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 1_500_000, zip=True)
    yield "png text by Pillow", whole, encode(image, "PNG", pnginfo=text)
    chunks = {
        "text": png_chunk(b"tEXt", b"a\0" + b"x" * 2_000_000),
        "text damaged": png_chunk(b"tEXt", b"a\0b", damaged=True),
        "packed text": png_chunk(b"zTXt", b"a\0\0" + flood),
        "packed text unknown": png_chunk(b"zTXt", b"a\0\7" + flood),
        "packed text empty": png_chunk(b"zTXt", b""),
        "international text": png_chunk(b"iTXt", b"a\0\1\0\0\0" + flood),
        "international text broken": png_chunk(b"iTXt", b"a\0\1\0\0\0no zlib"),
        "xmp": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + flood),
        "raw profile": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + flood),
        "profile": png_chunk(b"iCCP", b"big\0\0" + zlib.compress(os.urandom(1_200_000))),
        "profile broken": png_chunk(b"iCCP", b"x\0\3no zlib"),
        "profile without end": png_chunk(b"iCCP", b"no zero"),
        "exif": png_chunk(b"eXIf", b"MM\0*" + b"\xff" * 300_000),
        "gamma": png_chunk(b"gAMA", b"\0"),
        "chromaticities": png_chunk(b"cHRM", b"\0\1"),
        "rendering": png_chunk(b"sRGB", b""),
        "density": png_chunk(b"pHYs", b"\0"),
        "unknown": png_chunk(b"prVt", b"x" * 100_000, damaged=True),
        "animation": png_chunk(b"acTL", b"\0"),
        "frame": png_chunk(b"fcTL", b"\0" * 26, damaged=True),
    }
    for name, chunk in chunks.items():
        for behind in (False, True):
            place = "behind" if behind else "before"
            yield f"png {name} {place} the pixels", whole, in_png(whole, chunk, behind=behind)
    for options in ({}, {"progressive": True}):
        whole = encode(image, "JPEG", **options)
        segments: dict[str, Sequence[tuple[int, bytes]]] = {
            "exif": [(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")],
            "exif bomb": [(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1\1\0\2\xff\xff\xff\xff" * 8000)] * 9,
            "xmp": [(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<" * 60_000)],
            "profile": [(0xE2, b"ICC_PROFILE\0")],
            "profiles": [(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 65_000)] * 60,
            "pictures": [(0xE2, b"MPF\0garbage")],
            "photoshop": [(0xED, b"Photoshop 3.0\x008BIM\4\4")],
            "photoshop cut": [(0xED, b"Photoshop 3.0\x008BIM\4")],
            "adobe": [(0xEE, b"Adobe")],
            "jfif": [(0xE0, b"JFIF\0")],
            "comment": [(0xFE, b"x" * 65_533)] * 30,
            "empty": [(name, b"") for name in (*range(0xE0, 0xF0), 0xFE)],
        }  # fmt: skip
        for name, made in segments.items():
            yield f"jpeg {name} {options}", whole, in_jpeg(whole, *made)
        yield f"jpeg fill bytes {options}", whole, whole[:2] + b"\xff" * 5000 + whole[2:]
        yield (
            f"jpeg another picture behind {options}",
            whole,
            whole + b"junk" * 99 + whole[: len(whole) // 2],
        )
        yield f"jpeg end lost {options}", whole, whole[:-2]
        yield f"jpeg half the end lost {options}", whole, whole[:-1]
    for options in ({"quality": 80}, {"lossless": True}):
        whole = encode(image, "WEBP", **options)
        spoilt = (
            webp_chunk(b"EXIF", b"II*\0\xff\xff\xff\xff"),
            webp_chunk(b"XMP ", b"<" * 99_999),
            webp_chunk(b"odd!", b"x"),
        )
        profile = webp_chunk(b"ICCP", b"garbage")
        yield f"webp {options}", whole, in_webp(whole, image.size, 0x2C, profile, b"".join(spoilt))
        yield (
            f"webp unannounced {options}",
            whole,
            in_webp(whole, image.size, 0, profile, spoilt[0]),
        )
        cut = in_webp(whole, image.size, 0x0C, b"", b"".join(spoilt))[:-60_000]
        yield f"webp cut in its metadata {options}", whole, cut
    whole = encode(image, "PNG")
    yield "png end lost", whole, whole[:-12]
    yield "png end damaged", whole, whole[:-2]
    clear = png_chunk(b"tRNS", bytes(6), damaged=True)
    yield "png damaged transparency", whole, in_png(whole, clear, behind=False)
    yield (
        "png text cut off",
        whole,
        in_png(whole, png_chunk(b"tEXt", b"a\0" + b"x" * 999), behind=True)[:-600],
    )


def rare_modes() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Name, a file of a rare mode, and its pixels at 8 bits, transparency on black [H, W, 3]."""
    rng = np.random.default_rng(7)
    colour = np.asarray(picture(40, 32))
    grey = colour[..., 0]
    alpha = rng.integers(0, 256, grey.shape, dtype=np.uint8)
    clear = grey == grey[5, 7]
    some = (colour == colour[5, 7]).all(axis=2)

    def rows(values: np.ndarray) -> bytes:
        flat = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
        return np.pad(flat, ((0, 0), (1, 0))).tobytes()

    def deep(values: np.ndarray) -> np.ndarray:
        return (values.astype(np.uint16) * 257).astype(">u2")

    def on_black(values: np.ndarray, opacity: np.ndarray) -> np.ndarray:
        return np.rint(values.astype(float) * opacity[..., None] / 255).astype(np.uint8)

    three = np.repeat(grey[..., None], 3, axis=2)
    level, dot = int(grey[5, 7]), colour[5, 7].astype(int)
    t_grey = png_chunk(b"tRNS", struct.pack(">H", level))
    t_deep = png_chunk(b"tRNS", struct.pack(">H", level * 257))
    t_colour = png_chunk(b"tRNS", struct.pack(">HHH", *dot))
    t_colours = png_chunk(b"tRNS", struct.pack(">HHH", *(dot * 257)))
    blank, blanks = np.where(clear[..., None], 0, three), np.where(some[..., None], 0, colour)
    yield "grey 16", png(40, 32, 16, 0, rows(deep(grey))), three
    yield "grey 8 with transparency", png(40, 32, 8, 0, rows(grey), t_grey), blank
    yield "grey 16 with transparency", png(40, 32, 16, 0, rows(deep(grey)), t_deep), blank
    yield "rgb 16", png(40, 32, 16, 2, rows(deep(colour))), colour
    yield "rgb 8 with transparency", png(40, 32, 8, 2, rows(colour), t_colour), blanks
    yield "rgb 16 with transparency", png(40, 32, 16, 2, rows(deep(colour)), t_colours), blanks
    both = np.dstack([grey, alpha])
    yield "grey alpha 16", png(40, 32, 16, 4, rows(deep(both))), on_black(three, alpha)
    yield "grey alpha 8", png(40, 32, 8, 4, rows(both)), on_black(three, alpha)
    both = np.dstack([colour, alpha])
    yield "rgb alpha 16", png(40, 32, 16, 6, rows(deep(both))), on_black(colour, alpha)
    yield "rgb alpha 8", png(40, 32, 8, 6, rows(both)), on_black(colour, alpha)
    for depth in (1, 2, 4):
        steps = (grey >> (8 - depth)).astype(np.uint8)
        bits = np.unpackbits(steps[..., None], axis=2)[..., -depth:].reshape(32, -1)
        packed = rows(np.packbits(bits, axis=1))
        shown = np.repeat((steps * (255 // (2**depth - 1)))[..., None], 3, axis=2)
        yield f"grey {depth}", png(40, 32, depth, 0, packed), shown
        value = int(steps[5, 7])
        t_steps = png_chunk(b"tRNS", struct.pack(">H", value))
        cleared = np.where((steps == value)[..., None], 0, shown)
        yield f"grey {depth} with transparency", png(40, 32, depth, 0, packed, t_steps), cleared
        palette = rng.integers(0, 256, (2**depth, 3), dtype=np.uint8)
        opacity = rng.integers(0, 256, 2**depth, dtype=np.uint8)
        p, t = png_chunk(b"PLTE", palette.tobytes()), png_chunk(b"tRNS", opacity.tobytes())
        yield f"palette {depth}", png(40, 32, depth, 3, packed, p), palette[steps]
        yield (
            f"palette {depth} with transparency", png(40, 32, depth, 3, packed, p, t),
            on_black(palette[steps], opacity[steps]),
        )  # fmt: skip
    yield "bitmap", encode(Image.fromarray(colour), "BMP"), colour
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield (
            f"tiff {compression}",
            encode(Image.fromarray(colour), "TIFF", compression=compression),
            colour,
        )
    yield "tiff grey 16", encode(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"), three


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that took seconds or gigabytes, by name."""
    large = encode(Image.new("L", (4000, 3000)), "JPEG", progressive=True)
    yield "progressive JPEG of 3,000 scans", scans(large, 3000)
    colour = encode(Image.new("RGB", (7000, 7000)), "JPEG", progressive=True, quality=20)
    yield "progressive JPEG of 49 megapixels and 4,000 scans", scans(colour, 4000)
    small = encode(picture(64, 64), "JPEG", progressive=True)
    yield "progressive JPEG of 70,000 scans", scans(small, 70_000)
    yield "JPEG of 100,000 segments", in_jpeg(small, *[(0xFE, b"")] * 100_000)
    whole = encode(picture(64, 64), "PNG")
    yield "PNG of 100,000 chunks", in_png(whole, png_chunk(b"IDAT", b"") * 100_000, behind=False)
    yield "PNG of 1 × 60,000", encode(Image.new("1", (1, 60_000)), "PNG")
    yield "PNG of 16 bits and 25 megapixels", png(5000, 5000, 16, 6, bytes(5000 * 40_001))
    frames = b"".join(webp_chunk(b"ANMF", b"") for _ in range(70_000))
    simple = encode(picture(64, 64), "WEBP", lossless=True)
    yield "WebP of 70,000 frames", in_webp(simple[:12], (64, 64), 2, frames, b"")
    yield (
        "WebP without loss of 25 megapixels",
        encode(Image.new("RGB", (5000, 5000)), "WEBP", lossless=True, method=0),
    )
    yield "bitmap of run lengths", _run_lengths()
    entry = struct.pack("<HHII", 700, 7, 2**31, 8)
    tags = [
        struct.pack("<HHII", tag, 3, 1, value) for tag, value in ((256, 64), (257, 64), (262, 1))
    ]
    listing = tags + [entry] * 60_000
    yield (
        "TIFF of 60,000 tags",
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(listing)) + b"".join(listing),
    )
    strips = struct.pack("<HHII", 273, 4, 2**30, 8)
    yield (
        "TIFF of 2³⁰ strips",
        b"II*\0\x08\0\0\0" + struct.pack("<H", 4) + b"".join([*tags, strips]),
    )
    yield (
        "PostScript",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n",
    )
    card = b"".join(
        line.ljust(80).encode()
        for line in (
            "SIMPLE  = T",
            "BITPIX  = 8",
            "NAXIS   = 2",
            "NAXIS1  = 64",
            "NAXIS2  = 64",
            "END",
        )
    )
    yield "FITS", card.ljust(2880) + bytes(64 * 64)
    for kind in ("GIF", "PPM", "TGA", "PCX", "ICO", "SGI", "PDF"):
        yield kind, encode(picture(64, 64), kind)


def _run_lengths() -> bytes:
    side = 2000
    pixels = b"\1\0" * (side * side)
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    start = 14 + 40 + 1024
    return (
        b"BM"
        + struct.pack("<IHHI", start + len(pixels), 0, 0, start)
        + header
        + bytes(1024)
        + pixels
    )
