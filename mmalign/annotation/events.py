"""The event log: what happened in a judging session, in order, never changed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, select

from mmalign.annotation.schema import EVENT

PAGE = 1000
NEW = EVENT.insert()


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened.

    Args:
        at: seconds since 1970, UTC.
        kind: leased, displayed, voted, duplicate, refused, reopened, kept, released, expired, guideline, added, signed_in ...
        project, annotator: ids.
        assignment: what was on screen.
        details: the rest; never a password or a token.
    """

    id: int
    at: float
    kind: str
    project: int | None = None
    annotator: int | None = None
    assignment: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


def log(
    connection: Connection,
    at: float,
    kind: str,
    *,
    project: int | None = None,
    annotator: int | None = None,
    assignment: str | None = None,
    **details: Any,
) -> None:
    """Add an event, in the transaction of what it tells of."""
    connection.execute(
        NEW,
        {
            "at": at,
            "kind": kind,
            "project": project,
            "annotator": annotator,
            "assignment": assignment,
            "details": json.dumps(details, sort_keys=True),
        },
    )


def read_events(connection: Connection, project: int | None, after: int = 0) -> Iterator[Event]:
    """Yield events in order, a page in memory at a time.

    Args:
        project: of one project; None: of all, and those of accounts.
        after: only those with a greater id.
    """
    while True:
        query = select(EVENT).where(EVENT.c.id > after).order_by(EVENT.c.id).limit(PAGE)
        if project is not None:
            query = query.where(EVENT.c.project == project)
        rows = connection.execute(query).all()
        for row in rows:
            yield Event(**{**row._mapping, "details": json.loads(row.details)})
        if len(rows) < PAGE:
            return
        after = rows[-1].id
