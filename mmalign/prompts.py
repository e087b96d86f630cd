"""Prompts to sample for: from a text file, from JSON lines, or from a config's own list."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.errors import UserError


def read_prompts(source: str | Sequence[str]) -> list[str]:
    """Prompts of a .txt file (one a line), a .jsonl file (`"text"` or `{"prompt": "text"}` a line), or a list.

    Raises:
        UserError: no such file, another kind of file, or an empty prompt, with file and line.
    """
    if not isinstance(source, str):
        numbered: list[tuple[str, Any]] = [(f"prompts.{index}", text) for index, text in enumerate(source)]
        place = "prompts"
    else:
        file, place = Path(source).expanduser(), source
        if file.suffix not in (".txt", ".jsonl"):
            raise UserError(f"prompts: got {source!r}, want a .txt or .jsonl file, or a list of prompts.")
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as fault:
            raise UserError(f"{source}: cannot be read ({fault}). Give a .txt or .jsonl file in UTF-8.") from fault
        numbered = [(f"{source}:{number}", line) for number, line in enumerate(lines, 1)]
        if file.suffix == ".jsonl":
            numbered = [(where, _prompt_of(line, where)) for where, line in numbered]
    for where, text in numbered:
        if not text.strip():
            raise UserError(f"{where}: got an empty prompt, want a text. Write one or remove the line.")
    if not numbered:
        raise UserError(f"{place}: got no prompts, want at least one.")
    return [text for _, text in numbered]


def read_sources(source: str | Sequence[str]) -> list[Path]:
    """Source images of the prompts of a .jsonl file: `{"prompt": "text", "image": "file"}` a line, beside that file.

    Empty where no line names one, and for prompts that are no .jsonl file. Read after `read_prompts`, which checks the rest.

    Raises:
        UserError: a line without an image where others have one, or an image that is not there, with file and line.
    """
    if not isinstance(source, str) or not source.endswith(".jsonl"):
        return []
    file = Path(source).expanduser()
    values = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines()]
    names = [value.get("image") if isinstance(value, dict) else None for value in values]
    if not any(names):
        return []
    for number, name in enumerate(names, 1):
        if not isinstance(name, str) or not name:
            raise UserError(f'{source}:{number}: got no source image, want "image": a file, as other lines have. Add it.')
        if not (file.parent / name).is_file():
            raise UserError(f"{source}:{number}: the image {name} is missing. Put it beside {file.name}, or remove the line.")
    return [file.parent / str(name) for name in names]


def _prompt_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as fault:
        raise UserError(f'{where}: got no valid JSON ({fault}), want {{"prompt": "text"}}. Correct the line.') from fault
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f'{where}: got {line[:60]!r}, want {{"prompt": "text"}} or "text". Correct the line.')
    return text
