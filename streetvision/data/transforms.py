"""From a stored image to a model input: the same fit everywhere, random augmentation in training only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from streetvision.core.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from streetvision.core.params import Explora, Train


@dataclass(frozen=True)
class Preprocessing:
    """How an upright RGB image becomes a model input; stored with the model.

    `mean` and `std` are per channel, for values in [0, 1].
    """

    height: int
    width: int
    fit: Literal["letterbox", "crop"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Preprocessing:
        """Rebuild from `to_dict`; raises `UserError` on missing or unknown keys."""
        # Bundles from before `fit` alone decided say that they take no square first; the schema refuses others.
        document = {key: value for key, value in document.items() if key != "square_crop"}
        try:
            fields = document | {"mean": tuple(document["mean"]), "std": tuple(document["std"])}
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise UserError(f"preprocessing is incomplete or has unknown keys: {error}") from error

    def apply(self, image: Image) -> NDArray[np.uint8]:
        """Return the model input [H, W, 3] before normalisation.

        `letterbox` shows the whole image on a border of the mean colour; `crop` covers the input and cuts
        what sticks out.
        """
        from PIL import Image as PILImage

        if image.mode != "RGB":
            image = image.convert("RGB")
        wanted = (self.width, self.height)
        if image.size == wanted:
            return np.asarray(image)
        ratios = (self.width / image.width, self.height / image.height)
        scale = min(ratios) if self.fit == "letterbox" else max(ratios)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, PILImage.Resampling.BICUBIC, reducing_gap=3.0)
        if image.size == wanted:
            return np.asarray(image)
        if self.fit == "crop":
            return np.asarray(central_crop(image, *wanted))
        canvas = PILImage.new("RGB", wanted, tuple(round(255 * value) for value in self.mean))
        canvas.paste(image, ((self.width - size[0]) // 2, (self.height - size[1]) // 2))
        return np.asarray(canvas)

    def normalise(self, batch: torch.Tensor) -> torch.Tensor:
        """Scale uint8 images [B, 3, H, W] to what the backbone expects: float32, on their device."""
        import torch

        mean = torch.tensor(self.mean, device=batch.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.std, device=batch.device).view(1, 3, 1, 1) * 255
        # Channels last: on a CPU convolutions run up to 1.6 times faster in training, 1.8 in inference.
        # In place: fresh memory of a batch costs more than the arithmetic.
        scaled = batch.to(torch.float32, memory_format=torch.channels_last, copy=True)
        return scaled.sub_(mean).div_(std)


def central_crop(image: Image, width: int, height: int) -> Image:
    """The middle `width` × `height` pixels."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def training_transform(train: Train) -> Any:
    """What training does to an image: uint8 [3, H, W] to uint8 of the input size, random by torch.

    Crop, flip and colour jitter, then `train.augmentation`, then erasing.
    """
    import torch
    from torchvision.transforms import v2

    from streetvision.data.colour import ColourJitter

    steps: list[Any] = []
    if train.crop_min_area < 1:
        steps.append(_random_crop(train.height_px, train.width_px, train.crop_min_area))
    if train.flip_probability > 0:
        steps.append(v2.RandomHorizontalFlip(train.flip_probability))
    if train.colour_jitter > 0:
        steps.append(ColourJitter(*[train.colour_jitter] * 3))
    if train.augmentation == "trivial_augment":
        steps.append(v2.TrivialAugmentWide(num_magnitude_bins=train.trivial_augment_bins))
    elif train.augmentation == "augmix":
        steps.append(
            v2.AugMix(
                severity=train.augmix_severity,
                mixture_width=train.augmix_width,
                alpha=train.augmix_alpha,
            )
        )
    if train.erasing_probability > 0:
        steps.append(v2.RandomErasing(train.erasing_probability))
    return v2.Compose(steps) if steps else torch.nn.Identity()


def contrastive_transform(explora: Explora, height: int, width: int) -> Any:
    """One strong view as SimCLR's: uint8 [3, H, W] to uint8 [3, `height`, `width`], random by torch.

    Crop, flip, colour jitter, grey, blur (Chen et al. 2020, arXiv 2002.05709, appendix A); the blur's
    kernel spans a tenth of the shorter side, its sigma is drawn from 0.1 to 2 pixels.
    """
    from torchvision.transforms import v2

    from streetvision.data.colour import ColourJitter, GaussianBlur

    jitter = explora.colour_jitter
    kernel = max(3, round(min(height, width) / 10) | 1)
    return v2.Compose(
        [
            _random_crop(height, width, explora.crop_min_area),
            v2.RandomHorizontalFlip(explora.flip_probability),
            v2.RandomApply(
                [ColourJitter(jitter, jitter, jitter, jitter / 4)], explora.jitter_probability
            ),
            v2.RandomGrayscale(explora.grey_probability),
            v2.RandomApply([GaussianBlur(kernel, (0.1, 2.0))], explora.blur_probability),
        ]
    )


def _random_crop(height: int, width: int, min_area: float) -> Any:
    """A random part of at least `min_area`, about the input's aspect ratio, at the input's size."""
    from torchvision.transforms import v2

    aspect = width / height
    return v2.RandomResizedCrop(
        (height, width),
        scale=(min_area, 1.0),
        ratio=(aspect * 3 / 4, aspect * 4 / 3),
        antialias=True,
    )
