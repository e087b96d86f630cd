"""Agreement against values worked out by hand or published with the measure."""

import pytest
from annotation_ballots import ballot, ranking, votes_on

from mmalign.annotation.agreement import against_majority, alpha, cohen, fleiss, raw_agreement
from mmalign.annotation.ballots import choices, grades, items_of

# Krippendorff (2011): three raters, fifteen units, dots are missing verdicts.
PUBLISHED = {"A": ".....34121133.3", "B": "1.21334 3......".replace(" ", ""), "C": "..21344.21133.4"}
# Krippendorff (2011), four observers and twelve units, dots are missing verdicts.
OBSERVERS = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
# Fleiss (1971) as worked through in textbooks: ten subjects, fourteen raters, five categories.
TEXTBOOK = (
    *((0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1)),
    *((7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7)),
)


def published() -> dict[str, dict[str, float]]:
    rows = {name: text.ljust(15, ".") for name, text in PUBLISHED.items()}
    return {str(n): {name: float(row[n]) for name, row in rows.items() if row[n] != "."} for n in range(15)}


def test_raw_agreement_is_the_share_of_pairs_of_raters_who_say_the_same() -> None:
    units = {"1": {"p": "a", "q": "a", "r": "b"}, "2": {"p": "b", "q": "b"}, "3": {"p": "a"}}
    found = raw_agreement(units)
    assert found is not None
    assert found.value == pytest.approx(2 / 4)  # of item 1 one pair of three agrees, of item 2 the only one
    assert found.num_items == 2
    assert found.low is not None and found.high is not None and found.low <= 0.5 <= found.high


def test_nothing_is_said_of_agreement_where_nobody_overlaps() -> None:
    units = {"1": {"p": "a"}, "2": {"q": "b"}}
    assert raw_agreement(units) is None and alpha(units) is None and fleiss(units) is None
    assert cohen(units) == {} and against_majority(units) == {}


@pytest.mark.parametrize(("level", "value"), [("nominal", 0.691), ("interval", 0.811)])
def test_alpha_is_the_published_one(level: str, value: float) -> None:
    found = alpha(published(), level)  # type: ignore[arg-type]
    assert found is not None and round(found.value, 3) == value


@pytest.mark.parametrize(("level", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_four_observers_with_missing_verdicts_is_the_published_one(level: str, value: float) -> None:
    units = {str(n): {f"o{o}": float(row[n]) for o, row in enumerate(OBSERVERS) if row[n] != "."} for n in range(12)}
    found = alpha(units, level)  # type: ignore[arg-type]
    assert found is not None and round(found.value, 3) == value
    assert found.num_items == 11, "one unit was judged by one observer alone"


def test_alpha_worked_out_by_hand_on_two_choices() -> None:
    # Pairs aa, aa, ab, bb: coincidences aa 4, ab 1 each way, bb 2; n 8, n_a 5, n_b 3. D_o = 2/8, D_e = 2 * 15 / 56.
    units = {"1": {"p": "a", "q": "a"}, "2": {"p": "a", "q": "a"}, "3": {"p": "a", "q": "b"}, "4": {"p": "b", "q": "b"}}
    found = alpha(units)
    assert found is not None and found.value == pytest.approx(1 - (2 / 8) / (30 / 56))


def test_ordinal_alpha_punishes_a_near_miss_less_than_a_far_one() -> None:
    near = {"1": {"p": 1.0, "q": 2.0}, "2": {"p": 3.0, "q": 3.0}, "3": {"p": 1.0, "q": 1.0}, "4": {"p": 2.0, "q": 2.0}}
    far = {**near, "1": {"p": 1.0, "q": 3.0}}
    close, wide = alpha(near, "ordinal"), alpha(far, "ordinal")
    assert close is not None and wide is not None and close.value > wide.value


def test_alpha_of_one_and_the_same_verdict_is_undefined() -> None:
    assert alpha({"1": {"p": "a", "q": "a"}, "2": {"p": "a", "q": "a"}}) is None


def test_cohen_worked_out_by_hand() -> None:
    # Both say a 20 times, both b 15 times, p a and q b 5, p b and q a 10: p_o .7, p_e .5 * .6 + .5 * .4, kappa .4.
    both = ["aa"] * 20 + ["bb"] * 15 + ["ab"] * 5 + ["ba"] * 10
    found = cohen({str(n): {"p": one, "q": other} for n, (one, other) in enumerate(both)})
    assert found["p", "q"].value == pytest.approx(0.4)
    assert found["p", "q"].num_items == 50


def test_fleiss_is_the_textbook_one() -> None:
    units = {}
    for number, row in enumerate(TEXTBOOK):
        verdicts = [category for category, count in enumerate(row) for _ in range(count)]
        units[str(number)] = {f"r{n}": verdict for n, verdict in enumerate(verdicts)}
    assert fleiss(units) == pytest.approx(0.210, abs=5e-4)


def test_a_rater_is_held_against_the_majority_of_the_others_and_never_of_himself() -> None:
    units = choices([*votes_on(1, "aab"), *votes_on(2, "abb"), *votes_on(3, "ab")])
    found = against_majority(units)
    # r0: item 1 the others split, item 2 says b, item 3 says b. r1: 1 splits, 2 splits, 3 says a. r2: 1 says a, 2 splits.
    told = {rater: (share.count, share.total) for rater, share in found.items()}
    assert told == {"r0": (0, 2), "r1": (0, 1), "r2": (0, 1)}
    assert against_majority(choices(votes_on(1, "aaab")))["r0"].count == 1


def test_skips_repeats_and_items_of_known_answer_say_nothing_of_agreement() -> None:
    cast = [*votes_on(1, "aas"), ballot(1, "r0", "b", repeat=True), *votes_on(2, "ab", right=True)]
    assert choices(cast) == {"1": {"r0": "a", "r1": "a"}}


def test_strengths_are_grades_where_they_were_asked_else_the_preference_is() -> None:
    plain = [ballot(1, "p", "a"), ballot(1, "q", "both_bad"), ballot(1, "r", "b")]
    assert grades(plain) == ("preference", {"1": {"p": -1.0, "q": 0.0, "r": 1.0}})
    asked = [ballot(1, "p", "a", strength=-3.0), ballot(1, "q", "b", strength=1.0), ballot(1, "r", "both_bad")]
    assert grades(asked) == ("strength", {"1": {"p": -3.0, "q": 1.0}})


def test_a_ranking_agrees_pair_by_pair() -> None:
    cast = [ranking(1, "p", (1, 2, 3)), ranking(1, "q", (2, 1, 3))]
    units = choices(cast)
    assert units == {"1#0-1": {"p": "a", "q": "b"}, "1#0-2": {"p": "a", "q": "a"}, "1#1-2": {"p": "a", "q": "a"}}
    found = raw_agreement(units)
    assert found is not None and found.value == pytest.approx(2 / 3)
    assert grades(cast)[0] == "rank"


def test_fleiss_by_hand_where_the_numbers_of_raters_differ() -> None:
    # P_i: aab 1/3, bb 1, ab 0, mean 4/9; 3 a and 4 b of 7: P_e 25/49; (4/9 - 25/49) / (24/49) = -29/216.
    units = choices([*votes_on(1, "aab"), *votes_on(2, "bb"), *votes_on(3, "ab"), *votes_on(4, "a")])
    assert fleiss(units) == pytest.approx(-29 / 216)


def test_weighted_kappa_goes_by_the_difference_of_strengths_and_not_by_their_order() -> None:
    # Squared differences seen: 1 of four; expected from the margins (2, 2) and (1, 1, 2): 67 of four.
    both = [(-3.0, -3.0), (-3.0, -2.0), (3.0, 3.0), (3.0, 3.0)]
    units = {str(n): {"p": one, "q": other} for n, (one, other) in enumerate(both)}
    assert cohen(units, weights="quadratic")["p", "q"].value == pytest.approx(1 - 1 / 67)


def test_the_pairs_of_one_ranking_are_drawn_together() -> None:
    """Half of forty rankings agree wholly, half are turned round: 120 pairs are evidence of forty items."""
    cast = []
    for item in range(40):
        cast += [ranking(item, "p", (1, 2, 3)), ranking(item, "q", (1, 2, 3) if item % 2 else (3, 2, 1))]
    units = choices(cast)
    whole, loose = raw_agreement(units, items=items_of(units)), raw_agreement(units)
    assert whole is not None and loose is not None and whole.value == loose.value == 0.5
    assert (whole.num_items, loose.num_items) == (40, 120)
    assert whole.high - whole.low > 1.4 * (loose.high - loose.low)
    graded = grades(cast)[1]
    ordinal = alpha(graded, "ordinal", items=items_of(graded))
    assert ordinal is not None and ordinal.num_items == 40


def test_ranks_with_gaps_say_the_same_as_ranks_without() -> None:
    gaps, plain = [ranking(1, "p", (1, 3, 3))], [ranking(1, "p", (1, 2, 2))]
    assert grades(gaps) == grades(plain) == ("rank", {"1#0": {"p": 1.0}, "1#1": {"p": 2.5}, "1#2": {"p": 2.5}})
    assert choices(gaps) == choices(plain)
