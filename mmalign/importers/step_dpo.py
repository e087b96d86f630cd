"""Rows that are no plain pairs: Step-DPO's next step of a solution, and DOVE's two questions with their own answers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mmalign.importers.conversations import Form, answered, asked
from mmalign.importers.row_wise import import_rows, open_rows, text_of
from mmalign.importers.tables import Faulty, Imported
from mmalign.records import Comparison, Content


def step_dpo(*, path: str, split: str = "train", faulty: Faulty = "raise", form: Form = "messages") -> Imported:
    """Step-DPO: prompt, initial_reason_steps, chosen, rejected: the next step, after steps that are given. View `step`.

    full_chosen, full_rejected and answer are kept in the provenance.

    Source: xinlai/Math-Step-DPO-10K (arXiv 2406.18629).

    Args:
        path, split: as in `ultrafeedback`.
        faulty: rows without question or step: `raise`, or `drop` and report.
        form: `messages`: the question is a message of the user, and the steps begin the assistant's answer; or `text`.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    columns = ("prompt", "initial_reason_steps", "chosen", "rejected")
    convert = partial(step_dpo_row, form=form)
    table = open_rows(path, split)
    return import_rows(table, convert, name="step_dpo", path=path, split=split, columns=columns, faulty=faulty)


def step_dpo_row(row: Mapping[str, Any], *, form: Form = "messages") -> Comparison:
    """Convert one row; see `step_dpo`. The steps stay plain texts, since they do not end a turn.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    names = ("chosen", "rejected")
    given = {"answer": row["answer"]} if row.get("answer") is not None else {}
    whole = [{"full": row[f"full_{name}"]} if row.get(f"full_{name}") is not None else {} for name in names]
    return Comparison(
        id="",
        prompt=asked(text_of(row, "prompt"), form),
        candidates=tuple(Content(text=text_of(row, name)) for name in names),
        ranks=(1.0, 2.0),
        provenance=tuple({**given, **one} for one in whole),
        prefix=text_of(row, "initial_reason_steps"),
    )


def dove(*, path: str, split: str = "train", faulty: Faulty = "raise", form: Form = "messages") -> Imported:
    """DOVE: i_chosen, r_chosen, i_reject, r_reject: two instructions, each with its response. View `joint`.

    Source: DOVE, joint preference optimisation (arXiv 2404.00530).

    Args:
        path, split: as in `ultrafeedback`.
        faulty: rows without instruction or response: `raise`, or `drop` and report.
        form: as in `ultrafeedback`.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    columns = ("i_chosen", "r_chosen", "i_reject", "r_reject")
    convert = partial(dove_row, form=form)
    table = open_rows(path, split)
    return import_rows(table, convert, name="dove", path=path, split=split, columns=columns, faulty=faulty)


def dove_row(row: Mapping[str, Any], *, form: Form = "messages") -> Comparison:
    """Convert one row; see `dove`. The row's own prompt is that of the chosen response.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    prompts = tuple(asked(text_of(row, name), form) for name in ("i_chosen", "i_reject"))
    answers = tuple(answered(text_of(row, name), form) for name in ("r_chosen", "r_reject"))
    return Comparison(id="", prompt=prompts[0], candidates=answers, ranks=(1.0, 2.0), prompts=prompts)
