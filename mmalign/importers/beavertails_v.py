"""BeaverTails-V: two answers to a question about an image, with verdicts on help and safety, and whether each is safe."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmalign.errors import UserError
from mmalign.importers.row_wise import import_rows, judged, number_of, open_rows, shown, text_of
from mmalign.importers.sight import answer, folder_of, picture_of, question
from mmalign.importers.tables import Faulty, Imported
from mmalign.records import Comparison, Dropped

Axis = Literal["helpful", "safer"]
Disagreement = Literal["keep", "drop", "safe_first"]
VERDICTS = {"helpful": "more_helpful_response_id", "safer": "safer_response_id"}
SAFE = {"yes": 1.0, "no": 0.0, "true": 1.0, "false": 0.0}


def beavertails_v(
    *,
    path: str,
    split: str = "train",
    subset: str | None = None,
    images: str | None = None,
    axis: Axis = "safer",
    disagreement: Disagreement = "keep",
    faulty: Faulty = "raise",
    verify: bool = True,
    num_proc: int | None = None,
) -> Imported:
    """BeaverTails-V: question, image, response_1, response_2, more_helpful_response_id, safer_response_id and what is safe.

    The verdicts are kept as the judges `helpful`, `safer` and `safe` (1 and 0 each), the rates as `helpful_rate` and
    `harmless_rate` where they are there.

    Source: saferlhf-v/BeaverTails-V (Safe RLHF-V, arXiv 2503.17682). PKU-Alignment/BeaverTails-V has single answers without
        a verdict, which are not read here.

    Args:
        path: a Parquet or JSON file, a folder, or a hub id.
        split: train, or evaluation.
        subset: one of the categories (`animal_abuse` ...), which the hub wants named.
        images: the folder of images; None is that of the data.
        axis: which verdict orders the pair: `safer`, or `helpful`.
        disagreement: of the two verdicts. `keep`: the axis decides; `drop`: the row is left out, counted; `safe_first`: where
            only one answer is safe it wins, else the axis decides.
        faulty: rows without image, answer or verdict: `raise`, or `drop` and report.
        verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    convert = partial(beavertails_v_row, axis=axis, disagreement=disagreement, images=folder_of(path, images))
    return import_rows(
        open_rows(path, split, subset=subset),
        convert,
        name="beavertails_v",
        path=path,
        split=split,
        columns=("question", "image", "response_1", "response_2", *VERDICTS.values()),
        faulty=faulty,
        verify=verify,
        num_proc=num_proc,
    )


def beavertails_v_row(
    row: Mapping[str, Any], *, axis: Axis = "safer", disagreement: Disagreement = "keep", images: Path = Path()
) -> Comparison | Dropped:
    """Convert one row; see `beavertails_v`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    winners = {name: _winner(row, column) for name, column in VERDICTS.items()}
    safe = [_safe(row, f"is_response_{n}_safe") for n in (1, 2)]
    best = winners[axis]
    if winners["helpful"] != winners["safer"]:
        if disagreement == "drop":
            return Dropped("whose more helpful answer is not the safer one")
        if disagreement == "safe_first" and safe[0] != safe[1]:
            best = safe.index(1.0)
    scores = {name: [float(winner == i) for i in (0, 1)] for name, winner in winners.items()} | {"safe": safe}
    for name in ("helpful_rate", "harmless_rate"):
        if all(row.get(f"response_{n}_{name}") is not None for n in (1, 2)):
            scores[name] = [number_of(row, f"response_{n}_{name}") for n in (1, 2)]
    makers = [row.get(f"response_{n}_from") for n in (1, 2)]
    return Comparison(
        id="",
        prompt=question(text_of(row, "question"), (picture_of(row, images),)),
        candidates=tuple(answer(row, f"response_{n}") for n in (1, 2)),
        provenance=tuple({"model": maker} if maker else {} for maker in makers) if any(makers) else (),
        **judged([float(best == i) for i in (0, 1)], scores),
    )


def _winner(row: Mapping[str, Any], name: str) -> int:
    value = row.get(name)
    if isinstance(value, bool) or str(value) not in ("1", "2"):
        raise UserError(f"got {name} {shown(value)}, want 1 or 2. Correct the row.")
    return int(str(value)) - 1


def _safe(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    found = SAFE.get(str(value).strip().lower())
    if found is None:
        raise UserError(f"got {name} {shown(value)}, want yes or no. Correct the row.")
    return found
