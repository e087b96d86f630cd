"""PKU-SafeRLHF: two responses with a verdict on which is better, another on which is safer, and whether each is safe."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from mmalign.errors import UserError
from mmalign.importers.conversations import Form, answered, asked
from mmalign.importers.row_wise import import_rows, judged, open_rows, shown, text_of
from mmalign.importers.tables import Faulty, Imported
from mmalign.records import Comparison, Content, Dropped

Axis = Literal["better", "safer"]
Disagreement = Literal["keep", "drop", "safe_first"]


def pku_safe_rlhf(
    *,
    path: str,
    split: str = "train",
    subset: str | None = None,
    faulty: Faulty = "raise",
    axis: Axis = "better",
    disagreement: Disagreement = "keep",
    unpaired: bool = False,
    form: Form = "messages",
) -> Imported:
    """PKU-SafeRLHF: prompt, response_0, response_1, better_response_id, safer_response_id, is_response_0_safe and _1_.

    The verdicts are kept as judges: `better`, `safer`, `safe` (1 and 0 each).

    Source: PKU-Alignment/PKU-SafeRLHF (arXiv 2406.15513).

    Args:
        path, split: as in `ultrafeedback`; `PKU-Alignment/PKU-SafeRLHF`, train or test.
        subset: the name of one of its parts, `alpaca-7b` for one. None: all.
        faulty: rows without a response or a verdict: `raise`, or `drop` and report.
        axis: which verdict orders the pair: `better` (helpful) or `safer`.
        disagreement: of the two verdicts. `keep`: the axis decides; `drop`: the row is left out, counted; `safe_first`: where
            only one response is safe it wins, else the axis decides.
        unpaired: each response alone, labelled 1 if it is safe, for the view `unpaired`; axis and disagreement do not matter.
        form: as in `ultrafeedback`.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    rule = partial(pku_safe_rlhf_labels, form=form)
    convert = rule if unpaired else partial(pku_safe_rlhf_row, axis=axis, disagreement=disagreement, form=form)
    columns = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
    verdicts = () if unpaired else ("better_response_id", "safer_response_id")
    return import_rows(
        open_rows(path, split, subset=subset),
        convert,
        name="pku_safe_rlhf",
        path=path,
        split=split,
        columns=(*columns, *verdicts),
        faulty=faulty,
        least=1 if unpaired else 2,
    )


def pku_safe_rlhf_row(
    row: Mapping[str, Any], *, axis: Axis = "better", disagreement: Disagreement = "keep", form: Form = "messages"
) -> Comparison | Dropped:
    """Convert one row to a pair; see `pku_safe_rlhf`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    safe = _safe(row)
    verdicts = {name: _verdict(row, f"{name}_response_id") for name in ("better", "safer")}
    winner = verdicts[axis]
    if verdicts["better"] != verdicts["safer"]:
        if disagreement == "drop":
            return Dropped("whose better response is not the safer one")
        if disagreement == "safe_first" and safe[0] != safe[1]:
            winner = safe.index(True)
    scores = {name: [float(id == i) for i in (0, 1)] for name, id in verdicts.items()}
    fields = judged([float(winner == i) for i in (0, 1)], {**scores, "safe": safe})
    return Comparison(id="", prompt=_prompt(row, form), candidates=_candidates(row, form), provenance=_makers(row), **fields)


def pku_safe_rlhf_labels(row: Mapping[str, Any], *, form: Form = "messages") -> tuple[Comparison, ...]:
    """Convert one row to two single responses with their labels; see `pku_safe_rlhf`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    answers, makers = _candidates(row, form), _makers(row)
    return tuple(
        Comparison(
            id="", prompt=_prompt(row, form), candidates=(answer,), scores={"label": (float(safe),)}, provenance=(maker,)
        )
        for answer, safe, maker in zip(answers, _safe(row), makers, strict=True)
    )


def _prompt(row: Mapping[str, Any], form: Form) -> Content:
    return asked(text_of(row, "prompt"), form)


def _candidates(row: Mapping[str, Any], form: Form) -> tuple[Content, ...]:
    return tuple(answered(text_of(row, f"response_{i}"), form) for i in (0, 1))


def _makers(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    names = {"model": "response_{}_source", "severity": "response_{}_severity_level"}
    found = ({key: row.get(name.format(i)) for key, name in names.items()} for i in (0, 1))
    return tuple({key: value for key, value in one.items() if value is not None} for one in found)


def _safe(row: Mapping[str, Any]) -> list[bool]:
    safe = [row.get(f"is_response_{i}_safe") for i in (0, 1)]
    if not all(isinstance(value, bool) for value in safe):
        raise UserError(f"got is_response_0_safe and is_response_1_safe {shown(safe)}, want true or false. Correct the row.")
    return [bool(value) for value in safe]


def _verdict(row: Mapping[str, Any], name: str) -> int:
    value = row.get(name)
    if value not in (0, 1) or isinstance(value, bool):
        raise UserError(f"got {name} {shown(value)}, want 0 or 1. Correct the row.")
    return int(value)
