"""`mmalign score`: scorers judge the candidates of every comparison; a scorer is a judge like any other."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmalign.config import Choice, Table, check_folder, command_line, resolved
from mmalign.errors import UserError
from mmalign.judging import Judge, fault_of, judge_share
from mmalign.processes import launched_processes
from mmalign.records import (
    Comparison,
    Fault,
    Judgement,
    check_target,
    comparison,
    outline_rows,
    read,
    read_judgements,
    told_faults,
    with_judgements,
    write,
)
from mmalign.records.journal import gather_parts, part_of, sort_journal
from mmalign.scorers import SCORERS, Scorer, TextScorer, judged_kind

logger = logging.getLogger(__name__)

SCORER_TABLE = Table(SCORERS, extra={"label": (str | None, None)})
NOT_PART_OF_THE_SCORE = ("batch_size", "device")  # settings that change speed only


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What `mmalign score` judges, by whom, and where the verdicts go. A video's score is the mean over all its frames.

    Candidates are images or texts, and so are those that a scorer judges.

    Args:
        data: comparisons in any format that mmalign reads.
        scorers: judges; `label` renames one, so that the same scorer can judge twice with different settings.
        output: the comparisons with their scores; none: beside the data, `x_scored.parquet` for `x.parquet`. The verdicts
            stand beside it in `<output>.judgements.jsonl`, from which an interrupted run goes on, with as many processes as
            you like.
        batch_size: images, or texts, opened together and handed to a scorer in one call.
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
        told: by the main one of several processes only.
    """

    output: Path
    judgements: Path
    num_comparisons: int
    num_judged: int
    num_kept: int
    means: dict[str, float]
    faults: tuple[Fault, ...]
    told: bool = True

    def __str__(self) -> str:
        """Counts, mean scores, faults with their rows, files."""
        if not self.told:
            return ""
        kept = f", {self.num_kept} kept from before" if self.num_kept else ""
        lines = [f"{self.num_comparisons} comparisons, {self.num_judged} verdicts given{kept}"]
        lines += [f"  {judge}: mean {mean:.4g}" for judge, mean in self.means.items()]
        if self.faults:
            lines.append(f"{len(self.faults)} rows not judged:")
            lines += [f"  {line}" for line in told_faults(self.faults)]
        return "\n".join([*lines, str(self.output), str(self.judgements)])


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A scorer under another name."""

    name: str
    scorer: Scorer | TextScorer

    @property
    def judges(self) -> str:
        """What the scorer judges."""
        return judged_kind(self.scorer)

    def __call__(self, prompts: Sequence[Any], candidates: Sequence[Image] | Sequence[str]) -> Float[Tensor, " n"]:
        """The scorer's own scores."""
        scorer: Callable[..., Tensor] = self.scorer
        return scorer(prompts, candidates)


def main(config: ScoreConfig) -> ScoreResult:
    """Judge the candidates of every comparison by one or more scorers. Interrupted, the same command goes on.

    Run again, also with more judges, it keeps the verdicts and replaces the output. Images are always judged in the same
    groups: by one process or several, interrupted or not, output and verdicts end byte for byte the same.

    Raises:
        UserError: no usable rows, an output that cannot be written or would destroy other data, a judge that cannot judge.
    """
    data = Path(config.data).expanduser()
    output = Path(config.output).expanduser() if config.output else _beside(data)
    journal = output.with_name(output.name + ".judgements.jsonl")
    made_here = journal.exists() and (output / "dataset_info.json").exists()
    _check_output(data, output, replace=made_here)
    processes = launched_processes()
    device = str(processes.device("auto")) if processes.several and config.device is None else config.device
    judges = [
        Judge(scorer=scorer, settings=judge_settings(choice))
        for scorer, choice in zip(build_scorers(config.scorers, device=device), config.scorers, strict=True)
    ]
    kind = judged_kind(judges[0].scorer)
    faults: list[Fault] = []
    dataset = read(data, faults=faults)
    groups = _groups(dataset, config.batch_size, faults, kind)
    processes.wait()  # until here nobody has written
    if processes.is_main:
        output.parent.mkdir(parents=True, exist_ok=True)
        gather_parts(journal)
    processes.wait()
    known = _known_verdicts(journal, judges)
    part = part_of(journal, processes.index) if processes.several else journal
    share = judge_share(judges, dataset, processes.share(groups), known, part, show=processes.is_main)
    shares = processes.gathered([share])
    faults += [fault for one in shares for fault in one.faults]
    good = {place: content for one in shares for place, content in one.rows}
    if not good:
        raise UserError("\n".join([f"{config.data}: got no usable row, want at least one.", *told_faults(faults)]))
    means: dict[str, float] = {}
    if processes.is_main:
        for fault in faults:
            logger.warning("%s", fault)
        means = _finish(journal, judges, dataset, good, output, replace=made_here)
    processes.wait()
    return ScoreResult(
        output=output,
        judgements=journal,
        num_comparisons=len(good),
        num_judged=sum(one.num_judged for one in shares),
        num_kept=sum(one.num_kept for one in shares),
        means=means,
        faults=tuple(faults),
        told=processes.is_main,
    )


def build_scorers(choices: Sequence[Choice], *, device: str | None = None, kind: str | None = None) -> list[Any]:
    """The scorers that a config names, each under its label if it has one.

    Args:
        choices: entries of SCORER_TABLE.
        device: for every scorer that has one; None leaves each its own.
        kind: what they must judge, `images` or `texts`; None: the one or the other.

    Raises:
        UserError: what is no scorer, two judges of one name, or of two kinds.
    """
    scorers: list[Any] = []
    for choice in choices:
        more = {"device": device} if device is not None and "device" in choice.settings else {}
        scorer = choice.build(**more)
        if not isinstance(scorer, Scorer | TextScorer):
            raise UserError(
                f"scorers: got {choice.name}, which makes a {type(scorer).__name__}, want a scorer: a `name`, and a call that "
                "gives prompts and candidates one score each."
            )
        wanted = kind or judged_kind((scorers or [scorer])[0])
        if judged_kind(scorer) != wanted:
            raise UserError(f"scorers: got {scorer.name}, which judges {judged_kind(scorer)}, want judges of {wanted}.")
        label = choice.extra.get("label")
        scorers.append(scorer if label is None else Labelled(name=label, scorer=scorer))
    names = [scorer.name for scorer in scorers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"scorers: got the judge {', '.join(twice)} twice, want each name once. Give one of them a label.")
    return scorers


def unlabelled(scorer: Any) -> Any:
    """The scorer under a label, or itself."""
    return scorer.scorer if isinstance(scorer, Labelled) else scorer


def judge_settings(choice: Choice) -> dict[str, Any]:
    """What of a scorer's settings its scores depend on, as JSON values."""
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
    """Verdicts of an earlier run, comparison -> judge -> verdict.

    Raises:
        UserError: a judge of that name gave them with other settings.
    """
    if not journal.exists():
        return {}
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


def _groups(dataset: Any, num_candidates: int, faults: list[Fault], kind: str) -> list[list[int]]:
    """Places of usable rows in groups of about num_candidates images or texts; the others are noted. No image is read.

    Raises:
        UserError: there is none, and candidates are of another kind than the scorers judge.
    """
    other = ""
    groups: list[list[int]] = []
    count = num_candidates
    seen: dict[str, str] = {}
    for place, entry in enumerate(outline_rows(dataset)):
        where = entry.get("where") or f"row {place + 1}"
        try:
            value = comparison(entry)
            if value.id in seen:
                raise UserError(f"{where}: got id {value.id!r} again, first in {seen[value.id]}. Give each row its own id.")
            for number, candidate in enumerate(value.candidates, 1):
                is_text = bool(candidate.words().strip()) and not candidate.media()
                if (kind == "texts" and candidate.media()) or (kind == "images" and is_text):
                    other = other or f"{where}: candidate {number}"
                if kind == "texts" and not (is_text and value.prompt_of(number - 1).words().strip()):
                    raise UserError(f"{where}: candidate {number}: got no text or no prompt, want both. Remove the row.")
                if kind == "images" and (not candidate.images or not value.prompt.text):
                    raise UserError(f"{where}: candidate {number}: got no image or no prompt text, want both. Remove the row.")
        except UserError as error:
            faults.append(fault_of(where, error))
            continue
        seen[value.id] = value.where
        if count >= num_candidates:
            groups.append([])
            count = 0
        groups[-1].append(place)
        count += len(value.candidates)
    if other and not groups:
        got, wanted = ("a text", "images") if kind == "images" else ("an image", "texts")
        raise UserError(f"{other}: got {got}, and the scorers judge {wanted}. Name scorers of the other kind, or other data.")
    return groups


def _finish(
    journal: Path, judges: Sequence[Judge], dataset: Any, good: dict[int, str], output: Path, *, replace: bool
) -> dict[str, float]:
    """Gather and sort the verdicts, write the rows with their scores, and return each judge's mean."""
    gather_parts(journal)
    ids = list(dataset.select_columns(["id"])["id"])
    sort_journal(journal, [ids[place] for place in sorted(good)], [judge.scorer.name for judge in judges])
    known = _known_verdicts(journal, judges)
    scored = (_scored(comparison(dataset[place]), good[place], known, judges) for place in sorted(good))
    write(scored, output, replace=replace)
    means = {}
    for judge in judges:
        verdicts = [one for place, content in good.items() for one in _holding(ids[place], content, known, [judge])]
        scores = [score for verdict in verdicts for score in verdict.scores or ()]
        if scores:
            means[judge.scorer.name] = sum(scores) / len(scores)
    return means


def _holding(id: str, content: str, known: dict[str, dict[str, Judgement]], judges: Sequence[Judge]) -> list[Judgement]:
    """The verdicts of these judges on a row as it is now."""
    verdicts = [known.get(id, {}).get(judge.scorer.name) for judge in judges]
    return [verdict for verdict in verdicts if verdict is not None and verdict.details.get("content") == content]


def _scored(row: Comparison, content: str, known: dict[str, dict[str, Judgement]], judges: Sequence[Judge]) -> Comparison:
    return with_judgements(row, _holding(row.id, content, known, judges))


if __name__ == "__main__":
    sys.exit(command_line(ScoreConfig, main))
