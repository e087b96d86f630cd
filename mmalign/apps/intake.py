"""Data on their way into a project: read in a thread while judging has begun, known again when they come a second time."""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select

from mmalign.annotation.events import log
from mmalign.annotation.intake import CHUNK_ROWS, Added, Limits, Role
from mmalign.annotation.opening import open_data, rows_of
from mmalign.annotation.schema import EVENT
from mmalign.annotation.store import Store
from mmalign.apps.recognition import importer_of
from mmalign.config import Table
from mmalign.errors import UserError
from mmalign.records import MEDIA_SUFFIXES, Comparison, Fault

logger = logging.getLogger(__name__)

DONE = "intake"
SHOWN_FAULTS = 5
MOST_FILES = 200_000
DATA_SUFFIXES = (*MEDIA_SUFFIXES, ".txt", ".jsonl", ".json", ".parquet", ".arrow", ".tar", ".csv")
Rows = Iterator[Comparison | Fault]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows to be judged.

    Args:
        place: file or folder, or what else names them, for messages.
        role: ordinary, gold or calibration.
        open: reads them.
        limits: of rows.
        beside: further files or folders that are read.
    """

    place: str
    role: Role
    open: Callable[[], Rows]
    limits: Limits = field(default_factory=Limits)
    beside: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of names, sizes and times of the files, so that unchanged data need not be read again."""
        places = [Path(place).expanduser().resolve() for place in (self.place, *self.beside)]
        told = [[str(path), facts.st_size, facts.st_mtime_ns] for place in places for path, facts in _files(place)]
        return hashlib.sha256(json.dumps([self.place, self.role, told]).encode()).hexdigest()


def data_at(path: str, *, importer: str | None = None, role: Role = "ordinary", limits: Limits | None = None) -> Data:
    """Return the data at a path, in one of mmalign's own formats, as folders of images with prompts, or for an importer.

    Args:
        importer: None: told by the columns of the data, as `recognition` knows them. It passes over rows that are wrong.

    Raises:
        UserError: nothing is there (a hub id needs its importer), no such importer.
    """
    limits = limits or Limits()
    if importer is None:
        place = Path(path).expanduser()
        if not place.exists():
            raise UserError(f"{path}: got no such file or folder, want data to judge. Check the path, or name an importer.")
        importer = importer_of(place)
        if importer is None:
            return Data(place=path, role=role, open=lambda: open_data(path), limits=limits)
        logger.info("%s: read as %s, as its columns say; importer says otherwise", path, importer)
        path = str(place)
    choice = Table("mmalign.importers:IMPORTERS").choose(importer, path=path)
    told = choice.with_settings(faulty="drop") if "faulty" in choice.settings else choice
    return Data(place=path, role=role, open=lambda: rows_of(told.build()), limits=limits)


class Intake(threading.Thread):
    """Adds data to a project, one after the other, and tells how far it is.

    Args:
        store, project: where they go.
        data: in this order. What was added whole before, and is unchanged, is passed over.
    """

    def __init__(self, store: Store, project: int, data: list[Data]) -> None:
        """Nothing is read before `start`."""
        super().__init__(name="intake", daemon=True)
        self.store = store
        self.project = project
        self.data = data
        self.added = Added()
        self.num_read = 0
        self.fault: Exception | None = None
        self.usable = threading.Event()

    def run(self) -> None:
        """Add everything; what goes wrong is kept in `fault`, and logged."""
        try:
            for one in self.data:
                self._add(one)
        except UserError as fault:
            self.fault = fault
            if self.usable.is_set():  # else who waits in `begin` is told
                logger.error("%s", fault)
        except UnicodeEncodeError as fault:  # JSON may hold such escapes, no table can
            half = fault.object[fault.start : fault.end]
            self.fault = UserError(f"{self.data[0].place}: got {half!r}, half of a character, in a text. Take it out.")
        except Exception as fault:
            self.fault = fault
            logger.exception("the intake of %s was broken off", [one.place for one in self.data])
        finally:
            self.usable.set()

    @property
    def usable_rows(self) -> int:
        """How many of the rows that were read so far the project has now."""
        return self.added.added + self.added.repeated

    def begin(self, patience_s: float) -> None:
        """Start, and wait until something can be judged, or all is done, or patience ends.

        Raises:
            UserError: nothing was added, and why.
        """
        self.start()
        self.usable.wait(patience_s)
        if self.fault is not None and not self.usable_rows:
            raise self.fault

    def _add(self, data: Data) -> None:
        fingerprint = data.fingerprint
        if was_added(self.store, self.project, fingerprint):
            return
        added = self.store.add(self.project, self._counted(data.open()), source=data.place, role=data.role, limits=data.limits)
        self.added = self.added.plus(added)
        told = f"{data.place}: {added.added} new items ({data.role}), {added.repeated} known already"
        logger.info("%s", told)
        if added.num_faults:
            logger.warning("%s: %d rows not usable:", data.place, added.num_faults)
            for fault in added.faults[:SHOWN_FAULTS]:
                logger.warning("  %s", fault)
        if added.added + added.repeated == 0 and data.role == "ordinary":
            first = "\n".join(str(fault) for fault in added.faults[:SHOWN_FAULTS])
            raise UserError(f"{data.place}: got no usable row, want comparisons of 2 to 6 candidates.\n{first}".strip())
        with self.store.database.write() as connection:
            log(connection, time.time(), DONE, project=self.project, fingerprint=fingerprint)

    def _counted(self, rows: Rows) -> Rows:
        for row in rows:
            yield row
            self.num_read += 1
            if self.num_read > CHUNK_ROWS:  # the first chunk is in the store by now
                self.usable.set()


def was_added(store: Store, project: int, fingerprint: str) -> bool:
    """Return whether data of that fingerprint are in the project as a whole."""
    told = json.dumps({"fingerprint": fingerprint}, sort_keys=True)
    query = select(EVENT.c.id).where(EVENT.c.project == project, EVENT.c.kind == DONE, EVENT.c.details == told)
    with store.database.read() as connection:
        return connection.execute(query).first() is not None


def inside(path: str, roots: tuple[Path, ...] | None) -> Path:
    """Return a path with links followed, if it lies in one of the folders.

    Raises:
        UserError: it lies elsewhere.
    """
    place = Path(path).expanduser().resolve()
    if roots is not None and not any(place.is_relative_to(root.resolve()) for root in roots):
        allowed = ", ".join(map(str, roots)) or "what the server may read"
        raise UserError(f"{path}: lies outside of {allowed}. Upload it, or start the server with --roots FOLDER.")
    return place


def _files(place: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the data files of a folder, or the one, with their facts; of very many the first."""
    if place.is_file():
        yield place, place.stat()
        return
    names = (Path(folder) / name for folder, _, names in sorted(os.walk(place)) for name in sorted(names))
    found = (path for path in names if path.suffix.lower() in DATA_SUFFIXES)  # the store may lie in the same folder
    for number, file in enumerate(found):
        if number >= MOST_FILES:
            return
        yield file, file.stat()
