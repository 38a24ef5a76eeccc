"""Augmentation beyond one decoded input: what a validator sends, and mixtures within a batch."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streetvision.core.params import Subnet, Train
from streetvision.data.transforms import Preprocessing
from streetvision.subnet.profiles import ValidatorProfile, profile
from streetvision.subnet.served import served_jpeg

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    Mix = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class ServedAugmentation:
    """Shows a share of the images as `subnet.validator` sends them, instead of any other augmentation.

    What happens to an image depends on the seed given for it alone.

    Parameters
    ----------
    train
        `served_probability`, `flip_probability`.
    subnet
        Whose `validator` sends.
    preprocessing
        From what is sent to the model's input.
    """

    def __init__(self, train: Train, subnet: Subnet, preprocessing: Preprocessing) -> None:
        self.probability = train.served_probability
        self.sender = profile(subnet.validator)
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
        return served_view(image, self.preprocessing, self.sender, self.flip_probability, rng)


def served_view(
    image: Image,
    preprocessing: Preprocessing,
    sender: ValidatorProfile,
    flip_probability: float,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """What a validator sends of a stored image, at a level of its own share, as model input [H, W, 3].

    The flip, a liberty of ours, is horizontal.
    """
    from PIL import Image as PILImage

    level = sender.levels[rng.choice(len(sender.levels), p=sender.level_shares)]
    data = served_jpeg(sender, image, level, rng)
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
