"""What a vote costs does not grow with what was judged before: counted in steps of SQLite's machine, not in seconds."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from annotation_stores import Clock, project_with
from sqlalchemy import event

from mmalign.annotation.database import FairLock
from mmalign.annotation.protocol import Verdict
from mmalign.annotation.store import Store

STEPS = 10  # of the machine, each time it is counted


class Meter:
    """Counts the steps that SQLite takes in all connections of a store."""

    def __init__(self, store: Store) -> None:
        self.count = 0
        event.listen(store.database.engine, "checkout", self._watch)

    def _watch(self, connection: Any, *_: object) -> None:
        connection.set_progress_handler(self._step, STEPS)

    def _step(self) -> int:
        self.count += 1
        return 0

    def of(self, act: Callable[[], Any]) -> int:
        self.count = 0
        act()
        return self.count * STEPS


@pytest.mark.parametrize("settings", [{}, {"gold_share": 0.1, "repeat_share": 0.2, "repeat_gap": 5}])
def test_the_hundredth_vote_costs_no_more_than_the_third(tmp_path: Path, settings: dict[str, float]) -> None:
    """Every item wants another person too: a scan would walk over all that this person has judged."""
    store = Store.open(str(tmp_path / "store.db"), clock=Clock(), rng=random.Random(0))
    project = project_with(store, 200, votes_per_item=2, **settings)
    ann = store.add_account("Ann").id
    meter, costs = Meter(store), list[int]()
    shown = store.take(project.id, ann)

    def one() -> None:
        nonlocal shown
        assert shown is not None
        store.displayed(shown.assignment, ann)
        shown = store.vote(shown.assignment, shown.revision, Verdict(choice="left"), ann).next
        store.ahead(project.id, ann)

    for _ in range(100):
        costs.append(meter.of(one))
    early, late = sorted(costs[2:12])[5], sorted(costs[-10:])[5]
    assert early > 300 and late < 1.3 * early, "steps of an early vote and of a late one"
    store.release(project.id, ann)
    back = meter.of(lambda: store.take(project.id, ann))
    assert back < early
    store.close()


def test_who_has_judged_everything_is_told_so_without_a_search(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store.db"), clock=Clock(), rng=random.Random(0))
    project = project_with(store, 60, votes_per_item=2)
    ann = store.add_account("Ann").id
    meter = Meter(store)
    first = meter.of(lambda: store.take(project.id, ann))
    while shown := store.take(project.id, ann):
        store.displayed(shown.assignment, ann)
        store.vote(shown.assignment, 1, Verdict(choice="left"), ann)
    assert meter.of(lambda: store.take(project.id, ann)) < first
    store.close()


def test_votes_wait_for_the_disk_and_what_can_be_noted_again_does_not(tmp_path: Path) -> None:
    database = Store.open(str(tmp_path / "store.db")).database
    for durable, level in ((True, 2), (False, 1), (True, 2)):  # FULL, NORMAL
        with database.write(durable=durable) as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == level
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
    database.close()


def test_the_lock_of_writers_is_handed_over_in_the_order_of_asking() -> None:
    lock, order = FairLock(), list[int]()

    def ask(number: int) -> None:
        with lock:
            order.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    with lock:
        for number, thread in enumerate(threads):
            thread.start()
            while len(lock._waiting) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    with lock:
        order.append(20)
    assert order[-1] == 20
