"""The database of the judging sessions: SQLite or PostgreSQL by URL, and one writer at a time, first come, first served."""

import sqlite3
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import QueuePool

from mmalign.errors import UserError

BUSY_SECONDS = 30
CONNECTIONS = 16
WRITERS = 7_239_118_204  # the advisory lock of all writers of a PostgreSQL database


class FairLock:
    """A lock that is handed over in the order in which it was asked for, so that nobody starves."""

    def __init__(self) -> None:
        """Make a lock that nobody holds."""
        self._gate = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._held = False

    def __enter__(self) -> None:
        with self._gate:
            if not self._held:
                self._held = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        try:
            turn.wait()
        except BaseException:
            with self._gate:
                waits = turn in self._waiting
                if waits:
                    self._waiting.remove(turn)
            if not waits:
                self._hand_over()
            raise

    def __exit__(self, *fault: object) -> None:
        self._hand_over()

    def _hand_over(self) -> None:
        with self._gate:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._held = False


class Database:
    """Connections to one database. Reads run side by side; writes run one by one, each in a transaction of its own.

    Args:
        url: `sqlite:///judgements.db`, `postgresql://user@host/name`, or the path of an SQLite file.

    Raises:
        UserError: no such kind of database, its driver is missing, or it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        """Open the database."""
        self.url = _full_url(url)
        self._turn = FairLock()
        self.engine = _engine(self.url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._connect()

    def _connect(self) -> None:
        shown = make_url(self.url).render_as_string(hide_password=True)
        try:
            with self.engine.connect() as connection:
                connection.execute(text("SELECT 1"))
        except OperationalError as fault:
            raise UserError(
                f"{shown}: the database cannot be opened ({fault.orig}). Check the address and its rights."
            ) from fault

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[Connection]:
        """Open a transaction that may write; it is on disk when the block ends, and undone when it raises.

        Args:
            durable: False for what may be noted again: whole, but it may be lost when the power goes (never when the process
                is killed), and costs no wait for the disk.
        """
        options = {"mmalign_begins": "BEGIN IMMEDIATE", "mmalign_synchronous": "FULL" if durable else "NORMAL"}
        with self._turn, self.engine.connect().execution_options(**options) as connection, connection.begin():
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WRITERS})
                if not durable:
                    connection.execute(text("SET LOCAL synchronous_commit = off"))
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that sees one state of the database and changes nothing."""
        options: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    def backup(self, path: str | Path) -> None:
        """Copy an SQLite database while it is used.

        Raises:
            UserError: another database; it has tools of its own.
        """
        if not self.is_sqlite:
            raise UserError(f"backup: got a {self.engine.dialect.name} database, want SQLite. Use pg_dump.")
        source = self.engine.raw_connection()
        target = sqlite3.connect(path)
        try:
            assert isinstance(source.driver_connection, sqlite3.Connection)
            source.driver_connection.backup(target)
        finally:
            target.close()
            source.close()

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def is_storable(text: str) -> bool:
    """Return whether every database can hold a text: no NUL, no half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _full_url(url: str) -> str:
    if "://" not in url:
        return f"sqlite:///{Path(url).expanduser().absolute()}"
    return url.replace("postgres://", "postgresql://", 1).replace("postgresql://", "postgresql+psycopg://", 1)


def _engine(url: str) -> Engine:
    try:
        address = make_url(url)
        backend = address.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise UserError(f"store: got a {backend} database, want SQLite or PostgreSQL. Change the URL.")
        if backend == "sqlite" and not address.database:
            raise UserError("store: got an SQLite database without a file, want sqlite:///path. Name a file.")
        options: dict[str, Any] = {"poolclass": QueuePool, "pool_size": CONNECTIONS, "max_overflow": 64, "pool_timeout": 60}
        if backend == "sqlite":
            Path(str(address.database)).absolute().parent.mkdir(parents=True, exist_ok=True)
            options["connect_args"] = {"check_same_thread": False, "timeout": BUSY_SECONDS}
        else:
            options["pool_pre_ping"] = True
        engine = create_engine(address, **options)
    except (ArgumentError, NoSuchModuleError) as fault:
        raise UserError(
            f"store: got a URL that is none ({fault}), want sqlite:///path or postgresql://user@host/name."
        ) from fault
    except ModuleNotFoundError as fault:
        raise UserError("store: PostgreSQL needs psycopg. Install it: pip install 'mmalign[postgres]'.") from fault
    if backend == "sqlite":
        _tune(engine)
    return engine


def _tune(engine: Engine) -> None:
    """WAL, and every commit on disk before it is told (synchronous FULL); transactions begin as the caller says."""

    @event.listens_for(engine, "connect")
    def settings(connection: sqlite3.Connection, record: Any) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_SECONDS * 1000}"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        """Every request begins several: so without the driver's wrapping, and the level is only set where it changes."""
        options, driver = connection.get_execution_options(), connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        level = options.get("mmalign_synchronous")
        if level is not None and connection.info.get("synchronous", "FULL") != level:
            driver.execute(f"PRAGMA synchronous={level}").close()
            connection.info["synchronous"] = level
        driver.execute(options.get("mmalign_begins", "BEGIN")).close()
