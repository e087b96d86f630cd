"""TEMPLE: clips of a video are dropped, turned round or shuffled, harder to tell with every stage of training."""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from mmalign.errors import UserError

Clip = TypeVar("Clip")

STAGES = (16, 8, 4, 2)  # magnitudes, easy to hard; one stage of training each


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


def keeps_pair(operation: str, chosen: str, rejected: str, *, max_ratio: float = 1.5) -> bool:
    """Whether the description of the whole video and that of the corrupted one make a pair.

    drop: the chosen one is longer;  reverse, shuffle: the longer is at most max_ratio times the shorter;  always: the chosen
    one is no part of the rejected one

    Source: TEMPLE, published code, lengths in characters.

    Raises:
        UserError: no such operation.
    """
    if operation not in CORRUPTIONS:
        raise UserError(f"operation: got {operation}, want one of {', '.join(CORRUPTIONS)}.")
    if chosen in rejected:
        return False
    if operation == "drop":
        return len(chosen) > len(rejected)
    return max(len(chosen), len(rejected)) <= max_ratio * min(len(chosen), len(rejected))


def _groups(clips: Sequence[Clip], magnitude: int) -> list[Sequence[Clip]]:
    size = max(1, len(clips) // _checked(magnitude))
    return [clips[start : start + size] for start in range(0, len(clips), size)]


def _checked(magnitude: int) -> int:
    if magnitude < 1:
        raise UserError(f"magnitude: got {magnitude}, want 1 or more; published: 16, 8, 4, 2.")
    return magnitude


CORRUPTIONS: dict[str, Callable[..., list[object]]] = {"drop": drop, "reverse": reverse, "shuffle": shuffle}
