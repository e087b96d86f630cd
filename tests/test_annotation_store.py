"""The store on SQLite and on PostgreSQL: what is handed out to whom, in which order, and for how long."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from annotation_stores import Clock, clock, judge, new_url, order_of, people, postgres, project_with, row_of, store, texts

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


def test_a_name_of_a_project_is_used_once(store: Store) -> None:
    made = store.create_project("one", "text")
    assert store.project_named("one") == made == store.project(made.id) and store.project_named("two") is None
    with pytest.raises(UserError, match="taken"):
        store.create_project("one", "text")
    with pytest.raises(UserError, match="image or text"):
        store.create_project("two", "sound")
    with pytest.raises(UserError, match="no project has"):
        store.project(77)
