"""Which pairs come next: the uncertain ones, and a random slice whatever the votes say."""

import math

import pytest

from mmalign.annotation.selection import in_random_slice, priorities

PAIRS = {f"p{n}": ("x", "y") for n in range(1000)}


def ordered(found: dict[str, float]) -> list[str]:
    return sorted(found, key=lambda pair: -found[pair])


def test_a_pair_whose_votes_split_comes_before_one_on_which_they_agree() -> None:
    votes = [("split", 1.0), ("split", 0.0), ("agreed", 1.0), ("agreed", 1.0)]
    found = priorities(votes, {"agreed": (), "split": ()}, random_share=0.0)
    assert ordered(found) == ["split", "agreed"]


def test_a_pair_without_votes_comes_before_one_with_many() -> None:
    votes = [("seen", share) for share in (1.0, 0.0) * 5]
    assert ordered(priorities(votes, {"seen": (), "new": ()}, random_share=0.0)) == ["new", "seen"]


def test_sources_that_are_close_come_before_sources_that_are_far_apart() -> None:
    pairs = {**{f"far{n}": ("best", "worst") for n in range(20)}, **{f"close{n}": ("best", "good") for n in range(20)}}
    votes = [(f"far{n}", 0.0) for n in range(19)] + [(f"close{n}", float(n % 2)) for n in range(19)]
    assert ordered(priorities(votes, pairs, waiting=["far19", "close19"], random_share=0.0)) == ["close19", "far19"]


def test_every_stretch_of_the_order_keeps_the_random_slice_at_its_share() -> None:
    order = ordered(priorities([], PAIRS, random_share=0.2, seed=3))
    strewn = [in_random_slice(pair, random_share=0.2, seed=3) for pair in order]
    expected = sum(strewn) / len(strewn)
    assert expected == pytest.approx(0.2, abs=0.04)
    for start in range(0, 900, 100):
        assert sum(strewn[start : start + 100]) == pytest.approx(20, abs=1)


def test_no_vote_changes_who_is_in_the_random_slice_nor_its_order() -> None:
    def slice_of(votes: list[tuple[str, float]]) -> list[str]:
        order = ordered(priorities(votes, PAIRS, random_share=0.3, seed=1))
        return [pair for pair in order if in_random_slice(pair, random_share=0.3, seed=1)]

    assert slice_of([]) == slice_of([(f"p{n}", float(n % 3 == 0)) for n in range(1000)])
    assert slice_of([]) != sorted(slice_of([]))


def test_the_random_slice_has_the_win_rate_of_all_pairs_where_the_selected_ones_have_not() -> None:
    # Half of the pairs are plain (always b), half are a coin's toss: selection runs after the coins.
    truth = {f"p{n}": 1.0 if n % 2 else float(n % 4 == 0) for n in range(1000)}
    pairs = {pair: (("weak", "strong") if n % 2 else ("one", "other")) for n, pair in enumerate(truth)}
    votes: list[tuple[str, float]] = [(pair, truth[pair]) for pair in list(truth)[:100]]
    shown = ordered(priorities(votes, pairs, waiting=list(truth)[100:], random_share=0.25, seed=5))[:300]
    strewn = [truth[pair] for pair in shown if in_random_slice(pair, random_share=0.25, seed=5)]
    chosen = [truth[pair] for pair in shown if not in_random_slice(pair, random_share=0.25, seed=5)]
    assert sum(strewn) / len(strewn) == pytest.approx(0.75, abs=3 * math.sqrt(0.75 * 0.25 / len(strewn)))
    assert sum(chosen) / len(chosen) < 0.6


def test_the_ends_of_the_share_are_all_random_and_all_selected() -> None:
    everything = priorities([], PAIRS, random_share=1.0)
    assert len(everything) == 1000 and len(set(everything.values())) == 1000
    assert all(0 < value <= 1 for value in everything.values())
    assert priorities([], {}, random_share=0.5) == {}
    with pytest.raises(ValueError, match="random_share"):
        priorities([], PAIRS, random_share=1.5)
