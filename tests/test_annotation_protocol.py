"""What may be answered, worked out by hand: sides, strength, ranks, aspects, flags."""

from typing import Any

import pytest

from mmalign.annotation.protocol import (
    Protocol,
    Verdict,
    agrees,
    answer_of,
    as_shown,
    canonical,
    choices_of,
    fault_of,
    ranks_of,
)
from mmalign.errors import UserError

WHOLE = Protocol(strength=True, aspects=("style",), flags=("unsafe",))


@pytest.mark.parametrize(
    ("order", "choice", "strength", "told", "canonical_strength"),
    [
        ((0, 1), "left", -3, "a", -3),
        ((0, 1), "right", 2, "b", 2),
        ((1, 0), "left", -3, "b", 3),
        ((1, 0), "right", 2, "a", -2),
        ((1, 0), "tie", 0, "tie", 0),
        ((1, 0), "both_bad", None, "both_bad", None),
        ((1, 0), "skip", None, "skip", None),
    ],
)
def test_strength_turns_with_the_sides(
    order: tuple[int, ...], choice: str, strength: int | None, told: str, canonical_strength: int | None
) -> None:
    shown = Verdict(choice=choice, strength=strength)
    found = canonical(shown, order)
    assert (found.choice, found.strength) == (told, canonical_strength)
    assert as_shown(found, order) == shown


def test_ranks_aspects_and_flags_follow_their_candidates() -> None:
    order = (2, 0, 3, 1)  # the screen shows c a d b
    shown = Verdict(choice="ranks", ranks=(1, 2, 2, 4), aspects={"style": "3"}, flags={"unsafe": (0, 3)})
    found = canonical(shown, order)
    assert found.ranks == (2, 4, 1, 2)  # a second, b last, c first, d second
    assert found.aspects == {"style": "d"} and found.flags == {"unsafe": (1, 2)}
    assert as_shown(found, order) == shown


def test_a_pair_means_ranks_too() -> None:
    named = {name: ranks_of(Verdict(choice=name)) for name in ("a", "b", "tie", "both_bad", "skip")}
    assert named == {"a": (1, 2), "b": (2, 1), "tie": (1, 1), "both_bad": None, "skip": None}


@pytest.mark.parametrize(
    ("ranks", "prob", "answer"),
    [
        ((1.0, 2.0), None, {"choice": "a", "ranks": None}),
        ((5.0, 2.0), None, {"choice": "b", "ranks": None}),
        ((1.0, 1.0), None, {"choice": "tie", "ranks": None}),
        (None, 0.8, {"choice": "a", "ranks": None}),
        (None, 0.5, {"choice": "tie", "ranks": None}),
        ((3.0, 1.5, 3.0), None, {"choice": "ranks", "ranks": [2, 1, 2]}),
        (None, None, None),
    ],
)
def test_the_order_of_a_row_is_an_answer(ranks: tuple[float, ...] | None, prob: float | None, answer: Any) -> None:
    assert answer_of(ranks, prob) == answer


def test_a_ranking_agrees_where_the_best_are_the_same() -> None:
    answer = {"choice": "ranks", "ranks": [2, 1, 3]}
    assert agrees(Verdict(choice="ranks", ranks=(3, 1, 2)), answer)
    assert not agrees(Verdict(choice="ranks", ranks=(1, 1, 2)), answer)
    assert not agrees(Verdict(choice="both_bad"), answer)
    assert agrees(Verdict(choice="a"), {"choice": "a", "ranks": None})
    assert not agrees(Verdict(choice="tie"), {"choice": "a", "ranks": None})


@pytest.mark.parametrize(
    ("verdict", "k", "told"),
    [
        (Verdict(choice="a"), 2, "want one of left, right, tie, both_bad, skip"),
        (Verdict(choice="ranks", ranks=(1, 2)), 2, "want one of left"),
        (Verdict(choice="left"), 3, "want one of ranks, both_bad, skip"),
        (Verdict(choice="ranks"), 3, "ranks without the choice"),
        (Verdict(choice="left", ranks=(1, 2)), 2, "ranks without the choice"),
        (Verdict(choice="ranks", ranks=(1, 2)), 3, "want 3 from 1"),
        (Verdict(choice="ranks", ranks=(2, 2, 3)), 3, "want 3 from 1"),
        (Verdict(choice="ranks", ranks=(0, 1, 2)), 3, "want 3 from 1"),
        (Verdict(choice="ranks", ranks=(1, 2, 4)), 3, "want 3 from 1"),
        (Verdict(choice="left", strength=2), 2, "the strength 2 with left"),
        (Verdict(choice="right", strength=-1), 2, "the strength -1 with right"),
        (Verdict(choice="right", strength=4), 2, "the strength 4"),
        (Verdict(choice="tie", strength=1), 2, "the strength 1 with tie"),
        (Verdict(choice="skip", strength=0), 2, "the strength 0 with skip"),
        (Verdict(choice="left", aspects={"taste": "left"}), 2, "the aspect 'taste'"),
        (Verdict(choice="left", aspects={"style": "a"}), 2, "got 'a' for the aspect"),
        (Verdict(choice="left", flags={"unsafe": (2,)}), 2, "the flag 'unsafe'"),
        (Verdict(choice="left", flags={"unsafe": (0, 0)}), 2, "the flag 'unsafe'"),
        (Verdict(choice="left", flags={"rude": (0,)}), 2, "the flag 'rude'"),
        (Verdict(choice="left", rationale="x" * 4001), 2, "a reason of 4001"),
    ],
)
def test_verdicts_that_cannot_be_are_told(verdict: Verdict, k: int, told: str) -> None:
    fault = fault_of(verdict, WHOLE, k)
    assert fault is not None and told in fault


def test_what_is_not_asked_for_cannot_be_answered() -> None:
    plain = Protocol(choices=("left", "right"), rationale="off")
    for verdict in (Verdict(choice="tie"), Verdict(choice="left", strength=-1), Verdict(choice="left", rationale="so")):
        assert fault_of(verdict, plain, 2) is not None
    assert fault_of(Verdict(choice="left"), plain, 2) is None
    asked = Protocol(rationale="required")
    assert fault_of(Verdict(choice="left", rationale=" "), asked, 2) == "got no reason, want one"
    assert fault_of(Verdict(choice="skip"), asked, 2) is None
    assert choices_of(plain, 4) == ("ranks",) and choices_of(Protocol(), 4) == ("ranks", "both_bad", "skip")


def test_a_protocol_comes_back_from_json_and_forgets_what_it_does_not_know() -> None:
    protocol = Protocol(choices=("left", "right", "tie"), aspects=("style",), gold_share=0.1, guideline="*look*")
    assert Protocol.from_json(protocol.to_json()) == protocol
    assert Protocol.from_json('{"strength": true, "of_tomorrow": 1}') == Protocol(strength=True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"choices": ("left", "tie")}, "want left, right"),
        ({"choices": ("left", "right", "maybe")}, "want left, right"),
        ({"choices": ("left", "right", "left")}, "once each"),
        ({"gold_share": 1.5}, "gold_share: got 1.5"),
        ({"gold_share": 0.5, "repeat_share": 0.5}, "below 1"),
        ({"votes_per_item": 0}, "votes_per_item: got 0"),
        ({"lease_minutes": 0.0}, "lease_minutes: got 0"),
        ({"aspects": ("style", "style")}, "aspects: got"),
        ({"flags": (" ",)}, "flags: got"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Protocol(**settings)
