"""Ballots for tests of what is said about votes."""

from collections.abc import Sequence
from typing import Any

from mmalign.annotation.ballots import Ballot

RANKS = {"a": (1.0, 2.0), "b": (2.0, 1.0), "tie": (1.0, 1.0), "both_bad": (1.0, 1.0), "skip": None}


def ballot(item: object, rater: str, choice: str, **changes: Any) -> Ballot:
    """A vote on a pair that was shown in the order of the data."""
    values = {"item": str(item), "rater": rater, "choice": choice, "ranks": RANKS[choice], "order": (0, 1)}
    return Ballot(**{**values, **changes})


def ranking(item: object, rater: str, ranks: Sequence[float], **changes: Any) -> Ballot:
    """A vote on a list that was shown in the order of the data."""
    values = {"item": str(item), "rater": rater, "choice": "ranks", "ranks": tuple(map(float, ranks))}
    return Ballot(**{**values, "order": tuple(range(len(ranks))), **changes})


def votes_on(item: object, choices: str, **changes: Any) -> list[Ballot]:
    """Votes of different people on one item, a letter each: a, b, t(ie), x (both bad), s(kip)."""
    names = {"a": "a", "b": "b", "t": "tie", "x": "both_bad", "s": "skip"}
    return [ballot(item, f"r{n}", names[letter], **changes) for n, letter in enumerate(choices)]
