"""Projects: what is judged, by which protocol, and the versions of its instructions."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, update

from mmalign.annotation.database import is_storable
from mmalign.annotation.events import log
from mmalign.annotation.protocol import Protocol
from mmalign.annotation.schema import GUIDELINE, PROJECT
from mmalign.errors import UserError

ONE = select(PROJECT).where(PROJECT.c.id == bindparam("number"))


@dataclass(frozen=True, kw_only=True)
class Project:
    """A project.

    Args:
        kind: image or text.
        guideline_version: the newest.
        is_open: whether it hands out items and takes votes.
        created_at: seconds since 1970, UTC.
    """

    id: int
    name: str
    kind: str
    protocol: Protocol
    guideline_version: int
    is_open: bool
    created_at: float


@dataclass(frozen=True, kw_only=True)
class Guideline:
    """A version of the instructions, in Markdown."""

    version: int
    text: str
    created_at: float


def project_row(connection: Connection, project: int) -> Any:
    """Return a project's row.

    Raises:
        UserError: there is none.
    """
    row = connection.execute(ONE, {"number": project}).first()
    if row is None:
        raise UserError(f"project: got the number {project}, which no project has. Look at the list of projects.")
    return row


def project_of(row: Any) -> Project:
    """Return a row of the table as a Project."""
    return Project(
        id=row.id,
        name=row.name,
        kind=row.kind,
        protocol=Protocol.from_json(row.protocol),
        guideline_version=row.guideline_version,
        is_open=row.is_open,
        created_at=row.created_at,
    )


def write_guideline(connection: Connection, project: int, text: str, now: float) -> Guideline:
    """Write a version of the instructions, unless it is the newest already.

    Raises:
        UserError: no database can hold the text.
    """
    if not is_storable(text):
        raise UserError("guideline: got a text with NUL or half a character in it, want plain text. Save it as UTF-8.")
    version = project_row(connection, project).guideline_version
    which = (GUIDELINE.c.project == project, GUIDELINE.c.version == version)
    newest = connection.execute(select(GUIDELINE).where(*which)).first()
    if newest is not None and newest.text == text:
        return Guideline(version=version, text=text, created_at=newest.created_at)
    connection.execute(insert(GUIDELINE).values(project=project, version=version + 1, text=text, created_at=now))
    connection.execute(update(PROJECT).where(PROJECT.c.id == project).values(guideline_version=version + 1))
    log(connection, now, "guideline", project=project, of="written", version=version + 1)
    return Guideline(version=version + 1, text=text, created_at=now)
