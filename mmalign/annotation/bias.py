"""What a verdict should not depend on: the side of the screen, the length of a text; and whether people repeat themselves."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmalign.annotation.ballots import DECIDED, Ballot, by_rater, dense, judged, winner_of
from mmalign.annotation.shares import Share, share_by_group, share_of


def left_rate(ballots: Iterable[Ballot]) -> Share | None:
    """How often the left candidate of a decided pair won; ties, both bad and skips do not count. 0.5 is no bias.

    Repeats do not count, since their sides are not drawn, nor do items of known answer. Without a bias each vote is then a toss
    of a coin of its own, whoever cast it and on whatever, so that the interval is Wilson's over votes.

    To tell a rate of .55 from .5 needs 783 decided votes, of .52 4 904: pool people before believing in a bias.

    Args:
        ballots: of pairs; others are passed over.
    """
    decided = [one for one in judged(ballots) if one.choice in DECIDED]
    return share_of(sum(one.order[0] == winner_of(one) for one in decided), len(decided))


def place_rates(ballots: Iterable[Ballot]) -> dict[int, list[Share]]:
    """Of rankings, by the number of candidates k: how often what stood at each place was the single best. 1 / k is no bias."""
    places: dict[int, Counter[int]] = {}
    for one in judged(ballots):
        winner = winner_of(one)
        if one.choice == "ranks" and winner is not None:
            places.setdefault(len(one.order), Counter())[one.order.index(winner)] += 1
    found = {}
    for k, counts in sorted(places.items()):
        shares = [share_of(counts[place], counts.total()) for place in range(k)]
        found[k] = [share for share in shares if share is not None]
    return found


def longer_rate(ballots: Iterable[Ballot]) -> Share | None:
    """How often the longer text of a decided pair won, in words; texts of one length and ties do not count.

    Sides are drawn at random, so that a bias of side cannot look like one of length. The votes on one pair have the same longer
    side: the interval is that of votes drawn pair by pair (`share_by_group`). Repeats and items of known answer do not count.
    """
    decided = [one for one in judged(ballots) if one.choice in DECIDED and len(set(one.lengths)) == 2]
    return share_by_group([(one.item, one.lengths.index(max(one.lengths)) == winner_of(one)) for one in decided])


def gold_accuracy(ballots: Iterable[Ballot]) -> dict[str, Share]:
    """For each person: how often an item of known answer was answered so. Skips do not count.

    To tell a guesser of pairs (.5) from a rater of .9 takes 8 such items, from one of .7 37.
    """
    right, seen = Counter[str](), Counter[str]()
    for one in ballots:
        if one.right is not None and one.ranks is not None:
            seen[one.rater] += 1
            right[one.rater] += one.right
    return _shares(right, seen)


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """How a person judged the same items twice.

    Args:
        same: the second verdict was the first one.
        same_side: of the pairs decided both times with the sides swapped, those where the same side of the screen won.
    """

    same: Share
    same_side: Share | None


def repeats(ballots: Sequence[Ballot]) -> dict[str, Repeats]:
    """For each person whose items came back: how often the verdict did too. Skips do not count."""
    found = {}
    for rater, own in by_rater(ballots).items():
        first = {one.item: one for one in own if not one.repeat}
        both = [(first[one.item], one) for one in own if one.repeat and one.item in first]
        both = [(old, new) for old, new in both if old.ranks is not None and new.ranks is not None]
        same = share_of(sum(_verdict(old) == _verdict(new) for old, new in both), len(both))
        if same is None:
            continue
        swapped = [(o, n) for o, n in both if o.choice in DECIDED and n.choice in DECIDED and o.order != n.order]
        found[rater] = Repeats(same=same, same_side=share_of(sum(_side(o) == _side(n) for o, n in swapped), len(swapped)))
    return found


def _verdict(ballot: Ballot) -> tuple[str, tuple[int, ...]]:
    return ballot.choice, dense(ballot.ranks or ())


def _side(ballot: Ballot) -> int:
    return ballot.order.index(winner_of(ballot) or 0)


def _shares(count: Counter[str], total: Counter[str]) -> dict[str, Share]:
    shares = {name: share_of(count[name], total[name]) for name in sorted(total)}
    return {name: share for name, share in shares.items() if share is not None}
