"""What users and tools say within an answer of several messages: where it stands in the conversation that a template wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from mmalign.errors import UserError
from mmalign.records import Content, Message

Render = Callable[..., str]  # (messages, ends=...) -> a conversation as text; without `ends` up to where the assistant begins
MODEL = "assistant"


def said_by_others(whole: str, said: Sequence[Message], answers: Sequence[Message], render: Render) -> tuple[int, ...]:
    """Characters of `whole` between which users and tools have the word: where each run of theirs begins, where it ends.

    A run begins where the template ends the turn before it, and ends where the template lets the assistant go on: its headers
    belong to it, the end of the assistant's turn does not.

    Args:
        whole: the conversation as the template writes it.
        said: messages of the prompt.
        answers: messages of the answer.
        render: writes messages by the same template.

    Raises:
        UserError: the assistant has no part in the answer; or the template writes the conversation otherwise as it goes on.
    """
    roles = [message.role for message in answers]
    if MODEL not in roles:
        raise UserError(
            f"got an answer of {' and '.join(dict.fromkeys(roles))}, want the assistant's. Correct or remove the row."
        )
    places: list[int] = []
    start = 0
    for model, run in groupby(roles, key=lambda role: role == MODEL):
        stop = start + len(list(run))
        if not model:
            after = places[-1] if places else 0
            begun = reached(whole, (*said, *answers[:start]), render, after, ends=True)
            last = stop == len(answers)
            places += [begun, len(whole) if last else reached(whole, (*said, *answers[:stop]), render, begun, ends=False)]
        start = stop
    return tuple(places)


def reached(whole: str, messages: Sequence[Message], render: Render, after: int, *, ends: bool) -> int:
    """How far these messages go in the whole conversation, in characters.

    Raises:
        UserError: the template writes them otherwise there.
    """
    text = render(messages, ends=ends)
    if whole.startswith(text):
        return len(text)
    words = messages[-1].text.strip()
    tail = text[text.rfind(words) :] if words else ""  # the last message, whatever becomes of those before it
    found = whole.find(tail, after) if tail.startswith(words) and words else -1
    if found < 0:
        shown = " ".join(Content(messages=tuple(messages)).words().split())[:60]
        raise UserError(
            f"adapter.chat_template: it writes {shown!r} otherwise once the conversation goes on, so that its messages cannot "
            "be told apart, to score the assistant's or to cut a long prompt. Give another template, or other rows."
        )
    return found + len(tail)
