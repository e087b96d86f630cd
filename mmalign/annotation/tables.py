"""Tables of an export: rows with media in them, as Parquet, as JSONL with its media beside it, or as a `datasets` folder."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import UserError
from mmalign.records import Media
from mmalign.records.table import in_batches
from mmalign.records.writing import store_media

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]
Rows = Callable[[bool], Iterable[Row]]  # whether images can be opened -> rows
ROWS_A_GROUP = 100  # a row group is held in memory with its images


@dataclass(frozen=True)
class Encoded:
    """Media whose encoded bytes alone stand in a table, as the binary columns of Pick-a-Pic have them."""

    media: Media


def write_jsonl(rows: Rows, folder: Path, name: str) -> int:
    """Write `name.jsonl`; an image is `{"path": "media/<hash>.png"}`, relative to the folder, and written once."""

    def place(value: Any) -> Any:
        return {"path": f"media/{store_media(value, folder / 'media')}"} if isinstance(value, Media) else value

    count = 0
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for row in rows(True):
            file.write(json.dumps(_walked(row, place), ensure_ascii=False) + "\n")
            count += 1
    return count


def write_parquet(rows: Rows, folder: Path, name: str) -> int:
    """Write `name.parquet` with its images inside; the rows are read twice, the first time without their images.

    Raises:
        UserError: rows that have no schema in common, as texts beside conversations.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, count = _features(rows).arrow_schema, 0
    with pq.ParquetWriter(folder / f"{name}.parquet", schema) as writer:
        for group in in_batches(_embedded(rows), ROWS_A_GROUP):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def write_folder(rows: Rows, folder: Path, name: str) -> int:
    """Write a folder that `datasets.load_from_disk` opens, into the folder itself.

    Raises:
        UserError: as `write_parquet`.
    """
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    stream, count = folder.with_name(f"{folder.name}.{name}.arrow"), 0
    try:
        with ArrowWriter(path=str(stream), features=_features(rows), writer_batch_size=ROWS_A_GROUP) as writer:
            for row in _embedded(rows):
                writer.write(row)
                count += 1
            writer.finalize()
        Dataset.from_file(str(stream)).save_to_disk(str(folder))
    finally:
        stream.unlink(missing_ok=True)
    return count


def _embedded(rows: Rows) -> Iterator[dict[str, Any]]:
    """Rows as Arrow takes them: images as bytes, JSON where objects are open-ended."""

    def held(value: Any) -> Any:
        if isinstance(value, Encoded):
            return value.media.read()
        return {"bytes": value.read(), "path": None} if isinstance(value, Media) else value

    for row in rows(True):
        yield _plain(row, held)


def _features(rows: Rows) -> "datasets.Features":
    """The columns of the rows, told from all of them without their images."""
    import pyarrow as pa
    from datasets import Dataset, Features, Image, List

    single, several = set[str](), set[str]()

    def unread(value: Any) -> Any:
        return b"" if isinstance(value, Encoded) else {"bytes": b"", "path": ""} if isinstance(value, Media) else value

    light = []
    for row in rows(False):
        single |= {name for name, value in row.items() if isinstance(value, Media)}
        several |= {name for name, value in row.items() if isinstance(value, list) and any(isinstance(v, Media) for v in value)}
        light.append(_plain(row, unread))
    if not light:
        raise UserError("export: got no row, want at least one. Judge more items, or lower the settings that leave rows out.")
    names = list(dict.fromkeys(name for row in light for name in row))
    try:
        found = Dataset.from_list([{name: row.get(name) for name in names} for row in light]).features
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError) as fault:
        raise UserError(
            f"export: the rows have no schema in common ({str(fault).splitlines()[0]}), as texts beside conversations. "
            "Set container to jsonl, or format to comparisons."
        ) from fault
    pictures = {name: Image() for name in single} | {name: List(Image()) for name in several}
    return Features({**found, **pictures})


def _plain(row: Row, place: Callable[[Any], Any]) -> dict[str, Any]:
    """A row with its media placed, and `tools`, `aspects` and `flags` as JSON: one schema cannot hold all their keys."""
    texts = {
        name: json.dumps(row[name], ensure_ascii=False)
        for name in ("tools", "aspects", "shown_aspects", "flags", "shown_flags")
        if row.get(name) is not None
    }
    return {**_walked(row, place), **texts}


def _walked(value: Any, place: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _walked(one, place) for name, one in value.items()}
    if isinstance(value, str):
        return readable(value)
    return [_walked(one, place) for one in value] if isinstance(value, list | tuple) else place(value)


def readable(text: str) -> str:
    """Return a text with U+FFFD in place of half characters, which a database of JSON holds and no file of UTF-8 does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def readable_row(value: Any) -> Any:
    """Return a comparison, or a part of one, whose texts are all `readable`."""
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, Mapping):
        return {readable_row(name): readable_row(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(readable_row, value))
    if isinstance(value, Media) or not is_dataclass(value) or isinstance(value, type):
        return value
    held = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    found = {name: readable_row(one) for name, one in held.items()}
    return value if found == held else replace(value, **found)


CONTAINERS: dict[str, Callable[[Rows, Path, str], int]] = {
    "parquet": write_parquet,
    "jsonl": write_jsonl,
    "datasets": write_folder,
}
