"""Foreign tables of texts: every row becomes comparisons when it is read, after all rows were checked once."""

import glob
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import UserError
from mmalign.importers.tables import Faulty, Imported, check_columns, finish, json_list, local_path, open_table, row_place
from mmalign.records import (
    PHI,
    Comparison,
    Conversion,
    Dropped,
    Fault,
    collect,
    faults_of,
    preference_scores,
    raise_faults,
    to_row,
)

if TYPE_CHECKING:
    import datasets

Outcome = Comparison | tuple[Comparison, ...] | Dropped
Convert = Callable[[Mapping[str, Any]], Outcome]
Admit = Callable[[Mapping[str, Any]], str | None]
# Columns that stand beside the foreign ones while a table is in use: a line of JSON, the number of the row, which of its
# comparisons.
LINE, ROW, PART = "mmalign_line", "mmalign_row", "mmalign_part"
LINES = (".jsonl", ".jsonl.gz")


def open_rows(path: str, split: str, folder: str | None = None, subset: str | None = None) -> "datasets.Dataset":
    """Open a foreign table as `open_table` does; rows of local JSON and JSONL files stay lines, whatever their types.

    So a broken line is one faulty row, and rows need not have one schema.

    Raises:
        UserError: there is none, it cannot be read, or it has no such split.
    """
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetsError

    path = local_path(path)
    place = Path(path)
    if place.is_file() and not place.stat().st_size:
        raise UserError(f"{path}: got an empty file, want rows. Check what wrote it.")
    if place.is_file() and place.name.endswith(LINES):
        try:
            table = load_dataset("text", data_files=glob.escape(path), split="train")
        except (OSError, ValueError, DatasetsError) as fault:
            raise UserError(f"{path}: cannot be read ({fault.__cause__ or fault}). Give a JSONL file in UTF-8.") from fault
        return table.rename_column("text", LINE)
    if place.is_file() and place.suffix == ".json":
        return Dataset.from_dict({LINE: [json.dumps(entry) for entry in json_list(place)]})
    if folder is not None and place.is_dir():
        path, folder = str(place / folder), None
    return _undecoded(open_table(path, split, folder, subset))


def _undecoded(table: "datasets.Dataset") -> "datasets.Dataset":
    """Return the table with images, lists of them too, left as bytes or path."""
    from datasets import Image, List

    for name, kind in table.features.items():
        if isinstance(kind, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            table = table.cast_column(name, List(Image(decode=False)))
    return table


def foreign_rows(table: "datasets.Dataset", place: str) -> Iterator[tuple[int, str, Mapping[str, Any] | Fault]]:
    """Yield (number from 1, `place:number`, row) of every row that is not a blank line; no object is a Fault."""
    for number, row in enumerate(table, 1):
        where = f"{place}:{number}"
        if LINE in row and not row[LINE].strip():
            continue
        try:
            yield number, where, _plain(row)
        except UserError as error:
            yield number, where, Fault(where, str(error))


def _plain(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if LINE not in row:
        return row
    try:
        value = json.loads(row[LINE].removeprefix("\ufeff"))
    except ValueError as fault:
        raise UserError(f"got no valid JSON ({fault}), want one object a line. Correct the line.") from fault
    if not isinstance(value, dict):
        raise UserError(f"got a JSON {type(value).__name__}, want an object. Correct the line.")
    return value


def import_rows(
    table: "datasets.Dataset",
    convert: Convert,
    *,
    name: str,
    path: str,
    split: str,
    columns: Sequence[str] = (),
    least: int = 2,
    faulty: Faulty,
    admit: Admit | None = None,
    verify: bool = False,
    num_proc: int | None = None,
) -> Imported:
    """Check every row, and return the table whose rows are converted when they are read.

    Args:
        table: as `open_rows` gave it.
        convert: a row -> its comparison, several of them, or why it is left out; a fault is a UserError without a place. An
            empty id becomes `<name>-<number>`.
        name: of the format, for ids and messages.
        path, split: what is imported, for messages.
        columns: those a table must have; rows of JSON say themselves what they lack.
        least: candidates a row must have; 1 where answers may stand alone with a label.
        faulty, verify, num_proc: as in `pick_a_pic`.
        admit: a row that converted -> a reason to leave it out, or None. May count.

    Raises:
        UserError: missing columns; faulty rows.
    """
    place = row_place(local_path(path), split)
    if LINE not in table.column_names:
        check_columns(table, columns, path, f"{name} columns")
    faults, left_out, keep = list[Fault](), dict[str, list[str]](), list[tuple[int, int]]()
    for number, where, row in foreign_rows(table, place):
        outcome = _checked(row, convert, admit, where, least)
        if isinstance(outcome, Fault):
            faults.append(outcome)
        elif isinstance(outcome, str):
            left_out.setdefault(outcome, []).append(where)
        else:
            keep += [(number, part) for part in range(outcome)]
    chosen = table.select([number - 1 for number, _ in keep])
    chosen = chosen.add_column(ROW, [number for number, _ in keep]).add_column(PART, [part for _, part in keep])
    conversion = Conversion(partial(_read, convert=convert, name=name, place=place), ())
    return _ended(chosen.with_transform(conversion), faults, left_out, place, faulty, verify, num_proc)


def _checked(
    row: Mapping[str, Any] | Fault, convert: Convert, admit: Admit | None, where: str, least: int
) -> int | str | Fault:
    """Return how many comparisons the row gives, why it is left out, or what is wrong with it."""
    if isinstance(row, Fault):
        return row
    try:
        outcome = convert(row)
    except UserError as error:
        return Fault(where, str(error))
    if isinstance(outcome, Dropped):
        return outcome.reason
    values = outcome if isinstance(outcome, tuple) else (outcome,)
    problems = [problem for value in values for problem in _problems(value, least)]
    if problems:
        return Fault(where, "; ".join(problems))
    reason = admit(row) if admit is not None else None
    return len(values) if reason is None else reason


def _problems(value: Comparison, least: int) -> list[str]:
    contents = (value.prompt, *value.candidates, *(value.prompts or ()), *value.extras.values())
    files = [media.path for content in contents for media in content.media() if media.data is None]
    missing = [f for f in files if f and "://" not in f and not Path(f).is_file()]
    return [*faults_of(value, least), *(f"the image {f} is missing. Put it there or remove the row." for f in missing)]


def _read(row: Mapping[str, Any], *, media: bool, convert: Convert, name: str, place: str) -> dict[str, Any]:
    outcome = convert(_plain({key: value for key, value in row.items() if key not in (ROW, PART)}))
    assert not isinstance(outcome, Dropped)  # such rows are not in the table
    several = isinstance(outcome, tuple)
    value = outcome[row[PART]] if isinstance(outcome, tuple) else outcome
    named = value.id or f"{name}-{row[ROW]}" + (f"-{row[PART]}" if several else "")
    return to_row(replace(value, id=named, where=f"{place}:{row[ROW]}"))


def import_groups(values: Iterable[Comparison | Fault | tuple[str, Dropped]], *, place: str, faulty: Faulty) -> Imported:
    """Gather comparisons that several foreign rows make together, in a table of our own.

    Args:
        values: comparisons with id and where, faults, and (place, why it is left out).
        place: what is imported, for messages.
        faulty: as in `pick_a_pic`.
    """
    faults, left_out = list[Fault](), dict[str, list[str]]()

    def rows() -> Iterator[Mapping[str, Any] | Fault]:
        for value in values:
            if isinstance(value, tuple):
                left_out.setdefault(value[1].reason, []).append(value[0])
            else:
                yield value if isinstance(value, Fault) else to_row(value)

    return _ended(collect(rows(), place, faults), faults, left_out, place, faulty, verify=False, num_proc=None)


def _ended(
    dataset: "datasets.Dataset",
    faults: list[Fault],
    left_out: Mapping[str, Sequence[str]],
    place: str,
    faulty: Faulty,
    verify: bool,
    num_proc: int | None,
) -> Imported:
    if faulty == "raise":
        try:
            raise_faults(faults, place)
        except UserError as error:
            raise UserError(f"{error}\n{place}: with faulty: drop such rows are left out and counted.") from None
    imported = finish(dataset, faults, place=place, faulty="drop", verify=verify, num_proc=num_proc)
    return replace(imported, left_out=left_out)


def text_of(row: Mapping[str, Any], name: str) -> str:
    """Return a column's text.

    Raises:
        UserError: there is none.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"got {shown(value)} for {name}, want a text. Correct the row, or name this format's importer.")
    return value


def number_of(row: Mapping[str, Any], name: str) -> float:
    """Return a column's number.

    Raises:
        UserError: there is none, or it is not finite.
    """
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"got {shown(value)} for {name}, want a number. Correct the row, or name this format's importer.")
    return float(value)


def list_of(row: Mapping[str, Any], name: str) -> list[Any]:
    """Return a column's list.

    Raises:
        UserError: there is none.
    """
    value = row.get(name)
    if not isinstance(value, list):
        raise UserError(f"got {shown(value)} for {name}, want a list. Correct the row, or name this format's importer.")
    return value


def shown(value: Any) -> str:
    """Return a value as a message shows it, cut at 60 characters."""
    return "nothing" if value is None else json.dumps(value, default=str, ensure_ascii=False)[:60]


def ranks_of(scores: Sequence[float]) -> tuple[float, ...]:
    """Return the ranks of scores, 1 for the highest, equal where they are equal."""
    return tuple(1.0 + sum(other > score for other in scores) for score in scores)


def judged(order: Sequence[float], scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the fields `scores` and `ranks` of a comparison that has several judges and one order; every score is kept.

    The preference score of the order stands under PHI, so that the view `ranked` follows it and not all judges together.

    Args:
        order: values that order the candidates, higher is better.
        scores: judge -> one score a candidate.
    """
    values = {name: tuple(map(float, one)) for name, one in scores.items()}
    return {"scores": {**values, PHI: preference_scores([order])}, "ranks": ranks_of(order)}
