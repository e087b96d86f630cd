"""Leases: what is handed out to whom, until when; the current item and one ahead, so that overlap is exact."""

import json
import random
import re
import secrets
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, text, update

from mmalign.annotation.events import log
from mmalign.annotation.protocol import Protocol
from mmalign.annotation.queues import Next, choose
from mmalign.annotation.schema import ASSIGNMENT, ITEM, PARTICIPATION, PROJECT
from mmalign.annotation.shown import Shown, show

LEASED = text("assignment.state = 'leased'")  # written out, or SQLite does not use the partial indexes
# Statements of every request, made once: to build one costs more than to run it.
OF_PERSON = (PARTICIPATION.c.project == bindparam("of_project"), PARTICIPATION.c.annotator == bindparam("of_annotator"))
MINE = select(PARTICIPATION).where(*OF_PERSON)
CHANGE_MINE = update(PARTICIPATION).where(*OF_PERSON)
ASSIGNED = select(ASSIGNMENT).where(ASSIGNMENT.c.id == bindparam("of_id"))
CHANGE_ASSIGNED = update(ASSIGNMENT).where(ASSIGNMENT.c.id == bindparam("of_id"))
HELD = select(ASSIGNMENT).where(ASSIGNMENT.c.annotator == bindparam("of_annotator"), LEASED)
LATE = (
    select(ASSIGNMENT)
    .where(ASSIGNMENT.c.project == bindparam("of_project"), LEASED, ASSIGNMENT.c.expires_at <= bindparam("now"))
    .order_by(ASSIGNMENT.c.id)
)
ONCE = text("assignment.repeats IS NULL")
BEFORE = select(ASSIGNMENT).where(
    ASSIGNMENT.c.item == bindparam("of_item"), ASSIGNMENT.c.annotator == bindparam("of_annotator"), ONCE
)
AGAIN = select(ASSIGNMENT).where(ASSIGNMENT.c.repeats == bindparam("of_repeats"))
NEW = insert(ASSIGNMENT)
CANDIDATES = select(ITEM.c.k).where(ITEM.c.id == bindparam("item"))
SLOTS = {
    is_freed: update(ITEM)
    .where(ITEM.c.id == bindparam("item"))
    .values(slots_left=ITEM.c.slots_left - bindparam("by"), **({"freed": bindparam("number")} if is_freed else {}))
    .returning(ITEM.c.slots_left)
    for is_freed in (False, True)
}
SLOTS_LEFT = select(ITEM.c.slots_left).where(ITEM.c.id == bindparam("item"))
KEY = re.compile(r"[A-Za-z0-9_-]{1,32}")  # what ids of assignments and keys of media look like
RENEWED = 0.9  # a lease that is asked for again with less than this share left is renewed


def participation(connection: Connection, project: int, annotator: int, now: float) -> Any:
    """Return the person's row in the project; the first time it is made."""
    mine = {"of_project": project, "of_annotator": annotator}
    found = connection.execute(MINE, mine).first()
    if found is None:
        freed = connection.execute(select(PROJECT.c.freed).where(PROJECT.c.id == project)).scalar_one()
        row = {"project": project, "annotator": annotator, "freed_cursor": freed, "started_at": now}
        connection.execute(insert(PARTICIPATION).values(**row))
        found = connection.execute(MINE, mine).one()
    return found


def change_participation(connection: Connection, who: Any, **changes: Any) -> None:
    """Change the person's row in the project."""
    connection.execute(CHANGE_MINE, {"of_project": who.project, "of_annotator": who.annotator, **changes})


def change_assignment(connection: Connection, assignment: str, **changes: Any) -> None:
    """Change an assignment's row."""
    connection.execute(CHANGE_ASSIGNED, {"of_id": assignment, **changes})


def hand_out(connection: Connection, project: Any, annotator: int, now: float, rng: random.Random, count: int) -> list[Shown]:
    """Return what the person judges now, and what next, up to `count`, leasing it if need be; fewer when nothing is left.

    What was reopened comes first; then what the person holds, oldest first. A lease that is asked for again is renewed. What
    was held too long should have been given back before (`expire`).

    Args:
        project: its row.
    """
    who = participation(connection, project.id, annotator, now)
    waiting = [*_reopened(connection, who), *open_leases(connection, project.id, annotator)]
    protocol = Protocol.from_json(project.protocol)
    while len(waiting) < count and project.is_open:
        chosen = choose(connection, who, protocol, rng)
        if chosen is None:
            break
        waiting.append(_lease(connection, project, who, chosen, now, rng))
        who = participation(connection, project.id, annotator, now)
    lasts = protocol.lease_minutes * 60
    rows = [_renewed(connection, row, now, lasts) for row in waiting[:count]]
    return [show(connection, row, project.guideline_version) for row in rows]


def pair_of(shown: list[Shown]) -> tuple[Shown | None, Shown | None]:
    """Return the current one and the one ahead, None where there is none."""
    return shown[0] if shown else None, shown[1] if len(shown) > 1 else None


def _renewed(connection: Connection, row: Any, now: float, lasts: float) -> Any:
    """Put off the end of a lease, unless it is far off (farther than it can be: the clock was set back); return its row."""
    if row.state != "leased" or RENEWED * lasts <= row.expires_at - now <= lasts:
        return row
    change_assignment(connection, row.id, expires_at=now + lasts)
    return assignment_row(connection, row.id)


def open_leases(connection: Connection, project: int, annotator: int) -> list[Any]:
    """Return what the person holds and has not judged, oldest first."""
    rows = connection.execute(HELD, {"of_annotator": annotator}).all()
    # Filtered and sorted here: asked to, SQLite walks over all that the person ever judged instead.
    return sorted((row for row in rows if row.project == project), key=lambda row: row.number)


def assignment_row(connection: Connection, assignment: str) -> Any:
    """Return an assignment's row; None where there is none, or the id cannot be one."""
    if not KEY.fullmatch(assignment):
        return None
    return connection.execute(ASSIGNED, {"of_id": assignment}).first()


def renew(connection: Connection, project: Any, annotator: int, now: float) -> float | None:
    """Put off the end of what the person holds; return it, or None when nothing is held."""
    expire(connection, project.id, now)
    expires = now + Protocol.from_json(project.protocol).lease_minutes * 60
    held = [row.id for row in open_leases(connection, project.id, annotator)]
    if not held:
        return None
    connection.execute(update(ASSIGNMENT).where(ASSIGNMENT.c.id.in_(held)).values(expires_at=expires))
    return expires


def release(connection: Connection, project: int, annotator: int, now: float) -> int:
    """Give back what the person holds and has not judged; return how many. The same person gets the same again, sides too."""
    held = open_leases(connection, project, annotator)
    for row in held:
        _end(connection, row, "released", now)
    return len(held)


def release_unseen(connection: Connection, project: int, now: float) -> int:
    """Give back what was handed out to anybody and has not been on a screen yet, opened again too; return how many leases."""
    ahead = (ASSIGNMENT.c.project == project, LEASED, ASSIGNMENT.c.displayed_at.is_(None))
    rows = connection.execute(select(ASSIGNMENT).where(*ahead).order_by(ASSIGNMENT.c.id)).all()
    for row in rows:
        _end(connection, row, "released", now)
    unseen = select(ASSIGNMENT.c.id).where(ASSIGNMENT.c.project == project, ASSIGNMENT.c.displayed_at.is_(None))
    opened = (PARTICIPATION.c.project == project, PARTICIPATION.c.reopened.in_(unseen))
    connection.execute(update(PARTICIPATION).where(*opened).values(reopened=None))
    return len(rows)


def expire(connection: Connection, project: int, now: float) -> int:
    """Give back all that was held too long; return how many."""
    rows = connection.execute(LATE, {"of_project": project, "now": now}).all()
    for row in rows:
        _end(connection, row, "expired", now)
    return len(rows)


def display(connection: Connection, assignment: str, annotator: int, now: float) -> bool:
    """Note when an assignment was first on the screen since it was handed out, images decoded. False: it is not noted.

    It is not, where the assignment is another person's, or the project was closed before it came on the screen.
    """
    row = assignment_row(connection, assignment)
    if row is None or row.annotator != annotator:
        known = None if row is None else row.id
        log(connection, now, "refused", annotator=annotator, assignment=known, reason="not_yours", of="displayed")
        return False
    if row.displayed_at is not None and (row.state != "leased" or row.displayed_at >= row.leased_at):
        return True
    is_open = connection.execute(select(PROJECT.c.is_open).where(PROJECT.c.id == row.project)).scalar_one()
    if row.displayed_at is None and not is_open:
        told = {"reason": "closed", "of": "displayed"}
        log(connection, now, "refused", project=row.project, annotator=annotator, assignment=row.id, **told)
        return False
    change_assignment(connection, row.id, displayed_at=now)
    log(connection, now, "displayed", project=row.project, annotator=annotator, assignment=assignment)
    return True


def clock_was_set_back(connection: Connection, row: Any, now: float) -> Any:
    """Return the row of an assignment that was on the screen later than now as if it were there since now, and note it."""
    if row.displayed_at is None or row.displayed_at <= now:
        return row
    change_assignment(connection, row.id, displayed_at=now)
    details = {"by_s": round(row.displayed_at - now, 3)}
    log(connection, now, "clock", project=row.project, annotator=row.annotator, assignment=row.id, **details)
    return assignment_row(connection, row.id)


def take_slot(connection: Connection, project: int, item: int, by: int) -> int:
    """Take slots of an item (a negative number frees some) and return how many are left.

    A freed slot gives the item a new number, so that it lies ahead of everybody's cursor again.
    """
    if by == 0:
        return int(connection.execute(SLOTS_LEFT, {"item": item}).scalar_one())
    freed = {"number": next_freed(connection, project)} if by < 0 else {}
    return int(connection.execute(SLOTS[by < 0], {"item": item, "by": by, **freed}).scalar_one())


def next_freed(connection: Connection, project: int, count: int = 1) -> int:
    """Reserve numbers of freed items and return the last of them."""
    step = update(PROJECT).where(PROJECT.c.id == project).values(freed=PROJECT.c.freed + count).returning(PROJECT.c.freed)
    return int(connection.execute(step).scalar_one())


def _reopened(connection: Connection, who: Any) -> tuple[Any, ...]:
    return () if who.reopened is None else (assignment_row(connection, who.reopened),)


def _lease(connection: Connection, project: Any, who: Any, chosen: Next, now: float, rng: random.Random) -> Any:
    """Hand an item out. Who held it before gets the same assignment again; else the order of its sides is drawn.

    What was on the person's screen before stays known as such: a vote on it may still be on its way.
    """
    if chosen.repeats is None:
        before = connection.execute(BEFORE, {"of_item": chosen.item, "of_annotator": who.annotator}).first()
    else:
        before = connection.execute(AGAIN, {"of_repeats": chosen.repeats}).first()
    holds = chosen.kind in ("random", "active")
    values: dict[str, Any] = {
        "state": "leased",
        "holds": holds,
        "number": who.num_taken + 1,
        "kind": chosen.kind,
        "guideline_version": project.guideline_version,
        "leased_at": now,
        "expires_at": now + Protocol.from_json(project.protocol).lease_minutes * 60,
    }
    if before is None:
        id = secrets.token_urlsafe(16)
        order = _order(connection, chosen, rng)
        fixed = {"id": id, "project": project.id, "item": chosen.item, "annotator": who.annotator, "repeats": chosen.repeats}
        connection.execute(NEW, {**fixed, "shown_order": json.dumps(order), **values})
    else:
        id = before.id
        change_assignment(connection, id, **values)
    if holds:
        take_slot(connection, project.id, chosen.item, 1)
    if chosen.kind == "active":
        connection.execute(update(ITEM).where(ITEM.c.id == chosen.item).values(steered=True))
    if chosen.repeats is not None:
        change_assignment(connection, chosen.repeats, repeated=True)
    cursors = {"cursor": chosen.cursor, "freed_cursor": chosen.freed_cursor}
    change_participation(
        connection,
        who,
        num_taken=who.num_taken + 1,
        calibration_taken=who.calibration_taken + (chosen.kind == "calibration"),
        **{name: value for name, value in cursors.items() if value is not None},
    )
    log(connection, now, "leased", project=project.id, annotator=who.annotator, assignment=id, item=chosen.item, of=chosen.kind)
    return assignment_row(connection, id)


def _order(connection: Connection, chosen: Next, rng: random.Random) -> list[int]:
    """Draw which candidate stands where; a repeat has the order that it had before the other way round."""
    if chosen.repeats is not None:
        earlier = connection.execute(select(ASSIGNMENT.c.shown_order).where(ASSIGNMENT.c.id == chosen.repeats)).scalar_one()
        turned: list[int] = json.loads(earlier)[::-1]
        return turned
    k = connection.execute(CANDIDATES, {"item": chosen.item}).scalar_one()
    return rng.sample(range(k), k)


def _end(connection: Connection, row: Any, state: str, now: float) -> None:
    """End a lease without a verdict."""
    change_assignment(connection, row.id, state=state, holds=False)
    if row.holds:
        take_slot(connection, row.project, row.item, -1)
    if row.repeats is not None:
        change_assignment(connection, row.repeats, repeated=False)
    if row.kind == "calibration":
        who = participation(connection, row.project, row.annotator, now)
        change_participation(connection, who, calibration_taken=who.calibration_taken - 1)
    log(connection, now, state, project=row.project, annotator=row.annotator, assignment=row.id)
