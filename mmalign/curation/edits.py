"""What a relabelling says of a row (labels, a system prompt, a note for its provenance), and the row as it is written then."""

from dataclasses import dataclass, field, replace
from typing import Any

from mmalign.errors import UserError
from mmalign.records import Comparison, Content, Dropped, Message

CURATION = "curation"  # key of a candidate's provenance: a list of what was done to its row, in order


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One row that is to be written instead of a row.

    Args:
        suffix: added to the id, where one row becomes several.
        system: a message of the system before all others of the prompt; a text prompt becomes a conversation for it.
        labels: new values of ranks, prob, weight or margin; None takes one away.
        scores: judges' scores that are added.
        note: what was done, for the provenance: plain JSON values.
    """

    suffix: str = ""
    system: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Relabelled:
    """For every row what becomes of it, and sentences about all of them."""

    outcomes: list[tuple[Edit, ...] | Dropped]
    told: tuple[str, ...] = ()


def edited(row: Comparison, edit: Edit, method: str) -> Comparison:
    """The row to be written, with the method's name in its provenance.

    Raises:
        UserError: a system prompt for a conversation that begins with another one, or for joint pairs.
    """
    whole = row if edit.system is None else with_system(row, edit.system)
    return noted(
        replace(whole, id=row.id + edit.suffix, scores={**row.scores, **edit.scores}, **edit.labels),
        {"relabel": method, **edit.note, "of": row.id, "from": row.where},
    )


def noted(row: Comparison, note: dict[str, Any]) -> Comparison:
    """The row with one more entry under `curation` in the provenance of every candidate."""
    origins = row.provenance or ({},) * len(row.candidates)
    return replace(row, provenance=tuple({**o, CURATION: [*o.get(CURATION, []), note]} for o in origins))


def order_labels(first_is_better: bool, prob: float | None = None) -> dict[str, Any]:
    """The labels of a pair: ranks, and P(candidate 0 beats candidate 1) where it is soft; equal ranks for prob 0.5."""
    ranks = (1.0, 2.0) if first_is_better else (2.0, 1.0)
    return {"ranks": (1.0, 1.0) if prob == 0.5 else ranks, "prob": prob}


def with_system(row: Comparison, system: str) -> Comparison:
    """The row with a system prompt; prompt and answers become messages where they were texts.

    Raises:
        UserError: the conversation has a system prompt already, or each candidate has a prompt of its own.
    """
    if row.prompts is not None:
        raise UserError(f"{row.where or row.id}: got a prompt for each candidate, want one for both. Leave joint pairs out.")
    messages = row.prompt.messages or (Message(role="user", text=row.prompt.text or "", images=row.prompt.images),)
    if messages[0].role == "system":
        raise UserError(
            f"{row.where or row.id}: got a system prompt already, want none, for the goal stands there. Take it out, or put it "
            "into the first message of the user."
        )
    prompt = replace(row.prompt, text=None, images=(), messages=(Message(role="system", text=system), *messages))
    return replace(row, prompt=prompt, candidates=tuple(map(_answer, row.candidates)))


def _answer(content: Content) -> Content:
    if content.messages:
        return content
    return Content(messages=(Message(role="assistant", text=content.text or "", images=content.images),))
