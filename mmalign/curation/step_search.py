"""MCTS-DPO: which step of a search tree to try next, and what pair its siblings make."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def step_prior(logps: Sequence[float], *, length_penalty: float = 1.25) -> float:
    """Prior of a step from its token log-probs: exp(sum lp / len^length_penalty).

    Source: MCTS-DPO (arXiv 2405.00451), published code: length penalty 1.25.

    Raises:
        ValueError: no tokens.
    """
    if not logps:
        raise ValueError("step_prior: got no tokens, want at least one")
    return math.exp(sum(logps) / len(logps) ** length_penalty)


def puct(value: float, prior: float, visits: int, parent_visits: int, *, exploration: float = 1.0) -> float:
    """How worth a visit a child is: Q + c p sqrt(N_parent) / (1 + N).

    Source: MCTS-DPO; c = 1 published.
    """
    return value + exploration * prior * math.sqrt(parent_visits) / (1 + visits)


def node_value(values: Sequence[float], visits: Sequence[int]) -> float:
    """V of a node: its children's Q weighted by visits, an unvisited child counting one visit as in the published code.

    V = sum max(1, N) Q / sum max(1, N)

    Raises:
        ValueError: no children.
    """
    weights = [max(1, count) for count in visits]
    if not weights:
        raise ValueError("node_value: got no children, want at least one")
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def confidence(better_visits: int, worse_visits: int) -> float:
    """How sure a step pair is, from visits: 1 / (1 + N_worse / max(1, N_better)).

    Source: MCTS-DPO, calculate_preference_confidence of its code.
    """
    return 1 / (1 + worse_visits / max(1, better_visits))


def label_smoothing(better_visits: int, worse_visits: int) -> float:
    """Conservative smoothing of a step pair: min(1 - confidence, 0.5); the pair's prob is 1 minus it."""
    return min(1 - confidence(better_visits, worse_visits), 0.5)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One sibling in the tree: Q, the policy's share of it, the value that self-evaluation gave it, and its visits."""

    quality: float
    share: float = 0.0
    value: float = 0.0
    visits: int = 0


def step_pair(siblings: Sequence[Step]) -> tuple[int, int, float] | None:
    """Places of the best and the worst sibling and P(best is better); None where all have the same Q.

    Ordered by Q, then the policy's share, the value and the visits.

    Source: MCTS-DPO. The prob is 1 - `label_smoothing`.
    """
    order = sorted(
        range(len(siblings)),
        key=lambda i: (siblings[i].quality, siblings[i].share, siblings[i].value, siblings[i].visits),
    )
    if len(order) < 2 or siblings[order[0]].quality == siblings[order[-1]].quality:
        return None
    best, worst = order[-1], order[0]
    return best, worst, 1 - label_smoothing(siblings[best].visits, siblings[worst].visits)
