"""Intake: comparisons become items of a project, a few hundred rows in memory at a time; what is unfit is told, not dropped."""

import hashlib
import io
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from sqlalchemy import Connection, insert, select, update

from mmalign.annotation.database import is_storable
from mmalign.annotation.protocol import MOST_CANDIDATES, Protocol, answer_of
from mmalign.annotation.queues import LARGEST_SHUFFLE
from mmalign.annotation.schema import BLOB, ITEM, MEDIA, PROJECT, SOURCE
from mmalign.errors import UserError
from mmalign.records import Comparison, Fault, Media, to_row
from mmalign.records.frames import video_suffix
from mmalign.records.media import DAMAGED

Role = Literal["ordinary", "gold", "calibration"]
ROLES = ("ordinary", "gold", "calibration")
CHUNK_ROWS = 200
SHOWN_FAULTS = 100
SERVED = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}  # others are shown as PNG
VIDEOS = {".mp4": "video/mp4", ".webm": "video/webm"}
POSITION_BITS = (16, 24)  # of a position: chance, and number in its batch; the batch stands before them


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a row may hold.

    Args:
        media_bytes: of one image or video file.
        pixels: of one image; Pillow warns of more.
        characters: of one prompt or candidate.
        roots: folders that image files must lie in, links followed; None: anywhere. For data that was uploaded.
    """

    media_bytes: int = 64 * 2**20
    pixels: int = 89_478_485
    characters: int = 200_000
    roots: tuple[Path, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Added:
    """What became of the rows.

    Args:
        added: new items.
        repeated: rows whose content the project had already.
        num_faults: rows that could not be used.
        faults: the first hundred of them.
    """

    added: int = 0
    repeated: int = 0
    num_faults: int = 0
    faults: tuple[Fault, ...] = ()

    def plus(self, other: "Added") -> "Added":
        """Return the sum of both."""
        return Added(
            added=self.added + other.added,
            repeated=self.repeated + other.repeated,
            num_faults=self.num_faults + other.num_faults,
            faults=(self.faults + other.faults)[:SHOWN_FAULTS],
        )


@dataclass(frozen=True, kw_only=True)
class File:
    """One image or video of a row: where it lies, or its bytes."""

    sha256: str
    path: str | None
    data: bytes | None
    mime: str
    width: int
    height: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A row that is fit, its media replaced by their hashes."""

    id: str
    content_hash: str
    k: int
    row: dict[str, Any]
    files: dict[str, File] = field(default_factory=dict)
    answer: dict[str, Any] | None = None
    explanation: str | None = None


def prepare(value: Comparison, *, kind: str, role: Role, limits: Limits, explanation: str | None = None) -> Prepared | Fault:
    """Read, hash and check one row; the database is not asked.

    Args:
        kind: of the project.
        role: gold and calibration items need an order in the row (ranks or prob): it is their answer.
    """
    where = value.where or value.id
    if problem := _problem(value, kind, limits):
        return Fault(where, problem)
    answer = None if role == "ordinary" else answer_of(value.ranks, value.prob)
    if role != "ordinary" and answer is None:
        return Fault(where, f"got no ranks and no prob, want the answer of a {role} item. Add it.")
    files: dict[str, File] = {}

    def place(entry: Mapping[str, Any]) -> dict[str, Any]:
        file = _file(Media(data=entry["bytes"], path=entry["path"], where=where), limits)
        files[file.sha256] = file
        return {"sha256": file.sha256}

    try:
        row = to_row(value)
        if any(content.media() for content in value.contents()):
            row = replaced(row, {"bytes", "path"}, place)
    except UserError as error:
        return Fault(where, str(error).removeprefix(f"{where}: "))
    seen = [row["prompt"], row["prompts"], row["prefix"], row["candidates"]]
    first, *others = row["candidates"]
    if all(one == first for one in others) and value.prompts is None:
        return Fault(where, "got the same candidate again and again, want different ones. Remove the row.")
    hashed = json.dumps(seen, sort_keys=True)
    if "\\ud" in hashed and not is_storable(json.dumps(seen, ensure_ascii=False)):
        return Fault(where, "got half of a character (such as \\ud83d) in a text, want whole ones. Take it out.")
    content_hash = hashlib.sha256(hashed.encode()).hexdigest()
    return Prepared(
        id=value.id,
        content_hash=content_hash,
        k=len(value.candidates),
        row=row,
        files=files,
        answer=answer,
        explanation=explanation,
    )


def _problem(value: Comparison, kind: str, limits: Limits) -> str | None:
    k = len(value.candidates)
    if not is_storable(value.id):
        return f"got the id {value.id!r}, want one without NUL and half characters. Change it."
    if not 2 <= k <= MOST_CANDIDATES:
        return f"got {k} candidates, want 2 to {MOST_CANDIDATES}. Split or remove the row."
    for n, candidate in enumerate(value.candidates, 1):
        if kind == "image" and not candidate.media():
            return f"candidate {n}: got no image, want one in a project of images. Open the data as text."
        if kind == "text" and not candidate.words().strip() and not any(m.tool_calls for m in candidate.messages):
            return f"candidate {n}: got no text, want one in a project of texts. Open the data as images."
    longest = max(len(content.words()) for content in value.contents())
    if longest > limits.characters:
        return f"got a text of {longest} characters, want at most {limits.characters}. Shorten it or remove the row."
    return None


def _file(media: Media, limits: Limits) -> File:
    """Read a file once: its hash, kind and size.

    Raises:
        UserError: missing, too large, outside the roots, or of a kind that no browser shows.
    """
    path = media.path if media.data is None else None
    if path is not None and "://" not in path:
        path = os.path.realpath(path)
    if limits.roots is not None and path is not None:
        place = Path(path.rpartition("::")[2] if "://" in path else path).resolve()
        if not any(place.is_relative_to(root.resolve()) for root in limits.roots):
            raise UserError(f"{media.place()}: the file lies outside the data. Put it into the folder of the data.")
    try:
        if path is not None and "://" not in path and os.path.getsize(path) > limits.media_bytes:
            raise UserError(f"{media.place()}: got more than {limits.media_bytes} bytes. Make it smaller or remove the row.")
    except OSError as fault:
        raise UserError(f"{media.place()}: the image cannot be read ({fault}). Put it there or remove the row.") from fault
    data = media.read()
    if len(data) > limits.media_bytes:
        raise UserError(f"{media.place()}: got {len(data)} bytes, want at most {limits.media_bytes}. Make it smaller.")
    mime, (width, height) = _kind_of(media, data)
    if width * height > limits.pixels:
        raise UserError(f"{media.place()}: got {width} x {height} pixels, want at most {limits.pixels}. Make it smaller.")
    sha256 = hashlib.sha256(data).hexdigest()
    held = data if path is None else None
    return File(sha256=sha256, path=path, data=held, mime=mime, width=width, height=height, num_bytes=len(data))


def _kind_of(media: Media, data: bytes) -> tuple[str, tuple[int, int]]:
    """Tell the type that a file is served as, and its size from its head; a video's size is not read (0, 0)."""
    if suffix := video_suffix(data):
        if suffix not in VIDEOS:
            raise UserError(f"{media.place()}: got a video that no browser plays, want MP4 or WebM. Convert it.")
        return VIDEOS[suffix], (0, 0)
    try:
        with Image.open(io.BytesIO(data)) as image:
            format = image.format or ""
    except (*DAMAGED, Image.DecompressionBombWarning) as fault:
        raise UserError(f"{media.place()}: got a damaged image ({fault}), want one that decodes. Replace it.") from fault
    return SERVED.get(format, "image/png"), Media(data=data, where=media.where).size()


def replaced(value: Any, keys: set[str], place: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Any:
    """Return JSON with every object of just these keys replaced."""
    if isinstance(value, dict):
        if value.keys() == keys:
            return place(value)
        return {name: replaced(one, keys, place) if isinstance(one, dict | list) else one for name, one in value.items()}
    return [replaced(one, keys, place) for one in value] if isinstance(value, list) else value


def open_batch(connection: Connection, project: int, description: str, now: float) -> tuple[int, int]:
    """Begin to add rows from one place; return the source's id and the batch's number."""
    step = update(PROJECT).where(PROJECT.c.id == project).values(batches=PROJECT.c.batches + 1).returning(PROJECT.c.batches)
    batch = int(connection.execute(step).scalar_one())
    values = {"project": project, "batch": batch, "description": description, "added_at": now}
    source = connection.execute(insert(SOURCE).values(**values).returning(SOURCE.c.id)).scalar_one()
    return int(source), batch


def store_rows(
    connection: Connection,
    project: Any,
    prepared: Sequence[Prepared],
    *,
    role: Role,
    source: int,
    batch: int,
    start: int,
) -> Added:
    """Write rows and their media; content that the project has is left as it is.

    Args:
        start: rows of the batch before these.
    """
    hashes = [one.content_hash for one in prepared]
    there = select(ITEM.c.content_hash).where(ITEM.c.project == project.id, ITEM.c.content_hash.in_(hashes))
    known = set(connection.scalars(there))
    fresh: dict[str, tuple[int, Prepared]] = {}
    for number, one in enumerate(prepared, start):
        if one.content_hash not in known:
            fresh.setdefault(one.content_hash, (number, one))
    keys = _store_files(connection, project.id, {sha: file for one in prepared for sha, file in one.files.items()})
    protocol = Protocol.from_json(project.protocol)
    rows = [_item(one, keys, project, protocol, role, source, batch, number) for number, one in fresh.values()]
    if rows:
        connection.execute(insert(ITEM), rows)
        counts = {
            "num_items": PROJECT.c.num_items + len(rows),
            "num_wanted": PROJECT.c.num_wanted + sum(r["want"] for r in rows),
        }
        if role == "ordinary":
            connection.execute(update(PROJECT).where(PROJECT.c.id == project.id).values(**counts))
    return Added(added=len(rows), repeated=len(prepared) - len(rows))


def _store_files(connection: Connection, project: int, files: Mapping[str, File]) -> dict[str, str]:
    """Write the files that the project does not have, note where the others lie now, and return the key of each hash."""
    if not files:
        return {}
    held = select(MEDIA.c.sha256, MEDIA.c.key, MEDIA.c.path).where(MEDIA.c.project == project, MEDIA.c.sha256.in_(list(files)))
    keys: dict[str, str] = {}
    for row in connection.execute(held).all():
        keys[row.sha256] = row.key
        path = files[row.sha256].path
        if row.path is not None and path is not None and path != row.path:
            connection.execute(update(MEDIA).where(MEDIA.c.key == row.key).values(path=path))
    new = [(secrets.token_urlsafe(16), file) for sha, file in files.items() if sha not in keys]
    if new:
        values = ("sha256", "path", "mime", "width", "height", "num_bytes")
        rows = [{"key": key, "project": project, **{n: getattr(file, n) for n in values}} for key, file in new]
        connection.execute(insert(MEDIA), rows)
        blobs = [{"media": key, "data": file.data} for key, file in new if file.data is not None]
        if blobs:
            connection.execute(insert(BLOB), blobs)
    return keys | {file.sha256: key for key, file in new}


def _item(
    one: Prepared,
    keys: Mapping[str, str],
    project: Any,
    protocol: Protocol,
    role: Role,
    source: int,
    batch: int,
    number: int,
) -> dict[str, Any]:
    chance = hashlib.sha256(f"{project.salt}{one.content_hash}".encode()).digest()
    shared = int.from_bytes(chance[:8], "big") / 2**64 < protocol.overlap_share
    want = 0 if role != "ordinary" else protocol.overlap_votes if shared else protocol.votes_per_item
    row = replaced(one.row, {"sha256"}, lambda entry: {"key": keys[entry["sha256"]]}) if one.files else one.row
    return {
        "project": project.id,
        "source": source,
        "comparison": one.id,
        "content_hash": one.content_hash,
        "k": one.k,
        "row": json.dumps(row),
        "role": role,
        "answer": None if one.answer is None else json.dumps(one.answer),
        "explanation": one.explanation,
        "want": want,
        "slots_left": want,
        "position": _position(batch, number, int.from_bytes(chance[8:10], "big") if protocol.order == "random" else 0),
        "shuffle": int.from_bytes(chance[10:14], "big") & LARGEST_SHUFFLE,
    }


def _position(batch: int, number: int, chance: int) -> int:
    """Order within a batch by chance (or not), batches one after the other: what is added later lies ahead of every cursor."""
    if number >= 2 ** POSITION_BITS[1]:
        raise UserError(f"rows: got more than {2 ** POSITION_BITS[1]} at once, want fewer. Add them in parts.")
    return (((batch << POSITION_BITS[0]) | chance) << POSITION_BITS[1]) | number


def chunks(rows: Iterable[Comparison | Fault], size: int = CHUNK_ROWS) -> Iterator[list[Comparison | Fault]]:
    """Yield rows in lists."""
    chunk: list[Comparison | Fault] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
