"""Reading comparisons from disk: Parquet, JSONL + media, imagefolder, webdataset shards, save_to_disk folders."""

import codecs
import glob
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import UserError
from mmalign.records.columns import content_row
from mmalign.records.conversations import message_of
from mmalign.records.media import Media, tar_path
from mmalign.records.rows import Content, Fault, nearest
from mmalign.records.table import COLUMNS, comparison, empty_dataset, features, in_batches

if TYPE_CHECKING:
    import datasets

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, ".avif", ".apng", ".mp4", ".mov", ".webm", ".mkv", ".avi")
SIDE_KEYS = ("id", "scores", "ranks", "prob", "weight", "margin", "beta_scale", "provenance")
ENTRY_KEYS = (*SIDE_KEYS, "prompt", "candidates", "prompts", "prefix", "extras")
CONTENT_KEYS = ("text", "image", "images", "messages", "tools", "template_kwargs")
# The spellings that imagefolder metadata has in the wild; the better image of a pair stands first.
CAPTIONS = ("prompt", "text", "caption")
WINNERS = ("file_name", "image", "chosen_file_name")
LOSERS = ("lose_image", "lose_file_name", "rejected_file_name")
ROWS_IN_MEMORY = 10_000
SHOWN_FAULTS = 5
NUMBER = re.compile(r"[-+]?\b(?:\d[\d.]*(?:e[-+]?\d+)?|nan|inf)\b")


def read(path: str | Path, *, faults: list[Fault] | None = None, least: int = 2) -> "datasets.Dataset":
    """Read a table of comparisons; the format is told from the path. Images are not opened.

    `x.jsonl`, `x.parquet`, `x.tar`, or a folder with Parquet files, one JSONL file, `metadata.jsonl` (imagefolder), tar
    shards, or a table saved with `save_to_disk`. Paths of images are relative to the file that names them.

    Args:
        path: file or folder.
        faults: where unusable rows of JSONL, imagefolder and shards are noted, and left out. None: they are an error.
            Rows of Parquet and Arrow tables are checked when they are used.
        least: candidates that a row must have, where rows are checked.

    Raises:
        UserError: nothing there, no known format, or unusable rows (the first few are named).
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(
            f"{place}: got no such file or folder, want comparisons. Check the path: it counts from the folder you are in."
        )
    reader, files = _format_of(place)
    return reader(files, faults, least)


def collect(
    rows: Iterable[Mapping[str, Any] | Fault], place: str | Path, faults: list[Fault] | None, least: int = 2
) -> "datasets.Dataset":
    """Check rows one by one and gather the good ones in a table; tell or note the others.

    Args:
        rows: rows of our schema with `where` set, or faults found on the way.
        place: what is read, for the message.
        faults, least: as in `read`.
    """
    from datasets import Dataset, concatenate_datasets

    found: list[Fault] = []

    def good() -> Iterator[Mapping[str, Any]]:
        for row in rows:
            if isinstance(row, Fault):
                found.append(row)
            elif fault := fault_of(row, least):
                found.append(fault)
            else:
                yield {name: row.get(name) for name in COLUMNS}

    tables = [Dataset.from_list(list(rows), features=features()) for rows in in_batches(good(), ROWS_IN_MEMORY)]
    if faults is None:
        raise_faults(found, place)
    else:
        faults += found
    return concatenate_datasets(tables) if tables else empty_dataset()


def raise_faults(faults: list[Fault], place: str | Path) -> None:
    """Raise one error that tells the faults as `told_faults` does, if there are any.

    Raises:
        UserError: there are faults.
    """
    if faults:
        lines, rest = _told_kinds(faults)
        raise UserError("\n".join([*lines, *([f"{place}: {rest}"] if rest else [])]))


def told_faults(faults: Sequence[Fault]) -> list[str]:
    """A line for each of the first few kinds of faults: the first one, their number, where the next are; then how many more.

    Faults are of one kind that differ in nothing but numbers.
    """
    lines, rest = _told_kinds(faults)
    return [*lines, *([rest] if rest else [])]


def _told_kinds(faults: Sequence[Fault]) -> tuple[list[str], str]:
    """The lines of `told_faults`, and apart the closing one; empty where nothing is left out."""
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(NUMBER.sub("0", fault.problem), []).append(fault)
    shown = list(kinds.values())[:SHOWN_FAULTS]
    rest = len(faults) - sum(map(len, shown))
    return [_told(alike) for alike in shown], f"and {rest} rows more." if rest else ""


def _told(alike: list[Fault]) -> str:
    """The first of several faults of a kind, and where the next ones are."""
    first, *others = alike
    if not others:
        return str(first)
    places = [fault.where.rpartition("/")[2] for fault in others[: SHOWN_FAULTS - 1]]
    more = f" and {len(others) - len(places)} more" if len(others) > len(places) else ""
    return f"{first} Such faults: {len(alike)}, the next at {', '.join(places)}{more}."


def fault_of(row: Mapping[str, Any], least: int = 2) -> Fault | None:
    """Return what is wrong with a row of our schema, missing image files included; None when it is good.

    Args:
        least: candidates it must have.
    """
    where = row["where"]
    try:
        value = comparison(row, where, least)
    except UserError as error:
        return Fault(where, str(error).removeprefix(f"{where}: "))
    for content in value.contents():
        for media in content.media():
            if media.data is None and media.path and "://" not in media.path and not os.path.isfile(media.path):
                return Fault(where, f"the image {media.path} is missing. Put it there or remove the row.")
    return None


Reader = Callable[[list[Path], list[Fault] | None, int], "datasets.Dataset"]


def _format_of(place: Path) -> tuple[Reader, list[Path]]:
    if place.is_file():
        reader = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".tar": _read_shards}.get(place.suffix)
        if place.name == "metadata.jsonl":
            reader = _read_imagefolder
        if reader is not None:
            return reader, [place]
        raise UserError(f"{place}: got a file ending in {place.suffix!r}, want .jsonl, .parquet or .tar. Convert it.")
    if (place / "state.json").exists() and (place / "dataset_info.json").exists():
        return _read_arrow, [place]
    if (place / "metadata.jsonl").exists():
        return _read_imagefolder, [place / "metadata.jsonl"]
    for pattern, reader in (("*.parquet", _read_parquet), ("*.tar", _read_shards), ("*.jsonl", _read_jsonl)):
        files = sorted(place.glob(pattern))
        if files:
            return reader, files
    raise UserError(
        f"{place}: got a folder without comparisons, want *.parquet, *.jsonl, metadata.jsonl, *.tar or a table written "
        "by save_to_disk. Check the path, or name an importer for another layout."
    )


def _read_parquet(files: list[Path], faults: list[Fault] | None, least: int) -> "datasets.Dataset":
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import load_dataset

    try:
        counts = [pq.ParquetFile(file).metadata.num_rows for file in files]
    except pa.ArrowInvalid as fault:
        raise UserError(f"{files[0].parent}: got a damaged Parquet file ({fault}). Copy it again.") from fault
    names = pq.read_schema(files[0]).names
    _check_columns(names, files[0])
    if not any(counts):
        return empty_dataset()  # datasets would not read it
    table = load_dataset("parquet", data_files=[glob.escape(str(f)) for f in files], split="train")
    where = [f"{file}:{n}" for file, count in zip(files, counts, strict=True) for n in range(1, count + 1)]
    return _complete(table, where)


def _read_arrow(files: list[Path], faults: list[Fault] | None, least: int) -> "datasets.Dataset":
    from datasets import load_from_disk

    table = load_from_disk(str(files[0]))
    _check_columns(table.column_names, files[0])
    return _complete(table, [f"{files[0]}:{n}" for n in range(1, len(table) + 1)])


def _check_columns(names: list[str], place: Path) -> None:
    missing = [name for name in ("id", "prompt", "candidates") if name not in names]
    if missing:
        raise UserError(
            f"{place}: got the columns {', '.join(names)} and no {', '.join(missing)}, want a table of comparisons. "
            "For a public data set name its importer."
        )


def _complete(table: "datasets.Dataset", where: list[str]) -> "datasets.Dataset":
    """Bring a table to our schema: absent optional columns are empty, others go, `where` says file and row.

    A table of before there were conversations stays as it is on disk: casting it would copy its images.
    """
    table = table.remove_columns([name for name in table.column_names if name not in COLUMNS or name == "where"])
    for name in COLUMNS:
        if name not in table.column_names:
            column = where if name == "where" else [None] * len(table)
            table = table.add_column(name, column, feature=features()[name])
    table = table.select_columns(list(COLUMNS))
    return table if table.features in (features(), features(conversations=False)) else table.cast(features())


def _read_jsonl(files: list[Path], faults: list[Fault] | None, least: int) -> "datasets.Dataset":
    def rows() -> Iterator[Mapping[str, Any] | Fault]:
        for file in files:
            for where, entry in json_lines(file):
                if isinstance(entry, Fault):
                    yield entry
                else:
                    number = where.rpartition(":")[2]
                    yield row_of(entry, where, f"{file.stem}-{number}", _beside(file))

    return collect(rows(), files[0].parent if len(files) > 1 else files[0], faults, least)


def _read_imagefolder(files: list[Path], faults: list[Fault] | None, least: int) -> "datasets.Dataset":
    def rows() -> Iterator[Mapping[str, Any] | Fault]:
        for where, entry in json_lines(files[0]):
            if not isinstance(entry, Fault):
                entry = metadata_entry(entry, where)
            if isinstance(entry, Fault):
                yield entry
            else:
                number = where.rpartition(":")[2]
                yield row_of(entry, where, f"{files[0].parent.name}-{number}", _beside(files[0]))

    return collect(rows(), files[0], faults, least)


def metadata_entry(entry: dict[str, Any], where: str) -> dict[str, Any] | Fault:
    """Translate a line of imagefolder metadata to a line of our JSONL.

    `file_names` lists k candidates; `file_name` (or `image`) with `lose_image` is a pair whose first image won.
    """
    rest = {k: v for k, v in entry.items() if k in SIDE_KEYS}
    prompt = next((entry[k] for k in CAPTIONS if entry.get(k) is not None), None)
    winner, loser = (next((entry[k] for k in keys if entry.get(k)), None) for keys in (WINNERS, LOSERS))
    names = entry.get("file_names") or [name for name in (winner, loser) if name]
    if loser is not None and not any(k in rest for k in ("ranks", "prob", "scores")):
        rest["ranks"] = [1, 2]
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        return Fault(where, f"got file_names {names!r}, want a list of paths.")
    return {**rest, "prompt": prompt or "", "candidates": [{"image": name} for name in names]}


def _read_shards(files: list[Path], faults: list[Fault] | None, least: int) -> "datasets.Dataset":
    def rows() -> Iterator[Mapping[str, Any] | Fault]:
        for shard in files:
            try:
                yield from _shard_rows(shard)
            except tarfile.TarError as fault:
                raise UserError(f"{shard}: got no plain tar file ({fault}), want an uncompressed one.") from fault

    return collect(rows(), files[0].parent if len(files) > 1 else files[0], faults, least)


def _shard_rows(shard: Path) -> Iterator[Mapping[str, Any] | Fault]:
    samples: dict[str, tuple[bytes | None, list[str]]] = {}
    with tarfile.open(shard, "r:") as tar:
        for info in tar:
            folder, _, name = info.name.rpartition("/")
            key = f"{folder}/{name.partition('.')[0]}".strip("/")
            text, images = samples.setdefault(key, (None, [])) if info.isfile() else (None, [])
            file = tar.extractfile(info) if name.endswith(".json") else None
            if file is not None:
                samples[key] = (file.read(), images)
            elif name.lower().endswith(MEDIA_SUFFIXES):
                images.append(info.name)
    for key, (text, images) in samples.items():
        where = f"{shard}:{key}"
        entry = parse_object(text, where) if text is not None else Fault(where, "has no .json.")
        if isinstance(entry, Fault):
            yield entry
        else:
            if "candidates" not in entry:  # a foreign shard: the sample's images in the order of their names
                entry["candidates"] = [{"image": name} for name in sorted(images)]
            yield row_of(entry, where, key, lambda member: tar_path(str(shard.absolute()), member))


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Yield (`file:line`, object) for every line that is not blank; a line that is no object becomes a Fault."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            plain = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if plain.strip():
                where = f"{file}:{number}"
                yield where, parse_object(plain, where)


def parse_object(text: bytes, where: str) -> dict[str, Any] | Fault:
    """Parse one JSON object in UTF-8; anything else is a Fault."""
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as fault:
        return Fault(where, f"got text that is not UTF-8 ({fault}). Save the file as UTF-8.")
    except ValueError as fault:
        return Fault(where, f"got no valid JSON ({fault}), want one object a line. Correct the line.")
    return value if isinstance(value, dict) else Fault(where, f"got a JSON {type(value).__name__}, want an object.")


def row_of(entry: dict[str, Any], where: str, default_id: str, resolve: Callable[[str], str]) -> dict[str, Any] | Fault:
    """Turn a line of our JSONL into a row of our schema.

    `{"prompt": "a cat", "candidates": [{"image": "a.png"}, {"image": "b.png"}], "ranks": [1, 2]}`; further keys: id, scores
    ({judge: [...]}), prob, weight, margin, beta_scale, provenance, prompts (one a candidate), prefix (a text), extras ({name:
    content}).

    A prompt or candidate is a text, a list of messages, or an object with text, image, images, messages, tools,
    template_kwargs. A message is {role, content}, its content a text or a list of parts, {"type": "text", "text": ...} or
    {"type": "image", "image": path}.
    A video is an `image` that is one file (GIF, WebP, APNG, MP4, WebM), or `images`: its frames in order.
    """
    unknown = [key for key in entry if key not in ENTRY_KEYS]
    if unknown:
        return Fault(where, f"got the unknown key {unknown[0]}.{nearest(unknown[0], ENTRY_KEYS)}")
    scores = entry.get("scores") or {}
    try:
        return {
            "id": str(entry.get("id", default_id)),
            "prompt": _content(entry.get("prompt", ""), resolve),
            "candidates": [_content(c, resolve) for c in _list(entry, "candidates")],
            "scores": [{"judge": str(judge), "values": [float(v) for v in _list(scores, judge)]} for judge in scores],
            "ranks": None if entry.get("ranks") is None else [float(r) for r in _list(entry, "ranks")],
            **{k: None if entry.get(k) is None else float(entry[k]) for k in ("prob", "weight", "margin", "beta_scale")},
            "provenance": [json.dumps(p, sort_keys=True) for p in _list(entry, "provenance")],
            "prompts": None if entry.get("prompts") is None else [_content(p, resolve) for p in _list(entry, "prompts")],
            "prefix": _text(entry.get("prefix")),
            "extras": [{"name": name, "content": _content(c, resolve)} for name, c in (entry.get("extras") or {}).items()],
            "where": where,
        }
    except (TypeError, ValueError, AttributeError) as fault:
        return Fault(where, f"got a value of the wrong type ({fault}). Correct the line.")


def _content(value: Any, resolve: Callable[[str], str]) -> dict[str, Any]:
    value = {"text": value} if isinstance(value, str) else {"messages": value} if isinstance(value, list) else value
    if not isinstance(value, dict) or set(value) - {*CONTENT_KEYS}:
        raise TypeError(f"{json.dumps(value)[:60]}, want a text or an object with {', '.join(CONTENT_KEYS)}")
    template_kwargs = value.get("template_kwargs", {})
    if not isinstance(template_kwargs, dict):
        raise TypeError(f"template_kwargs {json.dumps(template_kwargs)[:60]}, want an object")
    paths = [value["image"]] if "image" in value else _list(value, "images")
    if not all(isinstance(path, str) for path in paths):
        raise TypeError(f"{json.dumps(value)[:60]}, want paths of images as texts")
    content = Content(
        text=_text(value.get("text")),
        images=tuple(Media(path=resolve(path)) for path in paths),
        messages=tuple(message_of(m, lambda path: Media(path=resolve(path))) for m in _list(value, "messages")),
        tools=tuple(_objects(value, "tools")),
        template_kwargs=template_kwargs,
    )
    return content_row(content)


def _objects(entry: dict[str, Any], key: str) -> list[dict[str, Any]]:
    values = _list(entry, key)
    if not all(isinstance(value, dict) for value in values):
        raise TypeError(f"{key} {json.dumps(values)[:60]}, want objects")
    return values


def _text(value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"{json.dumps(value)[:60]}, want a string")
    return value


def _list(entry: dict[str, Any], key: str) -> list[Any]:
    value = entry.get(key)
    if not isinstance(value, list | None):
        raise TypeError(f"{key} {json.dumps(value)[:60]}, want a list")
    return value or []


def _beside(file: Path) -> Callable[[str], str]:
    folder = file.absolute().parent
    return lambda name: str(folder / name)
