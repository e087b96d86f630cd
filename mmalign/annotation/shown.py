"""What is on the screen: an item, its candidates in the order drawn for one assignment, and nothing that names their makers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, select

from mmalign.annotation.protocol import Verdict, as_shown
from mmalign.annotation.schema import ITEM, MEDIA, VOTE

THOUGHTS = ("thinking", "reasoning_content")
JUDGED = select(ITEM.c.row, ITEM.c.role).where(ITEM.c.id == bindparam("item"))
PICTURES = select(MEDIA).where(MEDIA.c.key.in_(bindparam("keys", expanding=True)))
STANDS = select(VOTE.c.verdict).where(VOTE.c.assignment == bindparam("assignment"), VOTE.c.revision == bindparam("revision"))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image or video by its opaque key.

    Args:
        key: random; what the media route is asked for.
        mime: image/png, video/mp4 ...
        width, height: pixels as decoded, after EXIF rotation.
    """

    key: str
    mime: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class ShownMessage:
    """One message of a conversation; see `mmalign.records.Message`. `thoughts` is what the model thought before it spoke."""

    role: str
    text: str
    images: tuple[Picture, ...] = ()
    places: tuple[int, ...] = ()
    name: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    thoughts: str = ""


@dataclass(frozen=True, kw_only=True)
class ShownContent:
    """A prompt or a candidate; see `mmalign.records.Content`."""

    text: str | None = None
    images: tuple[Picture, ...] = ()
    messages: tuple[ShownMessage, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    def pictures(self) -> tuple[Picture, ...]:
        """Return every image in it, those of messages too."""
        return (*self.images, *(image for message in self.messages for image in message.images))


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One assignment as a person sees it; all positions are places on the screen, left first.

    Args:
        assignment: its id; a vote carries it.
        revision: what the vote on it must carry: 1, or more after an undo.
        prompt: what all candidates answer.
        prompts: one a place, where each candidate answers its own; else None.
        prefix: text that every candidate goes on from, or None.
        candidates: one a place.
        calibration: whether the right answer is told after the vote.
        expires_at: seconds since 1970; later votes still count, but are marked late.
        guideline_version: the newest.
        earlier: after an undo: the verdict that stands until another is cast, as shown.
    """

    assignment: str
    revision: int
    project: int
    prompt: ShownContent
    candidates: tuple[ShownContent, ...]
    prompts: tuple[ShownContent, ...] | None = None
    prefix: str | None = None
    calibration: bool = False
    expires_at: float = 0.0
    guideline_version: int = 1
    earlier: Verdict | None = None

    @property
    def k(self) -> int:
        """The number of candidates."""
        return len(self.candidates)

    def pictures(self) -> tuple[Picture, ...]:
        """Return every image on the screen, for prefetching."""
        contents = (self.prompt, *(self.prompts or ()), *self.candidates)
        return tuple(picture for content in contents for picture in content.pictures())


def show(connection: Connection, assignment: Any, guideline_version: int) -> Shown:
    """Build what an assignment (a row of its table) shows.

    Names of speakers are told in prompts alone, and not of assistants: they could name a maker.
    """
    item = connection.execute(JUDGED, {"item": assignment.item}).one()
    row = json.loads(item.row)
    keys = sorted(set(_keys(row["prompt"], row["prompts"], row["candidates"])))
    found = connection.execute(PICTURES, {"keys": keys}).all() if keys else []
    media = {m.key: Picture(key=m.key, mime=m.mime, width=m.width, height=m.height) for m in found}
    order = tuple(json.loads(assignment.shown_order))
    prompts = row["prompts"]
    earlier = latest_verdict(connection, assignment) if assignment.revision else None
    return Shown(
        assignment=assignment.id,
        revision=assignment.revision + 1,
        project=assignment.project,
        prompt=_content(row["prompt"], media, told=True),
        candidates=tuple(_content(row["candidates"][n], media, told=False) for n in order),
        prompts=None if prompts is None else tuple(_content(prompts[n], media, told=True) for n in order),
        prefix=row["prefix"],
        calibration=item.role == "calibration",
        expires_at=assignment.expires_at,
        guideline_version=guideline_version,
        earlier=None if earlier is None else as_shown(earlier, order),
    )


def latest_verdict(connection: Connection, assignment: Any) -> Verdict:
    """Return the canonical verdict that stands for an assignment that was voted on."""
    which = {"assignment": assignment.id, "revision": assignment.revision}
    return Verdict.from_json(connection.execute(STANDS, which).scalar_one())


def _keys(prompt: Mapping[str, Any], prompts: Sequence[Any] | None, candidates: Sequence[Any]) -> Iterator[str]:
    for content in (prompt, *(prompts or ()), *candidates):
        for holder in (content, *content["messages"]):
            yield from (image["key"] for image in holder["images"])


def _content(value: Mapping[str, Any], media: Mapping[str, Picture], *, told: bool) -> ShownContent:
    return ShownContent(
        text=value["text"],
        images=tuple(media[image["key"]] for image in value["images"]),
        messages=tuple(_message(message, media, told=told) for message in value["messages"]),
        tools=tuple(json.loads(value["tools"]) if value["tools"] else ()),
    )


def _message(value: Mapping[str, Any], media: Mapping[str, Picture], *, told: bool) -> ShownMessage:
    extra = json.loads(value["extra"]) if value["extra"] else {}
    thoughts = next((extra[name] for name in THOUGHTS if isinstance(extra.get(name), str)), "")
    return ShownMessage(
        role=value["role"],
        text=value["text"] or "",
        images=tuple(media[image["key"]] for image in value["images"]),
        places=tuple(value["places"]),
        name=value["name"] if told and value["role"] != "assistant" else None,
        tool_calls=tuple(json.loads(value["tool_calls"]) if value["tool_calls"] else ()),
        thoughts=thoughts,
    )
