"""Files of exams: rows of JSON or JSON lines, and answers matched to what was asked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.errors import UserError

SAID = ("answer", "response", "text", "caption", "prediction", "output")  # keys of an answer, the first that is there


def rows_of(path: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON list or of JSON lines.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    place = Path(path).expanduser()
    whole = json_of(path, lines=True)
    rows = whole if isinstance(whole, list) else [whole]
    wrong = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if wrong is not None or not rows:
        raise UserError(f"{place}:{wrong or 1}: got no object, want a JSON list or lines of them. Check the file.")
    return rows


def json_of(path: str, *, lines: bool = False) -> Any:
    """Return what a JSON file holds; with `lines` a list where each line is a value of its own.

    Raises:
        UserError: the file cannot be read.
    """
    place = Path(path).expanduser()
    try:
        text = place.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"{place}: cannot be read ({fault}). Give a JSON file in UTF-8.") from fault
    try:
        return json.loads(text)
    except ValueError as fault:
        if not lines:
            raise UserError(f"{place}: got no valid JSON ({fault}). Give the file as it was published.") from fault
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as fault:
                raise UserError(
                    f"{place}:{number}: got no valid JSON ({fault}), want one object a line. Correct it."
                ) from fault
    return found


def words_of(path: str) -> list[str]:
    """Return the lines of a file of phrases that are not blank.

    Raises:
        UserError: the file cannot be read, or has none.
    """
    place = Path(path).expanduser()
    try:
        found = [line.strip() for line in place.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"{place}: cannot be read ({fault}). Give a text file in UTF-8.") from fault
    if not found:
        raise UserError(f"{place}: got no line with words, want one phrase a line. Check the file.")
    return found


def said(row: Mapping[str, Any], where: str) -> str:
    """Return the answer that a row holds.

    Raises:
        UserError: it holds none.
    """
    found = next((row[key] for key in SAID if isinstance(row.get(key), str)), None)
    if not isinstance(found, str):
        raise UserError(f"{where}: got the keys {', '.join(row)}, want one of {', '.join(SAID)}. Name the answer so.")
    return found


def matched(
    asked: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], keys: Sequence[str], path: str
) -> list[tuple[Mapping[str, Any], str]]:
    """Return every question with its answer: by the first of these keys that both have, else by their order.

    Raises:
        UserError: an answer is missing, is there twice, or their numbers differ where nothing names them.
    """
    key = next((one for one in keys if all(one in row for row in (*asked, *answers))), None)
    if key is None:
        if len(asked) != len(answers):
            raise UserError(f"{path}: got {len(answers)} answers to {len(asked)} questions, want one each, in their order.")
        return [(row, said(answer, f"{path}:{n}")) for n, (row, answer) in enumerate(zip(asked, answers, strict=True), 1)]
    found: dict[Any, str] = {}
    for number, answer in enumerate(answers, 1):
        if answer[key] in found:
            raise UserError(f"{path}:{number}: got a second answer for {key} {answer[key]}, want one each. Remove it.")
        found[answer[key]] = said(answer, f"{path}:{number}")
    missing = [row[key] for row in asked if row[key] not in found]
    if missing:
        raise UserError(f"{path}: got no answer for {len(missing)} of {len(asked)}, first {key} {missing[0]}. Answer all.")
    return [(row, found[row[key]]) for row in asked]
