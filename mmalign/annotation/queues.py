"""Which item comes next for one person, found by index: nothing here walks over what is done.

Items with free slots are met twice at most: by their position, which a person's cursor passes once, and by the number that an
item gets whenever a slot of it is freed. So an item with a free slot that a person has not judged always lies ahead of one of
the two cursors.
"""

import random
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, bindparam, exists, select, text

from mmalign.annotation.protocol import Protocol
from mmalign.annotation.schema import ASSIGNMENT, ITEM

FREE = text("item.slots_left > 0")  # written out, or SQLite does not use the partial indexes
PRIORITISED = text("item.slots_left > 0 AND item.priority IS NOT NULL")
NOT_ORDINARY = text("item.role <> 'ordinary'")
LARGEST_SHUFFLE = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Next:
    """An item to hand out.

    Args:
        kind: random, active (for its priority, or as more people are wanted), gold, repeat, calibration.
        repeats: the assignment that is asked again.
        cursor, freed_cursor: where the person's cursors go.
    """

    item: int
    kind: str
    repeats: str | None = None
    cursor: int | None = None
    freed_cursor: int | None = None


def choose(connection: Connection, who: Any, protocol: Protocol, rng: random.Random) -> Next | None:
    """Draw what comes next: calibration first; then gold, repeats and ordinary items by the shares of the protocol.

    Args:
        who: the person's row of participation.

    Returns:
        None when there is nothing left for this person. Gold and repeats alone never keep a session going.
    """
    if who.calibration_taken < protocol.calibration and (known := _known(connection, who, "calibration", rng)):
        return known
    ordinary = _ordinary(connection, who, protocol, rng)
    if ordinary is None:
        return None
    drawn = rng.random()
    if drawn < protocol.gold_share:
        return _known(connection, who, "gold", rng) or ordinary
    if drawn < protocol.gold_share + protocol.repeat_share:
        return _repeat(connection, who, protocol, rng) or ordinary
    return ordinary


def _ordinary(connection: Connection, who: Any, protocol: Protocol, rng: random.Random) -> Next | None:
    person = {"project": who.project, "annotator": who.annotator}
    if rng.random() >= protocol.random_share:
        found = connection.execute(BY_PRIORITY, person).first()
        if found is not None:
            return Next(item=found.id, kind="active")
    found = connection.execute(BY_FREED, {**person, "after": who.freed_cursor}).first()
    if found is not None:
        return Next(item=found.id, kind="active" if found.steered else "random", freed_cursor=found.freed)
    found = connection.execute(BY_POSITION, {**person, "after": who.cursor}).first()
    if found is not None:
        return Next(item=found.id, kind="active" if found.steered else "random", cursor=found.position)
    return None


def _known(connection: Connection, who: Any, role: str, rng: random.Random) -> Next | None:
    """Return an item of known answer that the person has not met, from a random place on."""
    pivot = rng.randint(0, LARGEST_SHUFFLE)
    for query in KNOWN:
        told = {"project": who.project, "annotator": who.annotator, "role": role, "pivot": pivot}
        found = connection.execute(query, told).first()
        if found is not None:
            return Next(item=found.id, kind=role)
    return None


def _repeat(connection: Connection, who: Any, protocol: Protocol, rng: random.Random) -> Next | None:
    """Return one of the person's own judgements that lies far enough back and was not asked again, from a random place on."""
    latest = who.num_taken - protocol.repeat_gap + 1
    if latest < 1:
        return None
    pivot = rng.randint(1, latest)
    for query in JUDGED:
        told = {"project": who.project, "annotator": who.annotator, "latest": latest, "pivot": pivot}
        found = connection.execute(query, told).first()
        if found is not None:
            return Next(item=found.item, kind="repeat", repeats=found.id)
    return None


# The statements, made once: to build one costs more than to run it.
_MINE = and_(
    ASSIGNMENT.c.item == ITEM.c.id,
    ASSIGNMENT.c.annotator == bindparam("annotator"),
    ASSIGNMENT.c.repeats.is_(None),
    ASSIGNMENT.c.state.in_(("leased", "voted")),
)
_NOT_MINE = ~exists().where(_MINE)  # neither judged nor held
_FREE = select(ITEM.c.id, ITEM.c.position, ITEM.c.freed, ITEM.c.steered).where(
    ITEM.c.project == bindparam("project"), FREE, _NOT_MINE
)
BY_FREED = _FREE.where(ITEM.c.freed > bindparam("after")).order_by(ITEM.c.freed).limit(1)
BY_POSITION = _FREE.where(ITEM.c.position > bindparam("after")).order_by(ITEM.c.position).limit(1)
BY_PRIORITY = (
    select(ITEM.c.id)
    .where(ITEM.c.project == bindparam("project"), PRIORITISED, _NOT_MINE)
    .order_by(ITEM.c.priority.desc())
    .limit(1)
)
KNOWN = tuple(
    select(ITEM.c.id)
    .where(ITEM.c.project == bindparam("project"), NOT_ORDINARY, ITEM.c.role == bindparam("role"), _NOT_MINE, part)
    .order_by(ITEM.c.shuffle)
    .limit(1)
    for part in (ITEM.c.shuffle >= bindparam("pivot"), ITEM.c.shuffle < bindparam("pivot"))
)
_OLD = select(ASSIGNMENT.c.id, ASSIGNMENT.c.item).where(
    ASSIGNMENT.c.project == bindparam("project"),
    ASSIGNMENT.c.annotator == bindparam("annotator"),
    ASSIGNMENT.c.kind.in_(("random", "active")),
    ASSIGNMENT.c.state == "voted",
    ASSIGNMENT.c.holds,  # not skipped
    ~ASSIGNMENT.c.repeated,
    ASSIGNMENT.c.number <= bindparam("latest"),
)
JUDGED = (
    _OLD.where(ASSIGNMENT.c.number >= bindparam("pivot")).order_by(ASSIGNMENT.c.number).limit(1),
    _OLD.where(ASSIGNMENT.c.number < bindparam("pivot")).order_by(ASSIGNMENT.c.number.desc()).limit(1),
)
