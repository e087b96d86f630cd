"""Aspect-ratio buckets: several sizes to train at, so that little of an image is cut away."""

import math
from dataclasses import dataclass

from mmalign.families import Family


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Several sizes to train at: each example goes, with all its candidates, to the one nearest its chosen image in shape.

    Nearest is by the logarithm of height / width; of equal ones the first. A step is of one bucket. The heads of all chosen
    images are read when a run begins.

    Args:
        sizes: (height, width) in pixels, each; or null, and they are made:
        pixels: the most pixels of a made size, such as 1048576 for 1024 x 1024.
        step: made sides are multiples of it.
        max_aspect: the longer side of a made size over the shorter one, at most.
    """

    sizes: tuple[tuple[int, int], ...] | None = None
    pixels: int | None = None
    step: int = 64
    max_aspect: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what gives no sizes."""
        if (self.sizes is None) == (self.pixels is None):
            raise ValueError("got both or neither of sizes and pixels, want one of them.")
        if not self.all():
            raise ValueError("got no size at all. Raise pixels, lower step, or list sizes.")

    def all(self) -> tuple[tuple[int, int], ...]:
        """The sizes: as listed, or every one of the made kind that no other one of its height or width exceeds."""
        if self.sizes is not None:
            return self.sizes
        assert self.pixels is not None
        made: set[tuple[int, int]] = set()
        for height in range(self.step, self.pixels // self.step + 1, self.step):
            width = self.pixels // height // self.step * self.step
            if width and max(height, width) / min(height, width) <= self.max_aspect:
                made |= {(height, width), (width, height)}
        best = {size for size in made if not any(_exceeds(other, size) for other in made)}
        return tuple(sorted(best))

    def check(self, family: Family) -> None:
        """Refuse sizes and families that do not go with buckets.

        Raises:
            ValueError: a side that is no multiple of what the family asks for; a family of videos, or one that edits.
        """
        multiple = family.size_multiple
        if family.frame_multiple is not None or family.edits:
            raise ValueError(f"buckets: got {family.name}, want a family that makes images from prompts. Set buckets to null.")
        for size in self.all():
            if any(side <= 0 or side % multiple for side in size):
                raise ValueError(f"buckets: got {list(size)}, want multiples of {multiple} for {family.name}.")


def nearest_size(sizes: tuple[tuple[int, int], ...], height: int, width: int) -> tuple[int, int]:
    """The size nearest an image in shape, by the logarithm of height / width; of equal ones the first."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))


def _exceeds(other: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether `other` has one side of `size` and a longer other one."""
    return (other[0] == size[0] and other[1] > size[1]) or (other[1] == size[1] and other[0] > size[0])
