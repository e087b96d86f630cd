"""The store: one database of judging sessions. Everything that an app, an export or a statistic needs goes through it.

Projects, items and accounts are named by their numbers, assignments and media by random keys. Every method is one transaction,
on disk when it returns; methods may be called from many threads.
"""

import random
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from sqlalchemy import insert, select, update

from mmalign.annotation import accounts, items, leases, media, progress, votes
from mmalign.annotation.accounts import Account, SignIn
from mmalign.annotation.database import Database, is_storable
from mmalign.annotation.events import Event, log, read_events
from mmalign.annotation.intake import Added, Limits, Prepared, Role, chunks, open_batch, prepare, store_rows
from mmalign.annotation.items import Item
from mmalign.annotation.media import MediaFile
from mmalign.annotation.migrations import migrate
from mmalign.annotation.progress import Progress
from mmalign.annotation.projects import Guideline, Project, project_of, project_row, write_guideline
from mmalign.annotation.protocol import KINDS, Protocol, Verdict
from mmalign.annotation.schema import GUIDELINE, PROJECT
from mmalign.annotation.shown import Shown
from mmalign.annotation.votes import Cast, Receipt, Vote
from mmalign.errors import UserError
from mmalign.records import Comparison, Fault

SESSION_HOURS = 24 * 14
LONGEST_NAME = 200


class Store:
    """Judging sessions in one database. Make it with `Store.open`."""

    def __init__(self, database: Database, *, clock: Callable[[], float], rng: random.Random) -> None:
        """Take an open database; see `open`."""
        self.database = database
        self._clock = clock
        self._rng = rng

    @classmethod
    def open(cls, url: str, *, clock: Callable[[], float] = time.time, rng: random.Random | None = None) -> "Store":
        """Open a database, making it or bringing it to today's version if need be.

        Args:
            url: `sqlite:///judgements.db`, the path of an SQLite file, or `postgresql://user@host/name`.
            clock: seconds since 1970, UTC.
            rng: where chance comes from; by default from the operating system, so that nobody can foretell the sides.

        Raises:
            UserError: the database cannot be opened, is not ours, or a newer mmalign made it.
        """
        database = Database(url)
        migrate(database)
        return cls(database, clock=clock, rng=rng or secrets.SystemRandom())

    def close(self) -> None:
        """Close every connection."""
        self.database.close()

    def backup(self, path: str | Path) -> None:
        """Copy an SQLite store to a file while it is used."""
        self.database.backup(path)

    # Projects

    def create_project(self, name: str, kind: str, protocol: Protocol | None = None) -> Project:
        """Make a project.

        Args:
            kind: image or text: what the candidates are.

        Raises:
            UserError: the name is taken, or no such kind.
        """
        if kind not in KINDS or not name.strip():
            raise UserError(f"project: got the name {name!r} and the kind {kind!r}, want a name, and {' or '.join(KINDS)}.")
        if len(name) > LONGEST_NAME or not is_storable(name):
            raise UserError(f"project: got the name {name[:LONGEST_NAME]!r}, want at most {LONGEST_NAME} characters, none NUL.")
        settings, now = protocol or Protocol(), self._clock()
        with self.database.write() as connection:
            if connection.execute(select(PROJECT.c.id).where(PROJECT.c.name == name)).first():
                raise UserError(f"project {name}: the name is taken. Choose another, or open that project.")
            values = {"name": name, "kind": kind, "protocol": settings.to_json(), "guideline_version": 0, "is_open": True}
            rest = {"salt": secrets.token_hex(16), "created_at": now}
            id = connection.execute(insert(PROJECT).values(**values, **rest).returning(PROJECT.c.id)).scalar_one()
            write_guideline(connection, id, settings.guideline, now)
            log(connection, now, "project", project=id, of="created")
            return project_of(project_row(connection, id))

    def project(self, project: int) -> Project:
        """Return a project by its number.

        Raises:
            UserError: there is none.
        """
        with self.database.read() as connection:
            return project_of(project_row(connection, project))

    def project_named(self, name: str) -> Project | None:
        """Return a project by its name; None when there is none."""
        with self.database.read() as connection:
            row = connection.execute(select(PROJECT).where(PROJECT.c.name == name)).first()
            return None if row is None else project_of(row)

    def projects(self) -> list[Project]:
        """Return all projects, oldest first."""
        with self.database.read() as connection:
            return [project_of(row) for row in connection.execute(select(PROJECT).order_by(PROJECT.c.id))]

    def set_open(self, project: int, is_open: bool) -> None:
        """Open a project for judging, or close it: nothing is handed out or opened again.

        What is on a screen then can still be judged, and counts; what was only fetched ahead is given back.
        """
        with self.database.write() as connection:
            if not is_open:
                leases.release_unseen(connection, project, self._clock())
            connection.execute(update(PROJECT).where(PROJECT.c.id == project).values(is_open=is_open))
            log(connection, self._clock(), "project", project=project, of="opened" if is_open else "closed")

    def guideline(self, project: int, version: int | None = None) -> Guideline:
        """Return the instructions, the newest or a version.

        Raises:
            UserError: there is no such version.
        """
        with self.database.read() as connection:
            newest = project_row(connection, project).guideline_version
            which = (GUIDELINE.c.project == project, GUIDELINE.c.version == (newest if version is None else version))
            row = connection.execute(select(GUIDELINE).where(*which)).first()
        if row is None:
            raise UserError(f"guideline: got version {version}, want one up to {newest}.")
        return Guideline(version=row.version, text=row.text, created_at=row.created_at)

    def set_guideline(self, project: int, text: str) -> Guideline:
        """Write a new version of the instructions; later votes carry its number. The same text again is no new version."""
        with self.database.write() as connection:
            return write_guideline(connection, project, text, self._clock())

    def guideline_read(self, project: int, annotator: int, version: int) -> None:
        """Note that a person has read a version of the instructions."""
        with self.database.write() as connection:
            who = leases.participation(connection, project, annotator, self._clock())
            leases.change_participation(connection, who, guideline_read=version)
            log(connection, self._clock(), "guideline", project=project, annotator=annotator, of="read", version=version)

    # Items

    def add(
        self,
        project: int,
        comparisons: Iterable[Comparison | Fault],
        *,
        source: str = "",
        role: Role = "ordinary",
        limits: Limits | None = None,
        explanations: Mapping[str, str] | None = None,
    ) -> Added:
        """Add rows as items, two hundred in a transaction: judging can begin with the first, and a killed intake be repeated.

        Args:
            comparisons: rows, and faults of rows found on the way; read once, in order.
            source: where they come from, for the log.
            role: ordinary; gold: the row's own ranks or prob are the answer, told to nobody; calibration: told after the vote.
            explanations: id of the row -> why its answer is right, for calibration.
        """
        given = self.project(project)
        with self.database.write() as connection:
            origin, batch = open_batch(connection, project, source, self._clock())
        total, start, known = Added(), 0, explanations or {}
        for chunk in chunks(comparisons):
            allowed = limits or Limits()
            made = [
                c
                if isinstance(c, Fault)
                else prepare(c, kind=given.kind, role=role, limits=allowed, explanation=known.get(c.id))
                for c in chunk
            ]
            rows = [one for one in made if isinstance(one, Prepared)]
            faults = tuple(one for one in made if isinstance(one, Fault))
            with self.database.write() as connection:
                row = project_row(connection, project)
                added = store_rows(connection, row, rows, role=role, source=origin, batch=batch, start=start)
                log(connection, self._clock(), "added", project=project, added=added.added, role=role, faults=len(faults))
            total = total.plus(added).plus(Added(num_faults=len(faults), faults=faults))
            start += len(chunk)
        return total

    def items(self, project: int, *, media: bool = True) -> Iterator[Item]:
        """Yield all items with their comparisons as they were added, in that order, a page in memory at a time.

        Args:
            media: with paths or bytes of images; False: images stand for themselves and cannot be opened.
        """
        return items.read_items(self.database, project, media=media)

    def prioritise(self, project: int, priorities: Mapping[int, float]) -> None:
        """Set which items are handed out first (largest number first), in place of all earlier priorities.

        Meant for up to a few thousand items that a selection asks for; the protocol's random_share is drawn without them.
        """
        with self.database.write() as connection:
            items.prioritise(connection, project, priorities)
            log(connection, self._clock(), "prioritised", project=project, items=len(priorities))

    def want(self, project: int, item: int, votes: int) -> None:
        """Set how many people judge an item: more where the first ones disagree.

        Raises:
            UserError: no such ordinary item.
        """
        with self.database.write() as connection:
            items.want(connection, project, item, votes)
            log(connection, self._clock(), "wanted", project=project, item=item, votes=votes)

    def media(self, key: str) -> MediaFile | None:
        """Return the bytes that a browser gets for a key, texts inside them left out; None when there is no such key.

        Raises:
            UserError: the file is gone or was changed since it was added.
        """
        with self.database.read() as connection:
            found = media.find(connection, key)
        return None if found is None else media.serve(found)

    # Judging

    def take(self, project: int, annotator: int) -> Shown | None:
        """Return what the person judges now: the same until it is voted on, released or expired. None: nothing is left."""
        return self._current(project, annotator, 0)

    def ahead(self, project: int, annotator: int) -> Shown | None:
        """Return what comes after that, for prefetching, and hold it for the person."""
        return self._current(project, annotator, 1)

    def take_both(self, project: int, annotator: int) -> tuple[Shown | None, Shown | None]:
        """Return what `take` and `ahead` do, in one transaction: what a page asks for after every vote."""
        with self.database.write() as connection:
            row, now = project_row(connection, project), self._clock()
            leases.expire(connection, project, now)
            found = leases.hand_out(connection, row, annotator, now, self._rng, 2)
        return leases.pair_of(found)

    def _current(self, project: int, annotator: int, place: int) -> Shown | None:
        with self.database.write() as connection:
            row, now = project_row(connection, project), self._clock()
            leases.expire(connection, project, now)
            found = leases.hand_out(connection, row, annotator, now, self._rng, place + 1)
        return found[place] if len(found) > place else None

    def displayed(self, assignment: str, annotator: int) -> bool:
        """Note that an assignment is on the person's screen; a vote before that is refused. False: not theirs."""
        with self.database.write(durable=False) as connection:
            return leases.display(connection, assignment, annotator, self._clock())

    def vote(
        self,
        assignment: str,
        revision: int,
        verdict: Verdict,
        annotator: int,
        *,
        dwell_ms: int | None = None,
        app_version: str = "",
    ) -> Receipt:
        """Store a vote on what was on the screen. Sent again, it is answered as a duplicate; nothing is lost or counted twice.

        Args:
            assignment, revision: of the Shown that was judged.
            verdict: as shown.
            dwell_ms: time on the screen as the browser measured it.
            app_version: of the app that sent it.
        """
        vote = Cast(
            assignment=assignment,
            revision=revision,
            verdict=verdict,
            annotator=annotator,
            dwell_ms=dwell_ms,
            app_version=app_version,
        )
        with self.database.write() as connection:
            return votes.cast(connection, vote, self._clock(), self._rng)

    def undo(self, project: int, annotator: int, assignment: str | None = None) -> Shown | None:
        """Open the last judgement again (called again: the one before), or a named one; None when there is none.

        What `Shown.earlier` tells stands until another verdict is cast. `take` returns the same until then, or until `keep`.
        """
        with self.database.write() as connection:
            return votes.reopen(connection, project_row(connection, project), annotator, self._clock(), assignment)

    def keep(self, project: int, annotator: int) -> None:
        """Close what `undo` opened and let it stand."""
        with self.database.write() as connection:
            votes.keep(connection, project_row(connection, project), annotator, self._clock())

    def renew(self, project: int, annotator: int) -> float | None:
        """Put off the end of what the person holds and return it (seconds since 1970); None when nothing is held."""
        with self.database.write(durable=False) as connection:
            return leases.renew(connection, project_row(connection, project), annotator, self._clock())

    def release(self, project: int, annotator: int) -> int:
        """Give back what the person holds, as when the page is left; return how many."""
        with self.database.write() as connection:
            return leases.release(connection, project, annotator, self._clock())

    def expire(self, project: int) -> int:
        """Give back what anybody held too long, as every other method does before it hands out; return how many."""
        with self.database.write() as connection:
            return leases.expire(connection, project, self._clock())

    # What came of it

    def progress(self, project: int, annotator: int | None = None) -> Progress:
        """Return how far a project is, and a person in it."""
        with self.database.read() as connection:
            return progress.read_progress(connection, project, annotator)

    def votes(self, project: int, *, latest: bool = True) -> list[Vote]:
        """Return the votes in the order they were cast, canonical.

        Args:
            latest: only the last revision of each; False: all that was ever cast.
        """
        return list(self.each_vote(project, latest=latest))

    def each_vote(self, project: int, *, latest: bool = True, after: int = 0) -> Iterator[Vote]:
        """Yield votes as `votes`, a page in memory at a time.

        Args:
            after: only those with a greater id.
        """
        with self.database.read() as connection:
            yield from votes.read_votes(connection, project, latest=latest, after=after)

    def events(self, project: int | None = None, *, after: int = 0) -> Iterator[Event]:
        """Yield the event log of a project, or of everything, in order.

        Args:
            after: only those with a greater id.
        """
        with self.database.read() as connection:
            yield from read_events(connection, project, after)

    # People

    def add_account(self, name: str, password: str | None = None, role: accounts.Role = "annotator") -> Account:
        """Add a person; without a password nobody can sign in as them (a session on one's own machine).

        Raises:
            UserError: the name is taken or none, the password too short, no such role.
        """
        with self.database.write() as connection:
            return accounts.add(connection, name, password, role, self._clock())

    def change_account(
        self, account: int, *, password: str | None = None, role: accounts.Role | None = None, active: bool | None = None
    ) -> Account:
        """Change a person's password, role, or whether the account is open.

        A new password and a closed account end all sessions of the person.
        """
        with self.database.write() as connection:
            return accounts.change(connection, account, self._clock(), password=password, role=role, active=active)

    def account(self, name: str) -> Account | None:
        """Return a person by name; capitals do not count."""
        with self.database.read() as connection:
            return accounts.by_name(connection, name)

    def accounts(self) -> list[Account]:
        """Return everybody, by name."""
        with self.database.read() as connection:
            return accounts.everybody(connection)

    def sign_in(self, name: str, password: str, *, address: str = "", hours: float = SESSION_HOURS) -> SignIn:
        """Check a password and open a session; who fails often has to wait, by name and by address.

        Args:
            address: where the browser is.
            hours: how long the session lasts.
        """
        return accounts.sign_in(self.database, name, password, address, self._clock(), hours * 3600)

    def open_session(self, account: int, *, hours: float = SESSION_HOURS) -> str:
        """Open a session without a password (on one's own machine) and return its token."""
        with self.database.write() as connection:
            return accounts.open_session(connection, account, self._clock(), hours * 3600)

    def session(self, token: str) -> Account | None:
        """Return whose session a token is; None when it ended, never was, or the account is closed."""
        return accounts.session(self.database, token, self._clock())

    def sign_out(self, token: str) -> None:
        """End a session."""
        with self.database.write() as connection:
            accounts.close_session(connection, token)
