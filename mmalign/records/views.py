"""Views: a comparison becomes the examples one kind of loss sees, samples best first. Ties are never won by position."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal

from mmalign.errors import UserError
from mmalign.records.rows import Comparison, Content, Dropped, Example, Sample, nearest

# What an absent side value means, for batches in which only some rows have it.
SIDE_DEFAULTS = {"prob": 1.0, "weight": 1.0, "margin": 0.0}
# The judge under whose name `mmalign rank` keeps phi (see `ranked`): what the judges said together, never one judge more.
PHI = "phi"


def pair(
    row: Comparison,
    *,
    by: str = "auto",
    ties: Literal["drop", "soft"] = "drop",
    min_gap: float = 0.0,
    pairs: Literal["best_worst", "all"] = "best_worst",
) -> tuple[Example, ...] | Dropped:
    """Pairs (better, worse) with side data prob, weight and margin where the row has them.

    A tie is p = 0.5. It is dropped, or kept as a soft label; which of the two stands first then does not matter to a
    loss that honours prob. With soft ties every example carries prob, so that batches are uniform.

    Args:
        by: which judgement orders the candidates: `ranks` (prob included), a judge's name, or `auto`: ranks or prob if
            the row has them, else its only judge.
        ties: `drop`, or `soft` (prob 0.5).
        min_gap: score gaps below this are ties; in the judge's units. For scores only.
        pairs: the best against the worst candidate, or every pair of candidates.

    Raises:
        UserError: `auto` with several judges and no ranks; min_gap with ranks.
    """
    judged = Dropped(_too_few(row)) if len(row.candidates) < 2 else _values(row, by, min_gap)
    if isinstance(judged, Dropped):
        return judged
    values, soft = judged
    order = sorted(range(len(values)), key=lambda i: -values[i])
    chosen = [(order[0], order[-1])] if pairs == "best_worst" else list(combinations(order, 2))
    examples = []
    for better, worse in chosen:
        gap = values[better] - values[worse]
        tie = gap == 0 or gap < min_gap
        if tie and ties == "drop":
            continue
        side: dict[str, float | tuple[float, ...]] = {}
        if tie:
            side["prob"] = 0.5
        elif soft is not None or ties == "soft":
            side["prob"] = 1.0 if soft is None else max(soft, 1 - soft)
        if row.margin is not None:
            side["margin"] = 0.0 if tie else row.margin
        suffix = "" if pairs == "best_worst" else f"#{better}-{worse}"
        examples.append(_example(row, (better, worse), side, suffix))
    return tuple(examples) or Dropped("tie")


def ranked(row: Comparison, *, by: str = "auto", num_candidates: int | None = None) -> tuple[Example, ...] | Dropped:
    """All k candidates, best first, with side data `scores` = phi in [0, 1].

    phi_i = (wins of i over the other k - 1 candidates, summed over n judges, a tie is half a win) / (n (k - 1))

    Source: RankDPO (arXiv 2410.18013), preference score; the half win for ties is ours. The raw scores stay in the row.

    Args:
        by: `auto`: the phi that `mmalign rank` kept in the row, else that of all judges' scores, else that of the ranks;
            `ranks`; or one judge's name.
        num_candidates: k of every example. Rows with more are thinned evenly from best to worst, phi unchanged; rows
            with fewer are dropped. None keeps each row's k.

    A row whose phi are all equal teaches nothing and is dropped as a tie.

    Raises:
        UserError: num_candidates below 2; `auto` with several judges and no ranks.
    """
    if num_candidates is not None and num_candidates < 2:
        raise UserError(f"view: got num_candidates {num_candidates}, want 2 or more, or null for all candidates of a row.")
    phi = Dropped(_too_few(row)) if len(row.candidates) < 2 else _phi(row, by)
    if isinstance(phi, Dropped):
        return phi
    k = len(phi)
    if len(set(phi)) == 1:
        return Dropped("tie")
    order = sorted(range(k), key=lambda i: -phi[i])
    if num_candidates is not None:
        if k < num_candidates:
            return Dropped(f"{k} candidates, want {num_candidates}")
        order = thinned(order, num_candidates)
    return (_example(row, order, {"scores": tuple(phi[i] for i in order)}),)


def unpaired(
    row: Comparison,
    *,
    by: str = "auto",
    positive: Literal["best", "ever"] = "best",
    ties: Literal["drop", "positive", "negative"] = "drop",
    min_gap: float = 0.0,
) -> tuple[Example, ...] | Dropped:
    """Each candidate alone, with side data `labels` = 1 (wanted) or 0 (unwanted).

    Source: Diffusion-KTO (NeurIPS 2024): an image is wanted if it ever won.

    Args:
        by: as in `pair`.
        positive: 1 for the best candidates only, or for each that beat another one. The same for pairs.
        ties: what a row becomes whose candidates are all equal: dropped, all 1, or all 0.
        min_gap: as in `pair`.

    A single image is 1 if its score (a label of the importer `single_images`) is above 0.
    """
    judged = _values(row, by, min_gap) if row.candidates else Dropped(_too_few(row))
    if isinstance(judged, Dropped):
        return judged
    values, _ = judged
    if len(values) == 1:
        return (_example(row, (0,), {"labels": float(values[0] > 0)}),)
    low, high = min(values), max(values)
    tie = high == low or high - low < min_gap
    if tie and ties == "drop":
        return Dropped("tie")

    def label(value: float) -> float:
        if tie:
            return float(ties == "positive")
        against = high if positive == "best" else low
        gap = max(min_gap, 0.0)
        if positive == "best":
            return float(against - value == 0 or against - value < gap)
        return float(value - against > 0 and value - against >= gap)

    return tuple(_example(row, (i,), {"labels": label(v)}, f"#{i}") for i, v in enumerate(values))


def best(row: Comparison, *, by: str = "auto", ties: Literal["drop", "all"] = "drop") -> tuple[Example, ...] | Dropped:
    """The best candidate alone, for supervised fine-tuning and as an expert; that of a single image is itself.

    Args:
        by: as in `pair`.
        ties: with several best candidates drop the row, or make one example of each of them.
    """
    if len(row.candidates) == 1:
        return (_example(row, (0,), {}),)
    judged = _values(row, by, 0.0) if row.candidates else Dropped(_too_few(row))
    if isinstance(judged, Dropped):
        return judged
    values, _ = judged
    winners = [i for i, v in enumerate(values) if v == max(values)]
    if len(winners) > 1 and ties == "drop":
        return Dropped("tie")
    return tuple(_example(row, (i,), {}, f"#{i}" if len(winners) > 1 else "") for i in winners)


def reward_weighted(
    row: Comparison, *, by: str = "auto", temperature: float = 1.0, baseline: float | None = None
) -> tuple[Example, ...] | Dropped:
    """Each candidate alone, with side data `weight` that grows with its score: reward-weighted fine-tuning with loss `sft`.

    weight = exp((score - baseline) / temperature);  without a baseline the weights of a prompt's k candidates have mean 1:
    k exp(score / temperature) / sum of exp(score / temperature)

    Source: Peters & Schaal 2007 (reward-weighted regression). The mean of 1 within a prompt is ours.

    Args:
        by: the judge whose scores count; `auto`: the only one.
        temperature: in the judge's units; the smaller, the more the best images count alone.
        baseline: the score of weight 1, in the judge's units. None: see above; single images need one.

    Raises:
        UserError: a temperature that is not positive; `auto` with several judges; single images without a baseline; a weight
            too large for a number.
    """
    if not temperature > 0:
        raise UserError(f"view: got temperature {temperature}, want a positive number, in the judge's units.")
    judged = _values(replace(row, ranks=None, prob=None), by, 0.0) if row.candidates else Dropped("0 candidates")
    if isinstance(judged, Dropped):
        return judged
    values, _ = judged
    if baseline is None and len(values) == 1:
        raise UserError(
            f"{row.where or row.id}: got a single image and no baseline, so that its weight would be 1 whatever its score. Set "
            "the view's baseline to a typical score."
        )
    level = max(values) if baseline is None else baseline
    try:
        weights = [math.exp((value - level) / temperature) for value in values]
    except OverflowError as fault:
        raise UserError(
            f"{row.where or row.id}: the score {max(values):g} has a weight too large for a number. Raise the view's "
            f"temperature ({temperature:g}) or baseline ({level:g})."
        ) from fault
    factor = (len(values) / sum(weights) if baseline is None else 1.0) * (1.0 if row.weight is None else row.weight)
    plain = replace(row, weight=None)
    several = len(values) > 1
    return tuple(
        _example(plain, (i,), {"weight": factor * weight}, f"#{i}" if several else "") for i, weight in enumerate(weights)
    )


def prompts(row: Comparison) -> tuple[Example, ...]:
    """The prompt alone, for sources that make their own samples; candidates are not looked at."""
    sample = Sample(prompt=row.prompt, completion=Content())
    return (Example(id=row.id, samples=(sample,)),)


def _too_few(row: Comparison) -> str:
    return f"{len(row.candidates)} candidates, want 2 or more to compare"


def preference_scores(judges: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return phi (see `ranked`) from one tuple of values a judge, higher is better."""
    k = len(judges[0])
    wins = [sum((v[i] > o) + 0.5 * (v[i] == o) for v in judges for j, o in enumerate(v) if j != i) for i in range(k)]
    return tuple(w / (len(judges) * (k - 1)) for w in wins)


def thinned(order: Sequence[int], count: int) -> list[int]:
    """`count` entries of an order, evenly spaced from the first to the last; count is 2 or more."""
    return [order[round(i * (len(order) - 1) / (count - 1))] for i in range(count)]


def _phi(row: Comparison, by: str) -> tuple[float, ...] | Dropped:
    if by in ("auto", PHI) and PHI in row.scores:
        return row.scores[PHI]
    if by == "auto" and row.scores:
        return preference_scores(list(row.scores.values()))
    judged = _values(row, by, 0.0)
    return judged if isinstance(judged, Dropped) else preference_scores([judged[0]])


def _values(row: Comparison, by: str, min_gap: float) -> tuple[tuple[float, ...], float | None] | Dropped:
    """Return (values that order the candidates, higher is better; P(candidate 0 wins) if the row states it)."""
    ranked_row = row.ranks is not None or row.prob is not None
    if by == "ranks" or (by == "auto" and ranked_row):
        if min_gap > 0:
            raise UserError(
                f"view: got min_gap {min_gap} for rows ordered by ranks, want a judge's scores. "
                "Set by to a judge's name, or min_gap to 0."
            )
        if row.prob is not None:
            return (row.prob, 1 - row.prob), row.prob
        return (tuple(-r for r in row.ranks), None) if row.ranks is not None else Dropped("not ranked")
    if by == "auto":
        if len(row.scores) > 1:
            raise UserError(
                f"{row.where or row.id}: got scores by {', '.join(sorted(row.scores))} and no ranks, want one order. "
                "Set the view's by to one of them."
            )
        return (next(iter(row.scores.values())), None) if row.scores else Dropped("not judged")
    if by in row.scores:
        return row.scores[by], None
    hint = nearest(by, row.scores)
    return Dropped(f"not judged by {by}" + (f".{hint}" if hint else ""))


def _example(row: Comparison, order: Sequence[int], side: dict[str, float | tuple[float, ...]], suffix: str = "") -> Example:
    weight: dict[str, float | tuple[float, ...]] = {} if row.weight is None else {"weight": row.weight}
    samples = tuple(Sample(prompt=row.prompt, completion=row.candidates[i]) for i in order)
    return Example(id=row.id + suffix, samples=samples, side={**side, **weight})


VIEWS: dict[str, Callable[..., tuple[Example, ...] | Dropped]] = {
    "pair": pair,
    "ranked": ranked,
    "unpaired": unpaired,
    "best": best,
    "reward_weighted": reward_weighted,
    "prompts": prompts,
}
