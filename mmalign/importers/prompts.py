"""Prompts without images, for sources that make their own."""

import json
from pathlib import Path

from mmalign.errors import UserError
from mmalign.importers.tables import Imported
from mmalign.records.table import features


def prompts(*, path: str, distinct: bool = True) -> Imported:
    """One row a prompt of a text file (one a line), or of a JSONL file ("text", or an object with `prompt` or `caption`).

    For the prompts of comparisons name their own importer, with the view `prompts`.

    Args:
        path: x.txt or x.jsonl.
        distinct: keep only the first of equal prompts.

    Raises:
        UserError: no such file, another kind of file, an empty prompt (with its line), or none at all.
    """
    from datasets import Dataset

    place = Path(path).expanduser()
    if place.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: want a .txt or .jsonl file of prompts. Convert it, or name the importer of your data.")
    try:
        with place.open(encoding="utf-8-sig") as file:  # lines as an editor counts them: a prompt may have U+2028 inside
            lines = [line.removesuffix("\n") for line in file]
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: cannot be read ({fault}). Give a text file in UTF-8.") from fault
    seen: set[str] = set()
    rows = []
    for number, line in enumerate(lines, 1):
        text = _text(line, f"{path}:{number}") if place.suffix == ".jsonl" else line
        if not text.strip():
            raise UserError(f"{path}:{number}: got an empty prompt, want a text. Write one or remove the line.")
        if distinct and text in seen:
            continue
        seen.add(text)
        prompt = {"text": text, "images": []}
        rows.append({"id": f"{number}", "prompt": prompt, "candidates": [], "scores": [], "where": f"{path}:{number}"})
    if not rows:
        raise UserError(f"{path}: got no prompts, want at least one. Check the file.")
    empty = dict.fromkeys(features())
    return Imported(Dataset.from_list([{**empty, **row} for row in rows], features=features()), ())


def _text(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as fault:
        raise UserError(f'{where}: got no valid JSON ({fault}), want {{"prompt": "text"}}. Correct the line.') from fault
    named = value if isinstance(value, dict) else {"prompt": value}
    text = next((named[key] for key in ("prompt", "caption") if key in named), None)
    if not isinstance(text, str):
        raise UserError(f'{where}: got no prompt, want "text" or {{"prompt": "text"}}. Correct the line.')
    return text
