"""Multiple choice: the letter that an answer means, and how often it is the right one."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmalign.errors import UserError
from mmalign.exams.files import matched, rows_of
from mmalign.exams.yes_no import share

LETTERS = "ABCDEFGHIJ"
FIRST = re.compile(r"^\W*([A-J])(?:[\W_]|$)")
CLAIMED = re.compile(r"(?:answer|option|choice)(?: is|:)?\s*\(?([A-J])\b", re.IGNORECASE)
BRACKETED = re.compile(r"\(([A-J])\)")


def letter_of(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter that an answer means, or None where it does not say.

    In this order: a letter at its beginning (`B`, `(B)`, `B. a cat`); `the answer is B`; the only letter in brackets; the only
    option whose words it says.
    """
    said = text.strip()
    first = FIRST.match(said)
    if first is not None and not (first[1] in "AI" and re.match(r"\W*[AI] [a-z]", said)):  # A cat, I think
        return first[1]
    claimed = CLAIMED.search(said)
    if claimed is not None and claimed[1].upper() in LETTERS[: len(options) or None]:
        return claimed[1].upper()
    bracketed = set(BRACKETED.findall(said))
    if len(bracketed) == 1:
        return str(bracketed.pop())
    plain = _plain(said)
    named = [LETTERS[n] for n, option in enumerate(options) if option.strip() and f" {_plain(option)} " in f" {plain} "]
    return named[0] if len(named) == 1 else None


def multiple_choice(*, answers: str, questions: str) -> dict[str, float]:
    """Multiple choice: accuracy, and the share of answers that name no option, which count as wrong.

    Goes with SIUO's choices, MMStar, CV-Bench, MMVP, RealWorldQA and the like, whose files differ: bring them to this form.

    Args:
        answers: JSON lines with id (or question_id) and answer, or in the order of the questions.
        questions: JSON lines with the right letter as `answer` (`B` or `(B)`) and, where answers may be in words, `options`: a
            list, or an object letter -> words; `category`, where there is one, is told by itself.

    Raises:
        UserError: a file that cannot be read, answers that do not go with the questions, a right answer that is no letter.
    """
    marks: dict[str, list[tuple[bool, bool]]] = {"": []}
    for row, text in matched(rows_of(questions), rows_of(answers), ("id", "question_id", "index"), answers):
        right = letter_of(str(row.get("answer", "")))
        if right is None:
            raise UserError(f"{questions}: got the answer {row.get('answer')!r}, want a letter. Correct the row.")
        told = letter_of(text, _options(row))
        for name in ("", *((f"{row['category']}/",) if row.get("category") else ())):
            marks.setdefault(name, []).append((told == right, told is None))
    found: dict[str, float] = {}
    for name, some in marks.items():
        found[f"{name}accuracy"] = share(sum(right for right, _ in some), len(some))
        found[f"{name}number"] = float(len(some))
    return {**found, "unclear": share(sum(unclear for _, unclear in marks[""]), len(marks[""]))}


def _options(row: Mapping[str, Any]) -> list[str]:
    options = row.get("options") or row.get("choices") or []
    if isinstance(options, Mapping):
        return [str(options.get(letter, "")) for letter in LETTERS[: len(options)]]
    return [str(option) for option in options]


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()
