"""The store on SQLite and on PostgreSQL: which votes are taken, what they say of the data, and what is counted."""

import threading
from collections import Counter
from dataclasses import replace

import pytest
from annotation_stores import Clock, clock, judge, new_url, order_of, people, postgres, project_with, row_of, store
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from mmalign.annotation.protocol import Protocol, Verdict
from mmalign.annotation.schema import VOTE
from mmalign.annotation.store import Store
from mmalign.errors import UserError

FIXTURES = (clock, new_url, postgres, store)


def test_a_vote_says_of_the_data_what_was_seen_whichever_side_it_stood_on(store: Store) -> None:
    project = project_with(store, 30, strength=True, aspects=("style", "truth"), flags=("unsafe",))
    [ann] = people(store, 1)
    orders = set()
    while shown := store.take(project.id, ann.id):
        order = order_of(shown)
        orders.add(order)
        side = "left" if order[0] == 1 else "right"  # b is better
        strength = -2 if side == "left" else 2
        aspects = {"style": "right" if side == "left" else "left", "truth": "tie"}
        place = order.index(0)  # a is unsafe
        judge(store, shown, ann.id, side, strength=strength, aspects=aspects, flags={"unsafe": (place,)}, rationale="why")
    assert orders == {(0, 1), (1, 0)}
    votes = store.votes(project.id)
    assert len(votes) == 30
    expected = Verdict(choice="b", strength=2, aspects={"style": "a", "truth": "tie"}, flags={"unsafe": (0,)}, rationale="why")
    assert all(vote.verdict == expected and vote.ranks == (2, 1) for vote in votes)
    assert {vote.shown.choice for vote in votes} == {"left", "right"}


def test_a_ranking_is_put_back_into_the_order_of_the_data(store: Store) -> None:
    project = project_with(store, 20, k=4)
    [ann] = people(store, 1)
    truth = (3, 1, 4, 1)
    orders = set()
    while shown := store.take(project.id, ann.id):
        order = order_of(shown)
        orders.add(order)
        assert judge(store, shown, ann.id, "ranks", ranks=tuple(truth[n] for n in order)).status == "stored"
    assert len(orders) > 5
    assert [vote.ranks for vote in store.votes(project.id)] == [truth] * 20


def test_a_vote_sent_again_is_a_duplicate_and_the_first_one_stands(store: Store) -> None:
    project = project_with(store, 3)
    [ann] = people(store, 1)
    shown = store.take(project.id, ann.id)
    assert shown is not None
    judge(store, shown, ann.id, "left")
    again = store.vote(shown.assignment, 1, Verdict(choice="right"), ann.id)
    assert (again.status, again.stands) == ("duplicate", Verdict(choice="left"))
    assert again.next == store.take(project.id, ann.id)
    assert [vote.shown.choice for vote in store.votes(project.id, latest=False)] == ["left"]
    assert [event.details["verdict"] for event in store.events(project.id) if event.kind == "duplicate"]


def test_what_cannot_have_been_seen_cannot_be_judged(store: Store, clock: Clock) -> None:
    project = project_with(store, 3, min_dwell_ms=500)
    ann, bob = people(store, 2)
    shown = store.take(project.id, ann.id)
    assert shown is not None
    left = Verdict(choice="left")
    assert store.vote("no such", 1, left, ann.id).reason == "unknown"
    assert store.vote(shown.assignment, 1, left, ann.id).reason == "not_displayed"
    assert not store.displayed(shown.assignment, bob.id)
    assert store.vote(shown.assignment, 1, left, ann.id).reason == "not_displayed"
    assert store.displayed(shown.assignment, ann.id)
    assert store.vote(shown.assignment, 1, left, bob.id).reason == "not_yours"
    clock.now += 0.2
    soon = store.vote(shown.assignment, 1, left, ann.id)
    assert (soon.reason, soon.wait_ms) == ("too_soon", 300)
    clock.now += 0.3
    assert store.vote(shown.assignment, 2, left, ann.id).reason == "bad_revision"
    assert store.vote(shown.assignment, 1, Verdict(choice="best"), ann.id).reason == "bad_verdict"
    assert store.votes(project.id, latest=False) == []
    refused = [event.details["reason"] for event in store.events(project.id) if event.kind == "refused"]
    assert {"not_displayed", "too_soon", "bad_revision", "bad_verdict", "not_yours"} <= set(refused)
    assert store.vote(shown.assignment, 1, left, ann.id).status == "stored"
    assert store.vote(shown.assignment, 2, left, ann.id).reason == "not_reopened"


def test_undo_goes_back_step_by_step_and_the_old_verdict_stands_until_another_is_cast(store: Store) -> None:
    project = project_with(store, 6)
    [ann] = people(store, 1)
    shown = [store.take(project.id, ann.id)]
    for choice in ("left", "right", "tie"):
        assert shown[-1] is not None
        shown.append(judge(store, shown[-1], ann.id, choice).next)
    assert store.undo(project.id, ann.id).earlier == Verdict(choice="tie")
    back = store.undo(project.id, ann.id)
    assert shown[1] is not None and back.assignment == shown[1].assignment
    assert (back.revision, back.earlier, back.candidates) == (2, Verdict(choice="right"), shown[1].candidates)
    assert store.take(project.id, ann.id) == back
    assert [vote.shown.choice for vote in store.votes(project.id)] == ["left", "right", "tie"]
    assert store.vote(back.assignment, 2, Verdict(choice="both_bad"), ann.id).reason == "not_displayed"
    receipt = judge(store, back, ann.id, "both_bad")
    assert receipt.status == "stored" and receipt.next == shown[3]
    assert [vote.shown.choice for vote in store.votes(project.id)] == ["left", "tie", "both_bad"]
    assert [vote.is_latest for vote in store.votes(project.id, latest=False)] == [True, False, True, True]
    assert store.progress(project.id, ann.id).counted == 3


def test_undo_can_be_left_and_a_judgement_can_be_opened_by_name(store: Store) -> None:
    project = project_with(store, 4)
    ann, bob = people(store, 2)
    assert store.undo(project.id, ann.id) is None
    first = store.take(project.id, ann.id)
    assert first is not None
    following = judge(store, first, ann.id).next
    assert store.undo(project.id, bob.id, first.assignment) is None
    assert store.undo(project.id, ann.id, first.assignment).earlier == Verdict(choice="left")
    store.keep(project.id, ann.id)
    assert store.take(project.id, ann.id) == following
    assert store.vote(first.assignment, 2, Verdict(choice="right"), ann.id).reason == "not_reopened"


def test_a_skipped_item_goes_to_somebody_else_and_counts_once_it_is_judged(store: Store) -> None:
    project = project_with(store, 1)
    ann, bob = people(store, 2)
    shown = store.take(project.id, ann.id)
    assert shown is not None and store.take(project.id, bob.id) is None
    assert judge(store, shown, ann.id, "skip").next is None
    assert store.progress(project.id).counted == 0
    other = store.take(project.id, bob.id)
    assert other is not None and row_of(other) == row_of(shown)
    judge(store, other, bob.id)
    assert store.progress(project.id).counted == 1
    back = store.undo(project.id, ann.id)
    judge(store, back, ann.id, "right")
    votes = {vote.annotator: vote for vote in store.votes(project.id)}
    assert votes["person 0"].surplus and not votes["person 1"].surplus


def test_votes_carry_the_version_of_the_guideline_that_was_read(store: Store) -> None:
    project = project_with(store, 9, guideline="look well")
    [ann] = people(store, 1)
    judge(store, store.take(project.id, ann.id), ann.id)
    store.guideline_read(project.id, ann.id, 1)
    assert store.set_guideline(project.id, "look better").version == 2
    assert store.set_guideline(project.id, "look better").version == 2
    judge(store, store.take(project.id, ann.id), ann.id)
    store.guideline_read(project.id, ann.id, 2)
    judge(store, store.take(project.id, ann.id), ann.id)
    assert [vote.guideline_version for vote in store.votes(project.id)] == [1, 1, 2]
    assert [store.guideline(project.id, version).text for version in (1, 2, None)] == [
        "look well",
        "look better",
        "look better",
    ]
    progress = store.progress(project.id, ann.id)
    assert (progress.guideline_version, progress.guideline_read) == (2, 2)
    with pytest.raises(UserError, match="want one up to 2"):
        store.guideline(project.id, 3)


def test_a_closed_project_hands_nothing_out_but_takes_what_is_on_screens(store: Store) -> None:
    project = project_with(store, 6)
    ann, bob = people(store, 2)
    shown, left = store.take(project.id, ann.id), store.take(project.id, bob.id)
    ahead = store.ahead(project.id, ann.id)
    assert shown is not None and left is not None and ahead is not None
    for one, person in ((shown, ann), (left, bob)):
        assert store.displayed(one.assignment, person.id)
    store.release(project.id, bob.id)
    store.set_open(project.id, False)
    assert store.take(project.id, bob.id) is None and store.take(project.id, ann.id) == shown
    assert store.ahead(project.id, ann.id) is None, "what was only fetched ahead is given back"
    receipt = store.vote(shown.assignment, 1, Verdict(choice="left"), ann.id)
    assert (receipt.status, receipt.closed, receipt.late, receipt.next) == ("stored", True, False, None)
    late = store.vote(left.assignment, 1, Verdict(choice="left"), bob.id)
    assert (late.status, late.closed, late.late) == ("stored", True, True)
    assert not store.displayed(ahead.assignment, ann.id)
    assert store.vote(ahead.assignment, 1, Verdict(choice="left"), ann.id).reason == "closed"
    assert store.vote(shown.assignment, 1, Verdict(choice="right"), ann.id).status == "duplicate"
    assert store.undo(project.id, ann.id) is None
    assert [event.details.get("closed") for event in store.events(project.id) if event.kind == "voted"] == [True, True]
    store.set_open(project.id, True)
    again = store.ahead(project.id, ann.id)
    assert again is not None and judge(store, store.take(project.id, ann.id), ann.id).status == "stored"


def test_what_is_open_again_on_a_screen_can_be_revised_after_the_project_was_closed(store: Store) -> None:
    project = project_with(store, 4)
    ann, bob = people(store, 2)
    for person in (ann, bob):
        judge(store, store.take(project.id, person.id), person.id)
    seen, unseen = store.undo(project.id, ann.id), store.undo(project.id, bob.id)
    assert seen is not None and unseen is not None and store.displayed(seen.assignment, ann.id)
    store.set_open(project.id, False)
    assert store.take(project.id, ann.id) == seen and store.take(project.id, bob.id) is None
    receipt = store.vote(seen.assignment, 2, Verdict(choice="right"), ann.id)
    assert (receipt.status, receipt.closed) == ("stored", True)
    assert store.vote(unseen.assignment, 2, Verdict(choice="right"), bob.id).status == "refused"
    assert [vote.shown.choice for vote in store.votes(project.id)] == ["left", "right"]


def test_a_vote_on_its_way_is_taken_though_its_item_was_handed_to_the_same_person_again(store: Store, clock: Clock) -> None:
    """The laptop slept over the lease, the phone asked for work, and then the laptop sends."""
    project = project_with(store, 1, lease_minutes=10, min_dwell_ms=500)
    [ann] = people(store, 1)
    shown = store.take(project.id, ann.id)
    assert shown is not None and store.displayed(shown.assignment, ann.id)
    clock.now += 700
    again = store.take(project.id, ann.id)
    assert again is not None and again.assignment == shown.assignment
    receipt = store.vote(shown.assignment, 1, Verdict(choice="left"), ann.id)
    assert (receipt.status, receipt.late) == ("stored", False)


def test_an_item_that_is_handed_out_again_is_on_the_screen_since_it_was_shown_again(store: Store, clock: Clock) -> None:
    project = project_with(store, 1, min_dwell_ms=500)
    [ann] = people(store, 1)
    shown = store.take(project.id, ann.id)
    assert shown is not None and store.displayed(shown.assignment, ann.id)
    clock.now += 100
    store.release(project.id, ann.id)
    clock.now += 100
    assert store.take(project.id, ann.id) is not None
    clock.now += 1
    assert store.displayed(shown.assignment, ann.id)
    assert store.vote(shown.assignment, 1, Verdict(choice="left"), ann.id).reason == "too_soon"
    clock.now += 1
    assert store.vote(shown.assignment, 1, Verdict(choice="left"), ann.id).status == "stored"
    [vote] = store.votes(project.id)
    assert vote.submitted_at - vote.displayed_at == 1


def test_a_clock_that_is_set_back_keeps_nobody_waiting(store: Store, clock: Clock) -> None:
    project = project_with(store, 2, min_dwell_ms=500, lease_minutes=10)
    [ann] = people(store, 1)
    shown = store.take(project.id, ann.id)
    assert shown is not None and store.displayed(shown.assignment, ann.id)
    clock.now -= 3600
    soon = store.vote(shown.assignment, 1, Verdict(choice="left"), ann.id)
    assert (soon.reason, soon.wait_ms) == ("too_soon", 500)
    clock.now += 0.5
    assert store.vote(shown.assignment, 1, Verdict(choice="left"), ann.id).status == "stored"
    held = store.take(project.id, ann.id)
    assert held is not None and held.expires_at == clock.now + 600
    clock.now -= 3600
    held = store.take(project.id, ann.id)
    assert held is not None and held.expires_at == clock.now + 600
    assert [event.details["by_s"] for event in store.events(project.id) if event.kind == "clock"] == [3600.0]


def test_votes_and_events_cannot_be_changed_or_deleted(store: Store) -> None:
    project = project_with(store, 2)
    [ann] = people(store, 1)
    judge(store, store.take(project.id, ann.id), ann.id)
    commands = ["UPDATE vote SET late = late", "DELETE FROM vote", "UPDATE event SET at = 0", "DELETE FROM event"]
    commands += (
        ["INSERT OR REPLACE INTO vote SELECT * FROM vote", "REPLACE INTO event SELECT * FROM event"]
        if store.database.is_sqlite
        else ["TRUNCATE vote", "TRUNCATE event"]
    )
    columns = ", ".join(column.name for column in VOTE.columns if column.name != "id")
    again = f"INSERT INTO vote ({columns}) SELECT {columns} FROM vote WHERE true"
    commands.append(f"{again} ON CONFLICT (assignment, revision) DO UPDATE SET late = true")
    before = store.votes(project.id, latest=False), list(store.events())
    for command in commands:
        with pytest.raises(DatabaseError, match="append only"), store.database.write() as connection:
            connection.execute(text(command))
    assert (store.votes(project.id, latest=False), list(store.events())) == before and len(before[0]) == 1


def test_the_same_revision_of_an_assignment_cannot_be_written_twice(store: Store) -> None:
    """Whatever the code does: the database itself holds one vote for each key."""
    project = project_with(store, 2)
    [ann] = people(store, 1)
    judge(store, store.take(project.id, ann.id), ann.id)
    columns = ", ".join(column.name for column in VOTE.columns if column.name != "id")
    with pytest.raises(DatabaseError), store.database.write() as connection:
        connection.execute(text(f"INSERT INTO vote ({columns}) SELECT {columns} FROM vote"))
    assert len(store.votes(project.id, latest=False)) == 1


def test_fifty_threads_lose_and_double_nothing(store: Store) -> None:
    """Twenty-five people with two tabs each, all at once, each vote sent twice."""
    project = project_with(store, 40, votes_per_item=2)
    crowd = people(store, 25)
    receipts: list[str] = []
    faults: list[BaseException] = []

    def work(person: int) -> None:
        try:
            while shown := store.take(project.id, person):
                store.ahead(project.id, person)
                store.displayed(shown.assignment, person)
                for _ in range(2):
                    receipts.append(store.vote(shown.assignment, shown.revision, Verdict(choice="left"), person).status)
        except BaseException as fault:
            faults.append(fault)
            raise

    threads = [threading.Thread(target=work, args=(person.id,)) for person in crowd for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    votes = store.votes(project.id, latest=False)
    assert receipts.count("stored") == len(votes) == 80 and "refused" not in receipts
    assert len({(vote.annotator, vote.item) for vote in votes}) == 80
    assert Counter(vote.item for vote in votes) == {item.id: 2 for item in store.items(project.id)}
    assert not any(vote.late or vote.surplus for vote in votes)


def test_strings_that_no_database_holds_do_no_harm(store: Store) -> None:
    from mmalign.records import Comparison, Content

    strange, nul = "nul \0 and half a character \ud83d", "nul \0"
    project = store.create_project("project", "text", Protocol(min_dwell_ms=0))
    said = Comparison(id="row", prompt=Content(text=nul), candidates=(Content(text="a"), Content(text=nul)))
    assert store.add(project.id, [said]).added == 1
    assert "half of a character" in store.add(project.id, [replace(said, prompt=Content(text=strange))]).faults[0].problem
    assert next(iter(store.items(project.id))).comparison == said
    assert "the id" in store.add(project.id, [replace(said, id=strange)]).faults[0].problem
    ann = store.add_account("Ann", "correct horse battery")
    shown = store.take(project.id, ann.id)
    assert shown is not None and nul in [candidate.text for candidate in shown.candidates]
    for odd in (strange, "x" * 5000, ""):
        assert not store.displayed(odd, ann.id) and store.media(odd) is None and store.session(odd) is None
        assert store.vote(odd, 10**30, Verdict(choice=odd), ann.id).reason == "unknown"
        assert store.sign_in(odd, odd).status == "wrong" and store.sign_in("Ann", odd).status == "wrong"
    store.displayed(shown.assignment, ann.id)
    left = Verdict(choice="left", rationale=strange)
    assert store.vote(shown.assignment, 1, left, ann.id, dwell_ms=10**15, app_version=strange * 9).status == "stored"
    [vote] = store.votes(project.id)
    assert vote.verdict.rationale == strange and vote.dwell_ms == 2**31 - 1
    for fault in (lambda: store.set_guideline(project.id, strange), lambda: store.create_project(strange, "text")):
        with pytest.raises(UserError, match="NUL"):
            fault()
