"""The store on SQLite and on PostgreSQL: what is handed out to whom, which votes are taken, and what is counted."""

import json
import threading
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from annotation_stores import Clock, clock, judge, new_url, order_of, people, postgres, project_with, row_of, store, texts
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from mmalign.annotation.protocol import Protocol, Verdict
from mmalign.annotation.store import Store
from mmalign.errors import UserError

FIXTURES = (clock, new_url, postgres, store)


def test_the_same_item_with_the_same_sides_comes_until_it_is_judged(store: Store) -> None:
    project = project_with(store, 5)
    [ann] = people(store, 1)
    first = store.take(project.id, ann.id)
    assert first is not None
    assert [store.take(project.id, ann.id) for _ in range(3)] == [first] * 3
    ahead = store.ahead(project.id, ann.id)
    assert ahead is not None and ahead.assignment != first.assignment
    assert store.ahead(project.id, ann.id) == ahead
    receipt = judge(store, first, ann.id)
    assert receipt.status == "stored" and receipt.next == ahead == store.take(project.id, ann.id)


def test_everybody_sees_each_item_once_and_no_item_gets_more_votes_than_wanted(store: Store) -> None:
    project = project_with(store, 6, votes_per_item=2)
    crowd = people(store, 3)
    seen: dict[int, list[str]] = {person.id: [] for person in crowd}
    busy = {person.id for person in crowd}
    while busy:
        for person in crowd:
            shown = store.take(project.id, person.id)
            if shown is None:
                busy.discard(person.id)
                continue
            seen[person.id].append(row_of(shown))
            assert judge(store, shown, person.id).status == "stored"
    assert all(len(set(rows)) == len(rows) for rows in seen.values())
    assert Counter(row for rows in seen.values() for row in rows) == {f"row-{n}": 2 for n in range(6)}
    assert all(item.slots_left == 0 for item in store.items(project.id))
    progress = store.progress(project.id, crowd[0].id)
    assert (progress.items, progress.wanted, progress.counted, progress.mine) == (6, 12, 12, len(seen[crowd[0].id]))


def test_a_share_of_the_items_is_judged_by_more_people(store: Store) -> None:
    project = project_with(store, 160, overlap_share=0.25, overlap_votes=3)
    wanted = Counter(item.want for item in store.items(project.id, media=False))
    assert set(wanted) == {1, 3} and 20 < wanted[3] < 65
    assert store.progress(project.id).wanted == wanted[1] + 3 * wanted[3]


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


def test_a_lease_ends_and_its_item_goes_on_but_a_late_vote_is_kept_and_marked(store: Store, clock: Clock) -> None:
    project = project_with(store, 1, lease_minutes=10)
    ann, bob = people(store, 2)
    shown = store.take(project.id, ann.id)
    assert shown is not None
    store.displayed(shown.assignment, ann.id)
    clock.now += 599
    assert store.take(project.id, bob.id) is None
    clock.now += 2
    other = store.take(project.id, bob.id)
    assert other is not None and row_of(other) == row_of(shown)
    assert judge(store, other, bob.id).status == "stored"
    late = store.vote(shown.assignment, 1, Verdict(choice="right"), ann.id)
    assert late.status == "stored" and late.late
    votes = {vote.annotator: vote for vote in store.votes(project.id)}
    assert (votes["person 0"].late, votes["person 0"].surplus) == (True, True)
    assert (votes["person 1"].late, votes["person 1"].surplus) == (False, False)


def test_a_renewed_lease_lasts_and_what_is_given_back_comes_back_with_the_same_sides(store: Store, clock: Clock) -> None:
    project = project_with(store, 1, lease_minutes=10)
    ann, bob = people(store, 2)
    shown = store.take(project.id, ann.id)
    assert shown is not None
    clock.now += 500
    assert store.renew(project.id, ann.id) == clock.now + 600
    clock.now += 500
    assert store.take(project.id, bob.id) is None and store.expire(project.id) == 0
    assert store.release(project.id, ann.id) == 1 and store.renew(project.id, ann.id) is None
    again = store.take(project.id, ann.id)
    assert again is not None and (again.assignment, again.candidates) == (shown.assignment, shown.candidates)
    store.release(project.id, ann.id)
    assert store.take(project.id, bob.id) is not None
    assert store.take(project.id, ann.id) is None


def test_items_added_later_and_votes_wanted_later_reach_who_was_finished(store: Store) -> None:
    project = project_with(store, 2)
    ann, bob = people(store, 2)
    while shown := store.take(project.id, ann.id):
        judge(store, shown, ann.id)
    assert store.take(project.id, bob.id) is None
    added = store.add(project.id, texts(4))
    assert (added.added, added.repeated) == (2, 2)
    assert store.take(project.id, ann.id) is not None
    item = next(item for item in store.items(project.id) if item.comparison.id == "row-0")
    store.want(project.id, item.id, 2)
    rows = set()
    while shown := store.take(project.id, bob.id):
        rows.add(row_of(shown))
        judge(store, shown, bob.id)
    assert "row-0" in rows
    assert {vote.kind for vote in store.votes(project.id) if vote.comparison == "row-0" and vote.annotator == "person 1"} == {
        "active"
    }


def test_priorities_lead_but_a_random_share_is_drawn_without_them(store: Store) -> None:
    project = project_with(store, 80, random_share=0.3)
    [ann] = people(store, 1)
    ids = [item.id for item in store.items(project.id, media=False)]
    store.prioritise(project.id, {id: float(n) for n, id in enumerate(ids[:40])})
    for _ in range(40):
        judge(store, store.take(project.id, ann.id), ann.id)
    votes = store.votes(project.id)
    active = [vote.item for vote in votes if vote.kind == "active"]
    assert active == sorted(active, reverse=True) and set(active) <= set(ids[:40])
    assert 4 <= sum(vote.kind == "random" for vote in votes) <= 20
    with pytest.raises(UserError, match="no ordinary item"):
        store.prioritise(project.id, {10**6: 1.0})


def test_gold_is_mixed_in_silently_once_a_person_and_takes_no_slots(store: Store) -> None:
    project = project_with(store, 60, gold_share=0.2, votes_per_item=1)
    gold = [replace(row, id=f"gold-{row.id}", ranks=(2.0, 1.0)) for row in texts(10, start=1000)]
    assert store.add(project.id, gold, role="gold").added == 10
    assert store.add(project.id, texts(1, start=5000), role="gold").num_faults == 1
    ann, bob = people(store, 2)
    for person in (ann, bob):
        for _ in range(24):
            shown = store.take(project.id, person.id)
            assert shown is not None and not shown.calibration
            assert "answer" not in json.dumps(asdict(shown)) and "gold" not in json.dumps(asdict(shown))
            assert judge(store, shown, person.id).feedback is None
    golden = [vote for vote in store.votes(project.id) if vote.kind == "gold"]
    assert 3 <= len(golden) <= 20
    assert all(vote.answer == {"choice": "b", "ranks": None} for vote in golden)
    assert max(Counter((vote.annotator, vote.item) for vote in golden).values()) == 1
    assert store.progress(project.id).counted == 48 - len(golden)


def test_a_person_is_asked_again_later_with_the_sides_swapped(store: Store) -> None:
    project = project_with(store, 50, repeat_share=0.4, repeat_gap=10)
    [ann] = people(store, 1)
    for _ in range(40):
        shown = store.take(project.id, ann.id)
        assert shown is not None
        judge(store, shown, ann.id, "skip" if row_of(shown).endswith("7") else "left")
    votes = store.votes(project.id)
    by_assignment = {vote.assignment: (n, vote) for n, vote in enumerate(votes)}
    repeats = [(n, vote) for n, vote in enumerate(votes) if vote.kind == "repeat"]
    assert 4 <= len(repeats) <= 25
    assert len({vote.repeats for _, vote in repeats}) == len(repeats)
    for n, vote in repeats:
        before, original = by_assignment[str(vote.repeats)]
        assert n - before >= 10 and original.item == vote.item and original.choice != "skip"
        assert vote.order == original.order[::-1]
    assert store.progress(project.id).counted == sum(v.kind == "random" and v.choice != "skip" for v in votes)


def test_calibration_comes_first_and_tells_the_answer_as_the_screen_showed_it(store: Store) -> None:
    project = project_with(store, 5, calibration=3)
    known = [replace(row, ranks=(1.0, 2.0)) for row in texts(4, start=100)]
    store.add(project.id, known, role="calibration", explanations={row.id: f"because {row.id}" for row in known})
    [ann] = people(store, 1)
    shown = store.take(project.id, ann.id)
    right = 0
    for _ in range(3):
        assert shown is not None and shown.calibration
        receipt = judge(store, shown, ann.id, "left")
        good = "left" if order_of(shown)[0] == 0 else "right"
        assert receipt.feedback.expected.choice == good
        assert receipt.feedback.right == (good == "left")
        assert receipt.feedback.explanation == f"because {row_of(shown)}"
        right += receipt.feedback.right
        shown = receipt.next
    assert shown is not None and not shown.calibration
    progress = store.progress(project.id, ann.id)
    assert (progress.calibration, progress.calibration_done, progress.calibration_right) == (3, 3, right)
    assert store.undo(project.id, ann.id) is None


def test_what_is_shown_names_no_maker_no_file_and_no_score(store: Store, tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    from mmalign.records import Comparison, Content, Media, Message

    images = []
    for n, colour in enumerate(("red", "blue")):
        held = BytesIO()
        Image.new("RGB", (8, 6), colour).save(held, format="PNG")
        path = tmp_path / f"secretmodel_{n}.png"
        path.write_bytes(held.getvalue())
        images.append(Content(images=(Media(path=str(path)),)))
    row = Comparison(
        id="secretmodel-7",
        prompt=Content(
            messages=(Message(role="user", text="draw"), Message(role="assistant", text="how?", name="secretmodel"))
        ),
        candidates=tuple(images),
        scores={"secretmodel": (1.0, 2.0)},
        provenance=({"model": "secretmodel"}, {"model": "secretmodel2"}),
        where="secretmodel.jsonl:1",
    )
    project = store.create_project("images", "image", Protocol())
    assert store.add(project.id, [row]).added == 1
    [ann] = people(store, 1)
    shown = store.take(project.id, ann.id)
    assert shown is not None
    assert "secret" not in json.dumps(asdict(shown))
    assert [(p.mime, p.width, p.height) for p in shown.pictures()] == [("image/png", 8, 6)] * 2
    [item] = store.items(project.id)
    assert item.comparison == row


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
    project = project_with(store, 3)
    ann, bob = people(store, 2)
    shown = store.take(project.id, ann.id)
    given_back = store.take(project.id, bob.id)
    assert shown is not None and given_back is not None
    store.displayed(given_back.assignment, bob.id)
    store.release(project.id, bob.id)
    store.set_open(project.id, False)
    assert store.take(project.id, bob.id) is None
    assert store.vote(given_back.assignment, 1, Verdict(choice="left"), bob.id).reason == "closed"
    receipt = judge(store, shown, ann.id)
    assert (receipt.status, receipt.next) == ("stored", None)


def test_votes_and_events_cannot_be_changed_or_deleted(store: Store) -> None:
    project = project_with(store, 2)
    [ann] = people(store, 1)
    judge(store, store.take(project.id, ann.id), ann.id)
    for command in ("UPDATE vote SET late = late", "DELETE FROM vote", "UPDATE event SET at = 0", "DELETE FROM event"):
        with pytest.raises(DatabaseError, match="append only"), store.database.write() as connection:
            connection.execute(text(command))
    assert len(store.votes(project.id)) == 1


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

    strange = "nul \0 and half a character \ud83d"
    project = store.create_project("project", "text", Protocol(min_dwell_ms=0))
    said = Comparison(id="row", prompt=Content(text=strange), candidates=(Content(text="a"), Content(text=strange)))
    assert store.add(project.id, [said]).added == 1
    assert next(iter(store.items(project.id))).comparison == said
    assert "the id" in store.add(project.id, [replace(said, id=strange)]).faults[0].problem
    ann = store.add_account("Ann", "correct horse battery")
    shown = store.take(project.id, ann.id)
    assert shown is not None and strange in [candidate.text for candidate in shown.candidates]
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


def test_a_name_of_a_project_is_used_once(store: Store) -> None:
    made = store.create_project("one", "text")
    assert store.project_named("one") == made == store.project(made.id) and store.project_named("two") is None
    with pytest.raises(UserError, match="taken"):
        store.create_project("one", "text")
    with pytest.raises(UserError, match="image or text"):
        store.create_project("two", "sound")
    with pytest.raises(UserError, match="no project has"):
        store.project(77)
