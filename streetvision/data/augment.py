"""Augmentation beyond one decoded input: the subnet's own distortions, and mixtures within a batch."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streetvision.data.transforms import Preprocessing
from streetvision.params import Train
from streetvision.subnet.profiles import CROP
from streetvision.subnet.served import served_jpeg

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    Mix = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class ChallengeAugmentation:
    """Shows a share of the images as the subnet's validator sends them, instead of any other augmentation.

    What happens to an image depends on the seed given for it alone.

    Parameters
    ----------
    train
        `challenge_probability`, `challenge_levels`, `flip_probability`.
    preprocessing
        From the distorted image to the model's input.
    """

    def __init__(self, train: Train, preprocessing: Preprocessing) -> None:
        self.probability = train.challenge_probability
        self.levels = tuple(train.challenge_levels)
        self.flip_probability = train.flip_probability
        self.preprocessing = preprocessing

    def chosen(self, seed: int) -> np.random.Generator | None:
        """Generator of the challenge of the image with this `seed` >= 0; None if it is spared."""
        if self.probability == 0:
            return None
        rng = np.random.default_rng(seed)
        return rng if rng.random() < self.probability else None

    def __call__(self, image: Image, rng: np.random.Generator) -> NDArray[np.uint8]:
        """The stored image as a challenge: model input [H, W, 3]."""
        return challenge_view(image, self.preprocessing, self.levels, self.flip_probability, rng)


def challenge_view(
    image: Image,
    preprocessing: Preprocessing,
    levels: Sequence[float],
    flip_probability: float,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Distort a stored image as a challenge, send it as JPEG, and return the model input [H, W, 3].

    `levels` are the shares of the distortion levels 0 to 3; the flip, a liberty of ours, is horizontal.
    """
    from PIL import Image as PILImage

    shares = np.asarray(levels, dtype=np.float64)
    level = CROP.levels[rng.choice(len(CROP.levels), p=shares / shares.sum())]
    data = served_jpeg(CROP, image, level, rng)
    with PILImage.open(io.BytesIO(data), formats=("JPEG",)) as served:
        view = preprocessing.apply(served)
    return np.ascontiguousarray(view[:, ::-1]) if rng.random() < flip_probability else view


def mix_batch(train: Train) -> Mix | None:
    """MixUp or CutMix of a batch, from torch's global generator; None when both alphas are 0.

    The result takes images [B, 3, H, W] and targets [B] in [0, 1] and mixes each image with the one
    before it: lambda ~ Beta(alpha, alpha). With both alphas above 0 each batch draws one of the two
    evenly. The images' dtype (uint8 is rounded) and memory format stay; targets become float32. Quickest on
    uint8, before they are normalised.
    arXiv 1710.09412 and 1905.04899.
    """
    import torch
    from torchvision.transforms import v2

    mixers = [
        kind(alpha=alpha)
        for kind, alpha in ((v2.MixUp, train.mixup_alpha), (v2.CutMix, train.cutmix_alpha))
        if alpha > 0
    ]
    if not mixers:
        return None

    def mix(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixer = mixers[int(torch.randint(len(mixers), ()))] if len(mixers) > 1 else mixers[0]
        # The library wants a share of each class, [B, 2].
        shares = torch.stack([1 - targets, targets], dim=1).float()
        # MixUp multiplies in place, which whole numbers do not allow; CutMix only copies.
        whole = not images.is_floating_point() and isinstance(mixer, v2.MixUp)
        mixed, mixed_shares = mixer(images.float() if whole else images, shares)
        if whole:
            mixed = mixed.round_().to(images.dtype)
        if images.is_contiguous(memory_format=torch.channels_last):
            mixed = mixed.contiguous(memory_format=torch.channels_last)
        return mixed, mixed_shares[:, 1]

    return mix
