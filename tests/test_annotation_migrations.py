"""Databases: those of older versions go on, those of newer ones and of others are refused, and a copy is whole."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from annotation_stores import Clock, judge, new_url, people, postgres, project_with
from sqlalchemy import inspect, text

from mmalign.annotation.database import Database
from mmalign.annotation.migrations import migrate
from mmalign.annotation.protocol import Verdict
from mmalign.annotation.schema import METADATA
from mmalign.annotation.store import Store
from mmalign.errors import UserError

FIXTURES = (new_url, postgres)
OLD = Path(__file__).parent / "golden" / "annotation_v1.sql"


def test_a_store_of_an_older_mmalign_is_brought_to_today_with_its_votes(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as old:
        old.executescript(OLD.read_text())
    old.close()
    clock = Clock()
    store = Store.open(str(path), clock=clock)
    [project] = store.projects()
    assert [vote.choice for vote in store.votes(project.id)] == ["b", "skip"]
    fresh = Database(str(tmp_path / "fresh.db"))
    migrate(fresh)
    for table in METADATA.tables:
        columns = [{c["name"]: str(c["type"]) for c in inspect(d.engine).get_columns(table)} for d in (store.database, fresh)]
        indexes = [{i["name"] for i in inspect(d.engine).get_indexes(table)} for d in (store.database, fresh)]
        assert columns[0] == columns[1] and indexes[0] == indexes[1]
    ann = store.account("ann")
    assert ann is not None
    shown = store.take(project.id, ann.id)
    assert shown is not None and store.displayed(shown.assignment, ann.id)
    clock.now += 1
    assert store.vote(shown.assignment, 1, Verdict(choice="tie"), ann.id).status == "stored"
    fresh.close()
    store.close()


def test_a_store_of_a_newer_mmalign_or_of_something_else_is_refused(new_url: Callable[[], str]) -> None:
    url = new_url()
    Store.open(url).close()
    database = Database(url)
    with database.write() as connection:
        connection.execute(text("INSERT INTO schema_version (version, at) VALUES (99, 0)"))
    with pytest.raises(UserError, match="version 99"):
        migrate(database)
    database.close()
    other = Database(new_url())
    with other.write() as connection:
        connection.execute(text("CREATE TABLE project (id INTEGER)"))
    with pytest.raises(UserError, match="want an empty one"):
        migrate(other)
    other.close()


def test_addresses_that_are_none_are_told(tmp_path: Path) -> None:
    for url in ("mysql://there/db", "sqlite://", "nonsense://x"):
        with pytest.raises(UserError, match="store: got"):
            Database(url)
    with pytest.raises(UserError, match="cannot be opened") as told:
        Database("postgresql://ann:secretword@127.0.0.1:1/nowhere")
    assert "secretword" not in str(told.value)


def test_a_backup_is_a_store_of_its_own(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "a.db"))
    project = project_with(store, 3)
    [ann] = people(store, 1)
    judge(store, store.take(project.id, ann.id), ann.id)
    store.backup(tmp_path / "b.db")
    judge(store, store.take(project.id, ann.id), ann.id)
    copy = Store.open(str(tmp_path / "b.db"))
    assert (len(copy.votes(project.id)), len(store.votes(project.id))) == (1, 2)
    copy.close()
    store.close()
