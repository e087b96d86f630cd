"""Conversations as data sets write them: transcripts with markers, messages under other keys, images by placeholder."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmalign.errors import UserError
from mmalign.importers.row_wise import shown
from mmalign.records import Content, Media, Message, message_of

Form = Literal["messages", "text"]
TURN = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
IMAGE_TAG = "<image>"
UNREAD_TAGS = ("<video>", "<audio>")
CALL = "call"
ROLES = {
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "bot", "chatgpt")},
    **{name: "tool" for name in ("tool", "observation", "tool_response")},
    **{name: CALL for name in ("tool_call", "function_call")},
    "system": "system",
}


def asked(text: str, form: Form) -> Content:
    """Return a prompt of one question: a message of the user, or the text as it is."""
    return Content(messages=(Message("user", text),)) if form == "messages" else Content(text=text)


def answered(text: str, form: Form) -> Content:
    """Return an answer: a message of the assistant, or the text as it is."""
    return Content(messages=(Message("assistant", text),)) if form == "messages" else Content(text=text)


def transcript(text: str) -> tuple[Message, ...]:
    r"""Return the turns of `\n\nHuman: ...\n\nAssistant: ...`, without white space at their ends; an empty last one too.

    Raises:
        UserError: something stands before the first marker, or there is no marker.
    """
    before, *turns = TURN.split(text)
    if before.strip() or not turns:
        raise UserError(
            f"got a transcript that begins {shown(text[:30])}, want it to begin with \\n\\nHuman:. Correct the row."
        )
    return tuple(Message(SPEAKERS[who], said.strip()) for who, said in zip(turns[::2], turns[1::2], strict=True))


def first_difference(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Return the number of messages two conversations share, leaving one of each at least.

    Raises:
        UserError: one is empty.
    """
    if not chosen or not rejected:
        raise UserError("got an empty conversation, want the prompt and its answer. Correct the row.")
    most = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(most) if chosen[n] != rejected[n]), most)


def split_conversations(
    chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Return the messages that two conversations share, and how each goes on: by the assistant, and its tools, alone.

    Raises:
        UserError: one is empty, or they differ before the assistant's answer.
    """
    shared = first_difference(chosen, rejected)
    rests = (tuple(chosen[shared:]), tuple(rejected[shared:]))
    for rest in rests:
        if rest[0].role != "assistant" or any(message.role == "user" for message in rest):
            raise UserError(
                f"got conversations that differ from message {shared + 1} on, which go on by "
                f"{', '.join(message.role for message in rest)}, want them to differ in the last answer of the assistant alone."
            )
    return tuple(chosen[:shared]), *rests


def read_messages(
    entries: Sequence[Any],
    images: Sequence[Media] = (),
    *,
    role_key: str = "role",
    content_key: str = "content",
    roles: Mapping[str, str] = ROLES,
) -> tuple[Message, ...]:
    """Read a conversation; images stand where `<image>` does, or before the first words of the user if it is nowhere.

    Args:
        images: of the whole conversation, in order.

    Raises:
        UserError: as `read_message`; more images than placeholders.
    """
    waiting = iter(images)
    read = partial(read_message, images=waiting, role_key=role_key, content_key=content_key, roles=roles)
    messages = [read(entry) for entry in entries]
    left = tuple(waiting)
    first = next((n for n, message in enumerate(messages) if message.role == "user"), None)
    if left and (len(left) < len(images) or first is None):
        raise UserError(f"got {len(images)} images and {len(images) - len(left)} {IMAGE_TAG}, want one each. Correct the row.")
    if left and first is not None:
        messages[first] = replace(messages[first], images=left)
    return join_calls(messages)


def media_of(values: Any, root: Path) -> tuple[Media, ...]:
    """Return the images of a column: one or a list of paths, or of `{bytes, path}`.

    Args:
        root: folder that paths are relative to.

    Raises:
        UserError: something else.
    """
    found = []
    for value in values if isinstance(values, list) else [] if values is None else [values]:
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (None, value)
        if not isinstance(data, bytes | None) or not isinstance(path, str | None) or (data is None and not path):
            raise UserError(f"got the image {shown(value)}, want a path. Correct the row.")
        if data is None and path is not None and "://" not in path:
            path = str((root / path).absolute())
        found.append(Media(data=data, path=path))
    return tuple(found)


def read_message(
    entry: Any,
    images: Iterator[Media],
    *,
    role_key: str = "role",
    content_key: str = "content",
    roles: Mapping[str, str] = ROLES,
) -> Message:
    """Read a message under any keys and roles; `<image>` in its text takes the next image.

    Args:
        entry: the message.
        images: of the row, in order.
        role_key, content_key: the two keys.
        roles: name in the data -> system, user, assistant, tool, or `call`, whose content is the JSON of one or more calls
            `{"name", "arguments"}`.

    Raises:
        UserError: not a message, an unknown role, more placeholders than images, a video or sound.
    """
    said = entry.get(content_key) if isinstance(entry, Mapping) else None
    if not isinstance(said, str | list):
        raise UserError(f"got {shown(entry)}, want a message with {role_key} and {content_key}. Correct the row.")
    role = roles.get(str(entry.get(role_key)))
    if role is None:
        raise UserError(f"got the role {shown(entry.get(role_key))}, want one of {', '.join(roles)}. Correct the row.")
    rest = {key: value for key, value in entry.items() if key not in (role_key, content_key, "loss", "weight")}
    if role == CALL:
        chat = {**rest, "role": "assistant", "content": "", "tool_calls": tool_calls(said)}
    else:
        chat = {**rest, "role": role, "content": _parts(said) if isinstance(said, str) else said}
    try:
        return message_of(chat, lambda path: Media(path=path), images)
    except (TypeError, ValueError) as fault:
        raise UserError(f"got {fault}. Correct the row.") from fault


def _parts(text: str) -> str | list[dict[str, Any]]:
    unread = next((tag for tag in UNREAD_TAGS if tag in text), None)
    if unread is not None:
        raise UserError(f"got {unread} in a message, want texts and images only. Leave such rows out.")
    first, *others = text.split(IMAGE_TAG)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": "image"}, {"type": "text", "text": other}]
    return parts if others else text


def tool_calls(text: Any) -> list[dict[str, Any]]:
    """Return the calls that a text of JSON names, as chat templates want them.

    Raises:
        UserError: no JSON of `{"name", "arguments"}`, or a list of such.
    """
    try:
        value = json.loads(text)
        calls = value if isinstance(value, list) else [value]
        return [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls]
    except (TypeError, ValueError, KeyError, AttributeError) as fault:
        raise UserError(f'got the call {shown(text)}, want JSON of {{"name", "arguments"}}. Correct the row.') from fault


def join_calls(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Join calls in a row to one message of the assistant with all of them; a text right before them says why."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        if message.role == "assistant" and message.tool_calls and not message.text and last and last.role == "assistant":
            joined[-1] = replace(last, tool_calls=(*last.tool_calls, *message.tool_calls))
        else:
            joined.append(message)
    return tuple(joined)


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the functions of a `tools` column, a list or its JSON, each as `{"type": "function", "function": {...}}`.

    Raises:
        UserError: neither.
    """
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value or []
        return tuple(tool if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools)
    except (TypeError, ValueError) as fault:
        raise UserError(f"got the tools {shown(value)}, want a list of functions. Correct the row.") from fault
