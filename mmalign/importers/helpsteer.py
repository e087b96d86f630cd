"""HelpSteer2 (two rated responses a prompt, in rows that follow each other) and HelpSteer2-Preference (their comparison)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Literal

from mmalign.errors import UserError
from mmalign.importers.conversations import Form, answered
from mmalign.importers.row_wise import (
    LINE,
    foreign_rows,
    import_groups,
    import_rows,
    judged,
    number_of,
    open_rows,
    text_of,
)
from mmalign.importers.tables import Faulty, Imported, check_columns, local_path, row_place
from mmalign.records import Comparison, Content, Dropped, Fault, Message

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
WEIGHTED = "weighted"
TURN = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")
# The split of a row of HelpSteer2-Preference, which is published as one table.
SPLITS = {"train": ("train",), "validation": ("val", "validation")}


def helpsteer2(
    *,
    path: str,
    split: str = "train",
    faulty: Faulty = "raise",
    weights: dict[str, float] | None = None,
    form: Form = "messages",
) -> Imported:
    """HelpSteer2: rows of prompt, response and five attributes from 0 to 4; two rows that follow each other share a prompt.

    score = helpfulness, or sum of weights[attribute] * attribute;  equal scores are a tie

    Every attribute is kept as a judge, the weighted sum as `weighted`; `margin: gap` of the view `pair` takes it. Earlier turns
    of a prompt (`<extra_id_1>Assistant`) become messages.

    Source: nvidia/HelpSteer2 (arXiv 2406.08673).

    Args:
        path, split: as in `ultrafeedback`; `nvidia/HelpSteer2`, train or validation.
        faulty: a row without partner, without response or attribute: `raise`, or `drop` and report.
        weights: weight of each attribute that counts, as published on a reward model's card (that of verbosity is negative).
            None: helpfulness alone.
        form: as in `ultrafeedback`; `text` leaves the markers of earlier turns in the prompt.

    Raises:
        UserError: no such data set, split or columns; an unknown attribute in weights; faulty rows.
    """
    unknown = sorted(set(weights or ()) - set(ATTRIBUTES))
    if unknown:
        raise UserError(f"weights: got {', '.join(unknown)}, want attributes: {', '.join(ATTRIBUTES)}.")
    table = open_rows(path, split)
    place = row_place(local_path(path), split)
    if LINE not in table.column_names:
        check_columns(table, ("prompt", "response", *ATTRIBUTES), path, "helpsteer2 columns")

    convert = partial(helpsteer2_pair, weights=weights, form=form)

    def values() -> Iterator[Comparison | Fault]:
        for number, where, first, second in _pairs(foreign_rows(table, place)):
            try:
                value = first if isinstance(first, Fault) else convert(first, second)
            except UserError as error:
                value = Fault(where, str(error))
            if isinstance(value, Comparison):
                value = replace(value, id=f"helpsteer2-{number}", where=where)
            yield value

    return import_groups(values(), place=place, faulty=faulty)


Numbered = tuple[int, str, Mapping[str, Any] | Fault]


def _pairs(rows: Iterator[Numbered]) -> Iterator[tuple[int, str, Mapping[str, Any] | Fault, Mapping[str, Any]]]:
    """Yield (number, place, row, the next row of its prompt); a Fault in place of a row without one."""
    waiting: Numbered | None = None
    for number, where, row in chain(rows, [(0, "", Fault("", ""))]):
        if waiting is not None:
            before, place, first = waiting
            if not isinstance(row, Fault) and not isinstance(first, Fault) and first.get("prompt") == row.get("prompt"):
                yield before, place, first, row
                waiting = None
                continue
            lonely = "got one response to its prompt, want two rows of one prompt that follow each other. Add the other one."
            yield before, place, first if isinstance(first, Fault) else Fault(place, lonely), {}
        waiting = (number, where, row)


def helpsteer2_pair(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    *,
    weights: Mapping[str, float] | None = None,
    form: Form = "messages",
) -> Comparison:
    """Convert two rows of one prompt; see `helpsteer2`.

    Raises:
        UserError: what is wrong with them, without their place.
    """
    rows = (first, second)
    scores = {name: [number_of(row, name) for row in rows] for name in ATTRIBUTES}
    order = scores["helpfulness"]
    if weights is not None:
        order = scores[WEIGHTED] = [sum(w * scores[name][i] for name, w in weights.items()) for i in (0, 1)]
    return Comparison(
        id="",
        prompt=_prompt(text_of(first, "prompt"), form),
        candidates=tuple(answered(text_of(row, "response"), form) for row in rows),
        **judged(order, scores),
    )


def helpsteer2_preference(
    *,
    path: str,
    split: str = "train",
    folder: str | None = None,
    faulty: Faulty = "raise",
    strength: Literal["none", "margin", "weight"] = "none",
    rationale: bool = False,
    form: Form = "messages",
) -> Imported:
    """HelpSteer2-Preference: prompt, response_1, response_2, preference_strength (-3 to 3), preference_statement.

    A positive strength says that response_2 is better, 0 is a tie, which views drop or keep as a soft label.

    Source: HelpSteer2-Preference (arXiv 2410.01257): margin is its Bradley-Terry with margin, weight its scaled one.

    Args:
        path: as in `ultrafeedback`; `nvidia/HelpSteer2` with folder `preference`, or the file preference.jsonl.gz.
        split: train or validation: rows are told by their column `split` (train, val); of tables without it, their split.
        folder: the folder of a hub data set or local copy that holds the rows.
        faulty: rows without a response or a strength from -3 to 3: `raise`, or `drop` and report.
        strength: give the size of preference_strength as the `margin` or the `weight` of the row.
        rationale: keep preference_statement as the further completion `rationale`.
        form: as in `helpsteer2`.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    table = open_rows(path, "train", folder)
    named = LINE in table.column_names or "split" in table.column_names
    if not named and split != "train":
        table = open_rows(path, split, folder)
    convert = partial(helpsteer2_preference_row, split=split, strength=strength, rationale=rationale, form=form)
    columns = ("prompt", "response_1", "response_2", "preference_strength")
    return import_rows(table, convert, name="helpsteer2_preference", path=path, split=split, columns=columns, faulty=faulty)


def helpsteer2_preference_row(
    row: Mapping[str, Any],
    *,
    split: str | None = None,
    strength: Literal["none", "margin", "weight"] = "none",
    rationale: bool = False,
    form: Form = "messages",
) -> Comparison | Dropped:
    """Convert one row; see `helpsteer2_preference`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    if split is not None and row.get("split") is not None and row["split"] not in SPLITS.get(split, (split,)):
        return Dropped(f"of the split {row['split']}")
    value = number_of(row, "preference_strength")
    if value not in range(-3, 4):
        raise UserError(f"got the preference_strength {value:g}, want an integer from -3 to 3. Correct the row.")
    extras = {"rationale": answered(text_of(row, "preference_statement"), form)} if rationale else {}
    return Comparison(
        id="",
        prompt=_prompt(text_of(row, "prompt"), form),
        candidates=tuple(answered(text_of(row, name), form) for name in ("response_1", "response_2")),
        ranks=(1.0 + (value > 0), 1.0 + (value < 0)),
        margin=abs(value) if strength == "margin" else None,
        weight=abs(value) if strength == "weight" else None,
        extras=extras,
    )


def _prompt(text: str, form: Form) -> Content:
    """Read `first turn <extra_id_1>Assistant\\nanswer <extra_id_1>User\\nsecond turn` as messages."""
    if form == "text":
        return Content(text=text)
    first, *turns = TURN.split(text)
    later = (Message(who.lower(), said.strip()) for who, said in zip(turns[::2], turns[1::2], strict=True))
    return Content(messages=(Message("user", first), *later))
