"""A bundle as a miner would serve it: the installed detector, asked what validators ask, and worse."""

from __future__ import annotations

import base64
import io
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageChops, PngImagePlugin

from streetvision.bundle.natix.install import CONFIG, NAME, install
from streetvision.bundle.natix.layout import LAYOUTS, layout_of
from streetvision.bundle.natix.stand_in import make_checkout
from streetvision.core.errors import UserError

# Width and height of what is sent, in turn: a phone's picture and a generated one, whole as v0.4.1 sends
# them, and the 224 pixels of before.
SIZES = ((4032, 3024), (1024, 1024), (224, 224))
LIMIT_S = 9.0  # a validator waits no longer
LOAD_LIMIT_S = 300.0
WARM_UP = 3
# With the Predictor's libraries on its device; with others (Pillow 10 resizes a pixel in thirty otherwise).
TOLERANCE, TOLERANCE_ELSEWHERE = 1e-6, 2e-3
NO_ANSWER = -1.0


@dataclass(frozen=True)
class Answer:
    """What a miner sent back.

    Attributes
    ----------
    prediction : probability, or -1 without an answer
    error : why there is none
    seconds : that passed, and of these `decoding` from the opened file to pixels
    peak_mib : most memory the miner has held so far, MiB
    """

    prediction: float
    error: str
    seconds: float
    decoding: float
    peak_mib: int


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it is as it must be, and what was found."""

    name: str
    ok: bool
    found: str


class Miner:
    """A running `miner.py` with the detector of a checkout; `ready` is what it says of itself.

    Raises
    ------
    UserError
        It does not start; the message has the last line it printed.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: BinaryIO) -> None:
        self._process, self._log = process, log
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready = self._next(LOAD_LIMIT_S)

    def ask(self, payload: bytes) -> Answer:
        """Send one payload without a line break; UserError if no answer comes within the limit."""
        started = time.perf_counter()
        stream = self._process.stdin
        with suppress(BrokenPipeError):  # it has died: the next line says how
            if stream is not None:
                stream.write(payload + b"\n")
                stream.flush()
        document = self._next(LIMIT_S)
        return Answer(**document, seconds=time.perf_counter() - started)

    def _read(self) -> None:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(b"")

    def _next(self, limit: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            raise UserError(f"the miner did not answer within {limit:g} s") from None
        if not line:
            self._log.seek(0)
            printed = self._log.read().decode(errors="replace").split("\n")
            last = next((text for text in reversed(printed) if text.strip()), "nothing was printed")
            raise UserError(f"the miner ended with status {self._process.wait()}: {last.strip()}")
        document: dict[str, Any] = json.loads(line)
        return document


@contextmanager
def running_miner(
    checkout: Path, python: Path | str = sys.executable, device: str = "cpu"
) -> Iterator[Miner]:
    """Start a miner on an interpreter that has what the subnet's environment has, and end it."""
    program, package = Path(__file__).with_name("miner.py"), layout_of(checkout).package
    # The miner is started in the checkout, where a relative path leads elsewhere. No link is followed: it is
    # by its place that a Python knows its environment.
    interpreter = Path(shutil.which(python) or python).absolute()
    command = [str(interpreter), "-I", str(program), str(checkout.resolve()), package]
    command += [NAME, CONFIG, device]
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=checkout
            )
        except OSError as error:
            raise UserError(f"{python} cannot be run: {error.strerror}") from error
        with process:
            try:
                yield Miner(process, log)
            finally:
                process.kill()
                if process.stdin is not None:
                    with suppress(BrokenPipeError):  # a payload that it did not live to read
                        process.stdin.close()


def check(
    bundle: Path, challenges: int = 100, python: Path | str = sys.executable, device: str = "cpu"
) -> list[Finding]:
    """Install the bundle in stand-in checkouts, run a miner there and look at its answers.

    Parameters
    ----------
    bundle
        Folder of the bundle.
    challenges
        Timed ones, at least 1, of `SIZES` in turn.
    python
        The miner's interpreter: one with the subnet's environment, or this one.
    device
        The miner's: cpu or cuda.

    Raises
    ------
    UserError
        The bundle cannot be installed, or the miner does not start, dies, or exceeds the limit of 9 s.
    """
    if challenges < 1:
        raise UserError(f"{challenges} challenges are too few; at least 1 is needed")
    images = [challenge_image(seed, SIZES[seed % len(SIZES)]) for seed in range(challenges)]
    with tempfile.TemporaryDirectory(prefix="streetvision-") as folder:
        checkout = make_checkout(Path(folder) / "checkout")
        install(bundle, checkout)
        with running_miner(checkout, python, device) as miner:
            for data in images[:WARM_UP]:
                miner.ask(payload(data))
            answers = [miner.ask(payload(data)) for data in images]
            findings = [
                _start(miner.ready),
                *(
                    _speed(size, images[i :: len(SIZES)], answers[i :: len(SIZES)])
                    for i, size in enumerate(SIZES[:challenges])
                ),
                _same(bundle, images, answers, miner, device),
            ]
            findings += [_refused(name, miner.ask(sent)) for name, sent in malformed().items()]
            findings += [
                _served(name, miner.ask(payload(data))) for name, data in unusual().items()
            ]
            last = miner.ask(payload(images[0]))
        findings.append(
            Finding(
                "the first challenge again, after all these",
                last.prediction == answers[0].prediction,
                f"{last.prediction:.6f}; peak memory {last.peak_mib:,} MiB",
            )
        )
        for layout in LAYOUTS[1:]:
            checkout = make_checkout(Path(folder) / layout.package, layout)
            install(bundle, checkout)
            with running_miner(checkout, python, device) as miner:
                other = miner.ask(payload(images[0]))
            same = other.prediction == answers[0].prediction
            found = other.error or f"{other.prediction:.6f}"
            findings.append(Finding(f"the same in {layout}", same, found))
    return findings


def payload(data: bytes) -> bytes:
    """A request with an image as a validator sends it, in base64."""
    return json.dumps({"image": base64.b64encode(data).decode()}).encode()


def challenge_image(seed: int, size: tuple[int, int] = SIZES[-1]) -> bytes:
    """A JPEG of Pillow's default quality: coloured blocks and noise, a quarter of a byte a pixel."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    noise = rng.normal(64, 12, (512, 512)).clip(0, 128).astype(np.uint8)
    noise = np.tile(noise, [-(-side // 512) for side in size[::-1]])[: size[1], : size[0]]
    grey = Image.fromarray(noise)
    noisy = ImageChops.add(image, Image.merge("RGB", [grey] * 3), offset=-64)
    return encoded(noisy, "JPEG")


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def malformed() -> dict[str, bytes]:
    """Payloads without a usable image, by what is wrong: the subnet's miner answers none of them."""
    jpeg = challenge_image(0)
    half = Image.new("1", (12_000, 12_000))  # Pillow itself only warns of it
    return {
        "no JSON": b"image",
        "no object": b"[]",
        "deep JSON": b"[" * 200_000,
        "no image": b"{}",
        "an empty image": b'{"image": ""}',
        "a number": b'{"image": 5}',
        "NaN": b'{"image": NaN}',
        "null": b'{"image": null}',
        "an object in place of the image": b'{"image": {"bytes": ""}}',
        "wrong base64": b'{"image": "abc"}',
        "text outside ASCII": '{"image": "ß"}'.encode(),
        "bytes that are no image": payload(b"no image" * 100),
        "32 MB that are no image": payload(bytes(32_000_000)),
        "half a JPEG": payload(jpeg[: len(jpeg) // 2]),
        "a JPEG's header": payload(jpeg[:100]),
        "one pixel": payload(encoded(half.crop((0, 0, 1, 1)), "PNG")),
        "a line": payload(encoded(half.crop((0, 0, 224, 1)), "PNG")),
        "a format that no validator sends": payload(encoded(half.crop((0, 0, 64, 64)), "GIF")),
        "144 megapixels": payload(encoded(half, "PNG")),
        "400 megapixels": payload(encoded(Image.new("1", (20_000, 20_000)), "PNG")),
    }


def unusual() -> dict[str, bytes]:
    """Image files that no validator sends and that can be answered."""
    image = Image.open(io.BytesIO(challenge_image(1)))
    turned = Image.Exif()
    turned[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 1_500_000, zip=True)  # more than Pillow reads
    return {
        "grey": encoded(image.convert("L"), "JPEG"),
        "CMYK": encoded(image.convert("CMYK"), "JPEG"),
        "transparent": encoded(image.convert("RGBA"), "PNG"),
        "palette": encoded(image.convert("P"), "PNG"),
        "16-bit grey": encoded(Image.fromarray(np.full((36, 28), 40_000, np.uint16)), "PNG"),
        "animated": encoded(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
        "EXIF-rotated": encoded(image, "JPEG", exif=turned),
        "text beside the pixels": encoded(image, "PNG", pnginfo=text),
    }


def _start(ready: Mapping[str, Any]) -> Finding:
    versions = ", ".join(f"{name} {version}" for name, version in ready["versions"].items())
    found = f"{versions}; {ready['threads']} threads; loaded in {ready['seconds']:.1f} s"
    return Finding("the detector loads without StreetVision", True, found)


def _speed(size: tuple[int, int], images: list[bytes], answers: list[Answer]) -> Finding:
    seconds = [answer.seconds for answer in answers]
    megabytes = np.mean([len(data) for data in images]) / 1e6
    name = f"{len(answers)} of {size[0]}×{size[1]} ({megabytes:.2f} MB) within {LIMIT_S:g} s each"
    found = f"{_milliseconds(seconds)}; of that decoding "
    found += _milliseconds([answer.decoding for answer in answers])
    return Finding(name, max(seconds) <= LIMIT_S, found)


def _milliseconds(seconds: list[float]) -> str:
    p50, p95, p99 = (1e3 * np.quantile(seconds, q) for q in (0.5, 0.95, 0.99))
    return f"p50 {p50:.1f} ms, p95 {p95:.1f}, p99 {p99:.1f}, longest {1e3 * max(seconds):.1f}"


def _same(
    bundle: Path, images: list[bytes], answers: list[Answer], miner: Miner, device: str
) -> Finding:
    """Compare with the Predictor, an image at a time as the miner gets them."""
    import PIL
    import timm
    import torch

    from streetvision.bundle.predictor import Predictor

    predictor = Predictor.load(bundle, "cpu")
    expected = np.array([predictor(Image.open(io.BytesIO(data))) for data in images])
    difference = np.abs(expected - [answer.prediction for answer in answers])
    here = {module.__name__: module.__version__ for module in (torch, timm, np, PIL)}
    alike = device == "cpu" and here.items() <= miner.ready["versions"].items()
    allowed = TOLERANCE if alike else TOLERANCE_ELSEWHERE
    ok = bool((difference <= allowed).all())
    found = f"largest difference {difference.max():.1e}, allowed {allowed:.0e}"
    return Finding("the Predictor's probabilities", ok, found)


def _refused(name: str, answer: Answer) -> Finding:
    ok = answer.prediction == NO_ANSWER and bool(answer.error)
    return Finding(f"{name}: no answer (-1)", ok, answer.error or f"{answer.prediction}")


def _served(name: str, answer: Answer) -> Finding:
    ok = 0 <= answer.prediction <= 1
    return Finding(f"{name}: a probability", ok, answer.error or f"{answer.prediction:.6f}")
