"""Scorers judge rows, a group at a time: verdicts that still hold are kept, new ones go to a journal."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from mmalign.errors import UserError
from mmalign.records import Comparison, Fault, Judgement, append_judgements, asked, comparison
from mmalign.scorers import Scorer, TextScorer, finite_scores, judged_kind


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A scorer and the settings that its verdicts depend on, kept with every verdict."""

    scorer: Scorer | TextScorer
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A usable row: its place in the table, and a key of its prompt and of what its candidates are."""

    place: int
    comparison: Comparison
    content: str


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process did: the rows that can stand in the output (place and content), what it judged, what it could not."""

    rows: tuple[tuple[int, str], ...]
    num_judged: int
    num_kept: int
    faults: tuple[Fault, ...]


def fault_of(where: str, error: UserError) -> Fault:
    """What a row's error says, without the row's place twice."""
    return Fault(where, str(error).removeprefix(f"{where}: "))


def judge_share(
    judges: Sequence[Judge],
    dataset: Any,
    groups: Sequence[Sequence[int]],
    known: dict[str, dict[str, Judgement]],
    journal: Path,
    *,
    show: bool,
) -> Share:
    """Judge one process's groups and append the verdicts, a group at a time, to a file of its own."""
    from tqdm import tqdm

    rows: list[tuple[int, str]] = []
    faults: list[Fault] = []
    num_judged = num_kept = 0
    for places in tqdm(groups, desc="score", unit="group", disable=None if show else True):
        group = []
        for place in places:
            value = comparison(dataset[place])
            try:
                group.append(Row(place=place, comparison=value, content=_content_key(value)))
            except UserError as error:
                faults.append(fault_of(value.where, error))
        judged, kept = _judge(judges, group, known, faults, journal)
        rows += [(row.place, row.content) for row in group]
        num_judged, num_kept = num_judged + judged, num_kept + kept
    return Share(rows=tuple(rows), num_judged=num_judged, num_kept=num_kept, faults=tuple(faults))


def _content_key(row: Comparison) -> str:
    keys = [row.prompt.text, *(candidate.key() for candidate in row.candidates)]
    if row.prompt.messages or row.prompts is not None or row.prefix is not None:
        keys += [row.prefix, *(row.prompt_of(n).key() for n in range(len(row.candidates)))]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]


def _opened(row: Comparison, kind: str) -> list[list[Any]]:
    """Of each candidate its frames, or its one text, behind what all candidates go on from."""
    if kind == "images":
        return [candidate.frames() for candidate in row.candidates]
    return [[(row.prefix or "") + candidate.words()] for candidate in row.candidates]


def _judge(
    judges: Sequence[Judge], rows: Sequence[Row], known: dict[str, dict[str, Judgement]], faults: list[Fault], journal: Path
) -> tuple[int, int]:
    """Write each judge's new verdicts on these rows to the journal before the next one judges, so that its fault loses none.

    Returns: how many, and how many earlier ones still hold: those on the same prompt and candidates.

    A judge that lacks one verdict judges the whole group, so that what it says of a candidate never depends on what was known.
    """

    def holds(judge: Judge, row: Row) -> bool:
        verdict = known.get(row.comparison.id, {}).get(judge.scorer.name)
        return verdict is not None and verdict.details.get("content") == row.content

    due = {judge.scorer.name: [row for row in rows if not holds(judge, row)] for judge in judges}
    num_kept = len(judges) * len(rows) - sum(map(len, due.values()))
    images: dict[str, list[list[Any]]] = {}
    for row in rows if any(due.values()) else ():
        try:
            images[row.comparison.id] = _opened(row.comparison, judged_kind(judges[0].scorer))
        except UserError as error:
            faults.append(fault_of(row.comparison.where, error))
    whole = [row for row in rows if row.comparison.id in images]
    num_judged = 0
    for judge in judges:
        lacking = {row.comparison.id for row in due[judge.scorer.name]}
        if lacking & images.keys():
            verdicts = [verdict for verdict in _verdicts(judge, whole, images) if verdict.comparison in lacking]
            append_judgements(journal, verdicts)
            num_judged += len(verdicts)
    return num_judged, num_kept


def _verdicts(judge: Judge, rows: Sequence[Row], images: dict[str, list[list[Any]]]) -> list[Judgement]:
    """The scores of each row's candidates; that of a video is the mean over its frames."""
    prompts: list[Any] = []
    places, flat, lengths = [], [], []
    kind = judged_kind(judge.scorer)
    for value in (row.comparison for row in rows):
        for number, frames in enumerate(images[value.id], 1):
            prompts += [(value.prompt.text or "") if kind == "images" else asked(value.prompt_of(number - 1))] * len(frames)
            places += [f"{value.where or value.id}: candidate {number}"] * len(frames)
            flat += frames
            lengths.append(len(frames))
    each = iter(finite_scores(judge.scorer, prompts, flat, places).tolist())
    scores = iter([fmean(islice(each, length)) for length in lengths])
    return [
        Judgement(
            comparison=row.comparison.id,
            judge=judge.scorer.name,
            scores=tuple(next(scores) for _ in row.comparison.candidates),
            details={"settings": judge.settings, "content": row.content},
        )
        for row in rows
    ]
