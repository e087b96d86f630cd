"""Scorers that look at pixels only: quick, no weights, no prompt. For smoke runs and for watching what training does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's convert("L")


@dataclass(frozen=True, kw_only=True)
class PixelStatistic:
    """A scorer that applies `statistic` to each image by itself; the prompt is not read."""

    name: str
    statistic: Callable[[Float[Tensor, "h w 3"]], Float[Tensor, ""]]

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """One number per image; prompts only has to be as long as images."""
        scores = [self.statistic(_rgb(image)) for _, image in zip(prompts, images, strict=True)]
        return torch.stack(scores) if scores else torch.zeros(0)


def colourfulness() -> PixelStatistic:
    """How colourful an image is: 0 for grey, about 15 slightly, 45 averagely, 82 highly, 109 extremely colourful.

    rg = R - G,  yb = (R + G)/2 - B,  sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2),  channels 0 to 255

    Source: Hasler and Suesstrunk (2003), Measuring colourfulness in natural images, metric M3 (verbal scale: table 2).
    """
    return PixelStatistic(name="colourfulness", statistic=_colourfulness)


def saturation() -> PixelStatistic:
    """Mean saturation: 0 for grey, black and white, 1 for pure colours.

    mean((max(R, G, B) - min(R, G, B)) / max(R, G, B)),  0 where a pixel is black

    Source: Smith (1978), Color gamut transform pairs, the hexcone model: the S of HSV, as PIL's convert("HSV") but not rounded.
    """
    return PixelStatistic(name="saturation", statistic=_saturation)


def sharpness() -> PixelStatistic:
    """Variance of the Laplacian of the grey image, in grey levels squared: 0 for a flat image, low for a blurred one.

    var(L * g),  L = [[0, 1, 0], [1, -4, 1], [0, 1, 0]],  g = BT.601 luma 0 to 255, no padding

    Source: Pech-Pacheco et al. (2000), Diatom autofocusing in brightfield microscopy, LAPV. It depends on the resolution:
    compare images of one size. Images with a side below 3 pixels score 0.
    """
    return PixelStatistic(name="sharpness", statistic=_sharpness)


def brightness() -> PixelStatistic:
    """Mean luma: 0 black, 1 white.

    mean(0.299 R + 0.587 G + 0.114 B) / 255

    Source: ITU-R BT.601.
    """
    return PixelStatistic(name="brightness", statistic=_brightness)


def _rgb(image: Image) -> Float[Tensor, "h w 3"]:
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32))


def _colourfulness(rgb: Float[Tensor, "h w 3"]) -> Float[Tensor, ""]:
    red, green, blue = rgb.unbind(dim=-1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    deviation = opponents.var(dim=(1, 2), correction=0).sum().sqrt()
    return deviation + 0.3 * opponents.mean(dim=(1, 2)).square().sum().sqrt()


def _saturation(rgb: Float[Tensor, "h w 3"]) -> Float[Tensor, ""]:
    largest = rgb.amax(dim=-1)
    return ((largest - rgb.amin(dim=-1)) / largest.clamp(min=1)).mean()


def _luma(rgb: Float[Tensor, "h w 3"]) -> Float[Tensor, "h w"]:
    return rgb @ torch.tensor(LUMA)


def _sharpness(rgb: Float[Tensor, "h w 3"]) -> Float[Tensor, ""]:
    grey = _luma(rgb)
    if min(grey.shape) < 3:
        return torch.zeros(())
    neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return (neighbours - 4 * grey[1:-1, 1:-1]).var(correction=0)


def _brightness(rgb: Float[Tensor, "h w 3"]) -> Float[Tensor, ""]:
    return _luma(rgb).mean() / 255
