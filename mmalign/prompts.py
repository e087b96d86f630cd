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


def _prompt_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as fault:
        raise UserError(f'{where}: got no valid JSON ({fault}), want {{"prompt": "text"}}. Correct the line.') from fault
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f'{where}: got {line[:60]!r}, want {{"prompt": "text"}} or "text". Correct the line.')
    return text
