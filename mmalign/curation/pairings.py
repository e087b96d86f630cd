"""Methods of `mmalign pairs`: rows with several candidates in, pairs of them out, in stages where there are some."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from mmalign.curation.code_tests import correctness_pair, mutual_ranking, speed_pairs
from mmalign.curation.curriculum import curry_stages, gap_stages, rated_pairs
from mmalign.curation.edits import noted, order_labels
from mmalign.curation.order import check_judges, numbers_of
from mmalign.curation.step_search import Step, step_pair
from mmalign.errors import UserError
from mmalign.records import Comparison, Dropped
from mmalign.records.verdicts import Pairs, too_few


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two candidates of a row, the better one first.

    Args:
        better, worse: their places in the row.
        gap: of what ordered them; None where that has no unit.
        stage: of training, from 1; None: there are no stages.
        prob: P(better is better); None: certain.
        note: for the provenance.
    """

    better: int
    worse: int
    gap: float | None = None
    stage: int | None = None
    prob: float | None = None
    note: dict[str, Any] = field(default_factory=dict)


Outcome = tuple[Pair, ...] | Dropped


def ranked(
    rows: Sequence[Comparison], *, by: str = "auto", scheme: Pairs = "best_vs_rest", min_gap: float = 0.0
) -> list[Outcome]:
    """Pairs of a list by ratings or ranks.

    Args:
        by: `ranks`, a judge's name, or `auto`: ranks if the row has them, else its only judge.
        scheme: `best_vs_rest`, `best_worst`, `adjacent` or `all`.
        min_gap: smaller ones make no pair; in the judge's units.
    """
    outcomes: list[Outcome] = []
    for row in rows:
        values = _values(row, by)
        if isinstance(values, Dropped):
            outcomes.append(values)
            continue
        found = [Pair(better=b, worse=w, gap=values[b] - values[w]) for b, w in rated_pairs(values, scheme)]
        kept = tuple(pair for pair in found if (pair.gap or 0.0) >= min_gap)
        outcomes.append(kept or Dropped(f"gaps below {min_gap:g}" if found else "tie"))
    return outcomes


def curriculum(
    rows: Sequence[Comparison], *, by: str = "auto", stages: int = 3, key: Literal["position", "gap"] = "position"
) -> list[Outcome]:
    """Pairs from easy to hard: best against worst first, best against second worst next ...

    Train stage by stage, each from the weights of the one before, which are its reference too.

    Source: Curry-DPO (arXiv 2403.07230): four responses, three stages.

    Args:
        by: as in `ranked`.
        stages: pairs beyond the last stage are left out; a row with fewer pairs lacks the last stages.
        key: `position` in the row's own list, as published; or `gap`: all pairs of all rows are sorted by rating gap and cut
            into as many equal parts as there are stages.

    Raises:
        UserError: no stages.
    """
    if stages < 1:
        raise UserError(f"stages: got {stages}, want 1 or more.")
    outcomes: list[Outcome] = []
    for row in rows:
        values = _values(row, by)
        if isinstance(values, Dropped):
            outcomes.append(values)
            continue
        found = curry_stages(values)[: stages if key == "position" else None]
        pairs = tuple(Pair(better=b, worse=w, gap=values[b] - values[w], stage=n) for n, (b, w) in enumerate(found, 1))
        outcomes.append(pairs or Dropped("tie"))
    if key == "position":
        return outcomes
    every = [pair for one in outcomes if not isinstance(one, Dropped) for pair in one]
    numbers = iter(gap_stages([pair.gap or 0.0 for pair in every], stages))
    return [one if isinstance(one, Dropped) else tuple(replace(p, stage=next(numbers)) for p in one) for one in outcomes]


def search_steps(
    rows: Sequence[Comparison],
    *,
    quality: str = "quality",
    visits: str = "visits",
    policy_share: str | None = None,
    value: str | None = None,
) -> list[Outcome]:
    """The best against the worst sibling step of a search tree; visits tell how sure that is.

    prob = 1 - min(1 - 1 / (1 + N_worse / max(1, N_better)), 0.5)

    Source: MCTS-DPO (arXiv 2405.00451).

    Args:
        quality: name under which the rows have each step's Q.
        visits: of the visit counts.
        policy_share, value: of what settles ties of Q: the policy's share of the step, the value of self-evaluation.
    """
    wanted = [name for name in (quality, visits, policy_share, value) if name is not None]
    check_judges(rows, wanted)
    outcomes: list[Outcome] = []
    for row in rows:
        lacking = [name for name in wanted if name not in row.scores]
        if lacking:
            outcomes.append(Dropped(f"no {', '.join(lacking)}"))
            continue
        zeros = (0.0,) * len(row.candidates)
        shares, values = (row.scores[name] if name is not None else zeros for name in (policy_share, value))
        columns = zip(row.scores[quality], shares, values, row.scores[visits], strict=True)
        found = step_pair([Step(quality=q, share=s, value=v, visits=round(n)) for q, s, v, n in columns])
        if found is None:
            outcomes.append(Dropped("tie"))
            continue
        better, worse, prob = found
        gap = row.scores[quality][better] - row.scores[quality][worse]
        outcomes.append((Pair(better=better, worse=worse, gap=gap, prob=prob, note={"visits": visits}),))
    return outcomes


def code_tests(
    rows: Sequence[Comparison],
    *,
    passed: str = "passed",
    seconds: str | None = None,
    iterations: int = 10,
    damping: float = 0.85,
    min_speedup: float = 1.1,
) -> list[Outcome]:
    """Programs ranked by tests and tests by programs; with running times, a second stage of faster against slower.

    Source: CodeDPO (ACL 2025, arXiv 2410.05605): 15 programs, 15 tests.

    Args:
        passed: key of each candidate's provenance with a list of one 0 or 1 a test.
        seconds: key with the running time; None: correctness only.
        iterations, damping: of the mutual ranking.
        min_speedup: how many times slower the slower program must be. Ours.

    Raises:
        UserError: a damping outside [0, 1].
    """
    outcomes: list[Outcome] = []
    for row in rows:
        table = [origin.get(passed) for origin in row.provenance]
        if not table or not all(isinstance(one, list) and one for one in table) or len({len(one or ()) for one in table}) > 1:
            outcomes.append(Dropped(f"no list of equal length under {passed} for every candidate"))
            continue
        scores, _ = mutual_ranking(torch.tensor(table, dtype=torch.float64), iterations=iterations, damping=damping)
        outcomes.append(_programs(row, scores.tolist(), seconds, min_speedup) or Dropped("tie"))
    return outcomes


def _programs(row: Comparison, scores: list[float], seconds: str | None, min_speedup: float) -> tuple[Pair, ...]:
    found = correctness_pair(scores)
    stage = None if seconds is None else 1
    pairs = []
    if found is not None:
        gap = scores[found[0]] - scores[found[1]]
        pairs.append(Pair(better=found[0], worse=found[1], gap=gap, stage=stage, note={"by": "correctness"}))
    if seconds is not None and all(isinstance(origin.get(seconds), int | float) for origin in row.provenance):
        times = [float(origin[seconds]) for origin in row.provenance]
        for faster, slower in speed_pairs(scores, times, correct=max(scores), min_ratio=min_speedup):
            pairs.append(
                Pair(better=faster, worse=slower, stage=2, note={"by": "speed", "ratio": times[slower] / times[faster]})
            )
    return tuple(pairs)


def paired(row: Comparison, pair: Pair, method: str) -> Comparison:
    """The row of two candidates that a pair is, the better one first; judges' scores and provenance go with them."""
    places = (pair.better, pair.worse)
    stage = {} if pair.stage is None else {"stage": pair.stage}
    one = replace(
        row,
        id=f"{row.id}#{pair.better}-{pair.worse}",
        candidates=tuple(row.candidates[place] for place in places),
        prompts=None if row.prompts is None else tuple(row.prompts[place] for place in places),
        scores={judge: tuple(values[place] for place in places) for judge, values in row.scores.items()},
        provenance=tuple(row.provenance[place] for place in places) if row.provenance else (),
        **order_labels(True, pair.prob),
    )
    return noted(one, {"pairs": method, **pair.note, **stage, "gap": pair.gap, "of": row.id, "from": row.where})


def _values(row: Comparison, by: str) -> tuple[float, ...] | Dropped:
    return too_few(row) or numbers_of(row, by)


PAIRINGS: dict[str, Callable[..., list[Outcome]]] = {
    "ranked": ranked,
    "curriculum": curriculum,
    "search_steps": search_steps,
    "code_tests": code_tests,
}
