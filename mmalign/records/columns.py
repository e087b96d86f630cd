"""Contents as table columns: text, images, and conversations whose open-ended parts are JSON, since Arrow wants one schema."""

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from mmalign.errors import UserError
from mmalign.records.media import Media
from mmalign.records.rows import Content, Message

TEMPLATE = "chat_template_kwargs"  # key of an object among the tools of a column that is not a tool
NO_IMAGE = {"bytes": None, "path": None}
TEXTS = ("role", "text", "name", "tool_calls", "extra")


def content_features(*, conversations: bool = True) -> dict[str, Any]:
    """Return the columns of one content. Images are stored as `datasets.Image`: bytes or path, not decoded.

    Args:
        conversations: with messages, and tools with what the template is given; tables written before there were any lack them.
    """
    from datasets import Image, List, Value

    plain = {"text": Value("string"), "images": List(Image(decode=False))}
    if not conversations:
        return plain
    message = {
        **{name: Value("string") for name in TEXTS},  # tool_calls and extra are JSON
        "images": List(Image(decode=False)),
        "places": List(Value("int32")),
    }
    return {**plain, "messages": List(message), "tools": Value("string")}


def content_row(value: Content) -> dict[str, Any]:
    """Return a content as a value of its column."""
    return {
        "text": value.text,
        "images": _image_rows(value.images),
        "messages": [_message_row(message) for message in value.messages],
        "tools": _tools_column(value),
    }


def _tools_column(value: Content) -> str | None:
    """JSON of the tools, and of what the chat template is given: tables of all versions have this one column for both."""
    given = [{TEMPLATE: value.template_kwargs}] if value.template_kwargs else []
    return json.dumps([*value.tools, *given]) if value.tools or given else None


def _message_row(message: Message) -> dict[str, Any]:
    return {
        "role": message.role,
        "text": message.text,
        "name": message.name,
        "tool_calls": json.dumps(message.tool_calls) if message.tool_calls else None,
        "extra": json.dumps(message.extra) if message.extra else None,
        "images": _image_rows(message.images),
        "places": list(message.places),
    }


def _image_rows(images: Iterable[Media]) -> list[dict[str, Any]]:
    return [{"bytes": m.data, "path": m.path} for m in images]


def content_of(value: Mapping[str, Any], where: str) -> Content:
    """Read a value of a content column, also one without the columns of conversations.

    Args:
        where: file, row and part, for messages.

    Raises:
        UserError: a text that is none, or JSON that is none.
    """
    objects = _objects(value.get("tools"), f"{where}: tools")
    return Content(
        text=_text(value.get("text"), where),
        images=_images(value.get("images"), where),
        messages=tuple(_message(m, f"{where}, message {n}") for n, m in enumerate(value.get("messages") or (), 1)),
        tools=tuple(one for one in objects if set(one) != {TEMPLATE}),
        template_kwargs=next((one[TEMPLATE] for one in objects if set(one) == {TEMPLATE}), {}),
    )


def _message(value: Mapping[str, Any], where: str) -> Message:
    return Message(
        role=_text(value.get("role"), where) or "",
        text=_text(value.get("text"), where) or "",
        images=_images(value.get("images"), where),
        name=_text(value.get("name"), where),
        tool_calls=tuple(_objects(value.get("tool_calls"), f"{where}: tool_calls")),
        places=tuple(value.get("places") or ()),
        extra=next(iter(_objects(value.get("extra"), f"{where}: extra")), {}),
    )


def _images(values: Iterable[Mapping[str, Any]] | None, where: str) -> tuple[Media, ...]:
    return tuple(Media(data=m["bytes"], path=m["path"], where=where) for m in values or ())


def _text(value: Any, where: str) -> str | None:
    if not isinstance(value, str | None):
        raise UserError(f"{where}: got the text {value!r}, want a string. Correct the row.")
    return value


def _objects(text: str | None, where: str) -> list[dict[str, Any]]:
    """Read JSON of one object or of a list of them."""
    try:
        value = json.loads(text) if text else []
    except (TypeError, ValueError) as fault:
        raise UserError(f"{where}: got no valid JSON ({fault}). Correct the row.") from fault
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{where}: got {text}, want JSON objects. Correct the row.")
    return entries


def outline_contents(array: Any) -> list[dict[str, Any] | None]:
    """Read an Arrow array of contents, touching texts and the numbers of images but no image."""
    names = [array.type.field(n).name for n in range(array.type.num_fields)]
    columns: dict[str, list[Any]] = {"text": array.field("text").to_pylist(), "images": _counted(array.field("images"))}
    if "messages" in names:
        columns["messages"] = _grouped(array.field("messages"), _outline_messages)
        columns["tools"] = array.field("tools").to_pylist()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]


def outline_lists(array: Any) -> list[list[dict[str, Any] | None] | None]:
    """Read an Arrow array of lists of contents in the same way; None where the list is absent."""
    found = _grouped(array, outline_contents)
    return [values if valid else None for values, valid in zip(found, array.is_valid().to_pylist(), strict=True)]


def _outline_messages(array: Any) -> list[dict[str, Any]]:
    columns = {name: array.field(name).to_pylist() for name in (*TEXTS, "places")}
    columns["images"] = _counted(array.field("images"))
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _counted(array: Any) -> list[list[dict[str, Any]]]:
    return [[NO_IMAGE] * (n or 0) for n in array.value_lengths().to_pylist()]


def _grouped(array: Any, read: Callable[[Any], list[Any]]) -> list[list[Any]]:
    counts = [n or 0 for n in array.value_lengths().to_pylist()]
    if not sum(counts):
        return [[] for _ in counts]
    flat = iter(read(array.flatten()))
    return [list(islice(flat, n)) for n in counts]
