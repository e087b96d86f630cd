"""Which candidate of a row is better, by its ranks, its prob or a judge; and numbers of a row by a judge's name."""

from collections.abc import Sequence

from mmalign.errors import UserError
from mmalign.records import Comparison, Dropped
from mmalign.records.rows import nearest
from mmalign.records.verdicts import too_few, values_of


def numbers_of(row: Comparison, by: str = "auto") -> tuple[float, ...] | Dropped:
    """One number a candidate, higher is better; ordered as the views order them.

    Args:
        row: any comparison.
        by: `ranks` (prob included), a judge's name, or `auto`: ranks or prob if the row has them, else its only judge.

    Raises:
        UserError: `auto` with several judges and no ranks.
    """
    found = values_of(row, by, 0.0)
    return found if isinstance(found, Dropped) else found[0]


def best_and_worst(row: Comparison, by: str = "auto") -> tuple[int, int] | Dropped:
    """Places of the chosen and the rejected candidate; a row without an order, and a tie, is Dropped with the reason."""
    values = numbers_of(row, by)
    if isinstance(values, Dropped):
        return values
    if few := too_few(row):
        return few
    if max(values) == min(values):
        return Dropped("tie")
    return values.index(max(values)), len(values) - 1 - values[::-1].index(min(values))


def known_judges(rows: Sequence[Comparison]) -> list[str]:
    """Every judge of any row, in order of appearance."""
    return list(dict.fromkeys(judge for row in rows for judge in row.scores))


def check_judges(rows: Sequence[Comparison], wanted: Sequence[str]) -> None:
    """Refuse names that no row has.

    Raises:
        UserError: a judge that nobody is; the nearest name is told.
    """
    known = known_judges(rows)
    for name in wanted:
        if rows and name not in known:
            raise UserError(
                f"data: got no scores by {name}, want one of {', '.join(known) or 'none there'}.{nearest(name, known)} "
                "Run `mmalign score`, or name a judge of the data."
            )
