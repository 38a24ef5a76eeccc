"""torchvision's costly transforms of uint8 images, quicker on a CPU and with the same random draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torchvision.transforms import v2

_GREY = (0.2989, 0.587, 0.114)  # torchvision's
_REACH = 3.0  # standard deviations; all that lies beyond moves no pixel by a grey level


class ColourJitter(v2.ColorJitter):  # type: ignore[misc]
    """`v2.ColorJitter` of uint8 [3, H, W]: one float32 buffer from the first step to the last.

    Each step is cut to whole grey levels, as torchvision's are: without hue the result is the same
    bit for bit, with hue in all but one of 100,000 values.
    """

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Apply what `make_params` drew, in the order it drew."""
        image = inpt.to(torch.float32)
        factors = [params[f"{name}_factor"] for name in ("brightness", "contrast", "saturation")]
        for step in params["fn_idx"].tolist():
            if step == 3:
                if params["hue_factor"] is not None:
                    image = shift_hue(image, params["hue_factor"])
                continue
            factor = factors[step]
            if factor is None:
                continue
            if step == 0:
                image.mul_(factor)
            else:
                grey = _grey(image) if step == 2 else _grey(image).mean()
                image.mul_(factor).add_(grey, alpha=1 - factor)
            image.clamp_(0, 255).floor_()
        return _to_uint8(image)


class GaussianBlur(v2.GaussianBlur):  # type: ignore[misc]
    """`v2.GaussianBlur` of uint8 [3, H, W]: one axis after the other, and only weights that count.

    Within one grey level of torchvision's, and the same in 99 of 100 values.
    """

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Blur by the sigma that `make_params` drew."""
        image = inpt.to(torch.float32)
        for axis, size, sigma in zip((2, 1), self.kernel_size, params["sigma"], strict=True):
            image = _blur_axis(image, axis, size // 2, sigma)
        return _to_uint8(image.round_())


def shift_hue(image: torch.Tensor, shift: float) -> torch.Tensor:
    """Turn the hue of whole-numbered float32 [3, H, W] in 0..255 by `shift` of a circle, cut to levels.

    HSV's hexagon without HSV: value V and chroma C stay, and a channel is V - C max(0, min(k, 4 - k, 1))
    with k = (n + 6 hue) mod 6 and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = image.unbind()
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Chosen by weights of 0 and 1: `torch.where` takes ten times as long as arithmetic.
    is_red, is_green = (value - red).eq_(0), (value - green).eq_(0)
    hue = torch.lerp(
        (red - green).add_(chroma, alpha=4), (blue - red).add_(chroma, alpha=2), is_green
    )
    hue = hue.lerp_(green - blue, is_red).div_(chroma.clamp(min=1))  # times six: -1 to 5
    # With k - 2 = u, brought to -3..9 for all hues, min(k, 4 - k) is 2 - ||u - 3| - 3|.
    offsets = torch.tensor([(n + 6 * shift) % 6 - 5 for n in (5, 3, 1)]).view(3, 1, 1)
    share = (hue + offsets).abs_().sub_(3).abs_().clamp_(1, 2)
    turned = share.mul_(chroma).add_(value.sub_(chroma, alpha=2))
    # As torchvision goes from a range of 1 to whole levels.
    return turned.mul_(255.999 / 255).floor_()


def _to_uint8(image: torch.Tensor) -> torch.Tensor:
    # NumPy's cast takes a third of the time of torch's.
    return torch.from_numpy(image.numpy().astype(np.uint8))


def _grey(image: torch.Tensor) -> torch.Tensor:
    red, green, blue = image.unbind()
    return red.mul(_GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2]).floor_()


def _blur_axis(image: torch.Tensor, axis: int, radius: int, sigma: float) -> torch.Tensor:
    radius = min(radius, math.ceil(_REACH * sigma))
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(radius + 1)]
    total = 2 * sum(weights) - weights[0]
    size = image.shape[axis]
    padding = (radius, radius, 0, 0) if axis == 2 else (0, 0, radius, radius)
    padded = functional.pad(image, padding, mode="reflect")
    blurred = padded.narrow(axis, radius, size) * (weights[0] / total)
    for i in range(1, radius + 1):
        for start in (radius - i, radius + i):
            blurred.add_(padded.narrow(axis, start, size), alpha=weights[i] / total)
    return blurred
