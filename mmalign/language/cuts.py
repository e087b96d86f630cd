"""Conversations that are too long: their first messages go, and the beginning of the first one that stays, never its header."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

from mmalign.errors import UserError
from mmalign.language.turns import Render, reached
from mmalign.records import Message


def cut_conversation(
    ids: Sequence[int],
    limit: int,
    *,
    text: str,
    messages: Sequence[Message],
    render: Render,
    tokens: Callable[[list[str]], list[list[int]]],
    beginning: Sequence[int],
) -> list[int]:
    """A prompt of at most `limit` tokens: what every text begins with, and the end of a conversation.

    It begins with a message, or with the header of one whose words lose their beginning.

    Args:
        ids: tokens of the prompt, more than `limit`; its last ones may be missing.
        text: the prompt as its template wrote it.
        messages: that it was written from.
        render: writes messages by the same template.
        tokens: of texts.
        beginning: first ones of `ids` that every text begins with.

    Raises:
        UserError: nothing of the last message's words would stay, or the template's messages cannot be told apart.
    """
    begun = list(beginning)
    written = tokens([text])[0][: len(begun)] == begun  # by the template, so that the first header has it
    own = list(ids) if written else list(ids[len(begun) :])
    for number, (head, words, end) in enumerate(_places(own, text, messages, render, tokens)):
        before = begun if number or not written else []
        if len(before) + len(own) - head <= limit:
            return [*before, *own[head:]]
        header = [*before, *own[head:words]]
        first = len(own) - (limit - len(header))
        if first < end:
            return [*header, *own[first:]]
    raise UserError(
        f"got a prompt of {len(ids)} tokens, of whose last message adapter.max_prompt_length ({limit}) leaves no words. "
        "Raise it, or filter the row."
    )


def _places(
    ids: Sequence[int], text: str, messages: Sequence[Message], render: Render, tokens: Callable[[list[str]], list[list[int]]]
) -> list[tuple[int, int, int]]:
    """Of each message where its header begins, where its words do, and where these end, in tokens."""
    places: list[int] = []
    for number, message in enumerate(messages):
        head = reached(text, messages[:number], render, places[-1], ends=True) if number else 0
        words = message.text.strip()
        found = text.find(words, head) if words else -1
        places += [head, found, found + len(words)] if found >= 0 else [head, head, head]  # goes or stays as a whole
    counts = [_shared(part, ids) for part in tokens([text[:place] for place in places])]
    return list(zip(counts[::3], counts[1::3], counts[2::3], strict=True))


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))
