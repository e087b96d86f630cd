"""From an image of any size to the pixels the model is trained at, each image with its own aspect ratio, crop and flip."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Framed:
    """An image at training resolution, and how it came to be: SDXL's size and crop conditioning.

    Args:
        pixels: 8-bit RGB.
        original, crop, target: (height, width), (top, left) in the resized image, (height, width); in pixels.
    """

    pixels: UInt8[Tensor, "3 height width"]
    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


def frame(
    image: Image.Image,
    *,
    target: tuple[int, int],
    crop: Literal["center", "random"],
    flip: bool,
    rng: random.Random | None = None,
) -> Framed:
    """Scale an image until it covers the target, cut the target out of it, and mirror it if asked.

    The aspect ratio is the image's own; only what hangs over is cut. Lanczos with antialiasing, as PIL does it.

    Args:
        image: RGB.
        target: (height, width) in pixels.
        crop: where to cut.
        flip: mirror left and right.
        rng: what random crops are drawn from.
    """
    height, width = target
    scale = max(height / image.height, width / image.width)
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    scaled = image if image.size == resized else image.resize(resized, Image.Resampling.LANCZOS)
    room = (scaled.height - height, scaled.width - width)
    draw = (rng or random.Random()).randint
    top, left = (draw(0, r) for r in room) if crop == "random" else (r // 2 for r in room)
    cut = scaled.crop((left, top, left + width, top + height))
    if flip:
        cut, left = ImageOps.mirror(cut), room[1] - left
    pixels = torch.from_numpy(np.array(cut, dtype=np.uint8)).permute(2, 0, 1).contiguous()
    return Framed(pixels=pixels, original=(image.height, image.width), crop=(top, left), target=target)
