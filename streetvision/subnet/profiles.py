"""What the validators of Subnet 72 sent, era by era: one frozen value each, listed in `PROFILES`.

A further era is one more value in this file (and a test): everything that trains for, reports or serves what
a validator sends takes it from here.

Since 2026-05-06 (commit 05b830e) the public validator returns before it asks any miner, and gives all weight
to an address that burns it: nobody is asked, nothing is paid.

Dates and commits: natixnetwork/streetvision-subnet, and its upstream history in public forks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from streetvision.core.errors import UserError
from streetvision.subnet.distortions import (
    SIDE,
    apply_crop,
    apply_letterbox,
    draw_crop,
    draw_letterbox,
)

if TYPE_CHECKING:
    from PIL.Image import Image

HALTED, HALT_COMMIT = date(2026, 5, 6), "05b830e"
HALT = (
    f"Since {HALTED} (commit {HALT_COMMIT}) the public code of Subnet 72 asks no miner and pays nothing: "
    "all weight goes to an address that burns it."
)


@dataclass(frozen=True)
class SendOptions:
    """What differs between validators or challenges of one era.

    `flip_probability`, for each axis, from level 1 on: public validators list flips but make none.
    `mask_center` (x, y) in pixels of the picture as it lies in the file: what an image-to-image challenge was
    painted over at.
    """

    flip_probability: float = 0.0
    mask_center: tuple[int, int] | None = None


# From the whole picture, not turned by EXIF, and a level to what is sent, before it is a JPEG.
Send: TypeAlias = "Callable[[Image, int, np.random.Generator, SendOptions], Image]"


@dataclass(frozen=True)
class ValidatorProfile:
    """A validator of one era.

    Attributes
    ----------
    name : as `profile` takes it
    since, until : first day, and the day that another took over
    commits : that brought it, abbreviated
    sent : in words
    send : the picture that is sent, see `Send`
    level_shares : of the challenges, by level from 0; they add up to 1
    drawn_levels : levels whose picture depends on the random generator
    side : width and height of what is sent, pixels; None where a picture keeps its own
    sources : share of the challenges by where the pictures came from
    reward : a key of `payment.REWARDS`, which has its windows
    jpeg_quality, jpeg_subsampling : Pillow's defaults; EXIF is dropped without turning the picture
    deadline : seconds until an answer
    positive_share : of labels
    """

    name: str
    since: date
    until: date
    commits: tuple[str, ...]
    sent: str
    send: Send
    level_shares: tuple[float, ...]
    drawn_levels: frozenset[int]
    side: int | None
    sources: tuple[tuple[str, float], ...]
    reward: str = "sn72"
    jpeg_quality: int = 75
    jpeg_subsampling: str = "4:2:0"
    deadline: float = 9.0
    positive_share: float = 0.5

    def __str__(self) -> str:
        return self.name

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of distortion, from 0."""
        return tuple(range(len(self.level_shares)))

    @property
    def status(self) -> str:
        """`replaced` by another era, or `halted` with the subnet."""
        return "halted" if self.until == HALTED else "replaced"


def _send_raw(image: Image, _: int, __: np.random.Generator, ___: SendOptions) -> Image:
    """The picture as it is: its JPEG is that of the validator's code (653dd22) byte for byte, 1,000 of 1,000.

    Real pictures that come as JPEG are saved once more on their way, by the validator's cache, with the same
    settings. That is left out; it moved such pictures by one grey level on average, on noisy test pictures.
    A validator sends grey and CMYK as such, and fails to send what JPEG cannot hold (transparency, palettes,
    16 bits); that is made RGB here.
    """
    return image if image.mode in {"RGB", "L", "CMYK"} else _rgb(image)


def _send_letterbox(
    image: Image, level: int, rng: np.random.Generator, options: SendOptions
) -> Image:
    drawn = draw_letterbox(level, rng, options.flip_probability)
    return apply_letterbox(_rgb(image), drawn, rng)


def _send_crop(image: Image, level: int, rng: np.random.Generator, options: SendOptions) -> Image:
    drawn = draw_crop(level, image.size, rng, options.flip_probability, options.mask_center)
    return apply_crop(_rgb(image), drawn, rng)


def _rgb(image: Image) -> Image:
    return image if image.mode == "RGB" else image.convert("RGB")


RAW = ValidatorProfile(
    name="raw",
    since=date(2026, 5, 3),
    until=HALTED,
    commits=("81517f8", "cc3e0b9", "653dd22"),
    sent="the picture itself, not distorted, not resized",
    send=_send_raw,
    level_shares=(1.0,),
    drawn_levels=frozenset(),
    side=None,
    sources=(("real", 1 / 3), ("text-to-image", 1 / 6), ("image-to-image", 1 / 6), ("api", 1 / 3)),
)
LETTERBOX = ValidatorProfile(
    name="letterbox",
    since=date(2026, 4, 6),
    until=RAW.since,
    commits=("e02ce2c",),
    sent="the whole frame in a black square, turned, colour and sharpness distorted",
    send=_send_letterbox,
    level_shares=(0.25,) * 4,
    drawn_levels=frozenset({1, 2, 3}),
    side=SIDE,
    sources=(("real", 1 / 2), ("text-to-image", 1 / 4), ("image-to-image", 1 / 4)),
)
CROP = ValidatorProfile(
    name="crop",
    since=date(2025, 3, 14),
    until=LETTERBOX.since,
    commits=("b248b12", "28a1755"),
    sent="a square cut out of the turned picture, colour and sharpness distorted",
    send=_send_crop,
    level_shares=(0.25,) * 4,
    drawn_levels=frozenset({1, 2, 3}),
    side=SIDE,
    sources=LETTERBOX.sources,
)
PROFILES = {each.name: each for each in (RAW, LETTERBOX, CROP)}  # the newest first


def profile(name: str) -> ValidatorProfile:
    """The validator of this name; UserError for an unknown one."""
    try:
        return PROFILES[name]
    except KeyError:
        raise UserError(
            f'no validator is called "{name}"; there are {", ".join(PROFILES)}'
        ) from None
