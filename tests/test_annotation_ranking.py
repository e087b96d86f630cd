"""Rankings of sources from votes, on cases whose answer is known."""

import math

import numpy as np
import pytest
from annotation_ballots import ballot, ranking

from mmalign.annotation.ballots import Ballot
from mmalign.annotation.ranking import PRIOR, bradley_terry, skills

XY = {"sources": ("x", "y")}


def test_two_sources_are_apart_by_the_log_odds_of_their_votes() -> None:
    cast = [ballot(n, "p", "a" if n < 30 else "b", **XY) for n in range(40)]
    first, second = bradley_terry(cast)
    assert (first.source, second.source) == ("x", "y")
    assert first.strength - second.strength == pytest.approx(math.log((30 + PRIOR) / (10 + PRIOR)))
    assert first.strength + second.strength == pytest.approx(0)
    assert (first.rate, first.num_comparisons) == (0.75, 40)
    assert first.low is not None and first.low > 0
    assert [(one.best_rank, one.worst_rank) for one in (first, second)] == [(1, 1), (2, 2)]


def test_a_tie_and_both_bad_are_half_a_win_each() -> None:
    cast = [ballot(1, "p", "tie", **XY), ballot(2, "p", "both_bad", **XY), ballot(3, "p", "a", **XY)]
    first, _ = bradley_terry(cast)
    assert (first.source, first.rate) == ("x", pytest.approx(2 / 3))
    assert bradley_terry(cast[:2])[0].strength == pytest.approx(0)


def test_a_source_that_always_won_has_a_finite_strength() -> None:
    first, second = bradley_terry([ballot(n, "p", "a", **XY) for n in range(50)])
    assert first.strength - second.strength == pytest.approx(math.log((50 + PRIOR) / PRIOR))


def test_a_ranking_counts_as_its_pairs() -> None:
    [x, y, z] = bradley_terry([ranking(1, "p", (1, 2, 3), sources=("x", "y", "z"))])
    assert [one.source for one in (x, y, z)] == ["x", "y", "z"]
    assert [one.num_comparisons for one in (x, y, z)] == [2, 2, 2]
    assert [one.rate for one in (x, y, z)] == [1.0, 0.5, 0.0]


def test_strengths_that_made_the_votes_are_found_again() -> None:
    true = {"m0": 1.0, "m1": 0.3, "m2": -0.2, "m3": -1.1}
    random = np.random.default_rng(0)
    cast: list[Ballot] = []
    for number in range(4000):
        one, other = random.choice(list(true), 2, replace=False)
        won = random.random() < 1 / (1 + math.exp(true[other] - true[one]))
        cast.append(ballot(number, "p", "a" if won else "b", sources=(str(one), str(other))))
    found = {one.source: one for one in bradley_terry(cast)}
    assert list(found) == list(true)
    for name, strength in true.items():
        assert found[name].strength == pytest.approx(strength, abs=0.15)
        assert found[name].low < found[name].strength < found[name].high
    assert [one.source for one in skills(cast)] == list(true)


def test_the_votes_of_one_item_are_drawn_together() -> None:
    alone = bradley_terry([ballot(n, "p", "a" if n % 3 else "b", **XY) for n in range(30)])
    echoed = bradley_terry([ballot(n % 3, f"p{n}", "a" if n % 3 else "b", **XY) for n in range(30)])
    assert alone[0].strength == pytest.approx(echoed[0].strength)
    widths = [one[0].high - one[0].low for one in (alone, echoed)]
    assert widths[1] > 1.5 * widths[0]  # three items of ten equal votes each are evidence of three items


def test_without_two_sources_there_is_nothing_to_rank() -> None:
    cast = [ballot(1, "p", "a"), ballot(2, "p", "b", sources=("x", "x"))]
    assert bradley_terry(cast) == [] and skills(cast) == []


def test_a_streak_of_late_votes_does_not_decide_a_rating() -> None:
    cast = [ballot(n, "p", "a" if n < 300 else "b", **XY) for n in range(400)]
    assert [one.source for one in skills(cast)] == ["x", "y"]


def test_one_vote_proves_little() -> None:
    first, second = bradley_terry([ballot(1, "p", "a", **XY)])
    assert first.low is not None and second.high is not None and first.low < second.high
    assert [(one.best_rank, one.worst_rank) for one in (first, second)] == [(1, 2), (1, 2)]


def test_the_interval_of_two_sources_is_that_of_a_beta_posterior() -> None:
    from scipy.stats import beta

    for won, lost in ((30, 10), (12, 0)):
        cast = [ballot(n, "p", "a" if n < won else "b", **XY) for n in range(won + lost)]
        first, _ = bradley_terry(cast, num_resamples=2000)
        low, high = beta(won + 0.5, lost + 0.5).ppf([0.025, 0.975])
        assert first.low is not None and first.high is not None
        assert first.low == pytest.approx(math.log(low / (1 - low)) / 2, abs=0.06)  # strengths are apart by twice that
        assert first.high == pytest.approx(math.log(high / (1 - high)) / 2, abs=0.06 if lost else 0.6)
    assert (first.best_rank, first.worst_rank) == (1, 1), "one that always won is known to be better"


def test_sources_that_no_comparisons_join_are_not_told_apart() -> None:
    """a beats b nine times of ten, c and d are equal, and nobody compared the two with the others."""
    cast = [ballot(n, "p", "a" if n % 10 else "b", sources=("a", "b")) for n in range(100)]
    cast += [ballot(100 + n, "p", "a" if n % 2 else "b", sources=("c", "d")) for n in range(100)]
    ranks = {one.source: (one.best_rank, one.worst_rank) for one in bradley_terry(cast)}
    assert ranks == {"a": (1, 3), "b": (2, 4), "c": (1, 4), "d": (1, 4)}
