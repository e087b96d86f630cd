"""The schema's versions: a database of an older mmalign is brought to today's when it is opened."""

import logging
import time
from collections.abc import Callable, Sequence

from sqlalchemy import Connection, inspect, select, text

from mmalign.annotation.database import Database
from mmalign.annotation.schema import METADATA, SCHEMA_VERSION
from mmalign.errors import UserError

logger = logging.getLogger(__name__)

APPEND_ONLY = ("vote", "event")
REFUSED = "votes and events are append only"


def _create(connection: Connection) -> None:
    """Make all tables as they are today, and triggers that refuse to change or delete what is append only."""
    METADATA.create_all(connection)
    if connection.dialect.name == "postgresql":
        connection.execute(
            text(
                "CREATE OR REPLACE FUNCTION mmalign_append_only() RETURNS trigger AS "
                f"$$ BEGIN RAISE EXCEPTION '{REFUSED}'; END $$ LANGUAGE plpgsql"
            )
        )
    for table in APPEND_ONLY:
        for action in ("UPDATE", "DELETE"):
            name = f"{table}_no_{action.lower()}"
            body = (
                f"BEGIN SELECT RAISE(ABORT, '{REFUSED}'); END"
                if connection.dialect.name == "sqlite"
                else "FOR EACH ROW EXECUTE FUNCTION mmalign_append_only()"
            )
            connection.execute(text(f"CREATE TRIGGER {name} BEFORE {action} ON {table} {body}"))
    _sealed(connection)


def _steered(connection: Connection) -> None:
    """Version 2: items tell whether a selection asked for them. Of old ones it is known where they were handed out so."""
    no = "0" if connection.dialect.name == "sqlite" else "false"
    yes = "1" if connection.dialect.name == "sqlite" else "true"
    connection.execute(text(f"ALTER TABLE item ADD COLUMN steered BOOLEAN DEFAULT {no} NOT NULL"))
    connection.execute(text(f"UPDATE item SET steered = {yes} WHERE id IN (SELECT item FROM assignment WHERE kind = 'active')"))


def _sealed(connection: Connection) -> None:
    """Version 3: what triggers on UPDATE and DELETE do not see is refused too: INSERT OR REPLACE of SQLite, TRUNCATE."""
    same = {"vote": "id = NEW.id OR (assignment = NEW.assignment AND revision = NEW.revision)", "event": "id = NEW.id"}
    for table in APPEND_ONLY:
        if connection.dialect.name == "sqlite":
            there = f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {same[table]})"
            refuse = f"{there} BEGIN SELECT RAISE(ABORT, '{REFUSED}'); END"
            connection.execute(text(f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} {refuse}"))
        else:
            refuse = "FOR EACH STATEMENT EXECUTE FUNCTION mmalign_append_only()"
            connection.execute(text(f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} {refuse}"))


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_steered, _sealed)
FIRST = 1


def migrate(database: Database, migrations: Sequence[Callable[[Connection], None]] = MIGRATIONS) -> int:
    """Bring a database to the newest version, all in one transaction, and return the version it had (0: it was empty).

    Args:
        migrations: the first one brings version 1 to 2.

    Raises:
        UserError: a newer mmalign made it, or it holds tables that are not ours.
    """
    with database.write() as connection:
        tables = set(inspect(connection).get_table_names())
        found = 0
        if "schema_version" in tables:
            found = max(connection.scalars(select(SCHEMA_VERSION.c.version)), default=0)
        elif tables & set(METADATA.tables):
            raise UserError("store: got a database with other tables in it, want an empty one or one of mmalign. Name another.")
        newest = FIRST + len(migrations)
        if found > newest:
            raise UserError(
                f"store: got a database of version {found}, this mmalign knows {newest}. Update mmalign to open it."
            )
        if not found:
            _create(connection)
        for number in range(found + 1, newest + 1) if found else (newest,):
            if found:
                migrations[number - FIRST - 1](connection)
                logger.info("the database of judgements was brought to version %d", number)
            connection.execute(SCHEMA_VERSION.insert().values(version=number, at=time.time()))
        return found
