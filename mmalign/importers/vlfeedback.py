"""VLFeedback: four answers of different models to one image, each rated in three aspects."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmalign.errors import UserError
from mmalign.importers.row_wise import import_rows, judged, open_rows, shown, text_of
from mmalign.importers.sight import answer, folder_of, picture_of, question
from mmalign.importers.tables import Faulty, Imported
from mmalign.records import Comparison, Dropped

Axis = Literal["average", "helpfulness", "visual_faithfulness", "ethical_considerations"]
ASPECTS: dict[str, str] = {
    "helpfulness": "Helpfulness",
    "visual_faithfulness": "Visual Faithfulness",
    "ethical_considerations": "Ethical Considerations",
}


def vlfeedback(
    *,
    path: str,
    split: str = "train",
    images: str | None = None,
    axis: Axis = "average",
    faulty: Faulty = "raise",
    verify: bool = True,
    num_proc: int | None = None,
) -> Imported:
    """VLFeedback: prompt, img_path (or image), and completions with response, model and ratings of three aspects.

    The ratings (1 to 5) are kept as the judges helpfulness, visual_faithfulness and ethical_considerations. An answer that
    lacks one is left out of its row; a row with fewer than two such answers is left out, counted.

    Source: MMInstruction/VLFeedback (arXiv 2312.10665), whose pairs follow the average.

    Args:
        path: vlfeedback_80k.jsonl, a Parquet file, a folder, or a hub id.
        split: of a hub data set.
        images: the folder of `merged_images`; None is that of the data.
        axis: what orders the answers.
        faulty: rows without prompt, image or completions: `raise`, or `drop` and report.
        verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    convert = partial(vlfeedback_row, axis=axis, images=folder_of(path, images))
    return import_rows(
        open_rows(path, split),
        convert,
        name="vlfeedback",
        path=path,
        split=split,
        columns=("prompt", "completions"),
        faulty=faulty,
        verify=verify,
        num_proc=num_proc,
    )


def vlfeedback_row(row: Mapping[str, Any], *, axis: Axis = "average", images: Path = Path()) -> Comparison | Dropped:
    """Convert one row; see `vlfeedback`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    picture = picture_of(row, images, "image" if row.get("image") is not None else "img_path")
    rated = [(entry, ratings) for entry in _completions(row) if (ratings := _ratings(entry)) is not None]
    if len(rated) < 2:
        return Dropped("with fewer than two answers that are rated in all aspects")
    scores = {name: [ratings[name] for _, ratings in rated] for name in ASPECTS}
    order = [sum(one) / len(ASPECTS) for one in zip(*scores.values(), strict=True)] if axis == "average" else scores[axis]
    named = row.get("id")
    return Comparison(
        id="" if named is None else f"vlfeedback-{named}",
        prompt=question(text_of(row, "prompt"), (picture,)),
        candidates=tuple(answer(entry, "response") for entry, _ in rated),
        provenance=tuple({"model": entry["model"]} if entry.get("model") else {} for entry, _ in rated),
        **judged(order, scores),
    )


def _completions(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the answers: a list of objects, or an object of lists as tables have it."""
    value = row.get("completions")
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, entries, strict=True)) for entries in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise UserError(f"got the completions {shown(value)}, want objects with response and annotations. Correct the row.")
    return value


def _ratings(entry: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the rating of each aspect, or None where one is missing or is no number."""
    told = entry.get("annotations")
    found = {}
    for name, title in ASPECTS.items():
        aspect = told.get(title) if isinstance(told, Mapping) else None
        try:
            found[name] = float(aspect["Rating"]) if isinstance(aspect, Mapping) else float("nan")
        except (KeyError, TypeError, ValueError):
            return None
        if not 1 <= found[name] <= 5:
            return None
    return found
