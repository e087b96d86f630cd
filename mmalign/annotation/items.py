"""Items as they were added: the comparison of the data, what is known of it, and how many people are to judge it."""

import hashlib
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
from mmalign.records import Comparison, Media, comparison

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
        files: of media that lie outside the database: path, sha256 as it was added; only where media were asked for.
    """

    id: int
    comparison: Comparison
    role: str
    answer: dict[str, Any] | None
    want: int
    slots_left: int
    files: tuple[tuple[str, str], ...] = ()

    def is_intact(self) -> bool:
        """Read its files and return whether they are there, and are what was judged."""
        return all(_hash_of(path) == sha256 for path, sha256 in self.files)


def _hash_of(path: str) -> str | None:
    try:
        return hashlib.sha256(Media(path=path).read()).hexdigest()
    except UserError:
        return None


def read_items(database: Database, project: int, *, media: bool) -> Iterator[Item]:
    """Yield items in the order they were added; each page is a transaction of its own."""
    after = 0
    while True:
        with database.read() as connection:
            query = select(ITEM).where(ITEM.c.project == project, ITEM.c.id > after).order_by(ITEM.c.id).limit(PAGE)
            rows = connection.execute(query).all()
            entries = _entries(connection, [row.row for row in rows], media=media)
        for row, (entry, files) in zip(rows, entries, strict=True):
            yield Item(
                id=row.id,
                comparison=comparison(entry),
                role=row.role,
                answer=None if row.answer is None else json.loads(row.answer),
                want=row.want,
                slots_left=row.slots_left,
                files=files,
            )
        if len(rows) < PAGE:
            return
        after = rows[-1].id


def _entries(
    connection: Connection, rows: list[str], *, media: bool
) -> list[tuple[dict[str, Any], tuple[tuple[str, str], ...]]]:
    """Return rows of the table schema, with the paths or the bytes of their media, and the files at those paths."""
    read = [json.loads(row) for row in rows]
    keys = [set(_keys(row)) if media else set[str]() for row in read]
    wanted = set[str]().union(*keys)
    found: dict[str, dict[str, Any]] = {}
    files: dict[str, tuple[str, str]] = {}
    if wanted:
        for row in connection.execute(select(MEDIA.c.key, MEDIA.c.path, MEDIA.c.sha256).where(MEDIA.c.key.in_(wanted))):
            found[row.key] = {"bytes": None, "path": row.path}
            if row.path is not None:
                files[row.key] = row.path, row.sha256
        for blob in connection.execute(select(BLOB).where(BLOB.c.media.in_(wanted))):
            found[blob.media] = {"bytes": bytes(blob.data), "path": None}
            files.pop(blob.media, None)
    unread = {"bytes": None, "path": None}
    return [
        (
            replaced(row, {"key"}, lambda entry: found.get(entry["key"], unread)),
            tuple(files[k] for k in sorted(own) if k in files),
        )
        for row, own in zip(read, keys, strict=True)
    ]


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if set(value) == {"key"}:
            yield value["key"]
        else:
            yield from (key for one in value.values() for key in _keys(one))
    elif isinstance(value, list):
        yield from (key for one in value for key in _keys(one))


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
