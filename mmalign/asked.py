"""Prompts that a language model is asked: texts or conversations, with images or without, from files, lists, or rows."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.config import Choice
from mmalign.errors import UserError
from mmalign.prompts import read_prompts
from mmalign.records import Comparison, Content, Fault, comparison, outlines
from mmalign.records.reading import row_of


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, the id of the row it came from (None: it is not from data), and its place for messages.

    Args:
        content: as it is asked; of rows without the bytes of its images.
        id: of the row.
        where: for messages.
        load: reads it with its images. None: `content` has them.
    """

    content: Content
    id: str | None
    where: str
    load: Callable[[], Content] | None = None

    def whole(self) -> Content:
        """The prompt with its images."""
        return self.content if self.load is None else self.load()


def asked_prompts(prompts: str | Sequence[str] | None, data: Choice | None) -> list[Prompt]:
    """The prompts that a config names: of a file or list all of them, of rows the distinct ones.

    Args:
        prompts: a .txt file (one a line), a .jsonl file (a text, messages, or an object with either as `prompt` a line; images
            are parts of messages, with paths from the file's folder), or a list of texts; or
        data: an importer with its settings.

    Raises:
        UserError: none there, or an empty one, with its file and line.
    """
    if data is not None:
        found = list(_distinct(data.build().dataset))
    elif isinstance(prompts, str) and prompts.endswith(".jsonl"):
        found = list(_of_lines(Path(prompts).expanduser()))
    else:
        texts = read_prompts(prompts or ())
        found = [Prompt(content=Content(text=text), id=None, where=f"prompts: {n}") for n, text in enumerate(texts, 1)]
    if not found:
        raise UserError("prompts: got none, want at least one. Check the file.")
    return found


def _distinct(dataset: Any) -> Iterator[Prompt]:
    """Distinct prompts; images are read to tell them apart, and not kept."""
    seen: set[str] = set()
    for place, row in enumerate(outlines(dataset)):
        for number, content in enumerate(row.prompts or (row.prompt,)):
            load = partial(_loaded, dataset, place, number) if content.media() else None
            key = prompt_key(content if load is None else load())
            if key not in seen:
                seen.add(key)
                yield Prompt(content=content, id=row.id, where=row.where or row.id, load=load)


def prompt_key(content: Content) -> str:
    """A hash of a prompt: of its images, and of its words also where they are a text beside them."""
    return content.key() if not (content.images and content.text) else f"{content.key()} {content.text}"


def _loaded(dataset: Any, place: int, number: int) -> Content:
    row: Comparison = comparison(dataset[place], least=0)
    return row.prompt if row.prompts is None else row.prompts[number]


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
