"""TEMPLE's corruptions of a video: its clips are dropped, turned round or shuffled."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from mmalign.errors import UserError
from mmalign.records.media import Media
from mmalign.records.rows import Content

Clip = TypeVar("Clip")
Corruption = Literal["drop", "reverse", "shuffle"]
DRAWS = 20  # until an order is not that of the video


def drop(clips: Sequence[Clip], magnitude: int, seed: int = 0) -> list[Clip]:
    """Keep n // magnitude clips (at least one) at random, in their order.

    Source: TEMPLE (arXiv 2503.16929), published code; magnitudes 16, 8, 4, 2.
    """
    count = max(1, len(clips) // _checked(magnitude))
    return [clips[place] for place in sorted(random.Random(seed).sample(range(len(clips)), count))] if clips else []


def reverse(clips: Sequence[Clip], magnitude: int, seed: int = 0) -> list[Clip]:
    """Groups of n // magnitude clips (at least one) in the opposite order; within a group nothing moves.

    Source: TEMPLE, published code. The seed is not used: the three corruptions are called alike.
    """
    return [clip for group in reversed(_groups(clips, magnitude)) for clip in group]


def shuffle(clips: Sequence[Clip], magnitude: int, seed: int = 0) -> list[Clip]:
    """Groups of n // magnitude clips (at least one) in random order; within a group nothing moves.

    Source: TEMPLE, published code.
    """
    groups = _groups(clips, magnitude)
    random.Random(seed).shuffle(groups)
    return [clip for group in groups for clip in group]


def moved(count: int, how: Corruption, magnitude: int, seed: int) -> list[int]:
    """Places of the clips that are shown of so many; an order that happens to be their own is drawn again.

    Args:
        count: of clips.
        how, magnitude, seed: of `CORRUPTIONS`.
    """
    own = list(range(count))
    drawn = (CORRUPTIONS[how](own, magnitude, seed + more) for more in range(DRAWS))
    return next((places for places in drawn if places != own), own)


def corrupted(prompt: Content, how: Corruption, magnitude: int, name: str) -> Content | None:
    """A prompt whose videos, several images of one message each, are corrupted, frame by frame; None: it has none.

    Frames stand for clips. Nothing is read.

    Args:
        prompt: as it is.
        how, magnitude: of `CORRUPTIONS`.
        name: of the row, which draws belong to.
    """
    if max(map(len, (prompt.images, *(message.images for message in prompt.messages)))) < 2:
        return None
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")

    def of(frames: tuple[Media, ...]) -> tuple[Media, ...]:
        return tuple(frames[place] for place in moved(len(frames), how, magnitude, seed))

    messages = []
    for message in prompt.messages:
        images = of(message.images)
        messages.append(replace(message, images=images, places=message.places[: len(images)]))
    return replace(prompt, images=of(prompt.images), messages=tuple(messages))


def _groups(clips: Sequence[Clip], magnitude: int) -> list[Sequence[Clip]]:
    size = max(1, len(clips) // _checked(magnitude))
    return [clips[start : start + size] for start in range(0, len(clips), size)]


def _checked(magnitude: int) -> int:
    if magnitude < 1:
        raise UserError(f"magnitude: got {magnitude}, want 1 or more; published: 16, 8, 4, 2.")
    return magnitude


CORRUPTIONS: dict[str, Callable[..., list[Any]]] = {"drop": drop, "reverse": reverse, "shuffle": shuffle}
