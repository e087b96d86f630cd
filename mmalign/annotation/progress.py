"""Progress: how far a project is, and a person in it; all of it is counted as it happens, nothing is scanned."""

from dataclasses import dataclass

from sqlalchemy import Connection

from mmalign.annotation.leases import MINE
from mmalign.annotation.projects import project_row
from mmalign.annotation.protocol import Protocol


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a project is.

    Args:
        items: ordinary items.
        wanted: votes that they need in all.
        counted: votes that count for them: latest revisions, no skips, no gold, no repeats.
        mine: items that the person has judged, of all kinds, skips among them.
        calibration: items with feedback that come first; 0: none.
        calibration_done, calibration_right: of the person.
        guideline_version: the newest.
        guideline_read: the version that the person has read; None: none.
    """

    items: int
    wanted: int
    counted: int
    mine: int = 0
    calibration: int = 0
    calibration_done: int = 0
    calibration_right: int = 0
    guideline_version: int = 1
    guideline_read: int | None = None

    @property
    def share(self) -> float:
        """The share of the wanted votes that is there; 1 of nothing."""
        return min(1.0, self.counted / self.wanted) if self.wanted else 1.0


def read_progress(connection: Connection, project: int, annotator: int | None) -> Progress:
    """Return how far a project is, and a person in it."""
    row = project_row(connection, project)
    mine = {"of_project": project, "of_annotator": annotator}
    who = None if annotator is None else connection.execute(MINE, mine).first()
    return Progress(
        items=row.num_items,
        wanted=row.num_wanted,
        counted=row.num_counted,
        mine=0 if who is None else who.num_votes,
        calibration=Protocol.from_json(row.protocol).calibration,
        calibration_done=0 if who is None else who.calibration_done,
        calibration_right=0 if who is None else who.calibration_right,
        guideline_version=row.guideline_version,
        guideline_read=None if who is None else who.guideline_read,
    )
