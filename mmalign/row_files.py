"""What select, relabel and pairs share: rows of any importer in, a file of our rows and a report of how it came to be out."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.config import Choice, check_folder, resolved
from mmalign.config.writing import environment
from mmalign.errors import UserError
from mmalign.importers import Imported, comparisons
from mmalign.records import Comparison, Fault, check_target, comparison, outline_rows, told_faults, write
from mmalign.records.stamps import replace_file

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows that can be compared, without their media, and where each lies in the table.

    Args:
        table: all rows as they were imported.
        outlines: of the usable ones.
        places: of the usable ones in the table.
        faults: rows that could not be used, and why.
    """

    table: "datasets.Dataset"
    outlines: tuple[Comparison, ...]
    places: tuple[int, ...]
    faults: tuple[Fault, ...]

    def whole(self, number: int) -> Comparison:
        """A usable row with its media."""
        return comparison(self.table[self.places[number]])


@dataclass(frozen=True, kw_only=True)
class Curated:
    """What a verb made of rows, and where it lies.

    Args:
        made: what was made of them, in a word: `kept`, `relabelled rows`, `pairs`.
        files: what was written, with the number of rows; with a dry run what would be.
        report: beside the first of them.
        num_rows: usable rows read.
        dropped: rows left out, by reason.
        faults: rows that could not be used.
        told: sentences of the method.
        view: for training on the output.
        dry_run: nothing was written.
    """

    made: str
    files: dict[Path, int]
    report: Path
    num_rows: int
    dropped: Counter[str]
    faults: tuple[Fault, ...] = ()
    told: tuple[str, ...] = ()
    view: str = "pair"
    dry_run: bool = False

    @property
    def num_written(self) -> int:
        """Rows of all files."""
        return sum(self.files.values())

    def __str__(self) -> str:
        """Counts, reasons, faults with their rows, files, and what comes next."""
        lines = [f"{self.num_rows} rows: {self.num_written} {self.made}"]
        lines += [f"  {number} left out: {reason}" for reason, number in self.dropped.most_common()]
        lines += self.told
        if self.faults:
            lines.append(f"{len(self.faults)} rows not usable:")
            lines += [f"  {line}" for line in told_faults(self.faults)]
        if self.dry_run:
            return "\n".join([*lines, *(f"{path}: {count} rows, not written (dry run)" for path, count in self.files.items())])
        lines += [f"{path}: {count} rows" for path, count in self.files.items()]
        importer = f"data.importer.name=comparisons data.importer.path={next(iter(self.files))}"
        return "\n".join([*lines, f"next: mmalign train ... data.view={self.view} {importer}"])


def read_rows(path: str | None, data: Choice | None) -> Rows:
    """Read the rows that a config names.

    Args:
        path: comparisons in one of our own formats; or
        data: an importer with its settings, which may also say that faulty rows are left out.

    Raises:
        UserError: both or neither, no such data, no usable row.
    """
    if (path is None) == (data is None):
        raise UserError("data: got both or neither of path and data, want one. Give a path, or data.name=... .")
    imported: Imported = comparisons(path=str(path), faulty="drop") if data is None else data.build()
    faults = list(imported.faults)
    outlines, places = [], []
    for place, entry in enumerate(outline_rows(imported.dataset)):
        try:
            outlines.append(comparison(entry))
        except UserError as error:
            where = entry.get("where") or f"row {place + 1}"
            faults.append(Fault(where, str(error).removeprefix(f"{where}: ")))
        else:
            places.append(place)
    for fault in faults:
        logger.warning("%s", fault)
    if not outlines:
        raise UserError("\n".join(["data: got no usable row, want comparisons.", *told_faults(faults)]))
    return Rows(table=imported.dataset, outlines=tuple(outlines), places=tuple(places), faults=tuple(faults))


def check_output(output: str, sources: Iterable[str | None], verb: str) -> tuple[Path, Path]:
    """Output and report beside it, refused before anything is read if they cannot be written or would destroy the data.

    Raises:
        UserError: an ending of no format, an output inside the data or around it, a folder that is not ours.
    """
    target = Path(output).expanduser()
    report = target.with_name(f"{target.name}.{verb}.json")
    check_place(target, sources, replace=report.exists())
    return target, report


def check_place(target: Path, sources: Iterable[str | None], *, replace: bool) -> None:
    """As `check_output`, for one file of several.

    Args:
        target: what would be written.
        sources: what is read; places of this machine only count.
        replace: a folder that stands there may go: an earlier run made it.
    """
    for source in sources:
        place = Path(source).expanduser().resolve() if source else None
        if place is None or not place.exists():
            continue
        if target.resolve().is_relative_to(place) or place.is_relative_to(target.resolve()):
            raise UserError(f"output: got {target} for the data {place}, want a place outside the data. Name another output.")
    check_folder(target.parent)
    check_target(target, replace=replace)


def source_of(path: str | None, data: Choice | None) -> str | None:
    """The file or folder that a config reads, where it is one of this machine."""
    named = path if data is None else data.settings.get("path")
    return named if isinstance(named, str) else None


def write_rows(result: Curated, rows: dict[Path, Iterable[Comparison]], config: Any) -> None:
    """Write the report, then every file; each is whole or absent, and a killed run can be repeated.

    Raises:
        UserError: the format cannot hold a row.
    """
    replaces = result.report.exists()
    told = {
        "config": resolved(config),
        "num_rows": result.num_rows,
        "files": {str(path): count for path, count in result.files.items()},
        "dropped": dict(result.dropped),
        "told": list(result.told),
        "not_usable": [str(fault) for fault in result.faults],
        "environment": environment(),
    }
    result.report.parent.mkdir(parents=True, exist_ok=True)
    replace_file(result.report, (json.dumps(told, indent=2) + "\n").encode())
    for path, some in rows.items():
        write(some, path, replace=replaces)


def check_any(num_rows: int, dropped: Counter[str], faults: Sequence[Fault]) -> None:
    """Refuse to write nothing.

    Raises:
        UserError: every row was left out; the reasons are counted.
    """
    if not num_rows:
        counts = [*dropped.most_common(), *([("not usable", len(faults))] if faults else [])]
        reasons = [f"{reason}: {number}" for reason, number in counts]
        raise UserError(f"data: every row was left out ({', '.join(reasons)}), want at least one. Check data and settings.")
