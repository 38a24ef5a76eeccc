"""A split's images as the validator would send them: levels mixed, distorted, through a JPEG."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from streetvision.data.store import Split
from streetvision.processes import in_threads
from streetvision.progress import progress
from streetvision.subnet.profiles import CROP
from streetvision.subnet.served import Task, mixed_served_jpegs, open_jpeg

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetvision.params import Challenge


def challenge_images(
    split: Split, challenge: Challenge, repeats: int, seed: int, workers: int
) -> Iterator[Image]:
    """Yield `repeats` distorted versions, 224 × 224 pixels, of each image in the split's order.

    Their levels are mixed by `challenge.level_shares`; seed, image id and repetition determine them.
    """
    tasks = [Task(str(name), split.image_bytes(row)) for row, name in enumerate(split.ids)]
    jpegs = mixed_served_jpegs(
        CROP, tasks, challenge.level_shares, repeats, seed, challenge.flip_probability, workers
    )
    shown = progress(jpegs, len(tasks) * repeats, f"{split.name}, distorted")
    yield from in_threads(open_jpeg, shown, workers)
