"""Writing comparisons to disk in each format that `read` reads; what is written is whole or absent."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mmalign.errors import UserError
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

    def content(c: Content) -> Content:
        return Content(text=c.text, images=tuple(Media(data=m.read(), where=m.where) for m in c.images))

    whole = replace(value, prompt=content(value.prompt), candidates=tuple(content(c) for c in value.candidates), where="")
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
        return f"{media.name}/{_store(image, media)}"

    with open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            prompt, *candidates = (_entry(c, [place(m) for m in c.images]) for c in (row.prompt, *row.candidates))
            file.write(_line(row, {"prompt": prompt, "candidates": candidates}))


def _write_imagefolder(rows: Iterator[Comparison], target: Path, partial: Path) -> None:
    (partial / "images").mkdir(parents=True)
    with open(partial / "metadata.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            if row.prompt.images or any(c.text is not None or len(c.images) != 1 for c in row.candidates):
                raise UserError(
                    f"{row.where or row.id}: imagefolder metadata holds a text prompt and one image a candidate. "
                    "Write .jsonl or .parquet instead."
                )
            names = [f"images/{_store(c.images[0], partial / 'images')}" for c in row.candidates]
            file.write(_line(row, {"file_names": names, "prompt": row.prompt.text}))


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
        names = [f"{key}.{part}.{n}{_suffix(m.read())}" for n, m in enumerate(c.images)]
        return _entry(c, [add(name, m.read()) for name, m in zip(names, c.images, strict=True)])

    prompt = content(row.prompt, "prompt")
    candidates = [content(c, str(n)) for n, c in enumerate(row.candidates)]
    add(f"{key}.json", _line(row, {"prompt": prompt, "candidates": candidates}).encode())


def _entry(content: Content, paths: list[str]) -> Any:
    if not paths:
        return content.text if content.text is not None else {}
    text = {} if content.text is None else {"text": content.text}
    return {**text, "image": paths[0]} if len(paths) == 1 else {**text, "images": paths}


def _line(row: Comparison, contents: dict[str, Any]) -> str:
    optional = {name: getattr(row, name) for name in ("scores", "ranks", "prob", "weight", "margin", "provenance")}
    known = {name: value for name, value in optional.items() if value is not None and value != () and value != {}}
    return json.dumps({"id": row.id, **contents, **known}, ensure_ascii=False) + "\n"


def _store(image: Media, folder: Path) -> str:
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
