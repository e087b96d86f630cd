r"""Transcripts with `\n\nHuman:` and `\n\nAssistant:`: HH-RLHF (pairs) and Nectar (rankings of up to seven answers)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.conversations import Form, answered, transcript
from mmalign.importers.row_wise import import_rows, list_of, number_of, open_rows, shown, text_of
from mmalign.importers.tables import Faulty, Imported
from mmalign.records import Comparison, Content, Dropped, Message

ANSWER = "\n\nAssistant:"


def hh_rlhf(
    *, path: str, split: str = "train", folder: str | None = None, faulty: Faulty = "raise", form: Form = "messages"
) -> Imported:
    """HH-RLHF: columns chosen and rejected, two whole transcripts that share all but the last answer.

    The rare rows whose transcripts differ before it, in a turn of the human most often, are left out and counted.

    Source: Anthropic/hh-rlhf (arXiv 2204.05862).

    Args:
        path, split: as in `ultrafeedback`; `Anthropic/hh-rlhf`, train or test.
        folder: a part of it: `helpful-base`, `harmless-base`, `helpful-online`, `helpful-rejection-sampled`. None: all.
        faulty: transcripts that do not begin with the human, do not end with the assistant, or have an empty answer: `raise`,
            or `drop` and report.
        form: `messages` for chat models; `text` keeps the markers: a prompt that ends with `Assistant:`.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    convert = partial(hh_rlhf_row, form=form)
    table = open_rows(path, split, folder)
    return import_rows(table, convert, name="hh_rlhf", path=path, split=split, columns=("chosen", "rejected"), faulty=faulty)


def hh_rlhf_row(row: Mapping[str, Any], *, form: Form = "messages") -> Comparison | Dropped:
    """Convert one row; see `hh_rlhf`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    texts = [text_of(row, name) for name in ("chosen", "rejected")]
    turns = [transcript(text) for text in texts]
    for name, one in zip(("chosen", "rejected"), turns, strict=True):
        if one[0].role != "user" or one[-1].role != "assistant":
            raise UserError(f"got a {name} transcript from {one[0].role} to {one[-1].role}, want user to assistant.")
    if turns[0][:-1] != turns[1][:-1]:
        return Dropped("with transcripts that differ before the last answer")
    prompt, candidates = Content(messages=turns[0][:-1]), tuple(Content(messages=one[-1:]) for one in turns)
    if form == "text":
        parts = [text.rpartition(ANSWER) for text in texts]
        prompt = Content(text=parts[0][0] + ANSWER)
        candidates = tuple(Content(text=answer) for _, _, answer in parts)
    return Comparison(id="", prompt=prompt, candidates=candidates, ranks=(1.0, 2.0))


def nectar(*, path: str, split: str = "train", faulty: Faulty = "raise", form: Form = "messages") -> Imported:
    """Nectar: a prompt with markers, and answers of up to seven models ranked by GPT-4 (1 is best).

    Views make lists (`ranked`) or pairs of them; the best against each other one are the pairs Starling was trained on.

    Source: berkeley-nest/Nectar.

    Args:
        path, split: as in `ultrafeedback`.
        faulty: rows with fewer than two answers, an empty one, or a rank that is none: `raise`, or `drop` and report.
        form: as in `hh_rlhf`.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    convert = partial(nectar_row, form=form)
    table = open_rows(path, split)
    return import_rows(table, convert, name="nectar", path=path, split=split, columns=("prompt", "answers"), faulty=faulty)


def nectar_row(row: Mapping[str, Any], *, form: Form = "messages") -> Comparison:
    """Convert one row; see `nectar`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    text, answers = text_of(row, "prompt"), list_of(row, "answers")
    if not all(isinstance(answer, Mapping) for answer in answers):
        raise UserError(f"got the answers {shown(answers)}, want objects with answer, model and rank. Correct the row.")
    ranks = tuple(number_of(answer, "rank") for answer in answers)
    if any(rank < 1 for rank in ranks):
        raise UserError(f"got the ranks {shown(ranks)}, want 1 for the best and up. Correct the row.")
    prompt = Content(text=text) if form == "text" else Content(messages=_question(text))
    return Comparison(
        id="",
        prompt=prompt,
        candidates=tuple(answered(text_of(answer, "answer"), form) for answer in answers),
        ranks=ranks,
        provenance=tuple({"model": answer["model"]} if answer.get("model") else {} for answer in answers),
    )


def _question(text: str) -> tuple[Message, ...]:
    """Read a transcript that ends where the assistant is to speak."""
    turns = transcript(text)
    asked = turns[:-1] if turns[-1].role == "assistant" and not turns[-1].text else turns
    if not asked or asked[0].role != "user" or asked[-1].role != "user":
        raise UserError(f"got the prompt {shown(text)}, want turns from the human to the human. Correct the row.")
    return asked
