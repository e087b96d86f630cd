"""Curry-DPO: a rated list becomes pairs from easy to hard, one stage of training each."""

from collections.abc import Sequence

from mmalign.errors import UserError
from mmalign.records.verdicts import Pairs, paired


def rated_pairs(ratings: Sequence[float], scheme: Pairs = "best_vs_rest") -> list[tuple[int, int]]:
    """Pairs (better, worse) of places in a rated list, largest gap first; equal ratings make no pair.

    Args:
        ratings: higher is better, any unit.
        scheme: `best_vs_rest`, `best_worst`, `adjacent` (neighbours in the order) or `all`, as in the view `pair`.
    """
    order = sorted(range(len(ratings)), key=lambda place: (-ratings[place], place))
    every = paired(order, scheme) if len(order) > 1 else []
    found = [(better, worse) for better, worse in every if ratings[better] > ratings[worse]]
    return sorted(found, key=lambda pair: ratings[pair[1]] - ratings[pair[0]])


def curry_stages(ratings: Sequence[float]) -> list[tuple[int, int]]:
    """The pair of each stage: best against worst, best against second worst, ...: the gap shrinks, the task gets harder.

    The reference of stage k is the policy after stage k - 1: train stage by stage, each run from the one before.

    Source: Curry-DPO (arXiv 2403.07230): four responses, three stages.
    """
    return rated_pairs(ratings, "best_vs_rest")


def gap_stages(gaps: Sequence[float], num_stages: int) -> list[int]:
    """The stage, from 1, of each pair of a whole data set: sorted by gap, largest first, and cut into equal parts.

    Source: Curry-DPO, for pairs that do not come in lists of one length; the earlier pair first in a tie.

    Args:
        gaps: of rating between chosen and rejected; any number that falls as pairs get harder will do.
        num_stages: 1 or more. Published: 3.

    Raises:
        UserError: no stages.
    """
    if num_stages < 1:
        raise UserError(f"num_stages: got {num_stages}, want 1 or more.")
    order = sorted(range(len(gaps)), key=lambda place: (-gaps[place], place))
    stages = [0] * len(gaps)
    for position, place in enumerate(order):
        stages[place] = 1 + position * num_stages // len(gaps)
    return stages
