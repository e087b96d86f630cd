"""Processes that are killed while they judge: what was acknowledged is there, what was not can be sent again, once."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from annotation_stores import Clock, clock, new_url, people, postgres, project_with, store
from sqlalchemy import event, text

from mmalign.annotation.protocol import Verdict
from mmalign.annotation.store import Store

FIXTURES = (clock, new_url, postgres, store)
WORKER = """
import os, signal, sys, time
from sqlalchemy import event
from mmalign.annotation.protocol import Verdict
from mmalign.annotation.store import Store

url, project, person, moment = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
store = Store.open(url, clock=lambda: 1_000_000.0)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
while shown := store.take(project, person):
    store.displayed(shown.assignment, person)
    print("sends", shown.assignment, flush=True)
    if moment == "before the commit":
        event.listen(store.database.engine, "commit", die)
    receipt = store.vote(shown.assignment, shown.revision, Verdict(choice="left"), person)
    if moment == "before the reply":
        die()
    print(receipt.status, shown.assignment, flush=True)
"""


def worker(url: str, project: int, person: int, moment: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WORKER, url, str(project), str(person), moment]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(
    ("moment", "there", "answer"), [("before the commit", 0, "stored"), ("before the reply", 1, "duplicate")]
)
def test_a_vote_whose_process_was_killed_can_be_sent_again(
    new_url: Callable[[], str], clock: Clock, moment: str, there: int, answer: str
) -> None:
    url = new_url()
    store = Store.open(url, clock=clock)
    project, [ann] = project_with(store, 5), people(store, 1)
    process = worker(url, project.id, ann.id, moment)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    [line] = out.splitlines()
    assignment = line.removeprefix("sends ")
    assert len(store.votes(project.id)) == there
    receipt = store.vote(assignment, 1, Verdict(choice="left"), ann.id)
    assert receipt.status == answer and receipt.next is not None and receipt.next.assignment != assignment
    assert [vote.assignment for vote in store.votes(project.id, latest=False)] == [assignment]
    store.close()


def test_processes_killed_at_any_moment_lose_and_double_nothing(new_url: Callable[[], str], clock: Clock) -> None:
    url = new_url()
    store = Store.open(url, clock=clock)
    project, crowd = project_with(store, 200, votes_per_item=2), people(store, 2)
    rng = random.Random(0)
    acknowledged: list[str] = []
    sent: list[str] = []
    for _ in range(2):
        processes = [worker(url, project.id, person.id, "never") for person in crowd]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
        time.sleep(rng.uniform(0.3, 0.8))
        for process in processes:
            process.kill()
        for process in processes:
            out, _ = process.communicate(timeout=60)
            words = [line.split() for line in out.splitlines() if len(line.split()) == 2]
            acknowledged += [assignment for status, assignment in words if status == "stored"]
            sent += [assignment for status, assignment in words if status == "sends"]
            assert "refused" not in {status for status, _ in words}
    votes = store.votes(project.id, latest=False)
    stored = [vote.assignment for vote in votes]
    assert len(acknowledged) > 3 and set(acknowledged) <= set(stored)
    assert len(set(stored)) == len(stored) <= len(set(acknowledged)) + 8
    assert len({(vote.annotator, vote.item) for vote in votes}) == len(votes)
    held = {item.id: item.want - item.slots_left for item in store.items(project.id, media=False)}
    for person in crowd:
        store.release(project.id, person.id)
    after = {item.id: item.want - item.slots_left for item in store.items(project.id, media=False)}
    assert sum(after.values()) == len(votes) <= sum(held.values()) <= len(votes) + 4
    store.close()


def test_a_fault_while_writing_leaves_nothing_behind(store: Store) -> None:
    """A disk that is full in the middle of a vote: all of it is undone, and the vote can be sent again."""
    project = project_with(store, 3)
    [ann] = people(store, 1)
    shown = store.take(project.id, ann.id)
    assert shown is not None and store.displayed(shown.assignment, ann.id)
    before = _tables(store)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    for name in ("INSERT INTO event", "INSERT INTO vote", "UPDATE assignment"):

        def fail_there(connection: object, cursor: object, statement: str, *_: object, name: str = name) -> None:
            if statement.startswith(name):
                fail()

        event.listen(store.database.engine, "before_cursor_execute", fail_there)
        with pytest.raises(OSError, match="no space"):
            store.vote(shown.assignment, 1, Verdict(choice="left"), ann.id)
        event.remove(store.database.engine, "before_cursor_execute", fail_there)
        assert _tables(store) == before
    assert store.vote(shown.assignment, 1, Verdict(choice="left"), ann.id).status == "stored"


def _tables(store: Store) -> dict[str, list[tuple[object, ...]]]:
    names = ("project", "item", "assignment", "participation", "vote", "event")
    with store.database.read() as connection:
        return {name: sorted(map(tuple, connection.execute(text(f"SELECT * FROM {name}"))), key=repr) for name in names}
