"""A scorer that takes its time, so that a kill comes in between; in a file of its own that processes import quickly."""

import time
from collections.abc import Sequence

import torch
from PIL.Image import Image

from mmalign.scorers.pixels import brightness


class Slow:
    """Brightness, a twentieth of a second an image."""

    name = "slow"

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> torch.Tensor:
        """The scores."""
        time.sleep(0.05 * len(images))
        return brightness()(prompts, images)


def slow() -> Slow:
    """For `scorers`."""
    return Slow()
