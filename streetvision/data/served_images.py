"""A split's images as the configured validator sends them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import TYPE_CHECKING

from streetvision.core.processes import in_threads
from streetvision.core.progress import progress
from streetvision.data.store import Split
from streetvision.subnet.profiles import profile
from streetvision.subnet.served import Task, mixed_served_jpegs, open_jpeg

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetvision.core.params import Subnet


def served_versions(subnet: Subnet, repeats: int) -> int:
    """Versions of each image that `served_images` yields: one where the validator draws nothing."""
    return repeats if profile(subnet.validator).drawn_levels else 1


def served_images(
    split: Split, subnet: Subnet, repeats: int, seed: int, workers: int
) -> Iterator[Image]:
    """Yield `served_versions` of each image in the split's order, as `subnet.validator` sends them.

    Levels have the validator's shares; seed, image id and repetition determine what is drawn. A validator that
    sends pictures at their full size is asked with the stored ones as they are: they were reduced from the
    same file, and to encode the reduced picture again would spoil what was never sent so small. `challenge`
    sends the files themselves and measures the difference.
    """
    sender = profile(subnet.validator)
    versions = served_versions(subnet, repeats)
    rows = progress(range(len(split)), len(split), f"{split.name}, {sender.name}")
    if sender.side is None:
        for image in in_threads(split.image, rows, workers):
            yield from repeat(image, versions)
        return
    tasks = (Task(str(split.ids[row]), split.image_bytes(row)) for row in rows)
    jpegs = mixed_served_jpegs(
        sender, tasks, sender.level_shares, versions, seed, subnet.flip_probability, workers
    )
    yield from in_threads(open_jpeg, jpegs, workers)
