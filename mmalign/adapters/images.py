"""From an image or a video of any size to the pixels the model is trained at, each with its own aspect ratio, crop and flip."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Framed:
    """An image or a video at training resolution, and how it came to be: SDXL's size and crop conditioning.

    Args:
        pixels: 8-bit RGB.
        original, crop, target: (height, width), (top, left) in the resized image, (height, width); in pixels.
    """

    pixels: UInt8[Tensor, "3 *frames height width"]
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
    video = frame_video([image], target=target, crop=crop, flip=flip, rng=rng)
    return replace(video, pixels=video.pixels[:, 0])


def frame_video(
    frames: Sequence[Image.Image],
    *,
    target: tuple[int, int],
    crop: Literal["center", "random"],
    flip: bool,
    rng: random.Random | None = None,
) -> Framed:
    """The same for the frames of a video, RGB and of one size: one crop and one flip for all of them."""
    height, width = target
    first = frames[0]
    scale = max(height / first.height, width / first.width)
    resized = (max(width, round(first.width * scale)), max(height, round(first.height * scale)))
    room = (resized[1] - height, resized[0] - width)
    draw = (rng or random.Random()).randint
    top, left = (draw(0, r) for r in room) if crop == "random" else (r // 2 for r in room)
    box = (left, top, left + width, top + height)
    pixels = torch.stack([_cut(image, resized, box, flip) for image in frames], dim=1)
    crop_left = room[1] - left if flip else left
    return Framed(pixels=pixels, original=(first.height, first.width), crop=(top, crop_left), target=target)


def _cut(
    image: Image.Image, resized: tuple[int, int], box: tuple[int, int, int, int], flip: bool
) -> UInt8[Tensor, "3 height width"]:
    scaled = image if image.size == resized else image.resize(resized, Image.Resampling.LANCZOS)
    cut = scaled.crop(box)
    pixels = np.array(ImageOps.mirror(cut) if flip else cut, dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
