"""Judgements on disk (append-only JSONL), and how several verdicts become one order."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from mmalign.errors import UserError
from mmalign.records.faults import faults_of
from mmalign.records.rows import Comparison, Judgement


def with_judgements(value: Comparison, judgements: Sequence[Judgement]) -> Comparison:
    """Return the comparison with verdicts added: scores under the judge's name, ranks pooled over the judges.

    With several rankings a candidate's rank is the mean of its ranks, and a pair's prob is the share of judges for
    candidate 0, ties half. A judge's last verdict on the comparison counts.

    Raises:
        UserError: a verdict belongs to another comparison or has another number of candidates.
    """
    last = {j.judge: j for j in judgements}
    for j in last.values():
        if j.comparison != value.id or (j.ranks is None) == (j.scores is None):
            raise UserError(f"{value.where or value.id}: got a judgement by {j.judge} on {j.comparison}, "
                            f"want one on {value.id} with either ranks or scores. Check the ids.")  # fmt: skip
    scores = {**value.scores, **{name: j.scores for name, j in last.items() if j.scores is not None}}
    rankings = [j.ranks for j in last.values() if j.ranks is not None]
    pooled = replace(value, scores=scores)
    if rankings:
        lengths = [len(ranking) for ranking in rankings]
        if len(set(lengths)) > 1:
            raise UserError(f"{value.where or value.id}: got rankings of {lengths} candidates, want "
                            f"{len(value.candidates)} ranks from each judge. Correct or remove the judgement.")  # fmt: skip
        ranks = tuple(sum(column) / len(rankings) for column in zip(*rankings, strict=True))
        wins = [1.0 if r[0] < r[1] else 0.5 if r[0] == r[1] else 0.0 for r in rankings]
        prob = sum(wins) / len(wins) if len(ranks) == 2 else None
        if prob is not None:  # a majority decides a pair, so that ranks and prob agree
            ranks = (1.0 + (prob < 0.5), 1.0 + (prob > 0.5))
        pooled = replace(pooled, ranks=ranks, prob=prob if len(rankings) > 1 else None)
    problems = faults_of(pooled)
    if problems:
        raise UserError(f"{value.where or value.id}: judgements: {'; '.join(problems)}")
    return pooled


def append_judgements(path: str | Path, judgements: Iterable[Judgement]) -> None:
    """Append verdicts to a JSONL file, one line each, in one write."""
    lines = "".join(
        json.dumps({k: v for k, v in vars(j).items() if v is not None}, ensure_ascii=False) + "\n" for j in judgements
    )
    with open(path, "a", encoding="utf-8") as file:
        file.write(lines)


def read_judgements(path: str | Path) -> dict[str, list[Judgement]]:
    """Read a JSONL file of verdicts, grouped by comparison id in the order they were written.

    Raises:
        UserError: a line is no verdict; the message names file and line.
    """
    found: dict[str, list[Judgement]] = defaultdict(list)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line.decode("utf-8"))
                if not isinstance(entry, dict):
                    raise TypeError(f"a JSON {type(entry).__name__} is no object")
                tuples = {k: tuple(entry[k]) for k in ("ranks", "scores") if entry.get(k) is not None}
                verdict = Judgement(**{**entry, **tuples})
            except (ValueError, TypeError) as fault:
                text = line.decode("utf-8", errors="replace").strip()[:80]
                raise UserError(f"{path}:{number}: got {text!r}, want one judgement ({fault}). Correct the line.") from fault
            found[verdict.comparison].append(verdict)
    return dict(found)
