"""Items as they were added: the comparison of the data, what is known of it, and how many people are to judge it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, update

from mmalign.annotation.database import Database
from mmalign.annotation.intake import replaced
from mmalign.annotation.leases import take_slot
from mmalign.annotation.schema import BLOB, ITEM, MEDIA, PROJECT
from mmalign.errors import UserError
from mmalign.records import Comparison, comparison

PAGE = 200


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of a project.

    Args:
        comparison: the row as it was added, in the order of the data.
        role: ordinary, gold, calibration.
        answer: the known answer of gold and calibration items, canonical: {"choice", "ranks"}.
        want: how many people are to judge it.
        slots_left: how many of them are still to be found.
    """

    id: int
    comparison: Comparison
    role: str
    answer: dict[str, Any] | None
    want: int
    slots_left: int


def read_items(database: Database, project: int, *, media: bool) -> Iterator[Item]:
    """Yield items in the order they were added; each page is a transaction of its own."""
    after = 0
    while True:
        with database.read() as connection:
            query = select(ITEM).where(ITEM.c.project == project, ITEM.c.id > after).order_by(ITEM.c.id).limit(PAGE)
            rows = connection.execute(query).all()
            entries = _entries(connection, [row.row for row in rows], media=media)
        for row, entry in zip(rows, entries, strict=True):
            yield Item(
                id=row.id,
                comparison=comparison(entry),
                role=row.role,
                answer=None if row.answer is None else json.loads(row.answer),
                want=row.want,
                slots_left=row.slots_left,
            )
        if len(rows) < PAGE:
            return
        after = rows[-1].id


def _entries(connection: Connection, rows: list[str], *, media: bool) -> list[dict[str, Any]]:
    """Return rows of the table schema, with the paths or the bytes of their media."""
    keys: set[str] = set()

    def note(entry: Mapping[str, Any]) -> dict[str, Any]:
        keys.add(entry["key"])
        return {"key": entry["key"]}

    read = [replaced(json.loads(row), {"key"}, note) for row in rows]
    found: dict[str, dict[str, Any]] = {}
    if keys and media:
        paths = connection.execute(select(MEDIA.c.key, MEDIA.c.path).where(MEDIA.c.key.in_(keys)))
        found = {row.key: {"bytes": None, "path": row.path} for row in paths}
        blobs = connection.execute(select(BLOB).where(BLOB.c.media.in_(keys)))
        found |= {row.media: {"bytes": bytes(row.data), "path": None} for row in blobs}
    unread = {"bytes": None, "path": None}
    return [replaced(row, {"key"}, lambda entry: found.get(entry["key"], unread)) for row in read]


def prioritise(connection: Connection, project: int, priorities: Mapping[int, float]) -> None:
    """Replace all priorities of a project."""
    held = (ITEM.c.project == project, ITEM.c.priority.is_not(None))
    connection.execute(update(ITEM).where(*held).values(priority=None))
    for item, priority in priorities.items():
        which = (ITEM.c.project == project, ITEM.c.id == item, ITEM.c.role == "ordinary")
        if connection.execute(update(ITEM).where(*which).values(priority=priority)).rowcount != 1:
            raise UserError(f"priorities: got the item {item}, which is no ordinary item of the project. Leave it out.")


def want(connection: Connection, project: int, item: int, votes: int) -> None:
    """Set how many people judge an item."""
    which = (ITEM.c.project == project, ITEM.c.id == item, ITEM.c.role == "ordinary")
    row = connection.execute(select(ITEM.c.want).where(*which)).first()
    if row is None or votes < 1:
        raise UserError(f"want: got {votes} votes for the item {item}, want at least 1 for an ordinary item of the project.")
    take_slot(connection, project, item, row.want - votes)
    connection.execute(update(ITEM).where(ITEM.c.id == item).values(want=votes, steered=True))
    wanted = PROJECT.c.num_wanted + votes - row.want
    connection.execute(update(PROJECT).where(PROJECT.c.id == project).values(num_wanted=wanted))
