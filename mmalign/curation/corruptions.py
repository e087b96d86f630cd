"""TEMPLE: clips of a video are dropped, turned round or shuffled, harder to tell with every stage of training."""

from mmalign.errors import UserError
from mmalign.records.clips import CORRUPTIONS, drop, reverse, shuffle

__all__ = ["CORRUPTIONS", "STAGES", "drop", "keeps_pair", "reverse", "shuffle"]

STAGES = (16, 8, 4, 2)  # magnitudes, easy to hard; one stage of training each


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
