"""Pairs of answers to one image: SPA-VL and RLAIF-V, whose rows have the columns image, question, chosen and rejected."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.importers.row_wise import import_rows, open_rows, text_of
from mmalign.importers.sight import answer, folder_of, picture_of, question
from mmalign.importers.tables import Faulty, Imported
from mmalign.records import Comparison

COLUMNS = ("image", "question", "chosen", "rejected")


def spa_vl(
    *,
    path: str,
    split: str = "train",
    subset: str | None = None,
    images: str | None = None,
    faulty: Faulty = "raise",
    verify: bool = True,
    num_proc: int | None = None,
) -> Imported:
    """SPA-VL: image, question, chosen and rejected; the released JSON has a path for the image, the hub its bytes.

    Source: sqrti/SPA-VL (arXiv 2406.12030).

    Args:
        path: a JSON or Parquet file, a folder, or a hub id.
        split: of a hub data set: train, or validation of the part of that name. Its test parts have no answers.
        subset: the name of a part: `validation`. None: the default one, train.
        images: the folder of images; None is that of the data.
        faulty: rows without image, question or answer: `raise`, or `drop` and report.
        verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    convert = partial(image_pair_row, name="spa_vl", images=folder_of(path, images))
    return import_rows(
        open_rows(path, split, subset=subset),
        convert,
        name="spa_vl",
        path=path,
        split=split,
        columns=COLUMNS,
        faulty=faulty,
        verify=verify,
        num_proc=num_proc,
    )


def rlaif_v(
    *,
    path: str,
    split: str = "train",
    images: str | None = None,
    faulty: Faulty = "raise",
    verify: bool = True,
    num_proc: int | None = None,
) -> Imported:
    """RLAIF-V: image, question, chosen and rejected, whose model, labeller and kind `origin_split` tells; RLHF-V's rows too.

    RLHF-V-Dataset has question, chosen and rejected as JSON in the column `text`.

    Source: openbmb/RLAIF-V-Dataset (arXiv 2405.17220); openbmb/RLHF-V-Dataset (arXiv 2312.00849).

    Args:
        path, split, images, faulty, verify, num_proc: as in `spa_vl`.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    convert = partial(image_pair_row, name="rlaif_v", images=folder_of(path, images))
    return import_rows(
        open_rows(path, split),
        convert,
        name="rlaif_v",
        path=path,
        split=split,
        columns=("image",),
        faulty=faulty,
        verify=verify,
        num_proc=num_proc,
    )


def image_pair_row(row: Mapping[str, Any], *, name: str, images: Path = Path()) -> Comparison:
    """Convert one row; see `spa_vl` and `rlaif_v`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    said = _of_json(row.get("text")) if row.get("question") is None else row
    origin = _of_json(row.get("origin_split"))
    named = next((row[key] for key in ("id", "idx") if row.get(key) is not None), None)
    told = {key: origin[key] for key in ("model", "type") if origin.get(key) is not None}
    return Comparison(
        id="" if named is None else f"{name}-{named}",
        prompt=question(text_of(said, "question"), (picture_of(row, images),)),
        candidates=tuple(answer(said, key) for key in ("chosen", "rejected")),
        ranks=(1.0, 2.0),
        provenance=(told, told) if told else (),
    )


def _of_json(value: Any) -> Mapping[str, Any]:
    """Return an object that is written as a text, or nothing."""
    if isinstance(value, Mapping):
        return value
    try:
        found = json.loads(value) if isinstance(value, str) else {}
    except ValueError:
        return {}
    return found if isinstance(found, Mapping) else {}
