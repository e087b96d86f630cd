"""Verdicts: what the ranks, labels and scores of a row say about the order of its candidates, and by how much."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Literal

from mmalign.errors import UserError
from mmalign.records.rows import Comparison, Dropped, nearest

# The judge under whose name `mmalign rank` keeps phi (see `ranked`): what the judges said together, never one judge more.
PHI = "phi"
Pairs = Literal["best_worst", "all", "best_vs_rest", "adjacent"]


def preference_scores(judges: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return phi (see `ranked`) from one tuple of values a judge, higher is better.

    Raises:
        ValueError: no judge, fewer than two values, numbers of values that differ, or NaN.
    """
    k = len(judges[0]) if judges else 0
    if k < 2 or any(len(values) != k for values in judges) or any(value != value for values in judges for value in values):
        raise ValueError(
            f"preference_scores: got {[tuple(values) for values in judges]}, want two or more numbers of each judge."
        )
    wins = [sum((v[i] > o) + 0.5 * (v[i] == o) for v in judges for j, o in enumerate(v) if j != i) for i in range(k)]
    return tuple(w / (len(judges) * (k - 1)) for w in wins)


def thinned(order: Sequence[int], count: int) -> list[int]:
    """`count` entries of an order, evenly spaced from the first to the last; count is 2 or more."""
    return [order[round(i * (len(order) - 1) / (count - 1))] for i in range(count)]


def paired(order: Sequence[int], pairs: Pairs) -> list[tuple[int, int]]:
    """Return the pairs (better, worse) of an order from best to worst.

    best_worst: one pair; best_vs_rest: k - 1 pairs, the best against each other one; adjacent: k - 1 pairs of neighbours;
    all: k (k - 1) / 2 pairs.
    """
    if pairs == "best_worst":
        return [(order[0], order[-1])]
    if pairs == "best_vs_rest":
        return [(order[0], other) for other in order[1:]]
    return list(pairwise(order)) if pairs == "adjacent" else list(combinations(order, 2))


def too_few(row: Comparison) -> Dropped | None:
    """Return why a row has nothing to compare, if so."""
    k = len(row.candidates)
    return Dropped(f"{k} candidates, want 2 or more to compare") if k < 2 else None


def phi_of(row: Comparison, by: str) -> tuple[float, ...] | Dropped:
    """Return phi (see `ranked`): the one kept in the row, or that of a judge, of the ranks, or of all judges."""
    if by in ("auto", PHI) and PHI in row.scores:
        return row.scores[PHI]
    if by == "auto" and row.scores:
        return preference_scores(list(row.scores.values()))
    judged = values_of(row, by, 0.0)
    return judged if isinstance(judged, Dropped) else preference_scores([judged[0]])


def values_of(row: Comparison, by: str, min_gap: float) -> tuple[tuple[float, ...], float | None] | Dropped:
    """Return (values that order the candidates, higher is better; P(candidate 0 wins) if the row states it).

    Raises:
        UserError: `auto` with several judges and no ranks; min_gap with ranks.
    """
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


def scores_of(row: Comparison, by: str) -> tuple[float, ...] | Dropped:
    """Return the scores of a judge in its own units: of the one named, or of the only one that is not phi.

    Raises:
        UserError: `auto` or `ranks` with several judges.
    """
    if by not in ("auto", "ranks"):
        judged = values_of(row, by, 0.0)
    else:
        judges = {name: values for name, values in row.scores.items() if name != PHI}
        if len(judges) > 1:
            raise UserError(
                f"{row.where or row.id}: got scores by {', '.join(sorted(judges))}, want those of one judge. "
                "Set the view's by to one of them."
            )
        return next(iter(judges.values())) if judges else Dropped("no scores")
    return judged if isinstance(judged, Dropped) else judged[0]
