"""One model's answers on disk: a table with a prompt and an answer a row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.conversations import answered, asked, read_message
from mmalign.importers.row_wise import foreign_rows, open_rows, shown
from mmalign.importers.tables import local_path, row_place
from mmalign.records import Content, Fault

ANSWERS = ("completion", "response", "output", "answer")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers by the key of their prompt, the prompts, and where each row is; a prompt's first answer counts."""

    answers: dict[str, Content] = field(default_factory=dict)
    prompts: dict[str, Content] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def predictions(path: str, prompt: str = "prompt", answer: str | None = None, split: str = "train") -> Answers:
    """Read a table of answers: JSONL, JSON, Parquet, CSV, a save_to_disk folder, or a hub data set.

    Args:
        path: file, folder or hub id.
        prompt: column of the prompt: a text, or a list of messages.
        answer: column of the answer: a text, or a list of messages; None: the first of ANSWERS that a row has.
        split: of a hub data set or folder.

    Raises:
        UserError: nothing there, or it cannot be read.
    """
    found = Answers()
    for _, where, row in foreign_rows(open_rows(path, split), row_place(local_path(path), split)):
        if isinstance(row, Fault):
            found.faults.append(row)
            continue
        try:
            question = _content(row, prompt, prompt=True)
            named = answer or next((name for name in ANSWERS if row.get(name) is not None), ANSWERS[0])
            said = _content(row, named, prompt=False)
        except UserError as error:
            found.faults.append(Fault(where, str(error)))
            continue
        key = question.key()
        if key not in found.answers:
            found.answers[key], found.prompts[key], found.places[key] = said, question, where
    return found


def _content(row: Mapping[str, Any], column: str, *, prompt: bool) -> Content:
    value = row.get(column)
    if isinstance(value, list):
        content = Content(messages=tuple(read_message(message, iter(())) for message in value))
    elif isinstance(value, str):
        content = asked(value, "text") if prompt else answered(value, "text")
    else:
        raise UserError(f"got {shown(value)} for {column}, want a text or a list of messages. Name the column.")
    if content.is_empty():
        raise UserError(f"got an empty {column}, want a text. Write one or remove the row.")
    return content
