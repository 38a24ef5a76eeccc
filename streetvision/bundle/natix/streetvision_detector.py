# Written by `python -m streetvision natix install`; run that again to change it.
"""StreetVision's detector for Bittensor Subnet 72: image in, probability of roadwork out.

This file is complete: it needs torch, timm (which brings safetensors), numpy, Pillow and the bundle, nothing
of StreetVision, and works on Python 3.10. It gives the probabilities of `streetvision.bundle.Predictor`, one
image at a time; that project's tests hold both equal.

It lies among the subnet's detectors, `natix/miner/detectors` or, before v0.4, `base_miner/detectors`;
`configs/StreetVision.yaml` there names the weights; all else is in `bundle.json` beside them.

No array goes to torch, nor a tensor to numpy, by their own bridge: torch before 2.3, as the subnet pins it,
has none for numpy 2.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import BmpImagePlugin, Image, ImageFile, TiffImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

# Relative: the package around has another name in each layout of the subnet.
from ..registry import DETECTOR_REGISTRY  # noqa: TID252
from .feature_detector import FeatureDetector

MAX_PIXELS = 50_000_000  # a camera's; a larger image is not answered
Floats = NDArray[np.float64]
State = dict[str, Tensor]
PixelBox = tuple[int, int, int, int]


@DETECTOR_REGISTRY.register_module(module_name="StreetVision")
class StreetVisionDetector(FeatureDetector):
    """The classifier of a bundle, the fusion of its views, and its policy."""

    def __init__(
        self,
        model_name: str = "StreetVision",
        config_name: str = "StreetVision.yaml",
        device: str = "cpu",
    ) -> None:
        super().__init__(model_name, config_name, device)

    def load_model(self) -> None:
        """Load the bundle around `weights`, a path that the YAML gives; the base class calls this."""
        folder = (Path(__file__).resolve().parent / "weights" / self.weights).parent
        bundle = read_bundle(folder)
        files: dict[str, str] = bundle["files"]
        self.preprocessing = bundle["classifier"]["preprocessing"]
        self.views = bundle["views"]
        policy = read_file(folder, bundle["policy"]["policy_path"], files)
        self.policy = json.loads(policy)["scrc_params"]
        # Tensors first, then the model that takes them: twice the weights at most are in memory.
        state = load(read_file(folder, bundle["model_checkpoint"], files))
        self.model = Classifier(bundle["classifier"])
        self.model.load_state_dict(state)
        del state
        self.model.eval().to(self.device).to(memory_format=torch.channels_last)
        self.networks: list[Network] = []
        if bundle["cvfm_weights"] is not None:
            state = load(read_file(folder, bundle["cvfm_weights"], files))
            heads = int(self.views["options"].get("attention_heads", 1))
            self.networks = networks(state, heads, self.model.head)

    def __call__(self, image: Image.Image) -> float:
        """Return the probability in [0, 1] that the image shows roadwork; ValueError if it is unusable."""
        return deployed_probability(self.policy, self.logit(self.decoded(image)))

    def decoded(self, image: Image.Image) -> Image.Image:
        """Return the whole image, upright and in RGB; apart, so that its time can be taken apart."""
        return upright_rgb(image, MAX_PIXELS)

    @torch.inference_mode()
    def logit(self, image: Image.Image) -> float:
        """Return the logit that the policy takes, of an upright RGB image."""
        grid, hard = self.views["grid"], self.policy.get("hard_images")
        if hard is not None and (grid["grid"] > 1 or grid["flip"]):
            inputs, _, _ = cut_views(image, self.preprocessing, {"grid": 1, "flip": False})
            first = float(self.score(inputs)[0][0])
            if not hard["low"] < first < hard["high"]:
                return first
        inputs, content, boxes = cut_views(image, self.preprocessing, grid)
        logits, features = self.score(inputs)
        mode = self.views["mode"]
        if not self.networks:
            found = np.array(logits.tolist())
            return fuse_by_rule(mode, self.views["options"], found, content, boxes)
        fused = [getattr(network, mode)(logits, features, boxes) for network in self.networks]
        return float(sum(fused) / len(fused))

    def score(self, inputs: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Return logits [V] and features [V, D], in float64 on the CPU, of inputs [V, H, W, 3]."""
        images = torch.frombuffer(inputs, dtype=torch.uint8).view(inputs.shape)
        images = images.to(self.device).permute(0, 3, 1, 2)
        mean, std = (
            torch.tensor(self.preprocessing[name], device=self.device).view(1, 3, 1, 1) * 255
            for name in ("mean", "std")
        )
        images = ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)
        logits, features = self.model(images)
        # Fusion is fitted on features in float16.
        return logits.cpu().double(), features.cpu().half().double()


def read_bundle(folder: Path) -> dict[str, Any]:
    """Return `bundle.json` after checking it by its own SHA-256."""
    path = folder / "bundle.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: run `python -m streetvision natix install` again"
        )
    document: dict[str, Any] = json.loads(path.read_bytes())
    content = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    check_hash(path, text.encode(), document["sha256"])
    return document


def read_file(folder: Path, name: str, files: dict[str, str]) -> bytes:
    """Return the bytes of a file of the bundle, read once: what was hashed is what is used."""
    data = (folder / name).read_bytes()
    check_hash(folder / name, data, files[name])
    return data


def check_hash(path: Path, data: bytes, expected: str) -> None:
    """ValueError unless the data of a file have that SHA-256."""
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"{path} was changed (SHA-256 differs): run `natix install` again")


class Classifier(nn.Module):
    """Backbone and head of one logit, with the names that the weights have."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        name = config["backbone"]
        if not timm.is_model(name.split(".")[0]):
            raise ValueError(f"timm {timm.__version__} has no model {name}: a newer timm is needed")
        arguments = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config["arguments"].items()
        }
        self.backbone = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
        width, hidden = self.backbone.head_hidden_size, config.get("head_hidden")
        self.hidden: nn.Module = nn.Identity()
        if hidden is not None:
            self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.GELU())
        self.head = nn.Linear(width if hidden is None else hidden, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [V] and features [V, D] of images [V, 3, H, W]."""
        features = self.backbone(images)
        return self.head(self.hidden(features)).squeeze(1), features


# --------------------------------------------------------------------------- image to model inputs


# ---- the same in streetvision/data/pixels.py and in the detector: from here

MIN_SIDE_PX = 16
# Bounds what is scaled so that its shorter side fits: the longer one grows with the aspect ratio.
MAX_ASPECT = 10
MAX_FILE_BYTES = 2**27
# Segments of a JPEG, chunks of a PNG or WebP, strips of a TIFF.
MAX_PARTS = 2**16
MAX_SCANS = 500
# What decoding for an answer may take on one core, estimated from the headers with the nanoseconds below.
MAX_DECODE_SECONDS = 1.5
# Nanoseconds of the slowest content found, of a byte before and after its decompression or a pixel.
_JPEG_PIXEL_NS, _JPEG_BYTE_NS, _SCANS_BYTE_NS, _SCANS_BLOCK_NS = 12, 20, 90, 10
_PNG_BYTE_NS, _TIFF_BYTE_NS, _BMP_BYTE_NS = 18, 12, 3
_WEBP_PIXEL_NS, _WEBP_LOSSLESS_PIXEL_NS = 36, 68
_ALPHA_PIXEL_NS = 12

REASONS = (
    "no image",  # no bytes at all
    "not an image",  # none of the formats that are read
    "truncated",
    "corrupt",
    "too many pixels",
    "too small",
    "too elongated",
    "too costly",  # by MAX_FILE_BYTES, MAX_PARTS, MAX_SCANS or the seconds allowed
)

# Of metadata no more is looked at in search of an orientation.
_METADATA_BYTES = 2**16
_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_PNG = b"\x89PNG\r\n\x1a\n"
_END_OF_IMAGE = b"\xff\xd9"
# Bytes of a JPEG that are searched for markers at a time.
_SEARCHED = 2**18
# Pairs of bytes, each eight ones, that a decoder of several scans is given behind the last one.
_PROBES = 72
# TIFF tags that pixels follow from, and its compressions of bounded cost: none, LZW, Deflate, PackBits.
_TIFF_TAGS = {
    256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339,
}  # fmt: skip
_TIFF_COMPRESSIONS = {1, 5, 8, 32773, 32946}
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
# EXIF orientation -> what makes the image upright, as in `PIL.ImageOps.exif_transpose`.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnusableImageError(ValueError):
    """The bytes give no usable image; `reason` is one of `REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class ImageParts:
    """An image file without metadata, and what its headers say.

    Attributes
    ----------
    kind : name of the format in Pillow
    data : a complete file of what pixels follow from
    size : width and height as stored, pixels
    orientation : EXIF orientation 1 to 8
    nanoseconds : what decoding takes, about
    scans : a JPEG of several scans, progressive or not
    last_scan, least_last_scan : bytes of its last scan's data, and how many there must be at least
    depth : bits of a PNG's sample
    """

    kind: str
    data: bytes
    size: tuple[int, int]
    orientation: int
    nanoseconds: float
    scans: bool = False
    last_scan: int = 0
    least_last_scan: int = 0
    depth: int = 8


def image_parts(
    data: bytes, max_pixels: int, max_seconds: float = MAX_DECODE_SECONDS
) -> ImageParts:
    """Take a file apart; the file's first bytes tell its format, not its name.

    What would take more than `max_seconds` to decode on one core is refused, by an estimate.

    Raises
    ------
    UnusableImageError
        With one of `REASONS`; nothing is decoded.
    """
    if not data:
        raise UnusableImageError("no image")
    if len(data) > MAX_FILE_BYTES:
        raise UnusableImageError("too costly")
    reader = _reader(data)
    if reader is None:
        raise UnusableImageError("not an image")
    try:
        parts = reader(data, max_pixels)
    except UnusableImageError:
        raise
    except (IndexError, KeyError, ValueError, ZeroDivisionError) as error:
        raise UnusableImageError("corrupt") from error
    if parts.nanoseconds > max_seconds * 1e9:
        raise UnusableImageError("too costly")
    return parts


def is_image(data: bytes) -> bool:
    """Whether the first bytes are those of a format that is read."""
    return _reader(data) is not None


def without_metadata(data: bytes, max_seconds: float = MAX_DECODE_SECONDS) -> bytes:
    """The same picture as a file without metadata but the orientation, its pixels untouched.

    BMP and TIFF, which have no such form, become PNG at 8 bits a sample.

    Raises
    ------
    UnusableImageError
        Of files that are no image, damaged, too large or too costly.
    """
    parts = image_parts(data, MAX_FILE_BYTES, max_seconds)
    if parts.kind in {"BMP", "TIFF"}:
        buffer = io.BytesIO()
        decode_upright(data, MAX_FILE_BYTES, max_seconds).save(buffer, "PNG")
        return buffer.getvalue()
    return parts.data if parts.orientation == 1 else _with_orientation(parts)


def opened(parts: ImageParts) -> ImageFile.ImageFile:
    """Give the parts to Pillow's reader of their format; `load_whole` decodes it."""
    data = parts.data
    if parts.kind == "JPEG" and not parts.scans:
        # Without an end the decoder stops where data are missing; with one it would make them up. A
        # few bytes more are what it looks ahead.
        data = data[:-2] + bytes(8)
    openers: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
        "JPEG": JpegImageFile,
        "PNG": PngImageFile,
        "WEBP": WebPImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
    }
    with decoding():
        image = openers[parts.kind](io.BytesIO(data))
    if image.size != parts.size:
        raise UnusableImageError("corrupt")
    if parts.kind == "BMP" and any(tile[0] != "raw" for tile in image.tile):
        raise UnusableImageError("too costly")  # Pillow unpacks run lengths in Python
    if parts.kind == "PNG":
        _scale_transparency(image, parts.depth)
    return image


def load_whole(image: ImageFile.ImageFile, parts: ImageParts) -> None:
    """Decode; UnusableImageError unless all of the picture is there."""
    with decoding():
        if parts.scans:
            _load_scans(image, parts)
        else:
            image.load()


def decode_upright(
    data: bytes, max_pixels: int, max_seconds: float = MAX_DECODE_SECONDS
) -> Image.Image:
    """Decode an image file at its own size, upright, in RGB.

    Raises
    ------
    UnusableImageError
        With one of `REASONS`.
    """
    parts = image_parts(data, max_pixels, max_seconds)
    image = opened(parts)
    load_whole(image, parts)
    with decoding():
        return turned(to_rgb(image), parts.orientation)


def upright_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    """Turn an image of any mode upright, as its EXIF block says, and into RGB.

    A file that Pillow has opened but not decoded is read again as `decode_upright` reads it, whatever
    Pillow would make of it. Needs up to 30 bytes a pixel for a while, 4 for the result. Mode I is taken
    as 16-bit grey, mode F as 0 to 255. The same object comes back if nothing is to be done.

    Raises
    ------
    UnusableImageError
        With one of `REASONS`.
    """
    if isinstance(image, ImageFile.ImageFile) and image.fp is not None:
        data = _file_behind(image)
        if not (image.decoderconfig or image.tell()):
            return decode_upright(data, max_pixels)
        image_parts(data, max_pixels)  # a scaled JPEG or a later frame: as the caller wants it
    check_size(image.size, max_pixels)
    with decoding():
        image.load()
        orientation = _orientation(image)
        if orientation == 1 and image.mode == "RGB" and not image.has_transparency_data:
            return image
        return turned(to_rgb(image), orientation)


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """UnusableImageError unless width and height are within the limits."""
    if size[0] * size[1] > max_pixels:
        raise UnusableImageError("too many pixels")
    if min(size) < MIN_SIDE_PX:
        raise UnusableImageError("too small")
    if max(size) > MAX_ASPECT * min(size):
        raise UnusableImageError("too elongated")


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turn upright, and forget the orientation: whoever looks at the result shall not turn it again."""
    if orientation not in _UPRIGHT:
        return image
    upright = image.transpose(_UPRIGHT[orientation])
    oriented_by = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
    upright.info = {key: value for key, value in image.info.items() if key not in oriented_by}
    return upright


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; the same object where nothing is to be done.

    Transparency lies on black, 16-bit grey keeps its high byte.
    """
    if image.mode.startswith("I"):
        # `convert` would clip 16-bit grey at 255 instead of scaling it.
        values = np.asarray(image)
        grey = np.clip(values, 0, 65535) >> 8
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey = np.where(values == clear, 0, grey)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def decoding() -> Iterator[None]:
    """Turn whatever a decoder raises on hostile bytes into a reason."""
    try:
        yield
    except (MemoryError, UnusableImageError):
        raise  # the first says something about this machine, not about the image
    except Exception as error:
        # Pillow tells data that end early from data that are wrong.
        early = "truncated" in str(error).lower()
        raise UnusableImageError("truncated" if early else "corrupt") from error


def _file_behind(image: ImageFile.ImageFile) -> bytes:
    """The bytes of the file that an image was opened from; its position stays."""
    with decoding():
        file: Any = image.fp
        place = file.tell()
        file.seek(0)
        data: bytes = file.read(MAX_FILE_BYTES + 1)
        file.seek(place)
    return data


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or the EXIF block is damaged."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block raises anything and is no reason to lose the image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """Bring a PNG's transparent grey or colour from the file's depth to that of Pillow's pixels."""
    clear = image.info.get("transparency")
    if image.mode == "1" and isinstance(clear, int):
        image.info["transparency"] = 255 if clear else 0
    elif image.mode == "L" and isinstance(clear, int) and depth < 8:
        image.info["transparency"] = clear * 255 // (2**depth - 1)
    elif image.mode == "RGB" and isinstance(clear, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _reader(data: bytes) -> Callable[[bytes, int], ImageParts] | None:
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_parts
    if data.startswith(_PNG):
        return _png_parts
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp_parts
    if data.startswith((b"II*\0", b"MM\0*")):
        return _tiff_parts
    # A bitmap's header has one of few sizes; two letters alone begin many a text.
    if data.startswith(b"BM") and data[14:18] in {
        bytes([n, 0, 0, 0]) for n in (12, 40, 64, 108, 124)
    }:
        return _bmp_parts
    return None


def _bounded(count: int) -> None:
    if count > MAX_PARTS:
        raise UnusableImageError("too costly")


class _Metadata:
    """The first EXIF block and XMP packet of a file, where an orientation may stand."""

    def __init__(self) -> None:
        self.exif = self.xmp = b""

    def note(self, exif: bytes = b"", xmp: bytes = b"") -> None:
        """Take what is there, as far as an orientation stands in it."""
        self.exif = self.exif or exif[:_METADATA_BYTES]
        self.xmp = self.xmp or xmp[:_METADATA_BYTES]

    def orientation(self) -> int:
        """EXIF orientation 1 to 8; 1 where neither says one."""
        order, _, entries = _directory(self.exif.removeprefix(_EXIF))
        found = 0
        for entry in entries:
            if int.from_bytes(entry[:2], order) == 0x0112:
                found = _short(entry, order)
        match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', self.xmp)
        if not found and match:
            found = int(match[1])
        return found if 1 <= found <= 8 else 1


# JPEG: segments, each a marker, its length and content, and between them the data of scans.


def _jpeg_parts(data: bytes, max_pixels: int) -> ImageParts:
    kept, found, metadata = [data[:2]], _Jpeg(), _Metadata()
    place, count, several = 2, 0, True
    while several and (start := _next_marker(data, place)) < len(data):
        count += 1
        _bounded(count)
        name = data[start + 1]
        if name == 0xD9 or (name == 0xD8 and found.scans):  # the end, or another picture follows
            break
        if name == 0x01 or 0xD0 <= name <= 0xD8:  # has no content
            place = start + 2
            continue
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        place = start + 2 + length
        if length < 2 or place > len(data):
            break
        content = data[start + 4 : place]
        if not _says_nothing_of_pixels(name, content, metadata):
            kept.append(data[start:place])
            found.segment(name, content, max_pixels)
        if name == 0xDA:
            stop = _next_marker(data, place, restarts=not found.interval)
            found.scan(content, data[place:stop].rstrip(b"\xff"))
            kept.append(found.entropy)
            place, several = stop, found.several  # what follows a single scan is another picture
    if not found.scans or (found.several and not found.whole()):
        raise UnusableImageError("truncated")
    return ImageParts(
        "JPEG", b"".join([*kept, _END_OF_IMAGE]), found.size, metadata.orientation(),
        found.nanoseconds(), found.several, len(found.entropy), found.least,
    )  # fmt: skip


def _next_marker(data: bytes, place: int, *, restarts: bool = True) -> int:
    """Where the next marker begins, with or without those of restarts; the end if none does."""
    if place + 1 < len(data) and data[place] == 0xFF and 0xD8 <= data[place + 1] <= 0xFE:
        return place
    for start, ones, behind in _blocks(data, place):
        found = ones & (behind > 0) & (behind < 0xFF)
        if not restarts:
            found &= (behind & 0xF8) != 0xD0
        first = int(found.argmax())
        if found[first]:
            return start + first
    return len(data)


def _restarts(data: bytes) -> int:
    """How many restarts there are in a scan's data."""
    found = (ones & ((behind & 0xF8) == 0xD0) for _, ones, behind in _blocks(data, 0))
    return sum(int(np.count_nonzero(block)) for block in found)


def _blocks(data: bytes, place: int) -> Iterator[tuple[int, Any, Any]]:
    """Block after block its place, which of its bytes are eight ones, and the byte behind each.

    A regular expression takes seconds where a hostile file is nothing but pairs that begin like a marker.
    """
    length = 2**8  # between segments a marker is near
    while place < len(data) - 1:
        count = min(length, len(data) - 1 - place)
        block = np.frombuffer(data, np.uint8, count + 1, place)
        yield place, block[:-1] == 0xFF, block[1:]
        place, length = place + count, _SEARCHED


def _says_nothing_of_pixels(name: int, content: bytes, metadata: _Metadata) -> bool:
    """Whether a segment is a comment or an application's; EXIF and XMP are noted."""
    if not (0xE0 <= name <= 0xEF or name == 0xFE):
        return False
    if name == 0xE1:
        metadata.note(exif=content if content.startswith(_EXIF) else b"")
        metadata.note(xmp=content if content.startswith(_XMP) else b"")
    # By these two a decoder tells the colour space.
    jfif = name == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 14
    return not (jfif or (name == 0xEE and content.startswith(b"Adobe") and len(content) >= 12))


class _Jpeg:
    """What the headers of a JPEG say so far."""

    def __init__(self) -> None:
        self.interval = 0  # MCUs between restarts, 0 for none
        self.size = (0, 0)
        self.progressive = self.several = False
        # Blocks of each component.
        self.components: dict[int, int] = {}
        # Bits of a component's coefficients that are not there yet, DC and AC.
        self.missing: dict[tuple[int, int], int] = {}
        self.scans = self.blocks = self.bytes = self.least = 0
        self.entropy = b""
        self.restarts_missing = False

    def segment(self, name: int, content: bytes, max_pixels: int) -> None:
        """Read what is a frame's header or the length of a restart interval."""
        if name == 0xDD:
            self.interval = int.from_bytes(content[:2], "big")
        if not 0xC0 <= name <= 0xCF or name in {0xC4, 0xC8, 0xCC}:
            return
        if self.components:
            raise UnusableImageError("corrupt")
        height, width = (int.from_bytes(content[i : i + 2], "big") for i in (1, 3))
        self.size = (width, height)
        check_size(self.size, max_pixels)
        self.progressive = name in {0xC2, 0xCA}
        fields = [content[i : i + 3] for i in range(6, 6 + 3 * content[5], 3)]
        most = [max(field[1] >> 4 for field in fields), max(field[1] & 15 for field in fields)]
        for field in fields:
            sampling = (field[1] >> 4, field[1] & 15)
            blocks = [-(-self.size[i] * sampling[i] // (8 * most[i])) for i in (0, 1)]
            self.components[field[0]] = blocks[0] * blocks[1]
            spans = range(64) if self.progressive else (0,)
            self.missing |= {(field[0], k): 99 for k in spans}
        self.mcus = -(-width // (8 * most[0])) * -(-height // (8 * most[1]))

    def scan(self, content: bytes, entropy: bytes) -> None:
        """Read a scan's header, and weigh it."""
        shown = [content[i] for i in range(1, 1 + 2 * content[0], 2)]
        if not shown or not self.components:
            raise UnusableImageError("corrupt")
        first, last, bits = content[-3:]
        self.several = self.progressive or self.scans > 0 or len(shown) < len(self.components)
        for component in shown:
            self.blocks += self.components[component]
            for k in range(first, min(last, 63) + 1) if self.progressive else (0,):
                self.missing[component, k] = bits & 15 if self.progressive else 0
        mcus = self.components[shown[0]] if len(shown) == 1 else self.mcus
        self.scans += 1
        self.bytes += len(entropy)
        self.entropy = entropy
        if self.scans > MAX_SCANS:
            raise UnusableImageError("too costly")
        self.restarts_missing = bool(self.interval) and (
            _restarts(entropy) < -(-mcus // self.interval) - 1
        )
        refined = self.progressive and first == 0 and bits >> 4 > 0  # a bit a block
        self.least = mcus // 8 if refined else 0

    def whole(self) -> bool:
        """Whether nothing is missing before the last scan's data, nor a restart within them."""
        return not self.restarts_missing and max(self.missing.values()) == 0

    def nanoseconds(self) -> float:
        """What decoding all that was read takes."""
        cost = _JPEG_PIXEL_NS * self.size[0] * self.size[1]
        if self.several:
            return cost + _SCANS_BYTE_NS * self.bytes + _SCANS_BLOCK_NS * self.blocks
        return cost + _JPEG_BYTE_NS * self.bytes


def _load_scans(image: ImageFile.ImageFile, parts: ImageParts) -> None:
    """Decode a JPEG of several scans; UnusableImageError unless the last one's data are all there.

    Such a JPEG is decoded only when its end is seen, and then the decoder makes up what the last scan lacks.
    Before the end it says how much it has taken: behind a whole scan it skips all that is no marker, within
    one it takes bytes only for whole codes, and sixteen ones are none.
    """
    extents, arguments = image.tile[0][1], image.tile[0][3]
    decoder = Image._getdecoder(image.mode, "jpeg", arguments, image.decoderconfig)
    try:
        image.load_prepare()
        decoder.setimage(image.im, extents)
        rest = parts.data[: -len(_END_OF_IMAGE)]
        for probe in range(_PROBES):
            taken, _ = decoder.decode(rest)
            rest = rest[max(taken, 0) :]
            # The first few complete what the decoder looks ahead.
            if taken < 0 or (rest and probe > _PROBES // 3):
                raise UnusableImageError("corrupt" if taken < 0 else "truncated")
            rest += b"\xff\0"
        if parts.last_scan < parts.least_last_scan:
            raise UnusableImageError("truncated")
        taken, failed = decoder.decode(rest + _END_OF_IMAGE)
        if taken >= 0 or failed < 0:
            raise UnusableImageError("corrupt")
    finally:
        decoder.cleanup()
    image.tile = []
    image.fp = None


# PNG: chunks, each a length, a name, content and a checksum.


def _png_parts(data: bytes, max_pixels: int) -> ImageParts:
    header = data[len(_PNG) + 8 : len(_PNG) + 21]
    if data[len(_PNG) + 4 : len(_PNG) + 8] != b"IHDR" or len(header) < 13:
        raise UnusableImageError("truncated" if len(data) < len(_PNG) + 21 else "corrupt")
    size = (int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big"))
    check_size(size, max_pixels)
    depth, samples = header[8], {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[header[9]]
    kept, metadata = [_PNG], _Metadata()
    place, count, pixels, clear = len(_PNG), 0, False, samples in {2, 4}
    while place + 8 <= len(data):
        count += 1
        _bounded(count)
        length, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        stop = place + 12 + length
        if name == b"IEND":
            kept.append(_png_chunk(b"IEND", b""))
            break
        if name in {b"IHDR", b"PLTE", b"IDAT"}:
            kept.append(data[place:stop])
            pixels = pixels or name == b"IDAT"
        elif name == b"tRNS" and not pixels:
            chunk = data[place:stop]
            if chunk == _png_chunk(name, chunk[8:-4]):
                kept.append(chunk)
                clear = True
        else:
            _note_png(name, data[place + 8 : min(stop - 4, place + _METADATA_BYTES)], metadata)
        place = stop
    if not pixels:
        raise UnusableImageError("truncated")
    nanoseconds = _PNG_BYTE_NS * samples * depth / 8 + _ALPHA_PIXEL_NS * clear
    nanoseconds *= size[0] * size[1]
    return ImageParts("PNG", b"".join(kept), size, metadata.orientation(), nanoseconds, depth=depth)


def _note_png(name: bytes, content: bytes, metadata: _Metadata) -> None:
    """Note EXIF and XMP of a chunk, which text may hold, too."""
    if name == b"eXIf":
        metadata.note(exif=content)
    elif name in {b"tEXt", b"zTXt", b"iTXt"}:
        if content.startswith(b"XML:com.adobe.xmp\0"):
            metadata.note(xmp=_png_text(name, content))
        elif content.startswith(b"Raw profile type exif\0"):
            metadata.note(exif=_raw_profile(_png_text(name, content)))


def _png_chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(name + content)
    return b"".join([len(content).to_bytes(4, "big"), name, content, check.to_bytes(4, "big")])


def _png_text(name: bytes, content: bytes) -> bytes:
    """The text of a text chunk, of a compressed one the beginning."""
    _, _, text = content.partition(b"\0")
    packed = name == b"zTXt"
    if name == b"iTXt":
        packed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]  # behind the language and the translated keyword
    elif packed:
        text = text[1:]
    try:
        return zlib.decompressobj().decompress(text, _METADATA_BYTES) if packed else text
    except zlib.error:
        return b""


def _raw_profile(text: bytes) -> bytes:
    """EXIF as ImageMagick writes it into text: an empty line, "exif", the length, and hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


# WebP: chunks, each a name, a length and content, padded to an even length.


def _webp_parts(data: bytes, max_pixels: int) -> ImageParts:
    kept: list[bytes] = []
    metadata = _Metadata()
    size, extended, lossless, pixels = (0, 0), False, False, False
    place, count = 12, 0
    while place + 8 <= len(data):
        name, length = (
            data[place : place + 4],
            int.from_bytes(data[place + 4 : place + 8], "little"),
        )
        start, stop = place + 8, place + 8 + length
        count += 1
        _bounded(count)
        if count == 1:
            extended = name == b"VP8X"
            size = _webp_size(name, data[start : start + 10])
            check_size(size, max_pixels)  # the decoder makes room for the canvas when it is opened
        if name == b"EXIF":
            metadata.note(exif=data[start : min(stop, start + _METADATA_BYTES)])
        elif name == b"XMP ":
            metadata.note(xmp=data[start : min(stop, start + _METADATA_BYTES)])
        elif name in {b"VP8X", b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF"} and not pixels:
            if stop > len(data):
                raise UnusableImageError("truncated")
            kept.append(data[place : stop + (length & 1)].ljust(8 + length + (length & 1), b"\0"))
            pixels = name in {b"VP8 ", b"VP8L", b"ANMF"}  # of an animation the first frame
            lossless = lossless or name in {b"ALPH", b"VP8L", b"ANMF"}
        place = stop + (length & 1)
        if pixels and not extended:
            break
    if not pixels:
        raise UnusableImageError("truncated")
    if extended:  # it says what follows: an animation or transparency may still
        kept[0] = kept[0][:8] + bytes([kept[0][8] & 0x12]) + kept[0][9:]
    cost = _WEBP_LOSSLESS_PIXEL_NS + _ALPHA_PIXEL_NS if lossless else _WEBP_PIXEL_NS
    nanoseconds = float(cost * size[0] * size[1])
    return ImageParts("WEBP", _riff(kept), size, metadata.orientation(), nanoseconds)


def _webp_size(name: bytes, header: bytes) -> tuple[int, int]:
    """Width and height by the first chunk."""

    def number(start: int, stop: int) -> int:
        return int.from_bytes(header[start:stop], "little")

    if len(header) < 10 and not (name == b"VP8L" and len(header) >= 5):
        raise UnusableImageError("truncated")
    if name == b"VP8X":
        return number(4, 7) + 1, number(7, 10) + 1
    if name == b"VP8 ":
        return number(6, 8) & 0x3FFF, number(8, 10) & 0x3FFF
    if name == b"VP8L":
        return (number(1, 5) & 0x3FFF) + 1, (number(1, 5) >> 14 & 0x3FFF) + 1
    raise UnusableImageError("corrupt")


def _riff(chunks: list[bytes]) -> bytes:
    content = b"WEBP" + b"".join(chunks)
    return b"RIFF" + len(content).to_bytes(4, "little") + content


# TIFF: directories of tags; the first is the picture's. EXIF is a TIFF without pixels.


def _directory(data: bytes) -> tuple[Any, int, list[bytes]]:
    """Byte order, place and entries (12 bytes each) of the first directory; no entries if there is none."""
    order: Any = {b"II": "little", b"MM": "big"}.get(data[:2])
    if order is None:
        return "little", 0, []
    place = int.from_bytes(data[4:8], order)
    count = int.from_bytes(data[place : place + 2], order)
    entries = [data[i : i + 12] for i in range(place + 2, place + 2 + 12 * count, 12)]
    return order, place, [entry for entry in entries if len(entry) == 12]


def _short(entry: bytes, order: Any) -> int:
    """An entry's single number of two or four bytes; 0 where it is of another type."""
    size = {3: 2, 4: 4}.get(int.from_bytes(entry[2:4], order), 0)
    return int.from_bytes(entry[8 : 8 + size], order)


def _tiff_parts(data: bytes, max_pixels: int) -> ImageParts:
    order, _, entries = _directory(data)
    tags = {int.from_bytes(entry[:2], order): entry for entry in reversed(entries)}
    value = {tag: _short(entry, order) for tag, entry in tags.items()}
    if not {256, 257, 262}.issubset(tags):
        raise UnusableImageError("truncated" if len(entries) < 3 else "corrupt")
    size = (value[256], value[257])
    check_size(size, max_pixels)
    if value.get(259, 1) not in _TIFF_COMPRESSIONS:
        raise UnusableImageError("not an image")
    kept = [tags[tag] for tag in sorted(_TIFF_TAGS & set(tags))]
    for entry in kept:
        _bounded(int.from_bytes(entry[4:8], order))
    samples = max(1, value.get(277, 1))
    # One number of two bytes stands in the entry, several elsewhere.
    bits = [max(1, value.get(258, 1))] if samples == 1 else [16]
    nanoseconds = _TIFF_BYTE_NS * size[0] * size[1] * samples * max(bits) / 8
    orientation = value.get(0x0112, 1)
    # A directory of only these tags at the end, and none behind it.
    place = len(data) + len(data) % 2
    head = data[:4] + place.to_bytes(4, order) + data[8:].ljust(place - 8, b"\0")
    listing = len(kept).to_bytes(2, order) + b"".join(kept) + bytes(4)
    turn = orientation if 1 <= orientation <= 8 else 1
    return ImageParts("TIFF", head + listing, size, turn, nanoseconds)


def _bmp_parts(data: bytes, max_pixels: int) -> ImageParts:
    wide = data[14] != 12
    width, height = (
        int.from_bytes(
            data[18 + 4 * i : 22 + 4 * i] if wide else data[18 + 2 * i : 20 + 2 * i], "little"
        )
        for i in (0, 1)
    )
    size = (width, 2**32 - height if height >= 2**31 else height)  # negative: from the top down
    check_size(size, max_pixels)
    return ImageParts("BMP", data, size, 1, float(4 * _BMP_BYTE_NS * size[0] * size[1]))


def _with_orientation(parts: ImageParts) -> bytes:
    """The file with an EXIF block that holds nothing but the orientation."""
    entry = b"".join(n.to_bytes(2, "big") for n in (0x0112, 3, 0, 1, parts.orientation, 0))
    exif = b"MM\0*\0\0\0\x08\0\1" + entry + bytes(4)
    data = parts.data
    if parts.kind == "JPEG":
        place = 2
        if data[2:4] == b"\xff\xe0":  # JFIF comes first
            place += 2 + int.from_bytes(data[4:6], "big")
        segment = b"\xff\xe1" + (2 + len(_EXIF) + len(exif)).to_bytes(2, "big") + _EXIF + exif
        return data[:place] + segment + data[place:]
    if parts.kind == "PNG":
        behind = len(_PNG) + 25  # its header
        return data[:behind] + _png_chunk(b"eXIf", exif) + data[behind:]
    # A WebP with EXIF is an extended one already.
    chunks = data[12:20] + bytes([data[20] | 0x08]) + data[21:]
    return _riff([chunks, b"EXIF" + len(exif).to_bytes(4, "little") + exif])


# ---- the same in streetvision/data/pixels.py and in the detector: to here


def tolerant(factory: Any, file: Any, name: str | bytes = "") -> Any:
    """Open a file for `Image.open` without its metadata, where Pillow may find fault with that alone."""
    if isinstance(file, io.BytesIO):
        with suppress(UnusableImageError):
            file = io.BytesIO(without_metadata(file.read()))
        file.seek(0)
    return factory(file, name)


# A miner opens an image before it asks the detector.
for kind in ("JPEG", "PNG", "WEBP"):
    if kind in Image.OPEN:
        opener, accepts = Image.OPEN[kind]
        Image.register_open(kind, partial(tolerant, opener), accepts)


def cut_views(
    image: Image.Image, fit: dict[str, Any], grid: dict[str, Any]
) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Return the views' inputs [V, H, W, 3], pixels of each that show the image [V], and boxes [V, 4].

    The global view comes first; tiles are cut from the image itself, then fitted to the input like it.
    """
    pixel_boxes, n = [(0, 0, image.width, image.height)], grid["grid"]
    if n > 1:
        for row, column in product(range(n), repeat=2):
            left, right = span(column, n, grid["growth"], image.width)
            top, bottom = span(row, n, grid["growth"], image.height)
            pixel_boxes.append((left, top, right, bottom))
    fitted = [fit_to_input(image.crop(box), fit) for box in pixel_boxes]
    inputs = np.stack([one for one, _ in fitted])
    content = np.array([pixels for _, pixels in fitted], dtype=np.float64)
    boxes = np.stack([visible(box, fit) for box in pixel_boxes]) / np.tile(image.size, 2)
    if grid["flip"]:
        inputs = np.concatenate([inputs, inputs[:, :, ::-1]])
        content, boxes = np.tile(content, 2), np.tile(boxes, (2, 1))
    return inputs, content, boxes


def span(index: int, n: int, growth: float, length: int) -> tuple[int, int]:
    """Return first and last + 1 pixel of a cell grown by `growth` of its length, inside [0, length]."""
    start = max(0, round((index - growth / 2) / n * length))
    stop = min(length, round((index + 1 + growth / 2) / n * length))
    start = min(start, length - 1)
    return start, max(stop, start + 1)


def fit_to_input(image: Image.Image, fit: dict[str, Any]) -> tuple[NDArray[np.uint8], int]:
    """Return the model input [H, W, 3] before normalisation and how many pixels of it show the image."""
    wanted = (fit["width"], fit["height"])
    everything = wanted[0] * wanted[1]
    if image.size == wanted:
        return np.asarray(image), everything
    ratios = (wanted[0] / image.width, wanted[1] / image.height)
    scale = min(ratios) if fit["fit"] == "letterbox" else max(ratios)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if image.size == wanted:
        return np.asarray(image), everything
    if fit["fit"] == "crop":
        left, top = (size[0] - wanted[0]) // 2, (size[1] - wanted[1]) // 2
        return np.asarray(image.crop((left, top, left + wanted[0], top + wanted[1]))), everything
    canvas = Image.new("RGB", wanted, tuple(round(255 * value) for value in fit["mean"]))
    canvas.paste(image, ((wanted[0] - size[0]) // 2, (wanted[1] - size[1]) // 2))
    return np.asarray(canvas), size[0] * size[1]


def visible(box: PixelBox, fit: dict[str, Any]) -> Floats:
    """Return what the input shows of a box, in pixels: `crop` cuts what sticks out."""
    edges = np.array(box, dtype=np.float64)
    if fit["fit"] == "letterbox":
        return edges
    size = edges[2:] - edges[:2]
    scale = max(fit["width"] / size[0], fit["height"] / size[1])
    cut = np.maximum(size - np.array([fit["width"], fit["height"]]) / scale, 0) / 2
    shown: Floats = edges + np.concatenate([cut, -cut])
    return shown


# --------------------------------------------------------------------------- views to one logit


def is_tile(boxes: Floats) -> NDArray[np.bool_]:
    """Return which views [V] show another part of the image than the global one."""
    different: NDArray[np.bool_] = (np.abs(boxes - boxes[0]) > 1e-9).any(axis=1)
    return different


def fuse_by_rule(
    mode: str, options: dict[str, float], logits: Floats, content: Floats, boxes: Floats
) -> float:
    """Return the logit of views [V] by a rule that is not trained."""
    if mode == "single":
        return float(logits[0])
    if mode == "simple_mean":
        return float(logits.mean())
    if mode == "content_aware":
        return float(np.average(logits, weights=content))
    if mode == "weighted_uncertainty":  # by the inverse entropy of the views' probabilities
        z = np.abs(logits) / options["temperature"]
        entropy = np.log1p(np.exp(-z)) + z * np.exp(-z) / (1 + np.exp(-z))
        return float(np.average(logits, weights=1 / (0.05 + entropy)))
    if mode == "topk_mean":
        tiles = is_tile(boxes)
        top = np.sort(logits[tiles])[::-1][: int(options["top_k"])]
        return float((logits[~tiles].mean() + top.sum()) / (1 + len(top)))
    raise ValueError(f"the fusion mode {mode} is unknown: run `natix install` again")


def networks(state: State, heads: int, head: nn.Linear) -> list[Network]:
    """Return the trained networks whose logits are averaged; the weights of a single one have no prefix."""
    if not any(name.startswith("members.") for name in state):
        return [Network(state, heads, head)]
    parts: dict[int, State] = {}
    for name, value in state.items():
        _, number, rest = name.split(".", 2)
        parts.setdefault(int(number), {})[rest] = value
    return [Network(part, heads, head) for _, part in sorted(parts.items())]


class Network:
    """One trained fusion of the views of one image, in float64 on the CPU.

    Methods take logits [V], features [V, D] and boxes [V, 4]; all views exist.
    """

    def __init__(self, state: State, heads: int, head: nn.Linear) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.heads = heads
        self.head = head

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply a linear layer."""
        return functional.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def scaled(self, name: str, x: Tensor) -> Tensor:
        """Standardise features as in training."""
        return (x - self.state[f"{name}.mean"]) / self.state[f"{name}.deviation"]

    def terms(self, logits: Tensor, tiles: Tensor) -> Tensor:
        """Return the global logit, the mean tile's and the mean of the top three tiles', standardised."""
        whole = logits[~tiles].mean()
        terms = [whole, whole, whole]
        if tiles.any():
            ordered = logits[tiles].sort(descending=True).values
            terms = [whole, ordered.mean(), ordered[:3].mean()]
        return self.scaled("scale_terms", torch.stack(terms))

    def mlp(self, logits: Tensor, features: Tensor, boxes: Floats) -> Tensor:
        """Global and mean tile features and the logits, through linear layers."""
        tiles = torch.tensor(is_tile(boxes).tolist())
        tile = torch.zeros_like(features[0])
        if tiles.any():
            tile = self.scaled("scale_tiles", features[tiles].mean(0))
        whole = self.scaled("scale_global", features[~tiles].mean(0))
        x = torch.cat([whole, tile, self.terms(logits, tiles)])
        layer = 0
        while f"hidden.{layer}.weight" in self.state:
            x = functional.gelu(self.linear(f"hidden.{layer}", x))
            layer += 2
        return self.linear("output", x)

    def latent(self, logits: Tensor, features: Tensor, boxes: Floats) -> Tensor:
        """Views averaged in a latent space and decoded to features that the classifier's head takes."""
        state = self.state
        encoded = self.linear("encoder", self.scaled("scale", features))
        encoded = encoded + self.linear("outer", functional.gelu(self.linear("inner", encoded)))
        weights = state["view_logits"].softmax(0)
        biases = torch.stack([state[f"biases.{view}"] for view in range(len(weights))])
        decoded = torch.einsum("vdl,l->vd", state["decoders"], weights @ encoded) + biases
        fused = (weights @ decoded) * state["scale.deviation"] + state["scale.mean"]
        head = self.head
        return functional.linear(fused, head.weight.cpu().double(), head.bias.cpu().double())

    def attention(self, logits: Tensor, features: Tensor, boxes: Floats) -> Tensor:
        """Views attend to each other with a bias by their places; global and mean tile to the logit."""
        tiles, place = torch.tensor(is_tile(boxes).tolist()), places(boxes)
        tokens = self.linear("token", self.scaled("scale", features)) + self.linear("place", place)
        count, dim = tokens.shape
        split = self.linear("query_key_value", tokens).view(count, 3, self.heads, dim // self.heads)
        query, key, value = split.permute(1, 2, 0, 3)  # each [heads, V, dim / heads]
        apart = place[None] - place[:, None]  # key minus query
        bias = self.linear("bias", torch.cat([apart, apart[..., :2].square()], dim=2))
        scores = query @ key.transpose(1, 2) / math.sqrt(dim // self.heads) + bias.permute(2, 0, 1)
        mixed = (scores.softmax(2) @ value).transpose(0, 1).reshape(count, dim)
        tokens = tokens + self.linear("mixed", mixed)
        tile = tokens[tiles].mean(0) if tiles.any() else torch.zeros_like(tokens[0])
        return self.linear(
            "output", torch.cat([tokens[~tiles].mean(0), tile, self.terms(logits, tiles)])
        )


def places(boxes: Floats) -> Tensor:
    """Return centre x and y, log width and height of views in units of the global one [V, 4]."""
    corner, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    centre = (corner + size / 2 - corner[0]) / size[0]
    place = np.concatenate([centre, np.log(size / size[0])], axis=1)
    return torch.tensor(place.tolist(), dtype=torch.float64)


# --------------------------------------------------------------------------- logit to probability


def deployed_probability(policy: dict[str, Any], logit: float) -> float:
    """Calibrate, move to the served prior and by the threshold's shift: 0.5 is the decision."""
    shift = log_odds(policy["served_prior"]) - log_odds(policy["calibration_prior"])
    z = calibrated(policy["calibrator"], logit) + shift + policy["threshold_shift"]
    return float(1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z)))


def log_odds(probability: float) -> float:
    """Return ln p / (1 - p)."""
    return math.log(probability) - math.log1p(-probability)


def calibrated(fitted: dict[str, Any], x: float) -> float:
    """Return the log-odds that a fitted calibrator gives a logit."""
    return float(CALIBRATORS[fitted["kind"]](fitted, x))


def platt(fitted: dict[str, Any], x: float) -> float:
    """Return slope times logit plus intercept."""
    return float(fitted["slope"] * x + fitted["intercept"])


def temperature(fitted: dict[str, Any], x: float) -> float:
    """Return logit over temperature."""
    return float(x / fitted["temperature"])


def beta(fitted: dict[str, Any], x: float) -> float:
    """Return a ln p - b ln(1 - p) + c."""
    a, b = fitted["a"], fitted["b"]
    even = -abs(x) - 2 * math.log1p(math.exp(-abs(x)))  # ln p + ln(1 - p)
    return float((a + b) / 2 * x + (a - b) / 2 * even + fitted["c"])


def quadratic(fitted: dict[str, Any], x: float) -> float:
    """Return a parabola's value, continued by its tangents."""
    low, high = fitted["low"], fitted["high"]
    inside = min(max(x, low), high) - low
    right = inside**2 / (2 * (high - low))
    first, second = inside - right + min(x - low, 0.0), right + max(x - high, 0.0)
    return float(fitted["slope_low"] * first + fitted["slope_high"] * second + fitted["intercept"])


def pchip(fitted: dict[str, Any], x: float) -> float:
    """Return a cubic Hermite spline's value, continued by its tangents."""
    knots, heights, slopes = fitted["knots"], fitted["log_odds"], fitted["slopes"]
    if x <= knots[0]:
        return float(heights[0] + slopes[0] * (x - knots[0]))
    if x >= knots[-1]:
        return float(heights[-1] + slopes[-1] * (x - knots[-1]))
    i = int(np.searchsorted(knots, x, side="right")) - 1
    width, t = knots[i + 1] - knots[i], x - knots[i]
    secant = (heights[i + 1] - heights[i]) / width
    bend = (slopes[i] + slopes[i + 1] - 2 * secant) / width
    return float(
        heights[i] + t * (slopes[i] + t * ((secant - slopes[i]) / width - bend + t * bend / width))
    )


def ensemble(fitted: dict[str, Any], x: float) -> float:
    """Return the log-odds of the members' weighted mean probability, and the intercept."""
    z = np.array([calibrated(member, x) for member in fitted["members"]])
    share = np.log(fitted["weights"])
    positive = np.logaddexp.reduce(share - np.logaddexp(0.0, -z))
    negative = np.logaddexp.reduce(share - np.logaddexp(0.0, z))
    return float(positive - negative + fitted["intercept"])


CALIBRATORS = {
    one.__name__: one for one in (platt, temperature, beta, quadratic, pchip, ensemble)
}  # fmt: skip
