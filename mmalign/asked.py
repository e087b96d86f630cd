"""Prompts that a language model is asked: texts or conversations, from files, lists, or rows of any importer."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.config import Choice
from mmalign.errors import UserError
from mmalign.prompts import read_prompts
from mmalign.records import Comparison, Content, Fault, comparison, outlines
from mmalign.records.conversations import entry_of
from mmalign.records.reading import row_of


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, the id of the row it came from (None: it is not from data), and its place for messages."""

    content: Content
    id: str | None
    where: str


def asked_prompts(prompts: str | Sequence[str] | None, data: Choice | None) -> list[Prompt]:
    """The prompts that a config names: of a file or list all of them, of rows the distinct ones.

    Args:
        prompts: a .txt file (one a line), a .jsonl file (a text, messages, or an object with either as `prompt` a line), or
            a list of texts; or
        data: an importer with its settings.

    Raises:
        UserError: none there, an empty one, or one with images, with its file and line.
    """
    if data is not None:
        found = list(_distinct(outlines(data.build().dataset)))
    elif isinstance(prompts, str) and prompts.endswith(".jsonl"):
        found = list(_of_lines(Path(prompts).expanduser()))
    else:
        texts = read_prompts(prompts or ())
        found = [Prompt(content=Content(text=text), id=None, where=f"prompts: {n}") for n, text in enumerate(texts, 1)]
    if not found:
        raise UserError("prompts: got none, want at least one. Check the file.")
    for prompt in found:
        if prompt.content.media():
            raise UserError(f"{prompt.where}: got a prompt with images, which a language model does not see. Remove the row.")
    return found


def _distinct(rows: Iterable[Comparison]) -> Iterable[Prompt]:
    seen: set[str] = set()
    for row in rows:
        for content in row.prompts or (row.prompt,):
            key = content.key()
            if key not in seen:
                seen.add(key)
                yield Prompt(content=content, id=row.id, where=row.where or row.id)


def _of_lines(file: Path) -> Iterable[Prompt]:
    """Prompts of JSON lines: a text, a list of messages, or an object with either as `prompt`."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"prompts: {file} cannot be read ({fault}). Give a .txt or .jsonl file in UTF-8.") from fault
    wants = 'want "text", messages, or {"prompt": either}. Correct the line.'
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        try:
            value = json.loads(line)
        except ValueError as fault:
            raise UserError(f"{where}: got no valid JSON ({fault}), {wants}") from fault
        value = value.get("prompt", value.get("messages")) if isinstance(value, dict) else value
        if value is None:
            raise UserError(f"{where}: got {line[:60]!r}, {wants}")
        row = row_of({"prompt": value}, where, str(number), partial(_beside, file))
        if isinstance(row, Fault):
            raise UserError(str(row))
        yield Prompt(content=comparison(row, least=0).prompt, id=None, where=where)


def _beside(file: Path, name: str) -> str:
    return str(file.absolute().parent / name)


def prompt_entry(content: Content) -> Any:
    """A prompt as our JSON lines have it: a text, messages, or an object with messages and tools."""
    if not content.messages:
        return content.text
    messages = [entry_of(message) for message in content.messages]
    return {"messages": messages, "tools": list(content.tools)} if content.tools else messages
