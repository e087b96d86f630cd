"""Stores for the tests of annotation: SQLite in a folder, and PostgreSQL where a server is there or can be started."""

import glob
import os
import pwd
import random
import shlex
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, make_url, text

from mmalign.annotation import accounts
from mmalign.annotation.accounts import Account
from mmalign.annotation.projects import Project
from mmalign.annotation.protocol import Protocol, Verdict
from mmalign.annotation.shown import Shown
from mmalign.annotation.store import Store
from mmalign.records import Comparison, Content

PLAIN = {"overlap_share": 0.0, "gold_share": 0.0, "repeat_share": 0.0, "min_dwell_ms": 0}
WAIT_S = 120  # of a machine that does other things


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Postgres:
    """A PostgreSQL server with a new schema, which looks like an empty database, for each that asks."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._count = 0

    def database(self) -> str:
        self._count += 1
        name = f"mmalign_test_{os.getpid()}_{self._count}"
        engine = create_engine(self.url)
        with engine.begin() as connection:
            connection.execute(text(f"CREATE SCHEMA {name}"))
        engine.dispose()
        address = make_url(self.url).update_query_dict({"options": f"-csearch_path={name}"})
        return address.render_as_string(hide_password=False)


def _someone() -> str | None:
    """A user that is not root, whom PostgreSQL may run as; None where we are not root ourselves."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    pytest.skip("POSTGRESQL IS NOT TESTED: it refuses to run as root, and there is no other user to run it as")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server named by MMALIGN_TEST_POSTGRES, or one of our own in a temporary folder."""
    if url := os.environ.get("MMALIGN_TEST_POSTGRES"):
        yield Postgres(url)
        return
    programs = sorted(glob.glob("/usr/lib/postgresql/*/bin")) or [str(Path(p).parent) for p in [shutil.which("initdb")] if p]
    if not programs:
        pytest.skip(
            "POSTGRESQL IS NOT TESTED: no server is installed (apt install postgresql), and MMALIGN_TEST_POSTGRES is empty"
        )
    user, bin = _someone(), programs[-1]
    folder = Path(tempfile.mkdtemp(prefix="mmalign-pg-", dir="/tmp"))
    if user is not None:
        shutil.chown(folder, user)

    def run(*command: str) -> None:
        as_user = [] if user is None else ["runuser", "-u", user, "--"]
        with open(folder.with_suffix(".log"), "ab") as log:
            subprocess.run([*as_user, *command], check=True, cwd="/tmp", stdout=log, stderr=log, timeout=2 * WAIT_S)

    settings = ("listen_addresses=''", f"unix_socket_directories={folder}", "fsync=off", "max_connections=200")
    options = " ".join(f"-c {setting}" for setting in settings)
    stop = [f"{bin}/pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "-t", "20", "stop"]
    keeper = keeper_of(folder, stop if user is None else ["runuser", "-u", user, "--", *stop])
    try:
        run(f"{bin}/initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "mmalign", "-E", "UTF8", "--locale=C", "--no-sync")
        run(f"{bin}/pg_ctl", "-D", f"{folder}/data", "-w", "-t", str(WAIT_S), "-o", options, "start")
        yield Postgres(f"postgresql+psycopg://mmalign@/postgres?host={folder}")
    except (subprocess.CalledProcessError, FileNotFoundError, subprocess.TimeoutExpired) as fault:
        pytest.skip(f"POSTGRESQL IS NOT TESTED: the server does not start ({fault}): {folder.with_suffix('.log').read_text()}")
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(WAIT_S)


def keeper_of(folder: Path, stop: list[str]) -> "subprocess.Popen[bytes]":
    """A process that stops a server and removes its folder as soon as its standard input ends: by us, or as we are killed."""
    command = f"cat >/dev/null; cd /tmp; {shlex.join(stop)}; rm -rf {shlex.quote(str(folder))} {shlex.quote(str(folder))}.log"
    quiet = subprocess.DEVNULL
    return subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes addresses of empty databases, of SQLite and then of PostgreSQL."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres").database
    numbers = iter(range(10_000))
    return lambda: f"sqlite:///{tmp_path}/store-{next(numbers)}.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(new_url: Callable[[], str], clock: Clock) -> Iterator[Store]:
    """An empty store on either database, whose chance is the same in every run."""
    store = opened(new_url(), clock=clock, rng=random.Random(0))
    yield store
    store.close()


def opened(url: str, **options: Any) -> Store:
    """A store whose SQLite never waits for the disk, as the PostgreSQL above: a busy one takes seconds for a commit."""
    store = Store.open(url, **options)
    if store.database.is_sqlite:
        store.database.engine.dispose()
        event.listen(store.database.engine, "connect", _hurry)
    return store


def _hurry(connection: sqlite3.Connection, *_: object) -> None:
    connection.execute("PRAGMA synchronous=OFF").close()
    connection.set_authorizer(_keep_hurrying)


def _keep_hurrying(action: int, name: str | None, value: str | None, *_: object) -> int:
    is_slower = action == sqlite3.SQLITE_PRAGMA and name == "synchronous" and value is not None
    return sqlite3.SQLITE_IGNORE if is_slower else sqlite3.SQLITE_OK


@pytest.fixture
def passwords_cost_little(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hash of one two-thousandth of the work: where many try, and what counts is who is let in."""
    monkeypatch.setitem(accounts.SCRYPT, "n", 16)
    accounts._nobody.cache_clear()
    yield
    accounts._nobody.cache_clear()


def texts(count: int, *, k: int = 2, start: int = 0) -> list[Comparison]:
    """Rows whose candidates say which row and place they are of: `3b` is the second of row 3."""
    return [
        Comparison(
            id=f"row-{n}",
            prompt=Content(text=f"question {n}"),
            candidates=tuple(Content(text=f"{n}{'abcdef'[place]}") for place in range(k)),
        )
        for n in range(start, start + count)
    ]


def project_with(store: Store, count: int, *, k: int = 2, name: str = "project", **settings: Any) -> Project:
    """A project of texts that has nothing but random pairs, unless settings say otherwise."""
    project = store.create_project(name, "text", Protocol(**{**PLAIN, **settings}))
    store.add(project.id, texts(count, k=k))
    return project


def people(store: Store, count: int) -> list[Account]:
    return [store.add_account(f"person {n}") for n in range(count)]


def order_of(shown: Shown) -> tuple[int, ...]:
    """Which candidate of the data stands at each place, told from what is on the screen."""
    return tuple("abcdef".index(str(candidate.text)[-1]) for candidate in shown.candidates)


def row_of(shown: Shown) -> str:
    return str(shown.prompt.text).replace("question ", "row-")


def judge(store: Store, shown: Shown, annotator: int, choice: str = "left", **said: Any) -> Any:
    """Look, and vote."""
    assert store.displayed(shown.assignment, annotator)
    return store.vote(shown.assignment, shown.revision, Verdict(choice=choice, **said), annotator)


def wait_until(true: Callable[[], bool], seconds: float = WAIT_S) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)
