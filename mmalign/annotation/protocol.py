"""The protocol of a project: what may be answered, how often, and how an answer as shown becomes one in the data's order."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from mmalign.errors import UserError

Kind = Literal["image", "text"]
KINDS = ("image", "text")
CHOICES = ("left", "right", "tie", "both_bad", "skip")
RANKS = "ranks"
LETTERS = "abcdef"  # candidates in the order of the data
MOST_CANDIDATES = len(LETTERS)
STRONGEST = 3
LONGEST_RATIONALE = 4000


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a project is judged. Frozen with the project; only its guideline gets new versions.

    Args:
        choices: of a pair, as shown; left and right must be among them. Lists of 3 to 6 are ranked instead, and may also be
            called bad as a whole (both_bad) or skipped where the choice is there.
        strength: offer -3 to 3; negative: the left one is better.
        aspects: further questions which candidate is better (fidelity, aesthetics ...).
        flags: what may be marked on single candidates (unsafe, watermark ...).
        rationale: whether a reason in words is asked for.
        votes_per_item: people who judge an item.
        overlap_share, overlap_votes: this share of the items, drawn at random, is judged by so many people instead.
            Published: 1 vote and 10 to 20 % overlap for training sets; 3 votes in general, 5 for test sets.
        gold_share: share of what is shown that has a known answer; told to nobody. Published: 5 to 10 %.
        repeat_share: share that the same person has judged before; sides are swapped. Published: 5 to 10 %.
        repeat_gap: items between a judgement and its repeat, at least.
        calibration: items with known answers that everybody judges first, and is told the answers of. Published: 20 to 30.
        random_share: share that is drawn at random where items have priorities (active selection), and share of the items that
            no selection asks for (the random slice).
        order: serve items at random, or in the order of the data.
        lease_minutes: an item that was handed out and not judged is free for others after that.
        min_dwell_ms: a vote sooner than that after its item was on screen is refused.
        guideline: Markdown of the instructions, version 1.

    Raises:
        UserError: a setting that cannot be.
    """

    choices: tuple[str, ...] = CHOICES
    strength: bool = False
    aspects: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    rationale: Literal["off", "optional", "required"] = "optional"
    votes_per_item: int = 1
    overlap_share: float = 0.15
    overlap_votes: int = 3
    gold_share: float = 0.07
    repeat_share: float = 0.07
    repeat_gap: int = 20
    calibration: int = 0
    random_share: float = 0.3
    order: Literal["random", "data"] = "random"
    lease_minutes: float = 15.0
    min_dwell_ms: int = 500
    guideline: str = ""

    def __post_init__(self) -> None:
        unknown = [name for name in self.choices if name not in CHOICES]
        if unknown or not {"left", "right"} <= set(self.choices) or len(set(self.choices)) < len(self.choices):
            raise UserError(
                f"choices: got {', '.join(self.choices)}, want left, right and any of tie, both_bad, skip, once each."
            )
        for name in ("overlap_share", "gold_share", "repeat_share", "random_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: got {getattr(self, name)}, want a share from 0 to 1.")
        if self.gold_share + self.repeat_share >= 1:
            raise UserError(f"gold_share + repeat_share: got {self.gold_share + self.repeat_share:g}, want below 1. Lower one.")
        for name, least in (
            ("votes_per_item", 1),
            ("overlap_votes", 1),
            ("repeat_gap", 1),
            ("calibration", 0),
            ("min_dwell_ms", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name}: got {getattr(self, name)}, want at least {least}.")
        if self.lease_minutes <= 0:
            raise UserError(f"lease_minutes: got {self.lease_minutes}, want a time above 0.")
        for name in ("aspects", "flags"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or not all(value.strip() for value in values):
                raise UserError(f"{name}: got {', '.join(map(repr, values))}, want different names.")

    def to_json(self) -> str:
        """Return all settings as one JSON object."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    @functools.lru_cache(maxsize=256)  # every request asks for its project's
    def from_json(cls, text: str) -> "Protocol":
        """Read what `to_json` wrote; settings that were not known then have their defaults."""
        known = {f.name for f in fields(cls)}
        entry: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(text).items() if name in known
        }
        return cls(**entry)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One answer. As shown: positions on the screen, left first. Canonical: positions in the order of the data.

    Args:
        choice: a pair's: left, right, tie, both_bad, skip; canonical a, b, tie, both_bad, skip. A list's of 3 to 6: ranks,
            both_bad (none is any good), skip.
        strength: -3 to 3; as shown: positive where the right one is better; canonical: where b is. 0 with a tie only.
        ranks: of a list, one a candidate: 1 is best, equal is a tie.
        aspects: aspect -> which is better: left, right (of a list: 1 to 6), or tie; canonical: a to f, or tie.
        flags: flag -> positions of the candidates that have it, from 0.
        rationale: the reason in words.
    """

    choice: str
    strength: int | None = None
    ranks: tuple[int, ...] | None = None
    aspects: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rationale: str = ""

    def to_json(self) -> str:
        """Return the verdict as one JSON object."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Verdict":
        """Read what `to_json` wrote."""
        entry = json.loads(text)
        return cls(
            choice=entry["choice"],
            strength=entry["strength"],
            ranks=None if entry["ranks"] is None else tuple(entry["ranks"]),
            aspects=dict(entry["aspects"]),
            flags={name: tuple(places) for name, places in entry["flags"].items()},
            rationale=entry["rationale"],
        )


def shown_names(k: int) -> tuple[str, ...]:
    """Return the names of the places on the screen: left and right, or 1 to k."""
    return ("left", "right") if k == 2 else tuple(str(n) for n in range(1, k + 1))


def canonical_names(k: int) -> tuple[str, ...]:
    """Return the names of the candidates in the order of the data: a, b, ..."""
    return tuple(LETTERS[:k])


def choices_of(protocol: Protocol, k: int) -> tuple[str, ...]:
    """Return the choices that an item of k candidates has under a protocol, as shown."""
    if k == 2:
        return protocol.choices
    return (RANKS, *(name for name in ("both_bad", "skip") if name in protocol.choices))


def fault_of(verdict: Verdict, protocol: Protocol, k: int) -> str | None:
    """Return what is wrong with a verdict as shown, in one sentence; None when nothing is."""
    choices, names = choices_of(protocol, k), (*shown_names(k), "tie")
    if verdict.choice not in choices:
        return f"got the choice {verdict.choice!r}, want one of {', '.join(choices)}"
    if (verdict.choice == RANKS) != (verdict.ranks is not None):
        return "got ranks without the choice ranks, or the other way round"
    if verdict.ranks is not None and (
        len(verdict.ranks) != k or min(verdict.ranks) != 1 or not all(1 <= rank <= k for rank in verdict.ranks)
    ):
        return f"got the ranks {verdict.ranks}, want {k} from 1 (best) to {k}"
    for aspect, better in verdict.aspects.items():
        if aspect not in protocol.aspects or better not in names:
            return f"got {better!r} for the aspect {aspect!r}, want one of {', '.join(names)} for {', '.join(protocol.aspects)}"
    for flag, places in verdict.flags.items():
        if flag not in protocol.flags or len(set(places)) < len(places) or not all(0 <= place < k for place in places):
            return f"got the flag {flag!r} on {places}, want {', '.join(protocol.flags)} on places below {k}"
    if len(verdict.rationale) > LONGEST_RATIONALE:
        return f"got a reason of {len(verdict.rationale)} characters, want at most {LONGEST_RATIONALE}"
    if protocol.rationale == "off" and verdict.rationale:
        return "got a reason, want none: it is not asked for here"
    if protocol.rationale == "required" and verdict.choice != "skip" and not verdict.rationale.strip():
        return "got no reason, want one"
    return _fault_of_strength(verdict, protocol)


def _fault_of_strength(verdict: Verdict, protocol: Protocol) -> str | None:
    strength = verdict.strength
    if strength is None:
        return None
    if not protocol.strength:
        return "got a strength, want none: it is not asked for here"
    allowed = {"left": range(-STRONGEST, 0), "right": range(1, STRONGEST + 1), "tie": range(1)}.get(verdict.choice, range(0))
    if strength not in allowed:
        return f"got the strength {strength} with {verdict.choice}, want -3 to -1 with left, 0 with tie, 1 to 3 with right"
    return None


def canonical(verdict: Verdict, order: Sequence[int]) -> Verdict:
    """Turn a verdict as shown into one in the order of the data.

    Args:
        verdict: as shown.
        order: which candidate of the data stands at each place of the screen: (1, 0) shows b on the left.
    """
    k = len(order)
    names = {shown: LETTERS[order[place]] for place, shown in enumerate(shown_names(k))}
    return _moved(verdict, names, order)


def as_shown(verdict: Verdict, order: Sequence[int]) -> Verdict:
    """Turn a canonical verdict into one as the screen with that order would show it; the inverse of `canonical`."""
    k = len(order)
    places = [list(order).index(candidate) for candidate in range(k)]
    names = {LETTERS[candidate]: shown_names(k)[places[candidate]] for candidate in range(k)}
    return _moved(verdict, names, places)


def _moved(verdict: Verdict, names: Mapping[str, str], places: Sequence[int]) -> Verdict:
    """Rename what a verdict says of candidates, and move the one at place n to `places[n]`."""
    turned = len(places) == 2 and places[0] == 1
    ranks = verdict.ranks
    if ranks is not None:
        moved = sorted(zip(places, ranks, strict=True))
        ranks = tuple(rank for _, rank in moved)
    return replace(
        verdict,
        choice=names.get(verdict.choice, verdict.choice),
        strength=-verdict.strength if turned and verdict.strength is not None else verdict.strength,
        ranks=ranks,
        aspects={aspect: names.get(better, better) for aspect, better in verdict.aspects.items()},
        flags={flag: tuple(sorted(places[place] for place in found)) for flag, found in verdict.flags.items()},
    )


def ranks_of(verdict: Verdict) -> tuple[int, ...] | None:
    """Return the ranks that a canonical verdict means, a pair's too; None where it orders nothing (both_bad, skip)."""
    return {"a": (1, 2), "b": (2, 1), "tie": (1, 1)}.get(verdict.choice, verdict.ranks)


def answer_of(ranks: Sequence[float] | None, prob: float | None) -> dict[str, Any] | None:
    """Return the canonical answer that a row's own order gives: `{"choice": ..., "ranks": ...}`; None without an order."""
    if prob is not None:
        ranks = (1 + (prob < 0.5), 1 + (prob > 0.5))
    if ranks is None:
        return None
    distinct = sorted(set(ranks))
    dense = [distinct.index(rank) + 1 for rank in ranks]
    if len(dense) > 2:
        return {"choice": RANKS, "ranks": dense}
    return {"choice": "tie" if dense[0] == dense[1] else "a" if dense[0] < dense[1] else "b", "ranks": None}


def agrees(verdict: Verdict, answer: Mapping[str, Any]) -> bool:
    """Return whether a canonical verdict gives a known answer: a pair's choice; of a list the same best candidates."""
    if verdict.ranks is None or answer.get("ranks") is None:
        return bool(verdict.choice == answer["choice"])
    return [rank == 1 for rank in verdict.ranks] == [rank == 1 for rank in answer["ranks"]]
