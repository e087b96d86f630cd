"""Filters of `mmalign select`: each says of every row why it goes, or None where it stays."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from mmalign.curation.learnability import davir_scores, top_share
from mmalign.curation.order import best_and_worst, check_judges, numbers_of
from mmalign.curation.texts import normalised, spoken
from mmalign.errors import UserError
from mmalign.metrics import idealised_margin
from mmalign.records import Comparison, Dropped

Reasons = list[str | None]


def top(
    rows: Sequence[Comparison],
    *,
    by: str,
    share: float,
    of: Literal["best", "worst", "chosen", "gap", "mean"] = "best",
    lowest: bool = False,
) -> Reasons:
    """The best share of all rows by a judge's scores.

    Args:
        by: a judge's name: a scorer, or any column of numbers that an importer kept as one.
        share: above 0, at most 1.
        of: what a row's number is: the highest or lowest of its candidates' scores, that of the chosen one, their gap or mean.
        lowest: keep the lowest numbers instead.
    """
    check_judges(rows, [by])
    _check_share(share)
    numbers: dict[int, float] = {}
    reasons: Reasons = []
    for place, row in enumerate(rows):
        number = _number(row, by, of)
        reasons.append(number.reason if isinstance(number, Dropped) else f"not of the {_word(lowest)} {share:g} by {by}")
        if not isinstance(number, Dropped):
            numbers[place] = -number if lowest else number
    return _kept(reasons, numbers, share)


def davir(rows: Sequence[Comparison], *, base: str, tuned: str, share: float = 0.06, order: str = "auto") -> Reasons:
    """The rows whose chosen response a model learns most of: DavIR's score.

    Source: DavIR (ACL 2025, arXiv 2310.13008): the top 6 % of Alpaca.

    Args:
        base, tuned: names under which the rows have each response's log-probability by the model before and after tuning on all
            the data, nats (or per token). Higher is likelier, as every score.
        share: kept.
        order: which response is the chosen one; as in the views.
    """
    check_judges(rows, [base, tuned])
    _check_share(share)
    nlls: dict[int, tuple[float, float]] = {}
    reasons: Reasons = []
    for place, row in enumerate(rows):
        pair = best_and_worst(row, order) if len(row.candidates) > 1 else (0, 0)
        if isinstance(pair, Dropped):
            reasons.append(pair.reason)
        elif base not in row.scores or tuned not in row.scores:
            reasons.append(f"no {base if base not in row.scores else tuned}")
        elif row.scores[base][pair[0]] >= 0:
            reasons.append(f"{base} is not below 0: nothing is left to learn")
        else:
            nlls[place] = -row.scores[base][pair[0]], -row.scores[tuned][pair[0]]
            reasons.append(f"not of the most learnable {share:g}")
    scores = davir_scores([before for before, _ in nlls.values()], [after for _, after in nlls.values()])
    return _kept(reasons, dict(zip(nlls, scores, strict=True)), share)


def min_gap(rows: Sequence[Comparison], *, by: str, gap: float) -> Reasons:
    """Rows whose best and worst candidate are at least so far apart.

    Args:
        by: a judge's name.
        gap: in the judge's units.
    """
    check_judges(rows, [by])
    reasons: Reasons = []
    for row in rows:
        number = _number(row, by, "gap")
        short = not isinstance(number, Dropped) and number < gap
        reasons.append(number.reason if isinstance(number, Dropped) else f"gap below {gap:g} by {by}" if short else None)
    return reasons


def length_ratio(rows: Sequence[Comparison], *, ratio: float = 2.0, order: str = "auto") -> Reasons:
    """Rows whose chosen and rejected response are of similar length, so that length teaches nothing.

    Args:
        ratio: longer over shorter, in characters, at most; TEMPLE: 1.5.
        order: which two candidates of a longer list; as in the views.

    Raises:
        UserError: below 1, or no order.
    """
    if ratio < 1:
        raise UserError(f"ratio: got {ratio:g}, want 1 or more.")
    reasons: Reasons = []
    for row in rows:
        pair = (0, 1) if len(row.candidates) == 2 else best_and_worst(row, order)
        if isinstance(pair, Dropped):
            reasons.append(pair.reason)
            continue
        lengths = [len(row.candidates[place].words()) for place in pair]
        reasons.append(None if max(lengths) <= ratio * min(lengths) else f"lengths differ by more than {ratio:g} times")
    return reasons


def distinct_prompts(rows: Sequence[Comparison], *, per_prompt: int = 1) -> Reasons:
    """The first rows of every prompt; prompts that differ in case, width of characters or blanks only are one.

    Args:
        per_prompt: rows kept of each. SHP: 5.

    Raises:
        UserError: below 1, or no order.
    """
    if per_prompt < 1:
        raise UserError(f"per_prompt: got {per_prompt}, want 1 or more.")
    seen: Counter[tuple[str, ...]] = Counter()
    reasons: Reasons = []
    for row in rows:
        key = tuple(normalised(spoken(prompt)) for prompt in (row.prompt, *(row.prompts or ())))
        seen[key] += 1
        reasons.append(None if seen[key] <= per_prompt else f"more than {per_prompt} of its prompt")
    return reasons


def rankable(
    rows: Sequence[Comparison],
    *,
    reference: str,
    beta: float = 0.1,
    agreement: float = 0.75,
    hard: bool = False,
    order: str = "auto",
) -> Reasons:
    """Pairs that DPO could rank right at all: those whose ideal margin is above 0.

    log ref_w - log ref_l + log(a / (1 - a)) / beta > 0

    Source: Preference Learning Algorithms Do Not Learn Preference Rankings (arXiv 2405.19534).

    Args:
        reference: name under which the rows have each response's summed log-probability under the reference model, nats.
        beta: of the loss that will be used.
        agreement: share of annotators that prefer the chosen one; a pair's own prob is used where it has one.
        hard: keep those that it could not rank, to look at them.
        order: which response is the chosen one; as in the views.

    Raises:
        UserError: no such name, beta not positive, agreement outside (0, 1).
    """
    if not beta > 0:
        raise UserError(f"beta: got {beta:g}, want a positive number.")
    if not 0 < agreement < 1:
        raise UserError(f"agreement: got {agreement:g}, want above 0 and below 1.")
    check_judges(rows, [reference])
    reasons: Reasons = []
    for row in rows:
        pair = best_and_worst(row, order)
        if isinstance(pair, Dropped) or reference not in row.scores:
            reasons.append(pair.reason if isinstance(pair, Dropped) else f"no {reference}")
            continue
        share = agreement if row.prob is None or row.prob in (0, 1) else max(row.prob, 1 - row.prob)
        better, worse = (row.scores[reference][place] for place in pair)
        margin = idealised_margin(torch.tensor(better - worse, dtype=torch.float64), beta=beta, agreement=share)
        can = float(margin) > 0
        reasons.append(None if can != hard else "can be ranked" if hard else "cannot be ranked right from this reference")
    return reasons


def _number(row: Comparison, by: str, of: str) -> float | Dropped:
    values = numbers_of(row, by)
    if isinstance(values, Dropped) or not values:
        return values if isinstance(values, Dropped) else Dropped("no candidates")
    if of == "chosen":
        pair = best_and_worst(row) if len(values) > 1 else (0, 0)
        return pair if isinstance(pair, Dropped) else values[pair[0]]
    simple = {"best": max(values), "worst": min(values), "gap": max(values) - min(values)}
    return simple.get(of, math.fsum(values) / len(values))


def _kept(reasons: Reasons, numbers: dict[int, float], share: float) -> Reasons:
    places = list(numbers)
    for position in top_share(list(numbers.values()), share):
        reasons[places[position]] = None
    return reasons


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise UserError(f"share: got {share:g}, want above 0 and at most 1.")


def _word(lowest: bool) -> str:
    return "lowest" if lowest else "highest"


FILTERS: dict[str, Callable[..., Reasons]] = {
    "top": top,
    "davir": davir,
    "min_gap": min_gap,
    "length_ratio": length_ratio,
    "distinct_prompts": distinct_prompts,
    "rankable": rankable,
}
