"""Votes of one item pooled, by hand."""

import pytest
from annotation_ballots import ballot, ranking, votes_on
from annotation_votes import texts

from mmalign.annotation.pooling import ALL_BAD, NO_VOTES, SPLIT, TIE, pool, pooled, with_verdict


def test_a_majority_decides_and_prob_tells_by_how_much() -> None:
    found = pooled(votes_on(1, "aab"))
    assert (found.ranks, found.prob, found.num_votes) == ((1.0, 2.0), pytest.approx(2 / 3), 3)
    assert found.agreement == pytest.approx(2 / 3) and found.dropped is None


def test_a_tie_is_half_a_vote_for_either() -> None:
    found = pooled(votes_on(1, "bt"))
    assert (found.ranks, found.prob) == ((2.0, 1.0), 0.25)


def test_what_people_split_on_and_what_they_call_a_tie_are_told_apart() -> None:
    assert pooled(votes_on(1, "ab")).dropped == SPLIT
    assert pooled(votes_on(1, "tt")).dropped == TIE
    assert pooled(votes_on(1, "tt")).prob == 0.5


def test_both_bad_is_no_tie() -> None:
    one = pooled(votes_on(1, "ax"))
    assert (one.prob, one.ranks, one.all_bad, one.num_votes) == (1.0, (1.0, 2.0), False, 2)
    most = pooled(votes_on(1, "axx"))
    assert (most.prob, most.ranks, most.all_bad, most.dropped) == (None, None, True, ALL_BAD)


def test_skips_are_no_votes() -> None:
    found = pooled(votes_on(1, "ss"))
    assert (found.num_votes, found.ranks, found.agreement, found.dropped) == (0, None, None, NO_VOTES)
    assert pooled(votes_on(1, "as")).num_votes == 1


def test_the_margin_is_the_mean_strength_towards_the_winner() -> None:
    cast = [ballot(1, "p", "b", strength=3.0), ballot(1, "q", "b", strength=1.0), ballot(1, "r", "a", strength=-1.0)]
    assert pooled(cast).margin == pytest.approx(1.0)
    against = [ballot(1, "p", "b", strength=1.0), ballot(1, "q", "b", strength=1.0), ballot(1, "r", "a", strength=-3.0)]
    assert pooled(against).margin == 0.0  # the majority won, the strengths say otherwise
    assert pooled(votes_on(1, "aa")).margin is None


def test_the_ranks_of_a_list_are_means_in_which_ties_share_their_places() -> None:
    found = pooled([ranking(1, "p", (1, 2, 3)), ranking(1, "q", (1, 1, 2))])
    assert found.ranks == (1.25, 1.75, 3.0)
    assert found.prob is None and found.agreement == 0.5
    assert pooled([ranking(1, "p", (1, 2, 3)), ranking(1, "q", (3, 2, 1))]).dropped == TIE


def test_repeats_and_items_of_known_answer_are_not_pooled() -> None:
    cast = [ballot(1, "p", "a"), ballot(1, "p", "b", repeat=True), ballot(2, "p", "a", right=True)]
    found = pool(cast)
    assert list(found) == ["1"] and found["1"].num_votes == 1


def test_a_row_takes_the_order_people_gave_it_and_keeps_its_scores() -> None:
    row = texts(1, ranks=(2.0, 1.0), scores={"judge": (0.1, 0.9)})
    found = with_verdict(row, pooled(votes_on(1, "aab")))
    assert (found.ranks, found.prob, found.scores) == ((1.0, 2.0), pytest.approx(2 / 3), {"judge": (0.1, 0.9)})
    assert with_verdict(row, pooled(votes_on(1, "a"))).prob is None


def test_ranks_with_gaps_agree_with_ranks_without() -> None:
    found = pooled([ranking(1, "p", (1, 2, 2)), ranking(1, "q", (1, 3, 3))])
    assert (found.agreement, found.ranks) == (1.0, (1.0, 2.5, 2.5))
