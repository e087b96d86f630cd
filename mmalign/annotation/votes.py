"""Votes: append only, one a revision of an assignment; what is refused is told and logged, and nothing counts twice."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Integer, bindparam, insert, select, update

from mmalign.annotation.events import log
from mmalign.annotation.leases import (
    assignment_row,
    change_assignment,
    change_participation,
    clock_was_set_back,
    expire,
    hand_out,
    pair_of,
    participation,
    take_slot,
)
from mmalign.annotation.projects import project_row
from mmalign.annotation.protocol import Protocol, Verdict, agrees, as_shown, canonical, fault_of, ranks_of
from mmalign.annotation.schema import ANNOTATOR, ASSIGNMENT, ITEM, PROJECT, VOTE
from mmalign.annotation.shown import Shown, latest_verdict, show

PAGE = 1000
LONGEST_DWELL_MS = 2**31 - 1  # 24 days; what the column holds
LONGEST_VERSION = 40
NEW = insert(VOTE)
COUNTED = (
    update(PROJECT)
    .where(PROJECT.c.id == bindparam("number"))
    .values(num_counted=PROJECT.c.num_counted + bindparam("by", type_=Integer))
)
REASONS = {
    "unknown": "there is no such item on your screen; load the page again",
    "not_yours": "this item was shown to somebody else",
    "not_displayed": "this item has not been on your screen yet",
    "too_soon": "that was faster than anybody can look; please look first",
    "bad_verdict": "this is no answer to what is asked",
    "bad_revision": "this item is open with another revision; load the page again",
    "not_reopened": "this item was judged; undo it first to change the verdict",
    "answered": "the right answer of this item has been told",
    "closed": "the project was closed before this item was on your screen",
}


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What is told after a calibration item.

    Args:
        right: whether the verdict gives the known answer.
        expected: the known answer, as the screen showed the item.
        explanation: in words, or empty.
    """

    right: bool
    expected: Verdict
    explanation: str = ""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of a vote.

    Args:
        status: stored: it is on disk. duplicate: this revision of this assignment was stored before, and stays as it was.
        reason: why it was refused, a key of REASONS; empty otherwise.
        message: the same in words.
        late: its lease had ended; it counts all the same, and is marked.
        closed: the project was closed while this was on the screen; it counts all the same.
        wait_ms: after too_soon, how long to wait before it is sent again.
        stands: the verdict that stands for the assignment, as shown; None where there is none.
        feedback: after a calibration item.
        next, ahead: what `take` and `ahead` would give now; None when nothing is left, and after a refusal.
    """

    status: Literal["stored", "duplicate", "refused"]
    reason: str = ""
    message: str = ""
    late: bool = False
    closed: bool = False
    wait_ms: int = 0
    stands: Verdict | None = None
    feedback: Feedback | None = None
    next: Shown | None = None
    ahead: Shown | None = None


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One stored vote, in the order of the data.

    Args:
        item: number of the item in the store.
        comparison: id of the row in the data.
        annotator: name.
        kind: how the item was drawn: random, active, gold, repeat, calibration.
        verdict: canonical.
        shown: the verdict as it was given.
        order: which candidate stood at each place of the screen; (1, 0): b on the left.
        answer: the known answer of gold and calibration items, canonical: {"choice", "ranks"}.
        repeats: the assignment that was asked again.
        late: its lease had ended before.
        surplus: more people judged the item than were wanted, since a lease had ended before its vote came.
        dwell_ms: time on the screen as the browser measured it.
        leased_at, displayed_at, submitted_at: seconds since 1970, UTC.
        guideline_version: the one that the person had read; the newest where they have read none.
        is_latest: whether no later revision replaces it.
    """

    id: int
    project: int
    item: int
    comparison: str
    k: int
    assignment: str
    revision: int
    annotator: str
    kind: str
    verdict: Verdict
    shown: Verdict
    order: tuple[int, ...]
    answer: dict[str, Any] | None
    repeats: str | None
    late: bool
    surplus: bool
    dwell_ms: int | None
    leased_at: float
    displayed_at: float
    submitted_at: float
    guideline_version: int
    app_version: str
    is_latest: bool

    @property
    def choice(self) -> str:
        """The canonical choice: a, b, tie, both_bad, skip, ranks."""
        return self.verdict.choice

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """One rank a candidate of the data, a pair's too; None of both_bad and skip."""
        return ranks_of(self.verdict)

    @property
    def strength(self) -> int | None:
        """-3 to 3; positive: b is better."""
        return self.verdict.strength


@dataclass(frozen=True, kw_only=True)
class Cast:
    """A vote as it arrives: what was on the screen, and what was said of it."""

    assignment: str
    revision: int
    verdict: Verdict
    annotator: int
    dwell_ms: int | None = None
    app_version: str = ""


def cast(connection: Connection, vote: Cast, now: float, rng: random.Random) -> Receipt:
    """Store a vote, or say why not; the receipt names what is next. Sent again, it is a duplicate and changes nothing."""
    row = assignment_row(connection, vote.assignment)
    if row is None:
        return _refused(connection, vote, None, now, "unknown")
    if row.annotator != vote.annotator:
        return _refused(connection, vote, row, now, "not_yours")
    project = project_row(connection, row.project)
    if expire(connection, project.id, now):
        row = assignment_row(connection, vote.assignment)
    if 1 <= vote.revision <= row.revision:
        return _duplicate(connection, vote, row, project, now, rng)
    row = clock_was_set_back(connection, row, now)
    protocol = Protocol.from_json(project.protocol)
    reason, told = _objection(connection, vote, row, project, protocol, now)
    if reason:
        wait = max(1, round(protocol.min_dwell_ms - (now - row.displayed_at) * 1000)) if reason == "too_soon" else 0
        return _refused(connection, vote, row, now, reason, told, wait)
    late = row.state in ("expired", "released")
    given = canonical(vote.verdict, json.loads(row.shown_order))
    _store(connection, vote, row, project, given, late, now)
    feedback = _feedback(connection, row, given)
    if row.revision == 0:
        _count(connection, row, feedback, now)
    following, ahead = pair_of(hand_out(connection, project, vote.annotator, now, rng, 2))
    after: dict[str, Any] = {"stands": vote.verdict, "feedback": feedback, "next": following, "ahead": ahead}
    return Receipt(status="stored", late=late, closed=not project.is_open, **after)


def _objection(connection: Connection, vote: Cast, row: Any, project: Any, protocol: Protocol, now: float) -> tuple[str, str]:
    """Return why a vote is refused, and in words where there is more to say; empty when it is not.

    What was on a screen when its project was closed is taken, as what is late is: the work was done.
    """
    if vote.revision != row.revision + 1:
        return "bad_revision", ""
    if row.revision and participation(connection, project.id, vote.annotator, now).reopened != row.id:
        return "not_reopened", ""
    if row.displayed_at is None:
        return ("not_displayed" if project.is_open else "closed"), ""
    if (now - row.displayed_at) * 1000 < protocol.min_dwell_ms:
        return "too_soon", ""
    k = len(json.loads(row.shown_order))
    fault = fault_of(vote.verdict, protocol, k)
    return ("bad_verdict", fault) if fault else ("", "")


def _refused(
    connection: Connection, vote: Cast, row: Any, now: float, reason: str, told: str = "", wait_ms: int = 0
) -> Receipt:
    project, known = (None, None) if row is None else (row.project, row.id)
    details = {"reason": reason, "revision": vote.revision, "verdict": vote.verdict.to_json()}
    log(connection, now, "refused", project=project, annotator=vote.annotator, assignment=known, **details)
    message = f"{REASONS[reason]} ({told})" if told else REASONS[reason]
    return Receipt(status="refused", reason=reason, message=message, wait_ms=wait_ms)


def _duplicate(connection: Connection, vote: Cast, row: Any, project: Any, now: float, rng: random.Random) -> Receipt:
    stands = as_shown(latest_verdict(connection, row), json.loads(row.shown_order))
    details = {"revision": vote.revision, "verdict": vote.verdict.to_json()}
    log(connection, now, "duplicate", project=row.project, annotator=row.annotator, assignment=row.id, **details)
    feedback = _feedback(connection, row, latest_verdict(connection, row))
    following, ahead = pair_of(hand_out(connection, project, row.annotator, now, rng, 2))
    return Receipt(status="duplicate", stands=stands, feedback=feedback, next=following, ahead=ahead)


def _store(connection: Connection, vote: Cast, row: Any, project: Any, given: Verdict, late: bool, now: float) -> None:
    """Write the vote; the item's slot goes with whether it counts: a skip leaves it to others."""
    counts = row.kind in ("random", "active") and given.choice != "skip"
    left = take_slot(connection, project.id, row.item, counts - row.holds)
    who = participation(connection, project.id, vote.annotator, now)
    told = {
        "assignment": row.id,
        "revision": vote.revision,
        "project": project.id,
        "verdict": given.to_json(),
        "shown": vote.verdict.to_json(),
        "late": late,
        "surplus": counts and left < 0,
        "dwell_ms": None if vote.dwell_ms is None else min(max(vote.dwell_ms, 0), LONGEST_DWELL_MS),
        "displayed_at": row.displayed_at,
        "submitted_at": now,
        "guideline_version": who.guideline_read or project.guideline_version,
        "app_version": "".join(c for c in vote.app_version if c.isprintable())[:LONGEST_VERSION],
    }
    connection.execute(NEW, told)
    number = row.vote_number if row.revision else who.num_votes + 1
    change_assignment(connection, row.id, state="voted", holds=counts, revision=vote.revision, vote_number=number)
    if row.repeats is not None:
        change_assignment(connection, row.repeats, repeated=True)
    if who.reopened == row.id:
        change_participation(connection, who, reopened=None)
    counted = counts - (row.holds and row.state == "voted")
    if counted:
        connection.execute(COUNTED, {"number": project.id, "by": counted})
    details = {"revision": vote.revision, "late": late} | ({} if project.is_open else {"closed": True})
    log(connection, now, "voted", project=project.id, annotator=vote.annotator, assignment=row.id, **details)


def _count(connection: Connection, row: Any, feedback: Feedback | None, now: float) -> None:
    """Count a first vote for its person."""
    who = participation(connection, row.project, row.annotator, now)
    changes: dict[str, Any] = {"num_votes": who.num_votes + 1}
    if feedback is not None:
        right = who.calibration_right + feedback.right
        changes |= {"calibration_done": who.calibration_done + 1, "calibration_right": right}
        if row.state in ("expired", "released"):
            changes["calibration_taken"] = who.calibration_taken + 1
    change_participation(connection, who, **changes)


def _feedback(connection: Connection, row: Any, given: Verdict) -> Feedback | None:
    if row.kind != "calibration":
        return None
    item = connection.execute(select(ITEM.c.answer, ITEM.c.explanation).where(ITEM.c.id == row.item)).one()
    answer = json.loads(item.answer)
    ranks = answer.get("ranks")
    expected = Verdict(choice=answer["choice"], ranks=None if ranks is None else tuple(ranks))
    return Feedback(
        right=agrees(given, answer),
        expected=as_shown(expected, json.loads(row.shown_order)),
        explanation=item.explanation or "",
    )


def reopen(connection: Connection, project: Any, annotator: int, now: float, assignment: str | None = None) -> Shown | None:
    """Open a judgement again: a named one, or the one before the last; None when there is none.

    The verdict that was given stands until another is cast. Calibration items, whose answers were told, are passed over. In a
    closed project nothing is opened.
    """
    if not project.is_open:
        return None
    who = participation(connection, project.id, annotator, now)
    mine = select(ASSIGNMENT).where(
        ASSIGNMENT.c.project == project.id,
        ASSIGNMENT.c.annotator == annotator,
        ASSIGNMENT.c.revision > 0,
        ASSIGNMENT.c.kind != "calibration",
    )
    if assignment is not None:
        mine = mine.where(ASSIGNMENT.c.id == assignment)
    elif who.reopened is not None:
        mine = mine.where(ASSIGNMENT.c.vote_number < assignment_row(connection, who.reopened).vote_number)
    row = connection.execute(mine.order_by(ASSIGNMENT.c.vote_number.desc()).limit(1)).first()
    if row is None:
        return None
    change_assignment(connection, row.id, displayed_at=None)
    change_participation(connection, who, reopened=row.id)
    log(connection, now, "reopened", project=project.id, annotator=annotator, assignment=row.id, revision=row.revision)
    return show(connection, assignment_row(connection, row.id), project.guideline_version)


def keep(connection: Connection, project: Any, annotator: int, now: float) -> None:
    """Leave what was reopened as it was."""
    who = participation(connection, project.id, annotator, now)
    if who.reopened is not None:
        change_participation(connection, who, reopened=None)
        log(connection, now, "kept", project=project.id, annotator=annotator, assignment=who.reopened)


def read_votes(connection: Connection, project: int, *, latest: bool = True, after: int = 0) -> Iterator[Vote]:
    """Yield votes in the order they were cast, a page in memory at a time.

    Args:
        latest: only those that no later revision replaces.
        after: only those with a greater id.
    """
    columns = (
        VOTE,
        ASSIGNMENT.c.item,
        ASSIGNMENT.c.kind,
        ASSIGNMENT.c.shown_order,
        ASSIGNMENT.c.repeats,
        ASSIGNMENT.c.leased_at,
        ASSIGNMENT.c.revision.label("last"),
        ITEM.c.comparison,
        ITEM.c.k,
        ITEM.c.answer,
        ANNOTATOR.c.name,
    )
    joined = (
        VOTE.join(ASSIGNMENT, VOTE.c.assignment == ASSIGNMENT.c.id)
        .join(ITEM, ASSIGNMENT.c.item == ITEM.c.id)
        .join(ANNOTATOR, ASSIGNMENT.c.annotator == ANNOTATOR.c.id)
    )
    while True:
        query = select(*columns).select_from(joined).where(VOTE.c.project == project, VOTE.c.id > after)
        if latest:
            query = query.where(VOTE.c.revision == ASSIGNMENT.c.revision)
        rows = connection.execute(query.order_by(VOTE.c.id).limit(PAGE)).all()
        for row in rows:
            yield _vote(row)
        if len(rows) < PAGE:
            return
        after = rows[-1].id


def _vote(row: Any) -> Vote:
    return Vote(
        id=row.id,
        project=row.project,
        item=row.item,
        comparison=row.comparison,
        k=row.k,
        assignment=row.assignment,
        revision=row.revision,
        annotator=row.name,
        kind=row.kind,
        verdict=Verdict.from_json(row.verdict),
        shown=Verdict.from_json(row.shown),
        order=tuple(json.loads(row.shown_order)),
        answer=None if row.answer is None else json.loads(row.answer),
        repeats=row.repeats,
        late=row.late,
        surplus=row.surplus,
        dwell_ms=row.dwell_ms,
        leased_at=row.leased_at,
        displayed_at=row.displayed_at,
        submitted_at=row.submitted_at,
        guideline_version=row.guideline_version,
        app_version=row.app_version,
        is_latest=row.revision == row.last,
    )
