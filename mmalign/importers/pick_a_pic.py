"""Pick-a-Pic v1 and v2: pairs of JPEG bytes with human labels 0, 0.5 (tie) and 1."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mmalign.errors import UserError
from mmalign.importers.tables import (
    Faulty,
    Imported,
    byte_counts,
    check_columns,
    finish,
    local_path,
    open_table,
    row_place,
    stored_image,
    undecoded,
)
from mmalign.records import Conversion, Fault

if TYPE_CHECKING:
    import datasets

MEDIA = ("jpg_0", "jpg_1")
NEEDED = ("caption", *MEDIA, "label_0", "label_1")
COUNT = "num_example_per_prompt"
ROW = "mmalign_row"
BATCH_ROWS = 10_000


def pick_a_pic(
    *,
    path: str,
    split: str = "train",
    faulty: Faulty = "raise",
    verify: bool = True,
    num_proc: int | None = None,
    weight: Literal["none", "prompt"] = "none",
) -> Imported:
    """Pick-a-Pic: columns caption, jpg_0, jpg_1, label_0, label_1; labels 0.5 and 0.5 are a tie.

    The images stay in the data set's own files and are read row by row; labels are checked without touching them.
    Rows with `has_label` false are kept without a judgement, which every view then counts as not judged.

    Args:
        path: hub id (`yuvalkirstain/pickapic_v1`, `..._v2`: 335 GB, `kashif/pickascore`), or a local Parquet file or folder.
        split: of the data set.
        faulty: rows with a wrong label, an empty caption or a missing image: `raise`, or `drop` and report.
        verify: decode every image once and leave broken ones out (some of the published ones are); the result is
            remembered in the cache of `datasets`. False: a broken image stops the run that meets it.
        num_proc: processes for verify.
        weight: prompt: each row weighs 1 / `num_example_per_prompt`, scaled to a mean of 1 over the judged rows: a prompt
            counts once however often it was judged. Published for PickScore and SPO's step-aware model, which scale by the sum
            over a batch; none for Diffusion-DPO.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    path = local_path(path)
    table = undecoded(_opened(path, split), MEDIA)
    place = row_place(path, split)
    faults, keep = [], []
    for number, problem in enumerate(_problems(table), 1):
        if problem:
            faults.append(Fault(f"{place}:{number}", problem))
        else:
            keep.append(number - 1)
    table = table.add_column(ROW, list(range(1, len(table) + 1)))
    if faults:
        table = table.select(keep)
    scale = _weight_scale(table, place) if weight == "prompt" else None
    converted = table.with_transform(Conversion(partial(_convert, place=place, scale=scale), MEDIA))
    return finish(converted, faults, place=place, faulty=faulty, verify=verify, num_proc=num_proc)


def _opened(path: str, split: str) -> "datasets.Dataset":
    table = open_table(path, split)
    check_columns(table, NEEDED, path, "Pick-a-Pic columns")
    return table


def _problems(table: "datasets.Dataset") -> Iterator[str]:
    """Yield for each row what is wrong with it, or nothing, from the light columns alone."""
    counts = [byte_counts(table, name) for name in MEDIA]
    light = table.select_columns([n for n in (*NEEDED, "has_label") if n in table.column_names and n not in MEDIA])
    for start in range(0, len(light), BATCH_ROWS):
        batch = light[start : start + BATCH_ROWS]
        for offset, caption in enumerate(batch["caption"]):
            labels = (batch["label_0"][offset], batch["label_1"][offset])
            missing = [n for n, c in zip(MEDIA, counts, strict=True) if not c[start + offset]]
            if not (caption or "").strip():
                yield "got an empty caption, want a prompt. Correct the row or remove it."
            elif missing:
                yield f"got a pair without {' and '.join(missing)}, want two images. Correct the row or remove it."
            elif _labelled(batch, offset) and labels not in ((1, 0), (0, 1), (0.5, 0.5)):
                yield f"got label_0 {labels[0]} and label_1 {labels[1]}, want 1 and 0, 0 and 1, or 0.5 and 0.5. Correct it."
            else:
                yield ""


def _weight_scale(table: "datasets.Dataset", place: str) -> float:
    """1 / the mean of 1 / (the number of rows of a row's prompt), over the judged rows."""
    if COUNT not in table.column_names:
        raise UserError(f"{place}: got no column {COUNT}, want it for weight: prompt. Set weight to none.")
    light = table.select_columns([name for name in (COUNT, "has_label") if name in table.column_names])
    total, judged = 0.0, 0
    for start in range(0, len(light), BATCH_ROWS):
        batch = light[start : start + BATCH_ROWS]
        for offset, count in enumerate(batch[COUNT]):
            if not count or count < 1:
                raise UserError(f"{place}: got {COUNT} {count}, want 1 or more. Correct the rows, or set weight to none.")
            if _labelled(batch, offset):
                total, judged = total + 1 / count, judged + 1
    return judged / total if judged else 1.0


def _labelled(batch: dict[str, list[Any]], offset: int) -> bool:
    return "has_label" not in batch or bool(batch["has_label"][offset])


def _convert(row: Mapping[str, Any], *, media: bool, place: str, scale: float | None) -> dict[str, Any]:
    empty = {"bytes": None, "path": None}
    labelled = bool(row.get("has_label", True))
    extra = {"image_{}_uid": "uid", "model_{}": "model"}
    return {
        "id": f"pick_a_pic-{row[ROW]}",
        "prompt": {"text": row["caption"], "images": []},
        "candidates": [{"text": None, "images": [stored_image(row[n]) if media else empty]} for n in MEDIA],
        "scores": [],
        "ranks": [2.0 if row[f"label_{i}"] < row[f"label_{1 - i}"] else 1.0 for i in (0, 1)] if labelled else None,
        "prob": None,
        "weight": None if scale is None else scale / row[COUNT],
        "margin": None,
        "provenance": [
            json.dumps({key: row[name.format(i)] for name, key in extra.items() if row.get(name.format(i))}) for i in (0, 1)
        ],
        "where": f"{place}:{row[ROW]}",
    }
