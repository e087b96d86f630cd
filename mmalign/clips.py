"""Images and videos that are decoded when asked for: what a report shows of each, and what a scorer of images sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from PIL.Image import Image

from mmalign.records import Content

FRAMES = 8  # that a scorer sees of a video

if TYPE_CHECKING:
    Images = Sequence[Image]
else:
    Images = Sequence  # items are decoded when asked for, which a check of types must not do


class OpenedLate(Sequence[Image]):
    """Images, and of videos their first frames, decoded when asked for, so that thousands of them need no memory."""

    def __init__(self, found: Sequence[Content]) -> None:
        """Keep the contents, one image or one video each; nothing is read."""
        self.found = found

    def __len__(self) -> int:
        """Number of images and videos."""
        return len(self.found)

    @overload
    def __getitem__(self, index: int) -> Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image]: ...
    def __getitem__(self, index: int | slice) -> Image | list[Image]:
        """Decode one image or first frame, or those of a slice. Raises UserError where one cannot be read."""
        if isinstance(index, slice):
            return [one.frames(1)[0] for one in self.found[index]]
        return self.found[index].frames(1)[0]

    def frames(self, index: int) -> list[Image]:
        """What a scorer sees: the image alone, or at most FRAMES frames of the video, evenly spaced from first to last.

        Raises:
            UserError: it cannot be read.
        """
        content = self.found[index]
        places = spaced(content.num_frames())
        if len(content.images) > 1:
            return [content.images[place].open() for place in places]
        frames = content.frames()
        return [frames[place] for place in places]


def spaced(count: int, most: int = FRAMES) -> list[int]:
    """At most `most` places in 0 ... count - 1, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def seen_frames(images: Images, index: int) -> list[Image]:
    """The frames of one of `images` that scorers see; of plain images the image itself."""
    return images.frames(index) if isinstance(images, OpenedLate) else [images[index]]
