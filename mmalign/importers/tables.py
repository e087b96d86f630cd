"""What the importers share: opening a table by path or hub id, checking columns and images, and their common answer."""

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmalign.errors import UserError
from mmalign.records import Conversion, Fault, comparison, raise_faults

if TYPE_CHECKING:
    import datasets

Faulty = Literal["raise", "drop"]
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class Imported:
    """A table of our schema, and the rows that were left out of it with the reason.

    Args:
        faults: rows that are wrong.
        left_out: rows that a setting or the format's own rule leaves out: reason -> their places.
    """

    dataset: "datasets.Dataset"
    faults: tuple[Fault, ...] = ()
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def summary(self) -> str:
        """Say in one line how many rows were imported, and which were left out."""
        text = f"{len(self.dataset)} rows imported"
        if self.faults:
            first = "; ".join(str(f) for f in self.faults[:3])
            text += f", {len(self.faults)} left out ({first}{'; ...' if len(self.faults) > 3 else ''})"
        return text + self.rules()

    def rules(self) -> str:
        """Say how many rows each rule left out, with the first of them; nothing where there are none."""
        told = [f"{len(places)} {reason} (first: {places[0]})" for reason, places in self.left_out.items()]
        return f"; left out by rule: {', '.join(told)}" if told else ""


def open_table(path: str, split: str, folder: str | None = None, subset: str | None = None) -> "datasets.Dataset":
    """Open a local file (Parquet, JSON, JSONL, CSV), a local folder of them or of `save_to_disk`, or a hub data set.

    Args:
        folder: the folder in a hub data set that holds the rows, for those of several parts.
        subset: the name of one of its parts, where its card names them.

    Raises:
        UserError: there is none, it cannot be read, or it has no such split.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = local_path(path)
    place = Path(path)
    if not place.exists() and not HUB_ID.fullmatch(path):
        raise UserError(f"{path}: got no such file or folder, want a data set. Check the path, or give a hub id.")
    try:
        if place.is_file():
            kind = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}.get(place.suffix)
            if kind is None:
                raise UserError(f"{path}: got a file ending in {place.suffix!r}, want .parquet, .json, .jsonl or .csv.")
            return load_dataset(kind, data_files=glob.escape(path), split="train")
        if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
            table = load_from_disk(path)
        else:
            table = load_dataset(path, subset, data_dir=folder, split=split)
    except UserError:
        raise
    except (OSError, ValueError, DatasetsError) as fault:
        raise UserError(
            f"{path}: the split {split!r} cannot be read ({_first_line(fault)}). "
            "Check the path or hub id, the split, and for the hub the network and your login."
        ) from fault
    if isinstance(table, DatasetDict):
        if split not in table:
            raise UserError(f"{path}: got no split {split!r}, want one of {', '.join(table)}. Set split.")
        table = table[split]
    assert isinstance(table, Dataset)
    return table


def local_path(path: str) -> str:
    """Return the path with `~` as the home folder; a hub id stays as it is."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _first_line(fault: Exception) -> str:
    return (str(fault.__cause__ or fault).splitlines() or [type(fault).__name__])[0]


def json_list(file: Path) -> list[Any]:
    """Read a JSON file that holds one list.

    Raises:
        UserError: no such file, or something else in it.
    """
    if not file.is_file():
        raise UserError(f"{file}: got no such file, want a JSON list. Check the path and the split.")
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as fault:
        raise UserError(f"{file}: got no valid JSON ({fault}), want a list of rows. Copy the file again.") from fault
    if not isinstance(value, list):
        raise UserError(f"{file}: got a JSON {type(value).__name__}, want a list of rows. Check the path.")
    return value


def check_columns(table: "datasets.Dataset", wanted: Sequence[str], path: str, what: str) -> None:
    """Refuse a table that lacks columns.

    Raises:
        UserError: names the missing columns and those there are.
    """
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise UserError(
            f"{path}: got the columns {', '.join(table.column_names)} and no {', '.join(missing)}, want {what}. "
            "Name the importer of this data set's format."
        )


def row_place(path: str, split: str) -> str:
    """Return what stands before `:row` in messages: the file, or the data set with its split."""
    return path if Path(path).is_file() else f"{path} ({split})"


def undecoded(table: "datasets.Dataset", columns: Sequence[str]) -> "datasets.Dataset":
    """Return the table with image columns left as bytes or path."""
    from datasets import Image

    for name in columns:
        if isinstance(table.features[name], Image):
            table = table.cast_column(name, Image(decode=False))
    return table


def stored_image(value: Any) -> dict[str, Any]:
    """Return bytes, a path, or {bytes, path} as the image entry of our schema."""
    if isinstance(value, dict):
        return {"bytes": value["bytes"], "path": value["path"]}
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    return {"bytes": value, "path": None}


def byte_counts(table: "datasets.Dataset", column: str) -> list[int]:
    """Return the stored bytes of each image (a path counts as 1), without reading them; 0 where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    counts: list[int] = []
    for chunk in table.with_format("arrow")[column].chunks if len(table) else ():
        if pa.types.is_struct(chunk.type):
            by_path = pc.min_element_wise(pc.fill_null(pc.binary_length(chunk.field("path")), 0), 1)
            lengths = pc.add(pc.fill_null(pc.binary_length(chunk.field("bytes")), 0), by_path)
        else:
            lengths = pc.fill_null(pc.binary_length(chunk), 0)
        counts += lengths.to_pylist()
    return counts


def finish(
    dataset: "datasets.Dataset", faults: list[Fault], *, place: str, faulty: Faulty, verify: bool, num_proc: int | None
) -> Imported:
    """End an import: raise or keep the faults of rows, and leave out rows whose images do not decode.

    Args:
        dataset: good rows, of our schema or with a Conversion.
        faults: rows left out so far.
        place: what is imported, for messages.
        faulty: `raise`, or `drop` and report.
        verify: decode every image once. Broken ones are always dropped and reported, with a warning by the caller.
        num_proc: processes for it.
    """
    if faulty == "raise":
        raise_faults(faults, place)
    if not verify or not len(dataset):
        return Imported(dataset, tuple(faults))
    conversion = dataset.format["format_kwargs"].get("transform")
    plain = dataset.with_format(None)
    checked = plain.map(
        partial(_broken_media, conversion=conversion),
        remove_columns=plain.column_names,
        num_proc=num_proc,
        desc="checking images",
    )
    broken = {i: Fault(where, problem) for i, (where, problem) in enumerate(_pairs(checked)) if problem}
    if broken:
        dataset = dataset.select([i for i in range(len(dataset)) if i not in broken])
    return Imported(dataset, (*faults, *broken.values()))


def _pairs(checked: "datasets.Dataset") -> list[tuple[str, str]]:
    return list(zip(checked["checked_where"], checked["checked_problem"], strict=True))


def _broken_media(row: Mapping[str, Any], conversion: Conversion | None) -> dict[str, str]:
    """Decode the images of a row; say what is wrong with the first that does not."""
    value = comparison(row if conversion is None else conversion.convert(row, media=True), least=0)
    problem = ""
    for content in value.contents():
        for media in content.media():
            try:
                media.inspect()
            except UserError as error:
                problem = problem or str(error).removeprefix(f"{value.where}: ")
    return {"checked_where": value.where, "checked_problem": problem}
