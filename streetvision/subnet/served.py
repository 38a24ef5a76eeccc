"""Pictures as a validator serves them: a stream of JPEGs from a stream of files, on all cores.

What is drawn for a picture depends on seed, id, level and repetition alone, never on order or workers.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from streetvision.errors import UserError
from streetvision.processes import in_threads
from streetvision.subnet.profiles import SendOptions, ValidatorProfile

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # those that the project reads


class Task(NamedTuple):
    """A picture to serve: its name, its file, and where an image-to-image picture was painted over."""

    id: str
    data: bytes
    mask_center: tuple[int, int] | None = None


def challenge_rng(seed: int, image_id: str, level: int, repeat: int = 0) -> np.random.Generator:
    """Generator of one challenge, a function of its arguments alone."""
    number = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big")
    return np.random.default_rng([seed, number, level, repeat])


def served_image(
    profile: ValidatorProfile,
    image: Image,
    level: int,
    rng: np.random.Generator,
    flip_probability: float = 0.0,
    mask_center: tuple[int, int] | None = None,
) -> Image:
    """What `profile` sends of a whole picture at `level`, before it is a JPEG.

    The picture is taken as it lies in its file: nobody turns it as EXIF says. The last two arguments are those
    of `SendOptions`. UserError for a level that the profile does not have.
    """
    if level not in profile.levels:
        raise UserError(
            f'validator "{profile.name}" has the levels {", ".join(map(str, profile.levels))}, got {level}'
        )
    return profile.send(image, level, rng, SendOptions(flip_probability, mask_center))


def served_jpeg(
    profile: ValidatorProfile,
    image: Image,
    level: int,
    rng: np.random.Generator,
    flip_probability: float = 0.0,
    mask_center: tuple[int, int] | None = None,
) -> bytes:
    """`served_image` as the JPEG that a miner is sent."""
    sent = served_image(profile, image, level, rng, flip_probability, mask_center)
    buffer = io.BytesIO()
    # Grey and CMYK have no chroma to halve.
    halved = {"subsampling": profile.jpeg_subsampling} if sent.mode == "RGB" else {}
    sent.save(buffer, "JPEG", quality=profile.jpeg_quality, **halved)
    return buffer.getvalue()


def served_jpegs(
    profile: ValidatorProfile,
    tasks: Iterable[Task],
    levels: Sequence[int],
    repeats: int,
    seed: int,
    flip_probability: float = 0.0,
    workers: int = 1,
) -> Iterator[bytes]:
    """Yield a JPEG for each task, in it for each level, in it for each repeat.

    `workers` as in `in_threads`; it changes no byte. Tasks are taken a few at a time, and each worker holds one
    decoded picture: with tasks from a generator no more is in memory, whatever their number.

    UserError for a level that the profile does not have, and for a file that is no picture.
    """
    versions = [(level, repeat) for level in levels for repeat in range(repeats)]
    work = ((task, versions) for task in tasks)
    yield from _all_served(profile, work, seed, flip_probability, workers)


def mixed_served_jpegs(
    profile: ValidatorProfile,
    tasks: Iterable[Task],
    shares: Sequence[float],
    repeats: int,
    seed: int,
    flip_probability: float = 0.0,
    workers: int = 1,
) -> Iterator[bytes]:
    """Yield `repeats` JPEGs for each task, their levels drawn by `mixed_levels`.

    `workers` as in `in_threads`; it changes no byte.
    """
    work = (
        (task, [(n, k) for k, n in enumerate(mixed_levels(task.id, shares, repeats, seed))])
        for task in tasks
    )
    yield from _all_served(profile, work, seed, flip_probability, workers)


def mixed_levels(
    image_id: str, shares: Sequence[float], repeats: int, seed: int
) -> tuple[int, ...]:
    """Draw the levels [repeats] of one image, a function of the arguments alone.

    Systematic sampling: each level has its share of the draws in expectation, and among the repeats of
    one image less than one more or less than that. `shares` of the levels from 0 on add up to 1.
    """
    start = challenge_rng(seed, image_id, len(shares)).random()  # a stream of no level's own
    places = (start + np.arange(repeats)) / repeats
    drawn = np.searchsorted(np.cumsum(shares), places, side="right")
    last = int(np.flatnonzero(shares)[-1])  # where rounding leaves the sum below 1
    return tuple(int(level) for level in np.minimum(drawn, last))


def open_jpeg(data: bytes) -> Image:
    """The RGB image of a JPEG that was served."""
    from PIL import Image as PILImage

    with PILImage.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return image.convert("RGB")


# A picture, and the level and repetition of each of its versions.
_Work = tuple[Task, list[tuple[int, int]]]


def _all_served(
    profile: ValidatorProfile,
    work: Iterable[_Work],
    seed: int,
    flip_probability: float,
    workers: int,
) -> Iterator[bytes]:
    def served(one: _Work) -> list[bytes]:
        task, versions = one
        image = _opened(task)
        made: list[bytes] = []
        fixed: dict[int, bytes] = {}  # what repeats itself is made once
        for level, repeat in versions:
            if level not in fixed:
                rng = challenge_rng(seed, task.id, level, repeat)
                data = served_jpeg(profile, image, level, rng, flip_probability, task.mask_center)
                if level in profile.drawn_levels:
                    made.append(data)
                    continue
                fixed[level] = data
            made.append(fixed[level])
        return made

    for some in in_threads(served, work, workers):
        yield from some


def _opened(task: Task) -> Image:
    """The picture of a task as a validator opens it: decoded, not turned, in the mode of its file."""
    from PIL import Image as PILImage

    try:
        image = PILImage.open(io.BytesIO(task.data), formats=FORMATS)
        image.load()
    except Exception as error:  # decoders raise anything
        raise UserError(f"picture {task.id} cannot be decoded: {error}") from error
    return image
