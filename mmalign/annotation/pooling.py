"""Pooling: all votes on one item become one order, with how sure it is; and what a training set must leave out, by reason."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mmalign.annotation.ballots import Ballot, by_item, dense, shared
from mmalign.records import Comparison

TIE, ALL_BAD, NO_VOTES, SPLIT = "tie", "all candidates bad", "no verdict yet", "candidates equal in the mean"


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """What the people who judged an item said of it together.

    Args:
        item: its id.
        counts: votes by choice, skips included.
        num_votes: votes that are no skips.
        ranks: mean rank of each candidate over the votes that order them; None where there is none, or most say all are bad.
        prob: of pairs, share of those votes for candidate 0, a tie counting half.
        margin: mean strength in favour of the better candidate, at least 0; None where nobody gave one.
        agreement: share of the most frequent verdict.
        all_bad: more than half of the votes say that no candidate is any good.
    """

    item: str
    counts: Counter[str]
    num_votes: int
    ranks: tuple[float, ...] | None
    prob: float | None
    margin: float | None
    agreement: float | None
    all_bad: bool

    @property
    def dropped(self) -> str | None:
        """Why it gives no preference, if so."""
        if not self.num_votes:
            return NO_VOTES
        if self.all_bad or self.ranks is None:
            return ALL_BAD
        if len(set(self.ranks)) > 1:
            return None
        return TIE if self.counts["tie"] or len(self.ranks) > 2 else SPLIT


def pooled(ballots: Sequence[Ballot]) -> Pooled:
    """Pool the ballots of one item; first times only, whatever else is given.

    A vote that all candidates are bad does not order them: it counts for `all_bad` alone, never as a tie.

    Args:
        ballots: at least one, all of one item.
    """
    cast = [one for one in ballots if not one.repeat]
    votes = [one for one in cast if one.ranks is not None]
    ordering = [one for one in votes if one.choice != "both_bad"]
    bad = len(votes) - len(ordering)
    all_bad = 2 * bad > len(votes)
    ranks = None if all_bad or not ordering else _mean_ranks(ordering)
    verdicts = Counter((one.choice, dense(one.ranks or ())) for one in votes)
    prob = None
    if ranks is not None and len(ranks) == 2:
        prob = sum({"a": 1.0, "tie": 0.5}.get(one.choice, 0.0) for one in ordering) / len(ordering)
    strengths = [one.strength for one in ordering if one.strength is not None]
    margin = None
    if strengths and prob is not None:
        towards = 1 if prob < 0.5 else -1
        margin = max(0.0, towards * sum(strengths) / len(strengths)) if prob != 0.5 else 0.0
    return Pooled(
        item=ballots[0].item,
        counts=Counter(one.choice for one in cast),
        num_votes=len(votes),
        ranks=ranks,
        prob=prob,
        margin=margin,
        agreement=max(verdicts.values()) / len(votes) if votes else None,
        all_bad=all_bad,
    )


def _mean_ranks(ballots: Sequence[Ballot]) -> tuple[float, ...]:
    """Ranks of the candidates: of a pair those of the majority; of a list the means, ties of a vote sharing their places."""
    rankings = [shared(one.ranks or ()) for one in ballots]
    means = tuple(sum(column) / len(rankings) for column in zip(*rankings, strict=True))
    return means if len(means) > 2 else tuple(1.0 + (mean > min(means)) for mean in means)


def pool(ballots: Iterable[Ballot]) -> dict[str, Pooled]:
    """Pool the ballots of every item that has no known answer."""
    return {item: pooled(own) for item, own in by_item(one for one in ballots if one.right is None).items()}


def with_verdict(row: Comparison, verdict: Pooled) -> Comparison:
    """Return the item's comparison with the order people gave it in place of any it had.

    Args:
        row: as it was added; its scores, provenance and weight stay.
        verdict: one that orders the candidates, or ties.
    """
    return replace(
        row,
        ranks=verdict.ranks,
        prob=verdict.prob if verdict.num_votes > 1 else None,
        margin=verdict.margin,
    )
