"""Random sessions of several people against a plain model of what must be true, on SQLite and on PostgreSQL.

Leases, votes, undo, expiry, closing, restarts, power cuts before a commit and lost replies after it come in any order.
"""

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from annotation_stores import PLAIN, Clock, new_url, order_of, postgres, row_of, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import event

from mmalign.annotation.protocol import Protocol, Verdict, as_shown, canonical, fault_of, ranks_of
from mmalign.annotation.shown import Shown
from mmalign.annotation.store import Store

FIXTURES = (new_url, postgres)
EXAMPLES = int(os.environ.get("MMALIGN_TEST_EXAMPLES", "10"))
PEOPLE = 3
LEASE_S = 60.0
DWELL_S = 0.5
CHOICES = ("left", "right", "tie", "both_bad", "skip")
SIDES = {"left": 0, "right": 1}


class PowerCutError(Exception):
    """What a test lets happen in the middle of a commit."""


@dataclass
class Known:
    """What the model knows of one assignment."""

    person: int
    row: str
    order: tuple[int, ...]
    state: str = "leased"
    since: int = 0
    expires: float = 0.0
    leased: float = 0.0
    displayed: float | None = None
    given: list[str] = field(default_factory=list)  # canonical choices, one a revision
    first: int = 0

    def holds(self) -> bool:
        return self.state == "leased" or (self.state == "voted" and self.given[-1] != "skip")


class Sessions(RuleBasedStateMachine):
    """The store beside a model of it that walks over everything each time."""

    def __init__(self, new_url: Callable[[], str]) -> None:
        super().__init__()
        self.url, self.clock = new_url(), Clock()
        self.open()
        settings = {**PLAIN, "lease_minutes": LEASE_S / 60, "min_dwell_ms": int(DWELL_S * 1000), "random_share": 0.5}
        self.project = self.store.create_project("p", "text", Protocol(**settings)).id
        self.people = [self.store.add_account(f"p{n}").id for n in range(PEOPLE)]
        self.want: dict[str, int] = {}
        self.numbers: dict[str, int] = {}
        self.known: dict[str, Known] = {}
        self.reopened: dict[int, str | None] = dict.fromkeys(self.people)
        self.cast: list[tuple[str, int, str, bool, bool]] = []
        self.count = 0
        self.is_open = True
        self.add(2, 1)

    def open(self) -> None:
        self.store = Store.open(self.url, clock=self.clock, rng=random.Random(1))

    def teardown(self) -> None:
        self.store.close()

    # The model

    def taken(self, row: str) -> int:
        return sum(one.row == row and one.holds() for one in self.known.values())

    def expire(self) -> None:
        for one in self.known.values():
            if one.state == "leased" and one.expires <= self.clock.now:
                one.state = "expired"

    def mine(self, person: int) -> list[str]:
        held = [(one.since, id) for id, one in self.known.items() if one.person == person and one.state == "leased"]
        first = self.reopened[person]
        return [*([first] if first else []), *(id for _, id in sorted(held))]

    def free(self, person: int) -> set[str]:
        busy = {one.row for one in self.known.values() if one.person == person and one.state in ("leased", "voted")}
        return {row for row, want in self.want.items() if want > self.taken(row) and row not in busy}

    def check_shown(self, person: int, shown: Shown | None, place: int) -> None:
        """What comes is what the person holds already, or something free; nothing comes only if nothing is free, or closed."""
        self.expire()
        while len(self.mine(person)) <= place:
            free = self.free(person) if self.is_open else set()
            if not free:
                break
            if len(self.mine(person)) < place:  # it was handed out on the way, unseen
                raise AssertionError("the current one was asked for before the one ahead")
            assert shown is not None, f"nothing comes, though {free} are free"
            assert row_of(shown) in free
            self.hand_out(person, shown)
        waiting = self.mine(person)
        if len(waiting) <= place:
            assert shown is None
            return
        assert shown is not None and shown.assignment == waiting[place]
        one = self.known[shown.assignment]
        if one.state == "leased":
            assert 0.9 * LEASE_S <= shown.expires_at - self.clock.now <= LEASE_S
            one.expires = shown.expires_at
        assert (row_of(shown), order_of(shown)) == (one.row, one.order)
        assert shown.revision == len(one.given) + 1
        earlier = None if not one.given else canonical_name(shown.earlier, one.order)
        assert earlier == (one.given[-1] if one.given else None)

    def hand_out(self, person: int, shown: Shown) -> None:
        self.count += 1
        same = [id for id, one in self.known.items() if (one.person, one.row) == (person, row_of(shown))]
        assert same in ([], [shown.assignment]), "who held an item gets the same assignment again"
        one = self.known.setdefault(shown.assignment, Known(person=person, row=row_of(shown), order=order_of(shown)))
        one.state, one.since, one.leased = "leased", self.count, self.clock.now

    def seen(self, one: Known) -> bool:
        """Put it on the screen; return whether that is noted, or was."""
        if one.displayed is None and not self.is_open:
            return False
        if one.displayed is None or (one.state == "leased" and one.displayed < one.leased):
            one.displayed = self.clock.now
        return True

    # What people do

    @rule(person=st.integers(0, PEOPLE - 1), place=st.integers(0, 1))
    def look(self, person: int, place: int) -> None:
        id = self.people[person]
        self.check_shown(id, self.store.take(self.project, id), 0)
        if place:
            self.check_shown(id, self.store.ahead(self.project, id), 1)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), other=st.booleans())
    def display(self, data: st.DataObject, other: bool) -> None:
        id, one, person = self.pick(data, other)
        assert self.store.displayed(id, person) == (person == one.person and self.seen(one))

    @precondition(lambda self: self.known)
    @rule(
        data=st.data(),
        other=st.sampled_from([False, False, False, True]),
        step=st.sampled_from([1, 1, 1, 1, 0, 2]),
        choice=st.sampled_from(CHOICES),
        seen=st.booleans(),
        cut=st.booleans(),
    )
    def vote(self, data: st.DataObject, other: bool, step: int, choice: str, seen: bool, cut: bool) -> None:
        id, one, person = self.pick(data, other)
        if seen and not other:
            assert self.store.displayed(id, person) == self.seen(one)
            self.clock.now += DWELL_S
        revision = max(1, len(one.given) + step)
        if cut:
            self.cut_power(lambda: self.store.vote(id, revision, Verdict(choice=choice), person))
        receipt = self.store.vote(id, revision, Verdict(choice=choice), person)
        status, reason = self.expect_vote(id, one, person, revision)
        assert (receipt.status, receipt.reason) == (status, reason)
        if status == "stored":
            assert (receipt.late, receipt.closed) == (self.note_vote(id, one, choice), not self.is_open)
        if status != "refused":
            self.check_shown(person, receipt.next, 0)
            self.check_shown(person, receipt.ahead, 1)

    def expect_vote(self, id: str, one: Known, person: int, revision: int) -> tuple[str, str]:
        if person != one.person:
            return "refused", "not_yours"
        if revision <= len(one.given):
            return "duplicate", ""
        self.expire()
        if revision != len(one.given) + 1:
            return "refused", "bad_revision"
        if one.given and self.reopened[person] != id:
            return "refused", "not_reopened"
        if one.displayed is None:
            return "refused", "not_displayed" if self.is_open else "closed"
        return ("refused", "too_soon") if self.clock.now - one.displayed < DWELL_S else ("stored", "")

    def note_vote(self, id: str, one: Known, choice: str) -> bool:
        """Count a vote in the model and return whether it came late."""
        late = one.state in ("expired", "released")
        name = "ab"[one.order[SIDES[choice]]] if choice in SIDES else choice
        others = self.taken(one.row) - one.holds()
        self.count += 1
        one.first = one.first or self.count
        one.given.append(name)
        one.state = "voted"
        surplus = name != "skip" and others >= self.want[one.row]
        self.cast.append((id, len(one.given), name, late, surplus))
        if self.reopened[one.person] == id:
            self.reopened[one.person] = None
        return late

    @rule(person=st.integers(0, PEOPLE - 1))
    def undo(self, person: int) -> None:
        id = self.people[person]
        voted = sorted((one.first, name) for name, one in self.known.items() if one.person == id and one.given)
        before = self.reopened[id]
        if before is not None:
            voted = [(first, name) for first, name in voted if first < self.known[before].first]
        shown = self.store.undo(self.project, id)
        if not voted or not self.is_open:
            assert shown is None
            return
        self.reopened[id] = voted[-1][1]
        self.known[voted[-1][1]].displayed = None
        self.check_shown(id, shown, 0)

    @rule(person=st.integers(0, PEOPLE - 1))
    def keep(self, person: int) -> None:
        self.store.keep(self.project, self.people[person])
        self.reopened[self.people[person]] = None

    @rule(person=st.integers(0, PEOPLE - 1))
    def leave(self, person: int) -> None:
        held = [one for one in self.known.values() if one.person == self.people[person] and one.state == "leased"]
        assert self.store.release(self.project, self.people[person]) == len(held)
        for one in held:
            one.state = "released"

    @rule(person=st.integers(0, PEOPLE - 1))
    def renew(self, person: int) -> None:
        self.expire()
        held = [one for one in self.known.values() if one.person == self.people[person] and one.state == "leased"]
        expires = self.store.renew(self.project, self.people[person])
        assert expires == (self.clock.now + LEASE_S if held else None)
        for one in held:
            one.expires = self.clock.now + LEASE_S

    # What happens to all of them

    @rule(seconds=st.sampled_from([0.1, 1.0, 20.0, LEASE_S + 1]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(count=st.integers(1, 2), votes=st.integers(1, 3))
    def add(self, count: int, votes: int) -> None:
        start = len(self.want)
        rows = texts(count, start=start)
        assert self.store.add(self.project, [*rows, *rows]).added == count
        for item in self.store.items(self.project, media=False):
            if item.comparison.id not in self.want:
                self.numbers[item.comparison.id] = item.id
                self.want[item.comparison.id] = 1
        for row in rows:
            self.change_want(row.id, votes)

    @rule(data=st.data(), votes=st.integers(1, 3))
    def change(self, data: st.DataObject, votes: int) -> None:
        self.change_want(data.draw(st.sampled_from(sorted(self.want))), votes)

    def change_want(self, row: str, votes: int) -> None:
        self.store.want(self.project, self.numbers[row], votes)
        self.want[row] = votes

    @rule(data=st.data())
    def prioritise(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.sampled_from(sorted(self.want)), unique=True, max_size=3))
        self.store.prioritise(self.project, {self.numbers[row]: float(n) for n, row in enumerate(rows)})

    @rule()
    def close_or_open(self) -> None:
        """What was on no screen when it was closed is given back, or left as it was judged."""
        self.is_open = not self.is_open
        self.store.set_open(self.project, self.is_open)
        if self.is_open:
            return
        for one in self.known.values():
            if one.state == "leased" and one.displayed is None:
                one.state = "released"
        for person, id in self.reopened.items():
            if id is not None and self.known[id].displayed is None:
                self.reopened[person] = None

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.open()

    @rule(person=st.integers(0, PEOPLE - 1))
    def cut_power_while_looking(self, person: int) -> None:
        self.cut_power(lambda: self.store.take(self.project, self.people[person]))

    def cut_power(self, act: Callable[[], Any]) -> None:
        """Nothing that was not committed is there afterwards."""

        def cut(connection: Any) -> None:
            raise PowerCutError

        event.listen(self.store.database.engine, "commit", cut)
        with pytest.raises(PowerCutError):
            act()
        event.remove(self.store.database.engine, "commit", cut)
        self.restart()

    def pick(self, data: st.DataObject, other: bool) -> tuple[str, Known, int]:
        id = data.draw(st.sampled_from(sorted(self.known, key=lambda name: self.known[name].since)))
        one = self.known[id]
        owner = self.people.index(one.person)
        return id, one, self.people[(owner + 1) % PEOPLE] if other else one.person

    # What is always true

    @invariant()
    def every_vote_is_there_once(self) -> None:
        votes = self.store.votes(self.project, latest=False)
        assert [(v.assignment, v.revision, v.choice, v.late, v.surplus) for v in votes] == self.cast
        latest = {(v.assignment, v.choice) for v in votes if v.is_latest}
        assert latest == {(id, one.given[-1]) for id, one in self.known.items() if one.given}
        assert [v.id for v in self.store.votes(self.project)] == [v.id for v in votes if v.is_latest]

    @invariant()
    def slots_add_up(self) -> None:
        self.store.expire(self.project)
        self.expire()
        left = {item.comparison.id: item.slots_left for item in self.store.items(self.project, media=False)}
        assert left == {row: want - self.taken(row) for row, want in self.want.items()}
        counted = sum(one.state == "voted" and one.holds() for one in self.known.values())
        progress = self.store.progress(self.project)
        assert (progress.counted, progress.wanted, progress.items) == (counted, sum(self.want.values()), len(self.want))

    @invariant()
    def nobody_judges_an_item_twice(self) -> None:
        pairs = [(one.person, one.row) for one in self.known.values()]
        assert len(set(pairs)) == len(pairs)


def canonical_name(verdict: Verdict | None, order: tuple[int, ...]) -> str:
    assert verdict is not None
    return "ab"[order[SIDES[verdict.choice]]] if verdict.choice in SIDES else verdict.choice


def test_any_session_does_what_the_model_says(new_url: Callable[[], str]) -> None:
    quiet = settings(
        max_examples=EXAMPLES,
        stateful_step_count=30,
        deadline=None,
        derandomize=EXAMPLES < 50,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: Sessions(new_url), settings=quiet)


PROTOCOL = Protocol(strength=True, aspects=("style", "truth"), flags=("unsafe", "cut"))


@st.composite
def verdicts(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any]]:
    """An order of the sides, and what is said in any verdict as shown that the protocol takes."""
    k = draw(st.integers(2, 6))
    order = tuple(draw(st.permutations(range(k))))
    names = ["left", "right"] if k == 2 else [str(n) for n in range(1, k + 1)]
    choice = draw(st.sampled_from(CHOICES if k == 2 else ("ranks", "both_bad", "skip")))
    strengths = {"left": (-3, -2, -1), "right": (1, 2, 3), "tie": (0,)}.get(choice, ())
    ranks = tuple(draw(st.lists(st.integers(1, k), min_size=k, max_size=k))) if choice == "ranks" else None
    if ranks is not None:
        ranks = (*ranks[:-1], 1)
    said = dict(
        choice=choice,
        strength=draw(st.sampled_from((None, *strengths))),
        ranks=ranks,
        aspects=draw(st.dictionaries(st.sampled_from(PROTOCOL.aspects), st.sampled_from([*names, "tie"]))),
        flags=draw(
            st.dictionaries(
                st.sampled_from(PROTOCOL.flags), st.sets(st.integers(0, k - 1)).map(lambda places: tuple(sorted(places)))
            )
        ),
        rationale=draw(st.text(max_size=20)),
    )
    return order, said


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(verdicts())
def test_a_verdict_goes_to_the_order_of_the_data_and_back(drawn: tuple[tuple[int, ...], dict[str, Any]]) -> None:
    order, shown = drawn[0], Verdict(**drawn[1])
    assert fault_of(shown, PROTOCOL, len(order)) is None
    told = canonical(shown, order)
    assert as_shown(told, order) == shown
    assert Verdict.from_json(told.to_json()) == told
    assert json.loads(told.to_json())["choice"] == told.choice


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(verdicts())
def test_a_candidate_keeps_what_was_said_of_it_wherever_it_stood(drawn: tuple[tuple[int, ...], dict[str, Any]]) -> None:
    order, shown = drawn[0], Verdict(**drawn[1])
    told = canonical(shown, order)
    k = len(order)
    names = ["left", "right"] if k == 2 else [str(n) for n in range(1, k + 1)]
    for place, candidate in enumerate(order):
        letter = "abcdef"[candidate]
        assert (shown.choice == names[place]) == (told.choice == letter)
        if shown.ranks is not None:
            assert told.ranks is not None and told.ranks[candidate] == shown.ranks[place]
        for aspect, better in shown.aspects.items():
            assert (better == names[place]) == (told.aspects[aspect] == letter)
        for flag, places in shown.flags.items():
            assert (place in places) == (candidate in told.flags[flag])
    if k == 2:
        ranks, strength = ranks_of(told), told.strength
        if strength:
            assert ranks is not None and (strength > 0) == (ranks[1] < ranks[0])
        assert strength is None or abs(strength) == abs(shown.strength or 0)
