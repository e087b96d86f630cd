"""Writing comparisons to disk in each format that `read` reads; what is written is whole or absent."""

import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mmalign.errors import UserError
from mmalign.records.conversations import entry_of
from mmalign.records.frames import video_suffix
from mmalign.records.media import DAMAGED, Media
from mmalign.records.rows import Comparison, Content
from mmalign.records.table import comparison, features, in_batches, to_row

if TYPE_CHECKING:
    import datasets

ROWS_A_GROUP = 100  # a row group is held in memory with its images
SHARD_ROWS = 1000


def check_target(path: str | Path, *, format: str | None = None, replace: bool = False) -> str:
    """Return the name in FORMATS under which `write` would write there.

    Raises:
        UserError: the ending tells no format, the folder is not empty, or a file stands where a folder goes or the reverse.
    """
    target = Path(path)
    name = format or {".parquet": "parquet", ".jsonl": "jsonl", ".tar": "webdataset", "": "arrow"}.get(target.suffix, "")
    if name not in FORMATS:
        raise UserError(f"{target}: got format {name or target.suffix!r}, want one of {', '.join(FORMATS)}. Set format.")
    wants_folder = name in ("arrow", "imagefolder") or (name == "webdataset" and target.suffix != ".tar")
    if target.exists() and target.is_dir() != wants_folder:
        kinds = ("file", "folder") if wants_folder else ("folder", "file")
        raise UserError(f"{target}: got a {kinds[0]}, want a {kinds[1]} for the format {name}. Name another one.")
    if not replace and target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target}: the folder exists and is not empty. Name another one or remove it.")
    return name


def write(
    rows: "datasets.Dataset | Iterable[Comparison]", path: str | Path, *, format: str | None = None, replace: bool = False
) -> Path:
    """Write comparisons and return the path; the format is told from the ending, none is a save_to_disk folder.

    `x.parquet`, `x.tar` and folders hold the images; `x.jsonl` puts them in `x_media/`, except those that already lie in
    its folder, which stay where they are. A file is replaced; a folder must be new or empty, or `replace` is set.

    Args:
        rows: a table of our schema, or comparisons; they are streamed, not gathered.
        path: file or folder.
        format: a name of FORMATS, to override the ending: `imagefolder`, or `webdataset` for a folder of shards.
        replace: a folder that stands there goes, with all that is in it, once the new one is whole.

    Raises:
        UserError: as `check_target`, or the format cannot hold a row.
    """
    target = Path(path)
    name = check_target(target, format=format, replace=replace)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)
    try:
        FORMATS[name](_comparisons(rows), target, partial)
        if partial.is_dir() and target.exists():
            shutil.rmtree(target) if replace else target.rmdir()
        os.replace(partial, target)
    finally:
        _remove(partial)
    return target


def _comparisons(rows: "datasets.Dataset | Iterable[Comparison]") -> Iterator[Comparison]:
    for row in rows:
        yield row if isinstance(row, Comparison) else comparison(row)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _embedded(value: Comparison) -> dict[str, Any]:
    """Return the row with the bytes of its images, and without the place it came from."""

    def held(images: tuple[Media, ...]) -> tuple[Media, ...]:
        return tuple(Media(data=m.read(), where=m.where) for m in images)

    def content(c: Content) -> Content:
        return replace(c, images=held(c.images), messages=tuple(replace(m, images=held(m.images)) for m in c.messages))

    whole = replace(
        value,
        prompt=content(value.prompt),
        candidates=tuple(content(c) for c in value.candidates),
        prompts=None if value.prompts is None else tuple(content(p) for p in value.prompts),
        extras={name: content(c) for name, c in value.extras.items()},
        where="",
    )
    return to_row(whole)


def _write_parquet(rows: Iterator[Comparison], target: Path, partial: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = features().arrow_schema
    with pq.ParquetWriter(partial, schema) as writer:
        for group in in_batches(rows, ROWS_A_GROUP):
            writer.write_table(pa.Table.from_pylist([_embedded(row) for row in group], schema=schema))


def _write_arrow(rows: Iterator[Comparison], target: Path, partial: Path) -> None:
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    stream = partial.with_name(partial.name + ".arrow")
    try:
        with ArrowWriter(path=str(stream), features=features(), writer_batch_size=ROWS_A_GROUP) as writer:
            for row in rows:
                writer.write(_embedded(row))
            writer.finalize()
        Dataset.from_file(str(stream)).save_to_disk(str(partial))
    finally:
        stream.unlink(missing_ok=True)


def _write_jsonl(rows: Iterator[Comparison], target: Path, partial: Path) -> None:
    folder = target.absolute().parent
    media = folder / f"{target.stem}_media"

    def place(image: Media) -> str:
        if image.path and Path(image.path).is_absolute() and Path(image.path).is_relative_to(folder):
            return Path(image.path).relative_to(folder).as_posix()
        return f"{media.name}/{store_media(image, media)}"

    with open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(_line(row, lambda content, part: content_entry(content, place)))


def _write_imagefolder(rows: Iterator[Comparison], target: Path, partial: Path) -> None:
    (partial / "images").mkdir(parents=True)
    with open(partial / "metadata.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            if (
                any(content.images or content.messages or content.tools for content in (row.prompt, *row.extras.values()))
                or (row.extras or row.prompts is not None or row.prefix is not None)
                or any(c.text is not None or c.messages or len(c.images) != 1 for c in row.candidates)
            ):
                raise UserError(
                    f"{row.where or row.id}: imagefolder metadata holds a text prompt and one image a candidate. "
                    "Write .jsonl or .parquet instead."
                )
            names = [f"images/{store_media(c.images[0], partial / 'images')}" for c in row.candidates]
            file.write(_json_line({"id": row.id, "file_names": names, "prompt": row.prompt.text, **_side(row)}))


def _write_shards(rows: Iterator[Comparison], target: Path, partial: Path) -> None:
    """Write one shard where the target is a file, else a folder of shards of SHARD_ROWS rows."""
    single = target.suffix == ".tar"
    if not single:
        partial.mkdir()
    numbered = enumerate(rows)
    for n, group in enumerate([numbered] if single else in_batches(numbered, SHARD_ROWS)):
        shard = partial if single else partial / f"{n:06d}.tar"
        with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:
            for number, row in group:
                _add_sample(tar, f"{number:09d}", row)


def _add_sample(tar: tarfile.TarFile, key: str, row: Comparison) -> None:
    """Add `key.json` and one member an image; a sample's key has no dot, the row's own id stands in the JSON."""

    def add(name: str, data: bytes) -> str:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        return name

    def content(c: Content, part: str) -> Any:
        number = itertools.count()
        return content_entry(c, lambda m: add(f"{key}.{part}.{next(number)}{_suffix(m.read())}", m.read()))

    add(f"{key}.json", _line(row, content).encode())


def content_entry(content: Content, place: Callable[[Media], str]) -> Any:
    """Return a content as `row_of` reads it: the shortest of a text, a list of messages and an object.

    Args:
        content: a prompt or a candidate.
        place: stores an image and returns its path, from the folder of the file.
    """
    paths = [place(m) for m in content.images]
    images: dict[str, Any] = {"image": paths[0]} if len(paths) == 1 else {"images": paths}
    whole = {
        **({} if content.text is None else {"text": content.text}),
        **(images if paths else {}),
        **({"messages": [entry_of(m, place) for m in content.messages]} if content.messages else {}),
        **({"tools": list(content.tools)} if content.tools else {}),
        **({"template_kwargs": content.template_kwargs} if content.template_kwargs else {}),
    }
    return next(iter(whole.values())) if set(whole) in ({"text"}, {"messages"}) else whole


def _line(row: Comparison, content: Callable[[Content, str], Any]) -> str:
    """Return a row as one line; `content` places the media of a part of the row and returns its entry."""
    whole = {
        "id": row.id,
        "prompt": content(row.prompt, "prompt"),
        "candidates": [content(c, str(n)) for n, c in enumerate(row.candidates)],
        **_side(row),
    }
    if row.prompts is not None:
        whole["prompts"] = [content(p, f"prompt{n}") for n, p in enumerate(row.prompts)]
    if row.prefix is not None:
        whole["prefix"] = row.prefix
    if row.extras:
        whole["extras"] = {name: content(c, f"extra{n}") for n, (name, c) in enumerate(row.extras.items())}
    return _json_line(whole)


def _side(row: Comparison) -> dict[str, Any]:
    optional = {
        name: getattr(row, name) for name in ("scores", "ranks", "prob", "weight", "margin", "beta_scale", "provenance")
    }
    return {name: value for name, value in optional.items() if value is not None and value != () and value != {}}


def _json_line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def store_media(image: Media, folder: Path) -> str:
    """Write an image under its content key, once, and return its name."""
    data = image.read()
    name = image.key()[:32] + _suffix(data)
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.partial"
        partial.write_bytes(data)
        os.replace(partial, folder / name)
    return name


def _suffix(data: bytes) -> str:
    if video := video_suffix(data):
        return video
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}.get(image.format or "", f".{image.format}".lower())
    except DAMAGED:
        return ".bin"  # kept as it is: writing is no place to lose a row


FORMATS = {
    "parquet": _write_parquet,
    "jsonl": _write_jsonl,
    "imagefolder": _write_imagefolder,
    "webdataset": _write_shards,
    "arrow": _write_arrow,
}
