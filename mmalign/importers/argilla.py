"""Argilla's binarised exports: a chosen and a rejected answer with a rating each."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.conversations import Form, answered, asked, read_messages, split_conversations
from mmalign.importers.row_wise import import_rows, number_of, open_rows, ranks_of, shown, text_of
from mmalign.importers.tables import Faulty, Imported
from mmalign.records import Comparison, Content, Message

SIDES = ("chosen", "rejected")
# The spellings of the exports: ultrafeedback-binarized-preferences-cleaned, dpo-mix-7k, ultrafeedback-binarized-preferences,
# distilabel-capybara-dpo-7k-binarized. distilabel-intel-orca-dpo-pairs has both ratings in one list, in the order of answers
# that it calls generations, and calls the better one of them chosen.
RATINGS = ("{}-rating", "{}_rating", "{}_avg_rating", "rating_{}")
BOTH = "rating"
MODELS = ("{}-model", "{}_model")
ANSWERS = ("{}", "{}_response")
PROMPTS = ("prompt", "instruction", "input")


def argilla(*, path: str, split: str = "train", faulty: Faulty = "raise", form: Form = "messages") -> Imported:
    """Argilla exports: chosen and rejected as messages (prompt included) or texts, chosen-rating, rejected-rating, models.

    The ratings are kept as the judge `rating` and order the pair; equal ratings are a tie, which views drop or keep as a soft
    label, and whose gap is the margin with `margin: gap` of the view `pair`. Rows without ratings are ordered by their columns.

    Args:
        path, split: as in `ultrafeedback`; `argilla/ultrafeedback-binarized-preferences-cleaned`, `argilla/dpo-mix-7k`.
        faulty: rows without answers, whose conversations differ before the answer, or whose rejected rating is the higher one:
            `raise`, or `drop` and report.
        form: of answers that are texts, as in `ultrafeedback`; messages stay messages.

    Raises:
        UserError: no such data set or split; faulty rows.
    """
    convert = partial(argilla_row, form=form)
    return import_rows(open_rows(path, split), convert, name="argilla", path=path, split=split, faulty=faulty)


def argilla_row(row: Mapping[str, Any], *, form: Form = "messages") -> Comparison:
    """Convert one row; see `argilla`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    names = [_named(row, ANSWERS, side) for side in SIDES]
    sides = [row.get(name) for name in names]
    if all(isinstance(side, list) for side in sides):
        chosen, rejected = (read_messages(side or ()) for side in sides)
        prompt, *answers = split_conversations(chosen, rejected)
        asking, candidates = _prompt(row, prompt), tuple(Content(messages=answer) for answer in answers)
    else:
        question = next((name for name in PROMPTS if row.get(name) is not None), PROMPTS[0])
        asking = asked(text_of(row, question), form)
        system = row.get("system")
        if system:
            if form == "text":
                raise UserError("got a system prompt, want form: messages. Set it, since a plain text has no place for one.")
            asking = Content(messages=(Message("system", text_of(row, "system")), *asking.messages))
        candidates = tuple(answered(text_of(row, name), form) for name in names)
    ratings = [_named(row, RATINGS, side) for side in SIDES]
    scores: dict[str, tuple[float, ...]] = {}
    if any(row.get(name) is not None for name in ratings):
        scores["rating"] = tuple(number_of(row, name) for name in ratings)
        if scores["rating"][0] < scores["rating"][1]:
            raise UserError(f"got the ratings {shown(scores['rating'])} of chosen and rejected, want the first higher.")
    elif isinstance(row.get(BOTH), list) and any(value is not None for value in row[BOTH]):
        scores["rating"] = _sorted_pair(row[BOTH])
    models = [row.get(_named(row, MODELS, side)) for side in SIDES]
    return Comparison(
        id="",
        prompt=asking,
        candidates=candidates,
        scores=scores,
        ranks=ranks_of(scores["rating"]) if scores else (1.0, 2.0),
        provenance=tuple({"model": model} if model else {} for model in models) if any(models) else (),
    )


def _sorted_pair(values: list[Any]) -> tuple[float, float]:
    pair = [number_of({BOTH: value}, BOTH) for value in values]
    if len(pair) != 2:
        raise UserError(f"got {len(pair)} numbers for {BOTH}, want those of two answers. Correct the row.")
    return max(pair), min(pair)


def _named(row: Mapping[str, Any], spellings: tuple[str, ...], side: str) -> str:
    names = [spelling.format(side) for spelling in spellings]
    return next((name for name in names if row.get(name) is not None), names[0])


def _prompt(row: Mapping[str, Any], messages: tuple[Message, ...]) -> Content:
    """Return the messages before the answers; where the answers stand alone, the prompt's own column."""
    if messages:
        return Content(messages=messages)
    question = row.get("prompt")
    if isinstance(question, list):
        return Content(messages=read_messages(question))
    return asked(text_of(row, "prompt"), "messages")
