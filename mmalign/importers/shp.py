"""Stanford Human Preferences: pairs of Reddit comments, the better one by votes although it came later."""

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.conversations import Form, answered, asked
from mmalign.importers.row_wise import import_rows, number_of, open_rows, shown, text_of
from mmalign.importers.tables import Faulty, Imported
from mmalign.records import Comparison, Dropped

SIDES = ("A", "B")


def shp(
    *,
    path: str,
    split: str = "train",
    folder: str | None = None,
    faulty: Faulty = "raise",
    min_ratio: float = 2.0,
    max_pairs: int | None = 5,
    margin: bool = False,
    form: Form = "messages",
) -> Imported:
    """SHP: columns history, human_ref_A, human_ref_B, labels (1: A is better), score_A, score_B, score_ratio.

    The votes are kept as the judge `votes`. Pairs that min_ratio or max_pairs leave out are counted.

    Source: stanfordnlp/SHP (Ethayarajh et al. 2022); its card advises both limits. Which pairs of a post stay is not published:
    here the first ones in the data's order.

    Args:
        path, split: as in `ultrafeedback`; `stanfordnlp/SHP`, train, validation or test.
        folder: one of its domains, `askculinary` for one. None: all.
        faulty: rows without label, comment or ratio: `raise`, or `drop` and report.
        min_ratio: the least score_ratio, 1 or more; small ratios are noise.
        max_pairs: pairs of one post at most, None for all.
        margin: give log(score_ratio), in nats, as the margin of the row.
        form: as in `ultrafeedback`.

    Raises:
        UserError: no such data set, split or columns; faulty rows; a limit below 1.
    """
    if not min_ratio >= 1 or (max_pairs is not None and max_pairs < 1):
        raise UserError(f"shp: got min_ratio {min_ratio} and max_pairs {max_pairs}, want both 1 or more. Change them.")
    pairs: Counter[str] = Counter()

    def admit(row: Mapping[str, Any]) -> str | None:
        post = str(row.get("post_id") or row["history"])
        if pairs[post] == max_pairs:
            return f"beyond {max_pairs} pairs of one post"
        pairs[post] += 1
        return None

    return import_rows(
        open_rows(path, split, folder),
        partial(shp_row, min_ratio=min_ratio, margin=margin, form=form),
        name="shp",
        path=path,
        split=split,
        columns=("history", "human_ref_A", "human_ref_B", "labels", "score_ratio"),
        faulty=faulty,
        admit=admit,
    )


def shp_row(
    row: Mapping[str, Any], *, min_ratio: float = 2.0, margin: bool = False, form: Form = "messages"
) -> Comparison | Dropped:
    """Convert one row; see `shp`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    label, ratio = row.get("labels"), number_of(row, "score_ratio")
    if label not in (0, 1):
        raise UserError(f"got labels {shown(label)}, want 1 (A is better) or 0. Correct the row.")
    if ratio < 1:
        raise UserError(f"got the score_ratio {ratio:g}, want 1 or more: the better score over the other. Correct the row.")
    if ratio < min_ratio:
        return Dropped(f"with a score_ratio below {min_ratio:g}")
    votes = [row.get(f"score_{side}") for side in SIDES]
    return Comparison(
        id="",
        prompt=asked(text_of(row, "history"), form),
        candidates=tuple(answered(text_of(row, f"human_ref_{side}"), form) for side in SIDES),
        scores={"votes": tuple(number_of(row, f"score_{side}") for side in SIDES)} if None not in votes else {},
        ranks=(1.0, 2.0) if label == 1 else (2.0, 1.0),
        margin=math.log(ratio) if margin else None,
    )
