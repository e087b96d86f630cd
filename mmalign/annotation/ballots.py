"""Ballots: votes beside what was voted on, in the order of the data, as statistics and exports count them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from mmalign.annotation.agreement import Units

DECIDED = ("a", "b")
BETTER = {"a": (1.0, 2.0), "b": (2.0, 1.0), "tie": (1.0, 1.0), "both_bad": (1.0, 1.0)}


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """One person's latest verdict on one item.

    Args:
        item, rater: who judged what.
        choice: a, b, tie, both_bad, skip; `ranks` for lists of three candidates or more.
        ranks: one a candidate, 1 is best, equal is a tie; all 1 where all are bad; None of a skip.
        strength: -3 to 3, positive where b is better; None where it was not asked.
        order: which candidate stood at each place of the screen, from left to right; drawn at random, but for repeats.
        sources: who made each candidate, empty where that is unknown.
        lengths: words of each candidate; empty for images.
        right: whether the known answer was given, of an item that has one.
        repeat: the same person had judged the item before, and this is the second time.
        active: it was shown because it was uncertain.
        strewn: its item is of the random slice, and was judged whatever the votes say.
        seconds: from seeing to voting.
    """

    item: str
    rater: str
    choice: str
    ranks: tuple[float, ...] | None
    strength: float | None = None
    order: tuple[int, ...]
    sources: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    right: bool | None = None
    repeat: bool = False
    active: bool = False
    strewn: bool = True
    seconds: float | None = None


def dense(ranks: Sequence[float]) -> tuple[int, ...]:
    """Ranks from 1 without gaps, so that 1, 2, 2 and 1, 3, 3 are one order."""
    levels = sorted(set(ranks))
    return tuple(levels.index(rank) + 1 for rank in ranks)


def shared(ranks: Sequence[float]) -> list[float]:
    """Ranks in which tied candidates share the mean of the places they take: 1, 1, 2 is 1.5, 1.5, 3."""
    return [1 + sum(o < rank for o in ranks) + (sum(o == rank for o in ranks) - 1) / 2 for rank in ranks]


def winner_of(ballot: Ballot) -> int | None:
    """The candidate that alone is best, None where there is none."""
    if ballot.ranks is None:
        return None
    best = [place for place, rank in enumerate(ballot.ranks) if rank == min(ballot.ranks)]
    return best[0] if len(best) == 1 else None


def judged(ballots: Iterable[Ballot]) -> list[Ballot]:
    """The ballots that count for agreement: first times, neither skips nor items of known answer."""
    return [one for one in ballots if one.ranks is not None and not is_check(one)]


def choices(ballots: Iterable[Ballot]) -> Units:
    """Verdicts as names: the choice on a pair; of a ranking one name for each two of its candidates (`item#0-2`)."""
    units: dict[str, dict[str, str]] = {}
    for one in judged(ballots):
        if one.choice != "ranks":
            units.setdefault(one.item, {})[one.rater] = one.choice
            continue
        assert one.ranks is not None  # judged() keeps no other
        for i, j in combinations(range(len(one.ranks)), 2):
            gap = one.ranks[j] - one.ranks[i]
            name = "a" if gap > 0 else "b" if gap < 0 else "tie"
            units.setdefault(f"{one.item}#{i}-{j}", {})[one.rater] = name
    return units


def items_of(units: Iterable[str]) -> dict[str, str]:
    """The item that each unit of `choices` or `grades` is of: what is left of the `#` where a ranking became several."""
    return {unit: unit.partition("#")[0] for unit in units}


def grades(ballots: Sequence[Ballot]) -> tuple[str, Units]:
    """Verdicts as numbers with an order, and what they are: strengths where they were asked, else ranks, else -1, 0, 1.

    Both bad is 0, as a tie is: neither is better. Tied candidates of a ranking share the mean of their places.
    """
    kept = judged(ballots)
    units: dict[str, dict[str, float]] = {}
    if any(one.choice == "ranks" for one in kept):
        for one in kept:
            for place, rank in enumerate(shared(one.ranks or ())):
                units.setdefault(f"{one.item}#{place}", {})[one.rater] = rank
        return "rank", units
    strengths = any(one.strength is not None for one in kept)
    for one in kept:
        value = one.strength if strengths else {"a": -1.0, "b": 1.0}.get(one.choice, 0.0)
        if value is not None:
            units.setdefault(one.item, {})[one.rater] = float(value)
    return "strength" if strengths else "preference", units


def wins(ballots: Iterable[Ballot]) -> dict[str, list[tuple[str, str, float]]]:
    """Per item, (source, other source, share of the win: 1, 0.5 or 0), over every two candidates of different sources.

    Both bad counts as a tie: which of the two is better it does not say.
    """
    found: dict[str, list[tuple[str, str, float]]] = {}
    for one in judged(ballots):
        assert one.ranks is not None  # judged() keeps no other
        for i, j in combinations(range(len(one.sources)), 2):
            if one.sources[i] != one.sources[j]:
                gap = one.ranks[j] - one.ranks[i]
                share = 1.0 if gap > 0 else 0.0 if gap < 0 else 0.5
                found.setdefault(one.item, []).append((one.sources[i], one.sources[j], share))
    return found


def is_check(ballot: Ballot) -> bool:
    """Whether a vote tells of the person and not of the item: a repeat, or an item of known answer."""
    return ballot.repeat or ballot.right is not None


def counts_of(ballots: Iterable[Ballot]) -> Counter[str]:
    """How often each choice was made, skips too; repeats and items of known answer do not count."""
    return Counter(one.choice for one in ballots if not is_check(one))


def by_rater(ballots: Iterable[Ballot]) -> dict[str, list[Ballot]]:
    """The ballots of each person, people in the order of their names."""
    found: dict[str, list[Ballot]] = {}
    for one in ballots:
        found.setdefault(one.rater, []).append(one)
    return dict(sorted(found.items()))


def by_item(ballots: Iterable[Ballot]) -> dict[str, list[Ballot]]:
    """The ballots on each item, items in the order in which they were first judged."""
    found: dict[str, list[Ballot]] = {}
    for one in ballots:
        found.setdefault(one.item, []).append(one)
    return found


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON has them."""
    from dataclasses import fields, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {" / ".join(key) if isinstance(key, tuple) else str(key): plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value
