"""Databases: those of older versions go on, those of newer ones and of others are refused, and a copy is whole."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from annotation_stores import Clock, judge, new_url, people, postgres, project_with, wait_until
from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.exc import DatabaseError

from mmalign.annotation.database import Database
from mmalign.annotation.migrations import MIGRATIONS, migrate
from mmalign.annotation.protocol import Verdict
from mmalign.annotation.schema import METADATA
from mmalign.annotation.store import Store
from mmalign.errors import UserError

FIXTURES = (new_url, postgres)
OLD = Path(__file__).parent / "golden"
# Of each version that was: what its votes say. In the second kind one was revised, and one was asked for by priorities.
VERSIONS = {
    "annotation_v1.sql": ["b", "skip"],
    "annotation_v2.sql": ["b", "skip", "tie"],
    "annotation_v1_postgresql.sql": ["b", "skip", "tie"],
}


def old_store(name: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """The address of a database as an older mmalign left it."""
    script = (OLD / name).read_text()
    if name.endswith("_postgresql.sql"):
        url: str = request.getfixturevalue("postgres").database()
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.exec_driver_sql(script)
        engine.dispose()
        return url
    with sqlite3.connect(folder / "old.db") as old:
        old.executescript(script)
    old.close()
    return str(folder / "old.db")


def structure(database: Database) -> dict[str, object]:
    """Columns, indexes and triggers of a database."""
    found: dict[str, object] = {}
    for table in METADATA.tables:
        reading = inspect(database.engine)
        columns = {c["name"]: (str(c["type"]), c["nullable"]) for c in reading.get_columns(table)}
        found[table] = columns, {i["name"] for i in reading.get_indexes(table)}
    triggers = (
        "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        if database.is_sqlite
        else "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal AND tgrelid IN ('vote'::regclass, 'event'::regclass)"
    )
    with database.read() as connection:
        found["triggers"] = set(connection.scalars(text(triggers)))
    return found


@pytest.mark.parametrize("name", VERSIONS)
def test_a_store_of_an_older_mmalign_is_brought_to_today_with_its_votes(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url, clock = old_store(name, request, tmp_path), Clock()
    store = Store.open(url, clock=clock)
    [project] = store.projects()
    assert [vote.choice for vote in store.votes(project.id)] == VERSIONS[name]
    fresh = Database(str(tmp_path / "fresh.db") if store.database.is_sqlite else request.getfixturevalue("postgres").database())
    migrate(fresh)
    assert structure(store.database) == structure(fresh)
    for table in ("vote", "event"):
        with pytest.raises(DatabaseError, match="append only"), store.database.write() as connection:
            connection.execute(text(f"DELETE FROM {table}"))
    ann = store.account("ann")
    assert ann is not None
    shown = store.take(project.id, ann.id)
    assert shown is not None and store.displayed(shown.assignment, ann.id)
    clock.now += 1
    assert store.vote(shown.assignment, 1, Verdict(choice="tie"), ann.id).status == "stored"
    assert migrate(store.database) == 3, "nothing is left to do"
    fresh.close()
    store.close()


def test_a_migration_that_fails_leaves_the_old_store_as_it_was(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    def fails(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE half_done (id INTEGER)"))
        raise OSError("no space left on device")

    for name in ("annotation_v1.sql", "annotation_v1_postgresql.sql"):
        database = Database(old_store(name, request, tmp_path))
        before = structure(database)
        with pytest.raises(OSError, match="no space"):
            migrate(database, (*MIGRATIONS[:1], fails))
        assert structure(database) == before and "half_done" not in inspect(database.engine).get_table_names()
        assert migrate(database) == 1
        database.close()


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


def test_a_server_of_the_tests_does_not_outlive_them(tmp_path: Path) -> None:
    """What is killed with -9 closes its pipes: then the keeper stops the server and removes its folder."""
    folder, stopped = tmp_path / "server", tmp_path / "stopped"
    folder.mkdir()
    child = (
        "import sys, pathlib; from annotation_stores import keeper_of; "
        "keeper_of(pathlib.Path(sys.argv[1]), ['touch', sys.argv[2]]); print('made', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", child, str(folder), str(stopped)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"made\n"
        assert folder.is_dir() and not stopped.exists()
        process.kill()
    wait_until(lambda: stopped.exists() and not folder.exists())
