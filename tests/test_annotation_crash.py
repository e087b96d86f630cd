"""Processes that are killed while they judge: what was acknowledged is there, what was not can be sent again, once."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from annotation_stores import Clock, clock, new_url, opened, people, postgres, project_with, store, wait_until
from sqlalchemy import event, text

from mmalign.annotation.protocol import Verdict
from mmalign.annotation.store import Store

FIXTURES = (clock, new_url, postgres, store)
WORKER = """
import os, signal, sys, time
from annotation_stores import opened
from sqlalchemy import event
from mmalign.annotation.protocol import Verdict

url, project, person, moment = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
store = opened(url, clock=lambda: 1_000_000.0)
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


def worker(url: str, project: int, person: int, moment: str, told: Path) -> "subprocess.Popen[bytes]":
    """A process that judges, and writes to a file what it sends and what is acknowledged."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WORKER, url, str(project), str(person), moment]
    with told.open("wb") as file:
        return subprocess.Popen(command, stdout=file, env=environment)


@pytest.mark.parametrize(
    ("moment", "there", "answer"), [("before the commit", 0, "stored"), ("before the reply", 1, "duplicate")]
)
def test_a_vote_whose_process_was_killed_can_be_sent_again(
    new_url: Callable[[], str], clock: Clock, tmp_path: Path, moment: str, there: int, answer: str
) -> None:
    url = new_url()
    store = opened(url, clock=clock)
    project, [ann] = project_with(store, 5), people(store, 1)
    process = worker(url, project.id, ann.id, moment, tmp_path / "told")
    assert process.wait() == -signal.SIGKILL
    [line] = (tmp_path / "told").read_text().splitlines()
    assignment = line.removeprefix("sends ")
    assert len(store.votes(project.id)) == there
    receipt = store.vote(assignment, 1, Verdict(choice="left"), ann.id)
    assert receipt.status == answer and receipt.next is not None and receipt.next.assignment != assignment
    assert [vote.assignment for vote in store.votes(project.id, latest=False)] == [assignment]
    store.close()


def test_processes_killed_at_any_moment_lose_and_double_nothing(
    new_url: Callable[[], str], clock: Clock, tmp_path: Path
) -> None:
    url = new_url()
    store = opened(url, clock=clock)
    project, crowd = project_with(store, 200, votes_per_item=2), people(store, 2)
    rng = random.Random(0)
    acknowledged: list[str] = []
    for turn in range(2):
        files = [tmp_path / f"{turn}-{person.id}" for person in crowd]
        processes = [worker(url, project.id, p.id, "never", file) for p, file in zip(crowd, files, strict=True)]
        both = list(zip(processes, files, strict=True))  # one may have judged all there is by now
        wait_until(lambda both=both: all(p.poll() is not None or b"stored" in file.read_bytes() for p, file in both))
        time.sleep(rng.uniform(0.1, 0.4))
        for process in processes:
            process.kill()
        for process, file in both:
            process.wait()
            words = [line.split() for line in file.read_text().splitlines()]
            acknowledged += [word[1] for word in words if word[0] == "stored" and len(word) == 2 and len(word[1]) == 22]
            assert "refused" not in {word[0] for word in words}
    votes = store.votes(project.id, latest=False)
    stored = [vote.assignment for vote in votes]
    assert len(acknowledged) > 3 and set(acknowledged) <= set(stored)
    assert len(set(stored)) == len(stored) <= len(set(acknowledged)) + 4, "one a killed process may not have been told"
    assert len({(vote.annotator, vote.item) for vote in votes}) == len(votes)
    held = {item.id: item.want - item.slots_left for item in store.items(project.id, media=False)}
    for person in crowd:
        store.release(project.id, person.id)
    after = {item.id: item.want - item.slots_left for item in store.items(project.id, media=False)}
    assert sum(after.values()) == len(votes) <= sum(held.values()) <= len(votes) + 4
    store.close()


def test_processes_at_once_overlap_exactly_as_wanted(new_url: Callable[[], str], tmp_path: Path) -> None:
    url = new_url()
    store = opened(url)
    project, crowd = project_with(store, 24, overlap_share=0.3, overlap_votes=3, votes_per_item=2), people(store, 4)
    files = [tmp_path / str(person.id) for person in crowd]
    processes = [worker(url, project.id, p.id, "never", file) for p, file in zip(crowd, files, strict=True)]
    assert [process.wait() for process in processes] == [0] * 4
    votes = store.votes(project.id, latest=False)
    wanted = {item.id: item.want for item in store.items(project.id, media=False)}
    assert Counter(vote.item for vote in votes) == wanted and set(wanted.values()) == {2, 3}
    assert len({(vote.annotator, vote.item) for vote in votes}) == len(votes) and not any(vote.surplus for vote in votes)
    told = [line for file in files for line in file.read_text().splitlines() if line.startswith("stored")]
    assert len(told) == len(votes) == store.progress(project.id).counted
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
