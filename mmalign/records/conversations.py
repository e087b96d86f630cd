"""Messages in JSON: `{role, content}` with a text or a list of parts, as chat templates and data sets have them."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmalign.records.media import Media
from mmalign.records.rows import Content, Message

PART_KINDS = ("text", "image", "image_url")


def message_of(
    entry: Mapping[str, Any], image: Callable[[Any], Media] | None = None, images: Iterator[Media] | None = None
) -> Message:
    """Read one message: role, content (a text, or a list of parts), name, tool_calls; any other key is kept in `extra`.

    Keys without a value (null) are as if they were absent, since tables give every message the keys of all of them.

    Args:
        entry: the message.
        image: reads the `image` of a part (or the `url` of its `image_url`). None: an image that the part names is a fault.
        images: where the images of parts lie that name none (`{"type": "image"}`), as in an `images` column.

    Raises:
        TypeError: not a message, with what was wanted.
    """
    if not isinstance(entry, Mapping) or not isinstance(entry.get("role"), str):
        raise TypeError(f"{_shown(entry)}, want a message with role and content")
    known = {key: value for key, value in entry.items() if value is not None}
    content, name = known.pop("content", ""), known.pop("name", None)
    calls = known.pop("tool_calls", None) or []
    calls = json.loads(calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls) or not isinstance(name, str | None):
        raise TypeError(f"{_shown(entry)}, want a name as text and tool_calls as objects")
    text, pictures, places = _parts(content, image, images)
    return Message(
        role=known.pop("role"),
        text=text,
        images=tuple(pictures),
        name=name,
        tool_calls=tuple(without_nulls(call) for call in calls),
        places=tuple(places) if any(places) else (),
        extra=without_nulls(known),
    )


def asked(prompt: Content) -> str | list[dict[str, Any]]:
    """Return a prompt as scorers of texts take it: its text, or its messages as chat templates want them.

    Images are parts that mark their places; a text with images is a message of the user.
    """
    if prompt.images and not prompt.messages:
        return [entry_of(Message("user", prompt.text or "", images=prompt.images))]
    if not prompt.messages:
        return prompt.text or ""
    return [entry_of(one) for one in prompt.messages]


def _parts(
    content: Any, image: Callable[[Any], Media] | None, images: Iterator[Media] | None
) -> tuple[str, list[Media], list[int]]:
    """Read the content of a message: its text, its images, and where in the text each stands."""
    if isinstance(content, str):
        return content, [], []
    if not isinstance(content, list):
        raise TypeError(f"the content {_shown(content)}, want a text or a list of parts")
    text, pictures, places = "", list[Media](), list[int]()
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in PART_KINDS:
            raise TypeError(f"the part {_shown(part)}, want one of type {', '.join(PART_KINDS)}")
        if kind == "text":
            text += _said(part)
            continue
        pictures.append(_picture(part, image, images))
        places.append(len(text))
    return text, pictures, places


def _said(part: Mapping[str, Any]) -> str:
    said = part.get("text")
    said = part.get("content") if said is None else said
    if not isinstance(said, str):
        raise TypeError(f"the part {_shown(part)}, want a text in it")
    return said


def _picture(part: Mapping[str, Any], image: Callable[[Any], Media] | None, images: Iterator[Media] | None) -> Media:
    named = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None), None)
    named = named.get("url", named) if isinstance(named, Mapping) else named
    if named is not None:
        if image is None:
            raise TypeError(f"the part {_shown(part)}, want no image here")
        return image(named)
    found = next(images, None) if images is not None else None
    if found is None:
        raise TypeError("more image parts than images, want one each")
    return found


def entry_of(message: Message, image: Callable[[Media], Any] | None = None) -> dict[str, Any]:
    """Return a message as `message_of` reads it, and as chat templates want it.

    Args:
        image: what stands under `image` in the part of an image. None: nothing, the part only marks its place.
    """
    content: str | list[dict[str, Any]] = message.text
    if message.images:
        content, start = [], 0
        for media, place in zip(message.images, message.places or (0,) * len(message.images), strict=True):
            if place > start:
                content.append({"type": "text", "text": message.text[start:place]})
                start = place
            content.append({"type": "image"} if image is None else {"type": "image", "image": image(media)})
        if message.text[start:]:
            content.append({"type": "text", "text": message.text[start:]})
    named = {} if message.name is None else {"name": message.name}
    calls = {"tool_calls": list(message.tool_calls)} if message.tool_calls else {}
    return {"role": message.role, "content": content, **named, **calls, **message.extra}


def without_nulls(value: Any) -> Any:
    """Return JSON without the keys that have no value, at any depth: a table gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return json.dumps(value, default=lambda other: type(other).__name__)[:60]
