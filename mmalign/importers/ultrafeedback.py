"""UltraFeedback: four completions a prompt, each rated by GPT-4 in four aspects and overall."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from mmalign.errors import UserError
from mmalign.importers.conversations import Form, answered, asked
from mmalign.importers.row_wise import import_rows, judged, list_of, number_of, open_rows, shown, text_of
from mmalign.importers.tables import Faulty, Imported
from mmalign.records import Comparison, Dropped

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
# `overall_score` of the first revision: a critique's 1 was shown as 10. Revisions that mended it name the mean of the aspects.
MENDED = "fine-grained_score"
WRONG, RIGHT = 10.0, 1.0
POOR, GOOD = 2.0, 4.0


def ultrafeedback(
    *,
    path: str,
    split: str = "train",
    faulty: Faulty = "raise",
    score: Literal["fine_grained", "overall"] = "fine_grained",
    exclude: tuple[str, ...] = (),
    form: Form = "messages",
) -> Imported:
    """UltraFeedback of OpenBMB: columns source, instruction, completions (response, model, annotations, overall_score).

    Rows keep all completions with the judges `fine_grained` (the mean of the four ratings), the four aspects where all
    completions have them, and `overall`; the order is that of `score`. The view `pair` takes the best and the worst, `ranked`
    the list. Binarised columns (chosen, rejected) are read by `trl`, argilla's by `argilla`.

    The first revision's overall_score shows some 1 as 10. Where no completion carries `fine-grained_score`, as mended
    revisions do, a 10 becomes 1 if the aspects' mean is 2 or less, stays if it is above 4, and leaves the row out, counted,
    between the two: those were judged anew for the mended revision.

    Source: OpenBMB/UltraFeedback (arXiv 2310.01377), README, update of 2023-12-29.

    Args:
        path: hub id (`openbmb/UltraFeedback`), or a local file or folder (Parquet, JSON, JSONL, `save_to_disk`).
        split: of the data set.
        faulty: rows without prompt, with an empty response or a rating that is none: `raise`, or `drop` and report.
        score: what orders the completions.
        exclude: values of `source` to leave out; `truthful_qa` for models that are evaluated on TruthfulQA.
        form: `messages` for chat models, `text` for the plain strings.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    convert = partial(ultrafeedback_row, score=score, exclude=exclude, form=form)
    table = open_rows(path, split)
    columns = ("instruction", "completions")
    return import_rows(table, convert, name="ultrafeedback", path=path, split=split, columns=columns, faulty=faulty)


def ultrafeedback_row(
    row: Mapping[str, Any],
    *,
    score: Literal["fine_grained", "overall"] = "fine_grained",
    exclude: Sequence[str] = (),
    form: Form = "messages",
) -> Comparison | Dropped:
    """Convert one row; see `ultrafeedback`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    if row.get("source") in exclude:
        return Dropped(f"of the source {row['source']}")
    completions = list_of(row, "completions")
    if len(completions) < 2:
        return Dropped("with fewer than two completions")
    ratings = [_ratings(completion) for completion in completions]
    if not all(ratings):
        return Dropped("with a completion without a rating")
    means = [sum(r.values()) / len(r) for r in ratings]
    scores = {"fine_grained": means}
    scores |= {name: [r[name] for r in ratings] for name in ASPECTS if all(name in r for r in ratings)}
    if score == "overall" or all(c.get("overall_score") is not None for c in completions):
        overall = [mended(c, mean) for c, mean in zip(completions, means, strict=True)]
        known = [value for value in overall if value is not None]
        if len(known) == len(overall):
            scores["overall"] = known
        elif score == "overall":
            return Dropped("with an overall_score of 10 beside poor ratings")
    return Comparison(
        id="",
        prompt=asked(text_of(row, "instruction"), form),
        candidates=tuple(answered(text_of(completion, "response"), form) for completion in completions),
        provenance=tuple({k: c[k] for k in ("model", "principle") if c.get(k) is not None} for c in completions),
        **judged(scores[score], scores),
    )


def _ratings(completion: Any) -> dict[str, float]:
    """Return the ratings, 1 to 5, that there are; `N/A` is none."""
    if not isinstance(completion, Mapping):
        raise UserError(f"got the completion {shown(completion)}, want an object with response and annotations.")
    annotations = completion.get("annotations") or {}
    found = {}
    for name in ASPECTS:
        rating = (annotations.get(name) or {}).get("Rating")
        if rating in (None, "N/A"):
            continue
        try:
            found[name] = float(rating)
        except (TypeError, ValueError) as fault:
            raise UserError(f"got the rating {shown(rating)} for {name}, want 1 to 5 or N/A. Correct the row.") from fault
        if not 1 <= found[name] <= 5:
            raise UserError(f"got the rating {shown(rating)} for {name}, want 1 to 5 or N/A. Correct the row.")
    return found


def mended(completion: Mapping[str, Any], mean: float) -> float | None:
    """Return the overall score, 1 to 10, with the first revision's fault taken out; None where nobody can tell.

    Args:
        completion: with overall_score.
        mean: of its aspects, 1 to 5.

    Raises:
        UserError: no overall_score.
    """
    overall = number_of(completion, "overall_score")
    if overall != WRONG or completion.get(MENDED) is not None or mean > GOOD:
        return overall
    return RIGHT if mean <= POOR else None
