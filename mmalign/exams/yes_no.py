"""Questions with yes or no for an answer: POPE, and AMBER's discriminative part."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mmalign.errors import UserError
from mmalign.exams.files import matched, rows_of

DIMENSIONS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
}
GENERATIVE = "generative"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Answers by what they should be and what they are, `positive` the class that is looked for."""

    hits: int = 0
    false_alarms: int = 0
    misses: int = 0
    rejections: int = 0

    @classmethod
    def of(cls, pairs: Iterable[tuple[bool, bool | None]]) -> "Counts":
        """Count (is positive, said to be positive); None is an answer that is neither, and wrong."""
        counts = dict.fromkeys(("hits", "false_alarms", "misses", "rejections"), 0)
        for positive, told in pairs:
            right = told is positive
            counts[("hits" if right else "misses") if positive else ("rejections" if right else "false_alarms")] += 1
        return cls(**counts)

    @property
    def number(self) -> int:
        """All answers."""
        return self.hits + self.false_alarms + self.misses + self.rejections


def share(part: int, whole: int) -> float:
    """A part of a whole; 0 of nothing."""
    return part / whole if whole else 0.0


def f1_of(precision: float, recall: float) -> float:
    """Harmonic mean of two shares; 0 where both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def says_no(text: str) -> bool:
    """POPE's rule: the first sentence, without commas, holds the word No, no or not.

    Source: RUCAIBox/POPE, evaluate.py; whatever says nothing of the kind is yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return any(word in words for word in ("No", "no", "not"))


def pope(*, answers: str, questions: str) -> dict[str, float]:
    """POPE: is there a <object> in the image? Accuracy, and precision, recall and F1 of yes.

    Source: Li et al. 2023 (POPE, arXiv 2305.10355), with the rule of the published code (`says_no`).

    Args:
        answers: JSON lines with `answer` (or text, response), by question_id or in the order of the questions.
        questions: the published file: JSON lines with question_id, image, text and label (yes, no).

    Raises:
        UserError: a file that cannot be read, answers that do not go with the questions, a label that is neither.
    """
    pairs = matched(rows_of(questions), rows_of(answers), ("question_id",), answers)
    counts = Counts.of([(_is_yes(row, questions), not says_no(text)) for row, text in pairs])
    precision = share(counts.hits, counts.hits + counts.false_alarms)
    recall = share(counts.hits, counts.hits + counts.misses)
    return {
        "accuracy": share(counts.hits + counts.rejections, counts.number),
        "precision": precision,
        "recall": recall,
        "f1": f1_of(precision, recall),
        "yes_ratio": share(counts.hits + counts.false_alarms, counts.number),
        "number": float(counts.number),
    }


def amber(*, answers: str, annotations: str, exact: bool = True) -> dict[str, float]:
    """AMBER's discriminative part: accuracy, and precision, recall and F1 of no, in all and by dimension.

    Generative entries are passed over. The published code rounds to a tenth of a per cent and adds 0.0001 to the denominator of
    F1; here neither.

    Source: Wang et al. 2023 (AMBER, arXiv 2311.07397), inference.py.

    Args:
        answers: JSON list with id and response.
        annotations: the published annotations.json: id, type and truth.
        exact: an answer counts as `Yes` or `No` only if it is that word and nothing else, as published; else by `says_no`.

    Raises:
        UserError: a file that cannot be read, an answer that is missing, a truth that is neither.
    """
    entries = [row for row in rows_of(annotations) if row.get("type") != GENERATIVE]
    given = rows_of(answers)
    named = {row.get("id") for row in entries}
    pairs = matched(entries, [row for row in given if row.get("id") in named], ("id",), answers)
    told: dict[str, list[tuple[bool, bool | None]]] = {"all": []}
    for row, text in pairs:
        is_no = not _is_yes(row, annotations, "truth")
        claimed = {"Yes": False, "No": True}.get(text) if exact else says_no(text)
        for name in ("all", DIMENSIONS.get(str(row.get("type")), "relation")):
            told.setdefault(name, []).append((is_no, claimed))
    found: dict[str, float] = {}
    for name, some in told.items():
        said_no = sum(claimed is True for _, claimed in some)
        counts = Counts.of(some)
        precision, recall = share(counts.hits, said_no), share(counts.hits, counts.hits + counts.misses)
        place = "" if name == "all" else f"{name}/"
        found |= {
            f"{place}accuracy": share(counts.hits + counts.rejections, counts.number),
            f"{place}precision": precision,
            f"{place}recall": recall,
            f"{place}f1": f1_of(precision, recall),
            f"{place}number": float(counts.number),
        }
    return found


def _is_yes(row: Any, path: str, key: str = "label") -> bool:
    value = row.get(key)
    if value not in ("yes", "no"):
        raise UserError(f"{path}: got the {key} {value!r} in {str(dict(row))[:80]}, want yes or no. Give the published file.")
    return bool(value == "yes")
