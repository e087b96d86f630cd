"""`mmalign score`: scorers judge the candidates of every comparison; a scorer is a judge like any other."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmalign.config import Choice, Table, check_folder, command_line, resolved
from mmalign.errors import UserError
from mmalign.records import (
    Comparison,
    Fault,
    Judgement,
    append_judgements,
    check_target,
    comparison,
    read,
    read_judgements,
    with_judgements,
    write,
)
from mmalign.scorers import SCORERS, Scorer, finite_scores

logger = logging.getLogger(__name__)

SCORER_TABLE = Table(SCORERS, extra={"label": (str | None, None)})
NOT_PART_OF_THE_SCORE = ("batch_size", "device")  # settings that change speed only
SHOWN_FAULTS = 5


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What `mmalign score` judges, by whom, and where the verdicts go.

    Args:
        data: comparisons in any format that mmalign reads.
        scorers: judges; `label` renames one, so that the same scorer can judge twice with different settings.
        output: the comparisons with their scores; none: beside the data, `x_scored.parquet` for `x.parquet`. The verdicts
            stand beside it in `<output>.judgements.jsonl`, from which an interrupted run goes on.
        batch_size: images opened together and handed to a scorer in one call.
        device: for every scorer that has one; none leaves each its own.
    """

    data: str = field(metadata={"positional": True})
    scorers: tuple[Annotated[Choice, SCORER_TABLE], ...]
    output: str | None = None
    batch_size: int = 64
    device: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings that do not go together."""
        if not self.scorers:
            raise ValueError("scorers: got none, want at least one. Name one of SCORERS.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, want at least 1.")


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """What was judged and where it lies.

    Args:
        output, judgements: the files written.
        num_comparisons: rows in the output.
        num_judged: verdicts given by this run; num_kept: those found from an earlier one.
        means: judge -> mean score over all candidates it judged.
        faults: rows that could not be judged, or read at all.
    """

    output: Path
    judgements: Path
    num_comparisons: int
    num_judged: int
    num_kept: int
    means: dict[str, float]
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        """Counts, mean scores, faults with their rows, files."""
        kept = f", {self.num_kept} kept from before" if self.num_kept else ""
        lines = [f"{self.num_comparisons} comparisons, {self.num_judged} verdicts given{kept}"]
        lines += [f"  {judge}: mean {mean:.4g}" for judge, mean in self.means.items()]
        if self.faults:
            lines.append(f"{len(self.faults)} rows not judged:")
            lines += [f"  {fault}" for fault in self.faults[:SHOWN_FAULTS]]
            if len(self.faults) > SHOWN_FAULTS:
                lines.append(f"  and {len(self.faults) - SHOWN_FAULTS} more")
        return "\n".join([*lines, str(self.output), str(self.judgements)])


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A scorer under another name."""

    name: str
    scorer: Scorer

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """The scorer's own scores."""
        return self.scorer(prompts, images)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A scorer and the settings that its verdicts depend on, kept with every verdict."""

    scorer: Scorer
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A usable row: its place in the table, and a key of its prompt and the bytes of its images."""

    place: int
    comparison: Comparison
    content: str


def main(config: ScoreConfig) -> ScoreResult:
    """Judge the candidates of every comparison by one or more scorers. Interrupted, the same command goes on.

    Run again, also with more judges, it keeps the verdicts and replaces the output.

    Raises:
        UserError: no usable rows, an output that cannot be written or would destroy other data, a judge that cannot judge.
    """
    data = Path(config.data).expanduser()
    output = Path(config.output).expanduser() if config.output else _beside(data)
    journal = output.with_name(output.name + ".judgements.jsonl")
    made_here = journal.exists() and (output / "dataset_info.json").exists()
    _check_output(data, output, replace=made_here)
    judges = [
        Judge(scorer=scorer, settings=_settings(choice))
        for scorer, choice in zip(build_scorers(config.scorers, device=config.device), config.scorers, strict=True)
    ]
    faults: list[Fault] = []
    dataset = read(data, faults=faults)
    known = _known_verdicts(journal, judges)
    num_judged = num_kept = 0
    good: list[int] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    for rows in _groups(dataset, config.batch_size, faults):
        good += [row.place for row in rows]
        verdicts, kept = _judge(judges, rows, known, faults)
        append_judgements(journal, verdicts)
        for verdict in verdicts:
            known.setdefault(verdict.comparison, {})[verdict.judge] = verdict
        num_judged, num_kept = num_judged + len(verdicts), num_kept + kept
    if not good:
        raise UserError("\n".join([f"{config.data}: got no usable row, want at least one.", *map(str, faults[:SHOWN_FAULTS])]))
    scored = (_scored(comparison(dataset[place]), known, judges) for place in good)
    write(scored, output, replace=made_here)
    return ScoreResult(
        output=output,
        judgements=journal,
        num_comparisons=len(good),
        num_judged=num_judged,
        num_kept=num_kept,
        means=_means(known, judges),
        faults=tuple(faults),
    )


def build_scorers(choices: Sequence[Choice], *, device: str | None = None) -> list[Scorer]:
    """The scorers that a config names, each under its label if it has one.

    Args:
        choices: entries of SCORER_TABLE.
        device: for every scorer that has one; None leaves each its own.

    Raises:
        UserError: two judges of one name.
    """
    scorers: list[Scorer] = []
    for choice in choices:
        more = {"device": device} if device is not None and "device" in choice.settings else {}
        scorer: Scorer = choice.build(**more)
        label = choice.extra.get("label")
        scorers.append(scorer if label is None else Labelled(name=label, scorer=scorer))
    names = [scorer.name for scorer in scorers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"scorers: got the judge {', '.join(twice)} twice, want each name once. Give one of them a label.")
    return scorers


def _settings(choice: Choice) -> dict[str, Any]:
    kept = {name: value for name, value in choice.settings.items() if name not in NOT_PART_OF_THE_SCORE}
    plain: dict[str, Any] = resolved({"scorer": choice.name, **kept})
    return plain


def _beside(data: Path) -> Path:
    plain = data.parent if data.name == "metadata.jsonl" else data
    return plain.with_name(f"{plain.stem}_scored{plain.suffix}" if plain.is_file() else f"{plain.name}_scored")


def _check_output(data: Path, output: Path, *, replace: bool) -> None:
    """Refuse, before anything is judged, an output that cannot be written or would take the place of the data."""
    source, target = data.resolve(), output.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise UserError(f"output: got {output} for the data {data}, want a place outside the data. Name another output.")
    check_folder(output.parent)
    check_target(output, replace=replace)


def _known_verdicts(journal: Path, judges: Sequence[Judge]) -> dict[str, dict[str, Judgement]]:
    """Verdicts of an earlier run, comparison -> judge -> verdict, after a torn last line has been cut off.

    Raises:
        UserError: a judge of that name gave them with other settings.
    """
    if not journal.exists():
        return {}
    text = journal.read_bytes()
    if text and not text.endswith(b"\n"):
        os.truncate(journal, text.rfind(b"\n") + 1)
        logger.info("%s: the last line was cut short and is judged again", journal)
    settings = {judge.scorer.name: judge.settings for judge in judges}
    known: dict[str, dict[str, Judgement]] = {}
    for id, verdicts in read_judgements(journal).items():
        for verdict in verdicts:
            before = verdict.details.get("settings")
            if verdict.judge in settings and before != settings[verdict.judge]:
                raise UserError(
                    f"{journal}: got verdicts of {verdict.judge} with settings {json.dumps(before)}, want "
                    f"{json.dumps(settings[verdict.judge])}. Give the judge a label, choose another output, or remove the file."
                )
            known.setdefault(id, {})[verdict.judge] = verdict
    return known


def _groups(dataset: Any, num_images: int, faults: list[Fault]) -> Iterator[list[Row]]:
    """Usable rows in groups of about num_images images; the others are noted and left out."""
    from tqdm import tqdm

    group: list[Row] = []
    seen: dict[str, str] = {}
    for place, entry in enumerate(tqdm(dataset, desc="score", unit="row", disable=None)):
        try:
            value = comparison(entry)
            if value.id in seen:
                raise UserError(
                    f"{value.where}: got id {value.id!r} again, first in {seen[value.id]}. Give each row its own id."
                )
            group.append(Row(place=place, comparison=value, content=_content_key(value)))
            seen[value.id] = value.where
        except UserError as error:
            _note(faults, entry.get("where") or f"row {place + 1}", error)
        if sum(len(row.comparison.candidates) for row in group) >= num_images:
            yield group
            group = []
    if group:
        yield group


def _note(faults: list[Fault], where: str, error: UserError) -> None:
    faults.append(Fault(where, str(error).removeprefix(f"{where}: ")))
    logger.warning("%s", faults[-1])


def _content_key(row: Comparison) -> str:
    for number, candidate in enumerate(row.candidates, 1):
        if not candidate.images or not row.prompt.text:
            raise UserError(f"{row.where}: candidate {number}: got no image or no prompt text, want both. Remove the row.")
    keys = [row.prompt.text, *(candidate.images[0].key() for candidate in row.candidates)]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]


def _judge(
    judges: Sequence[Judge], rows: Sequence[Row], known: dict[str, dict[str, Judgement]], faults: list[Fault]
) -> tuple[list[Judgement], int]:
    """New verdicts on these rows, and how many earlier ones still hold. Verdicts on changed rows are forgotten."""
    due: dict[str, list[Row]] = {judge.scorer.name: [] for judge in judges}
    images: dict[str, list[Image]] = {}
    num_kept = 0
    for row in rows:
        verdicts = known.get(row.comparison.id, {})
        for name in [name for name, verdict in verdicts.items() if verdict.details.get("content") != row.content]:
            del verdicts[name]
        lacking = [name for name in due if name not in verdicts]
        num_kept += len(judges) - len(lacking)
        if not lacking:
            continue
        try:
            images[row.comparison.id] = [candidate.images[0].open() for candidate in row.comparison.candidates]
        except UserError as error:
            _note(faults, row.comparison.where, error)
            continue
        for name in lacking:
            due[name].append(row)
    return [verdict for judge in judges for verdict in _verdicts(judge, due[judge.scorer.name], images)], num_kept


def _verdicts(judge: Judge, rows: Sequence[Row], images: dict[str, list[Image]]) -> list[Judgement]:
    if not rows:
        return []
    values = [row.comparison for row in rows]
    prompts = [value.prompt.text or "" for value in values for _ in value.candidates]
    places = [f"{value.where or value.id}: candidate {n}" for value in values for n in range(1, len(value.candidates) + 1)]
    flat = [image for value in values for image in images[value.id]]
    scores = iter(finite_scores(judge.scorer, prompts, flat, places).tolist())
    return [
        Judgement(
            comparison=row.comparison.id,
            judge=judge.scorer.name,
            scores=tuple(next(scores) for _ in row.comparison.candidates),
            details={"settings": judge.settings, "content": row.content},
        )
        for row in rows
    ]


def _scored(row: Comparison, known: dict[str, dict[str, Judgement]], judges: Sequence[Judge]) -> Comparison:
    verdicts = known.get(row.id, {})
    return with_judgements(row, [verdicts[judge.scorer.name] for judge in judges if judge.scorer.name in verdicts])


def _means(known: dict[str, dict[str, Judgement]], judges: Sequence[Judge]) -> dict[str, float]:
    means = {}
    for judge in judges:
        name = judge.scorer.name
        scores = [score for verdicts in known.values() if name in verdicts for score in verdicts[name].scores or ()]
        if scores:
            means[name] = sum(scores) / len(scores)
    return means


if __name__ == "__main__":
    sys.exit(command_line(ScoreConfig, main))
