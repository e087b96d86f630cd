"""Rows with a blind candidate: what is asked without the image, which answers are left out, and how one stands in its row."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmalign.metrics.refusals import refuses, sees_nothing
from mmalign.multimodal.degradations import without_images
from mmalign.records import Comparison, Content, Dropped, Message
from mmalign.records.verdicts import PHI, values_of

BLIND, DEGRADED = "blind", "degraded"  # sources of an answer, as its provenance tells them
NO_IMAGE = Dropped("no image in the prompt")


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which blind answers are left out; the paper leaves out none.

    Args:
        like_chosen: similarity to the best candidate from which on an answer is left out; 1: equal but for case and blanks.
        refusals: leave out answers that decline, or say that they see no image.
    """

    like_chosen: float | None = None
    refusals: bool = False

    def reason(self, text: str, chosen: str) -> str | None:
        """Why an answer is left out, or None."""
        if self.refusals and sees_nothing(text):
            return "a blind answer that says it sees no image"
        if self.refusals and refuses(text):
            return "a blind answer that declines"
        if self.like_chosen is not None and likeness(text, chosen) >= self.like_chosen:
            return "a blind answer like the chosen one"
        return None


def likeness(one: str, other: str) -> float:
    """Share of two texts that is the same, 0 to 1, by Python's difflib; case and blanks do not count."""
    left, right = (re.sub(r"\s+", " ", text).strip().lower() for text in (one, other))
    return 1.0 if left == right else difflib.SequenceMatcher(None, left, right, autojunk=False).ratio()


def shown_prompt(row: Comparison) -> Content | Dropped:
    """What is asked with its images, where there are some and one prompt for all candidates."""
    if row.prompts is not None:
        return Dropped("a prompt of its own for each candidate")
    if row.prefix is not None:
        return Dropped("a prefix that answers go on from")
    if any(candidate.media() for candidate in row.candidates):
        return Dropped("candidates that are images, not answers")
    return row.prompt if row.prompt.media() else NO_IMAGE


def blind_prompt(row: Comparison) -> Content | Dropped:
    """What is asked when the images are taken out, and with them their placeholders; no other word is changed."""
    shown = shown_prompt(row)
    if isinstance(shown, Dropped):
        return shown
    prompt = without_images(shown)
    last = prompt.messages[-1] if prompt.messages else None
    if prompt.is_empty() or (last is not None and last.is_empty()):
        return Dropped("nothing asked beside the image")
    return prompt


def of_text(row: Comparison) -> bool:
    """Whether a row is one of text alone, to which a model can answer as it stands."""
    last = row.prompt.messages[-1] if row.prompt.messages else None
    return shown_prompt(row) == NO_IMAGE and not row.prompt.is_empty() and (last is None or not last.is_empty())


def question(row: Comparison, *, shown: bool = False, keep_texts: bool = True) -> Content | Dropped | None:
    """What a row asks of the base, why it is left out, or None: it stays without an answer.

    Args:
        row: as it was imported.
        shown: images are shown; rows of text alone then stay as they are.
        keep_texts: rows of text alone are not left out.
    """
    prompt = shown_prompt(row) if shown else blind_prompt(row)
    if isinstance(prompt, Content) or not (keep_texts and of_text(row)):
        return prompt
    return None if shown else row.prompt


def is_ordered(row: Comparison, by: str) -> bool:
    """Whether its own candidates are judged by what orders them; one alone is."""
    return len(row.candidates) < 2 or not isinstance(values_of(row, by, 0.0), Dropped)


def best_text(row: Comparison, by: str) -> str:
    """The words of the best candidate, or of the first where none is judged."""
    judged = values_of(row, by, 0.0) if len(row.candidates) > 1 else Dropped("one candidate")
    if isinstance(judged, Dropped):
        return row.candidates[0].words()
    return row.candidates[judged[0].index(max(judged[0]))].words()


def with_blind(
    row: Comparison,
    answers: Sequence[str],
    origins: Sequence[Mapping[str, Any]],
    by: str = "auto",
    source: str = BLIND,
) -> Comparison:
    """A row with blind candidates at its end, ranked with the worst of the others.

    Blind answers have no scores: the order is kept as ranks, scores and a soft label go into the provenance.

    Args:
        row: as it was.
        answers, origins: texts, and where each comes from; there may be none.
        by: what orders the row, as in the view `pair`.
        source: what the provenance of the answers says.
    """
    k = len(row.candidates)
    judged = values_of(row, by, 0.0) if k > 1 else ((1.0,), None)
    ranks: tuple[float, ...] | None = None
    if not isinstance(judged, Dropped):
        values = judged[0]
        own = tuple(1.0 + sum(other > value for other in values) for value in values)
        ranks = (*own, *([max(own) if k > 1 else 2.0] * len(answers)))
    told = list(row.provenance) or [{} for _ in row.candidates]
    kept = {judge: values for judge, values in row.scores.items() if judge != PHI}
    told = [
        {
            **origin,
            **({"scores": {judge: values[n] for judge, values in kept.items()}} if kept else {}),
            **({"prob": row.prob if n == 0 else 1 - row.prob} if row.prob is not None else {}),
        }
        for n, origin in enumerate(told)
    ]
    return replace(
        row,
        candidates=(*row.candidates, *(_said(text, row.candidates[0]) for text in answers)),
        ranks=ranks,
        prob=None,
        scores={},
        provenance=(*told, *({"source": source, **origin} for origin in origins)),
    )


def _said(text: str, other: Content) -> Content:
    """An answer of the form that the row's others have."""
    return Content(messages=(Message("assistant", text),)) if other.messages else Content(text=text)
