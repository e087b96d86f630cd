"""Biases of votes, counted by hand."""

import pytest
from annotation_ballots import ballot, ranking

from mmalign.annotation.ballots import Ballot
from mmalign.annotation.bias import gold_accuracy, left_rate, longer_rate, place_rates, repeats
from mmalign.annotation.shares import share_of, wilson


def test_a_share_has_wilsons_interval() -> None:
    found = share_of(60, 100)
    assert found is not None
    # (0.6 + 1.92073/100 -+ 1.95996 * sqrt(0.24/100 + 3.84146/40000)) / 1.0384146
    assert (found.low, found.high) == (pytest.approx(0.50200, abs=1e-5), pytest.approx(0.69060, abs=1e-5))
    assert share_of(0, 0) is None


def test_the_left_rate_follows_the_screen_and_not_the_order_of_the_data() -> None:
    cast = [ballot(1, "p", "a"), ballot(2, "p", "b", order=(1, 0)), ballot(3, "p", "a", order=(1, 0)), ballot(4, "p", "b")]
    found = left_rate(cast)
    assert found is not None and (found.count, found.total) == (2, 4)


def test_ties_both_bad_and_skips_have_no_side() -> None:
    cast = [ballot(1, "p", "tie"), ballot(2, "p", "both_bad"), ballot(3, "p", "skip"), ballot(4, "p", "a")]
    found = left_rate(cast)
    assert found is not None and (found.count, found.total) == (1, 1)
    assert left_rate(cast[:3]) is None


def test_the_longer_rate_counts_texts_of_different_length_only() -> None:
    cast = [
        ballot(1, "p", "a", lengths=(9, 3)),
        ballot(2, "p", "b", lengths=(9, 3)),
        ballot(3, "p", "b", lengths=(2, 7)),
        ballot(4, "p", "a", lengths=(5, 5)),
        ballot(5, "p", "tie", lengths=(5, 1)),
        ballot(6, "p", "a"),
    ]
    found = longer_rate(cast)
    assert found is not None and (found.count, found.total) == (2, 3)


def test_the_place_of_the_best_of_a_ranking_is_where_it_stood() -> None:
    cast = [ranking(1, "p", (2, 1, 3), order=(1, 2, 0)), ranking(2, "p", (1, 2, 3)), ranking(3, "p", (1, 1, 2))]
    [first, second, third] = place_rates(cast)[3]
    assert [one.count for one in (first, second, third)] == [2, 0, 0]  # the third has no single best
    assert first.total == 2


def test_items_of_known_answer_are_counted_for_each_person_without_skips() -> None:
    cast = [
        ballot(1, "p", "a", right=True),
        ballot(2, "p", "b", right=False),
        ballot(3, "p", "skip", right=False),
        ballot(1, "q", "a", right=True),
        ballot(4, "q", "a"),
    ]
    found = gold_accuracy(cast)
    assert {name: (one.count, one.total) for name, one in found.items()} == {"p": (1, 2), "q": (1, 1)}


def test_repeats_tell_who_follows_the_side_of_the_screen() -> None:
    def twice(item: int, first: str, second: str) -> list[Ballot]:
        return [ballot(item, "p", first), ballot(item, "p", second, order=(1, 0), repeat=True)]

    found = repeats([*twice(1, "a", "a"), *twice(2, "a", "b"), *twice(3, "tie", "tie"), *twice(4, "a", "skip")])["p"]
    assert (found.same.count, found.same.total) == (2, 3)
    assert found.same_side is not None
    assert (found.same_side.count, found.same_side.total) == (1, 2)  # item 2: left both times, of the two decided twice


def test_a_repeat_without_its_first_time_is_no_repeat() -> None:
    assert repeats([ballot(1, "p", "a", repeat=True)]) == {}


def test_repeats_and_items_of_known_answer_tell_of_people_and_not_of_a_bias() -> None:
    pair = {"lengths": (9, 3)}
    cast = [ballot(1, "p", "a", **pair), ballot(1, "p", "b", order=(1, 0), repeat=True, **pair)]
    cast += [ballot(2, "p", "a", right=True, **pair), ranking(3, "p", (1, 2, 3)), ranking(4, "p", (1, 2, 3), right=True)]
    for found in (left_rate(cast), longer_rate(cast)):
        assert found is not None and (found.count, found.total) == (1, 1)
    assert place_rates(cast)[3][0].total == 1


def test_the_votes_on_one_pair_are_no_independent_evidence_of_a_bias_of_length() -> None:
    # Four pairs of five votes each: twice all five for the longer one, twice none. v = 4 * 2.5^2 / 400, deff 5: worth 4 votes.
    cast = [ballot(n, f"p{v}", "a" if n < 2 else "b", lengths=(9, 3)) for n in range(4) for v in range(5)]
    found = longer_rate(cast)
    assert found is not None and (found.count, found.total) == (10, 20)
    assert (found.low, found.high) == pytest.approx(wilson(0.5, 4))
    alone = longer_rate([ballot(n, "p", "a" if n % 3 else "b", lengths=(9, 3)) for n in range(30)])
    assert alone is not None and alone == share_of(20, 30)
    same = longer_rate([ballot(n % 3, f"p{n}", "a", lengths=(9, 3)) for n in range(30)])
    assert same is not None and (same.low, same.high) == pytest.approx(wilson(1.0, 3))
