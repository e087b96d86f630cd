"""Which pairs come next: the uncertain ones, and a random slice whatever the votes say."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from annotation_votes import Voter, cast, opened, protocol, saying, texts

from mmalign.annotation.selection import in_random_slice, priorities
from mmalign.annotation.store import Store
from mmalign.annotation.tally import ballots_of, select
from mmalign.errors import UserError

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


def session(folder: Path, says: Callable[[int], Voter], *, count: int = 60, random_share: float = 0.5) -> tuple[Store, int]:
    """A hundred pairs and two people, who are asked for what is uncertain every ten votes."""
    folder.mkdir()
    store = opened(folder)
    settings = protocol(random_share=random_share, votes_per_item=2)  # in the order of the data: at random it is salted
    project = store.create_project("trial", "text", settings).id
    store.add(project, [texts(n) for n in range(100)])
    people = [store.add_account(f"p{n}").id for n in range(2)]
    for number in range(count):
        if number % 10 == 0:
            select(store, project, most=30)
        cast(store, project, people[number % 2], says(number))
    return store, project


def strewn(store: Store, project: int, person: str) -> list[int]:
    """The pairs of the slice that a person judged, in that order."""
    votes = [vote for vote in store.votes(project) if vote.annotator == person]
    share = store.project(project).protocol.random_share
    return [vote.item for vote in votes if in_random_slice(str(vote.item), random_share=share, seed=project)]


def test_which_pairs_of_the_slice_are_judged_and_in_which_order_is_the_same_whatever_is_voted(tmp_path: Path) -> None:
    sayings = (lambda n: saying("a"), lambda n: saying("ab"[n % 2]), lambda n: saying("tie" if n % 3 else "b"))
    told = []
    for number, says in enumerate(sayings):
        store, project = session(tmp_path / str(number), says)
        told.append([strewn(store, project, person) for person in ("p0", "p1")])
        votes = store.votes(project)
        assert sum(vote.kind == "active" for vote in votes) > 15, "the others come by their votes"
        assert not {vote.item for vote in votes if vote.kind == "active"} & {item for own in told[-1] for item in own}
    for person in (0, 1):
        orders = [own[person] for own in told]
        least = min(map(len, orders))
        assert least > 5 and all(order[:least] == orders[0][:least] for order in orders)


def test_votes_that_were_asked_for_on_a_pair_of_the_slice_do_not_count_for_it(tmp_path: Path) -> None:
    store, project = session(tmp_path / "one", lambda n: saying("ab"[n % 2]), count=20)
    pair = strewn(store, project, "p0")[0]
    store.want(project, pair, 5)
    third = store.add_account("p2").id
    while str(pair) not in {one.item for one in ballots_of(store, project) if one.rater == "p2"}:
        cast(store, project, third, saying("a"))
    found = {one.rater: one.strewn for one in ballots_of(store, project) if one.item == str(pair)}
    assert found["p0"] and not found["p2"]


def test_selection_without_a_random_slice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="random_share: got 0"):
        session(tmp_path / "one", lambda n: saying("a"), random_share=0.0)
