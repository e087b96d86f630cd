"""`mmalign evaluate`: images, videos or texts made before and after training on the same prompts and seeds, judged."""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL.Image import Image

from mmalign.clips import Images, OpenedLate, seen_frames
from mmalign.config import Choice, check_folder, command_line, write_resolved
from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.evaluate_texts import evaluate_texts, holds_texts, paired_texts, write_text_report
from mmalign.experiment import Data
from mmalign.held_out import pair_fit
from mmalign.kept_scores import KeptScores, identity
from mmalign.records import Comparison, Content, comparison, read
from mmalign.report import (
    Checkpoint,
    Evaluation,
    PairFit,
    ScorerChange,
    TrainingDrift,
    before_after_grid,
    checkpoint_grid,
    report_page,
    scorer_change,
    task_changes,
    training_drift,
)
from mmalign.score import SCORER_TABLE, build_scorers, judge_settings, unlabelled
from mmalign.scorers import Scorer, TaskScorer, finite_scores
from mmalign.statistics import diversity, pixel_std

logger = logging.getLogger(__name__)

Judging = Callable[..., torch.Tensor]  # asks a scorer for the scores of images, as `finite_scores` does
IMAGES_AT_ONCE = 64  # opened together; a scorer's own batch_size may be smaller
CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `mmalign evaluate` compares, who judges, and where the report goes.

    A judge's score of a video is its mean over at most 8 frames, evenly spaced; the report shows the first frame, and diversity
    and contrast are those of first frames.

    Args:
        before, after: comparisons from `mmalign generate` or `mmalign answer` with the same prompts and seeds; candidates carry
            their seed.
        scorers: judges; the first one's win rate is the result.
        held_out: judges that took no part in making the preferences; the first one's mean is the fidelity.
        checkpoints: comparisons from `mmalign generate` with lora (or model), or `mmalign answer` with tuned, set to a run's
            checkpoint-N, on the same prompts and seeds: shown side by side in checkpoints.png, their scores as curves.
        output: folder for results.json, report.html, evaluation.yaml and, of images, grid.png; it may be the run's, whose files
            stay. Killed, not refused, the same command goes on with what was judged of images (`OUTPUT.scores.jsonl`).
        interval: of the win rates; see statistics.win_rate.
        tie_eps: pairs whose scores differ by no more are ties; in standard deviations of that judge's scores before.
        run: output folder of the training run, for its implicit-reward accuracy and error drift.
        pairs: held-out preference pairs, on which the run's weights are measured the same way.
        draws: (timestep, noise) draws of each held-out pair; language models need one.
        rows, cols: pairs in grid.png; of texts, rows * cols pairs in the report.
        title: heading of the report.
        device: for every scorer that has one; none leaves each its own.
    """

    before: str
    after: str
    scorers: tuple[Annotated[Choice, SCORER_TABLE], ...]
    held_out: tuple[Annotated[Choice, SCORER_TABLE], ...] = ()
    checkpoints: str | tuple[str, ...] = ()
    output: str
    interval: Literal["wilson", "bootstrap"] = "wilson"
    tie_eps: float = 0.02
    run: str | None = None
    pairs: Data | None = None
    draws: int = 8
    rows: int = 6
    cols: int = 4
    title: str = "Before and after training"
    device: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings that do not go together."""
        if not self.scorers:
            raise ValueError("scorers: got none, want at least one. Name one of SCORERS.")
        if self.tie_eps < 0:
            raise ValueError(f"tie_eps: got {self.tie_eps}, want 0 or more. 0 counts every difference.")
        if self.pairs is not None and self.run is None:
            raise ValueError(
                "run: got none with held-out pairs, want the training run whose weights to measure. Name its folder."
            )
        if self.draws < 1:
            raise ValueError(f"draws: got {self.draws}, want 1 or more.")
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"rows, cols: got {self.rows} and {self.cols}, want at least 1 each.")


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """The evaluation and where its report lies; its text is the table."""

    evaluation: Evaluation
    output: Path

    def __str__(self) -> str:
        """The table, then the files."""
        grids = ["grid.png"] if self.evaluation.texts is None else []
        grids += ["checkpoints.png"] if grids and self.evaluation.checkpoints else []
        files = (self.output / name for name in ("report.html", *grids, "results.json"))
        return "\n".join([str(self.evaluation), "", *map(str, files)])


def main(config: EvaluateConfig) -> EvaluateResult:
    """Compare what was made before and after training: win rates with intervals, a held-out judge, diversity, a report."""
    output = Path(config.output).expanduser()
    check_folder(output)
    if config.device is not None:
        torch_device(config.device)
    base, tuned = list(_comparisons(config.before)), list(_comparisons(config.after))
    named = (config.checkpoints,) if isinstance(config.checkpoints, str) else config.checkpoints
    between = {path: list(_comparisons(path)) for path in named}
    compare = _compared_texts if holds_texts(base) else _compared_images
    evaluation = compare(config, base, tuned, between)
    write_resolved(config, output, config="evaluation.yaml", versions="evaluation_environment.json")
    return EvaluateResult(evaluation=evaluation, output=output)


Rows = list[Comparison]


def _compared_images(config: EvaluateConfig, base: Rows, tuned: Rows, found: dict[str, Rows]) -> Evaluation:
    prompts, before, after = paired_images(base, tuned)
    between = checkpoint_images(base, found)
    told = _judged(config, tuned, "images")
    output = Path(config.output).expanduser()
    with KeptScores(output, told.settings) as kept:
        evaluation = evaluate_pairs(
            prompts,
            OpenedLate(before),
            OpenedLate(after),
            scorers=told.scorers,
            held_out=told.held_out,
            interval=config.interval,
            tie_eps=config.tie_eps,
            training=told.training,
            checkpoints=[(step, OpenedLate(images)) for step, images in between],
            last_step=told.last_step,
            judge=kept,
        )
        evaluation = replace(evaluation, pairs=told.pairs)
        write_report(
            evaluation,
            prompts,
            OpenedLate(before),
            OpenedLate(after),
            output,
            rows=config.rows,
            cols=config.cols,
            title=config.title,
            checkpoints=[(step, OpenedLate(images)) for step, images in between],
        )
    return evaluation


def _compared_texts(config: EvaluateConfig, base: Rows, tuned: Rows, found: dict[str, Rows]) -> Evaluation:
    prompts, before, after = paired_texts(base, tuned)
    between = {step: paired_texts(base, rows, name=place)[2] for step, place, rows in checkpoint_rows(found)}
    told = _judged(config, tuned, "texts")
    evaluation = evaluate_texts(
        prompts,
        before,
        after,
        scorers=told.scorers,
        held_out=told.held_out,
        interval=config.interval,
        tie_eps=config.tie_eps,
        training=told.training,
        pairs=told.pairs,
        checkpoints=between,
        last_step=told.last_step,
    )
    columns = [("before", before), *((f"step {step}", between[step]) for step in sorted(between)), ("after", after)]
    output = Path(config.output).expanduser()
    write_text_report(evaluation, prompts, columns, output, title=config.title, num_shown=config.rows * config.cols)
    return evaluation


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """Who judges, and what is known of the training, whatever is compared."""

    scorers: list[Any]
    held_out: list[Any]
    training: TrainingDrift | None
    pairs: PairFit | None
    last_step: int | None
    settings: dict[str, Any]


def _judged(config: EvaluateConfig, tuned: Rows, kind: str) -> _Judged:
    choices = (*config.scorers, *config.held_out)
    scorers = build_scorers(choices, device=config.device, kind=kind)
    training = None if config.run is None else training_drift(Path(config.run))
    fit = None
    if config.pairs is not None:
        fit = pair_fit(Path(config.run or ""), config.pairs, draws=config.draws, device=config.device)
    return _Judged(
        scorers=scorers[: len(config.scorers)],
        held_out=scorers[len(config.scorers) :],
        training=training,
        pairs=fit,
        last_step=_step_of(tuned) or (None if training is None else training.last_step),
        settings={
            scorer.name: identity(unlabelled(scorer), judge_settings(choice))
            for scorer, choice in zip(scorers, choices, strict=True)
        },
    )


def evaluate_pairs(
    prompts: Sequence[str],
    before: Images,
    after: Images,
    *,
    scorers: Sequence[Scorer],
    held_out: Sequence[Scorer] = (),
    interval: Literal["wilson", "bootstrap"] = "wilson",
    tie_eps: float = 0.02,
    training: TrainingDrift | None = None,
    checkpoints: Sequence[tuple[int, Images]] = (),
    last_step: int | None = None,
    judge: Judging = finite_scores,
) -> Evaluation:
    """Compare two images per entry, made from the same prompt and seed.

    Args:
        prompts, before, after: entry i of all three belongs together.
        scorers: at least one; the first one's win rate is the result.
        held_out: judges that took no part in making the preferences.
        interval: a name in statistics.INTERVALS.
        tie_eps: in standard deviations of the judge's scores before.
        training: from `training_drift`, to be told along.
        checkpoints: (step, images), the images paired with `before`; in the order of the steps.
        last_step: of the images after, where it is known.
        judge: asks a scorer; `KeptScores` remembers what it said.

    Raises:
        UserError: nothing to compare, two judges of one name, a score that is not finite, an image that cannot be read.
    """
    names = [scorer.name for scorer in (*scorers, *held_out)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"scorers, held_out: got {', '.join(twice)} twice, want each judge once. A held-out judge is not among the scorers."
        )
    if not prompts or not scorers or not len(prompts) == len(before) == len(after):
        raise UserError(
            f"evaluate: got {len(scorers)} scorers, {len(prompts)} prompts, {len(before)} images before, "
            f"{len(after)} after, want at least one scorer and as many images on each side as prompts."
        )
    changes: list[list[ScorerChange]] = [[] for _ in range(len(checkpoints) + 1)]
    for scorer in (*scorers, *held_out):
        old = _scores(judge, scorer, prompts, before, "before")
        sides = [*((f"checkpoint {step}", images) for step, images in checkpoints), ("after", after)]
        for found, (side, images) in zip(changes, sides, strict=True):
            new = _scores(judge, scorer, prompts, images, side)
            found.append(_change(scorer, prompts, old, new, interval, tie_eps, held_out=scorer.name in names[len(scorers) :]))
    return Evaluation(
        num_pairs=len(prompts),
        num_prompts=len(set(prompts)),
        interval=interval,
        scorers=tuple(changes[-1]),
        checkpoints=tuple(
            Checkpoint(step=step, scorers=tuple(found)) for (step, _), found in zip(checkpoints, changes, strict=False)
        ),
        last_step=last_step,
        diversity_before=diversity(prompts, before),
        diversity_after=diversity(prompts, after),
        contrast_before=pixel_std(before),
        contrast_after=pixel_std(after),
        training=training,
    )


def _change(
    scorer: Scorer,
    prompts: Sequence[str],
    old: torch.Tensor,
    new: torch.Tensor,
    interval: str,
    tie_eps: float,
    *,
    held_out: bool,
) -> ScorerChange:
    judge = unlabelled(scorer)
    tasks = [judge.task(prompt) for prompt in prompts] if isinstance(judge, TaskScorer) else []
    return scorer_change(
        scorer.name,
        old,
        new,
        eps=tie_eps * float(old.std(correction=0)),
        interval=interval,
        held_out=held_out,
        tasks=task_changes(tasks, old, new) if tasks else (),
    )


def _scores(judge: Judging, scorer: Scorer, prompts: Sequence[str], images: Images, side: str) -> torch.Tensor:
    """The score of each image; of each video its mean over the frames that scorers see."""
    parts: list[torch.Tensor] = []
    counts: list[int] = []
    waiting: list[tuple[str, Image, str]] = []
    for index, prompt in enumerate(prompts):
        frames = seen_frames(images, index)
        counts.append(len(frames))
        waiting += [(prompt, frame, f"{side}, image {index + 1} ({prompt!r})") for frame in frames]
        if len(waiting) >= IMAGES_AT_ONCE or index == len(prompts) - 1:
            texts, opened, places = zip(*waiting, strict=True)
            parts.append(judge(scorer, texts, opened, places))
            waiting = []
    return torch.stack([score.mean() for score in torch.split(torch.cat(parts).double(), counts)])


def checkpoint_images(before: Sequence[Comparison], found: dict[str, list[Comparison]]) -> list[tuple[int, list[Content]]]:
    """(step, images paired with `before`) of each checkpoint, in the order of the steps.

    Raises:
        UserError: images that no checkpoint-N made, a step given twice, or images that cannot be paired.
    """
    return [(step, paired_images(before, rows, name=place)[2]) for step, place, rows in checkpoint_rows(found)]


def checkpoint_rows(found: dict[str, list[Comparison]]) -> list[tuple[int, str, list[Comparison]]]:
    """(step, place, rows) of each checkpoint, in the order of the steps.

    Raises:
        UserError: what no checkpoint-N made, or a step given twice.
    """
    series: dict[int, tuple[str, list[Comparison]]] = {}
    for place, rows in found.items():
        step = _step_of(rows)
        if step is None:
            made = "answers", "answer` with tuned"
            kind, how = made if holds_texts(rows) else ("images", "generate` with lora")
            raise UserError(
                f"checkpoints: got {place}, whose {kind} do not all come from one checkpoint-N of a run, want those of "
                f"`mmalign {how}=runs/x/checkpoint-N. Name such a folder."
            )
        if step in series:
            raise UserError(f"checkpoints: got step {step} twice, again in {place}, want each once. Remove one.")
        series[step] = (place, rows)
    return [(step, *series[step]) for step in sorted(series)]


def _step_of(rows: Sequence[Comparison]) -> int | None:
    """The step of the checkpoint that made all candidates of these rows, as their provenance tells."""
    keys = ("lora", "tuned", "model")
    origins = [origin for row in rows for origin in row.provenance or ({},)]
    named = {str(next((origin[key] for key in keys if origin.get(key)), "")) for origin in origins}
    matches = {int(match[1]) for name in named if (match := CHECKPOINT.search(name.rstrip("/")))}
    return matches.pop() if len(named) == len(matches) == 1 else None


def paired_images(
    before: Iterable[Comparison], after: Iterable[Comparison], *, name: str = "after"
) -> tuple[list[str], list[Content], list[Content]]:
    """Prompts, and images or videos of both sides, by prompt and seed in the order of `before`; `name` is what to call `after`.

    Raises:
        UserError: an image without a seed, a prompt and seed given twice, or one that the other side lacks.
    """
    old, new = _by_prompt_and_seed(before), _by_prompt_and_seed(after)
    for side, present, absent in ((name, old, new), ("before", new, old)):
        missing = [key for key in present if key not in absent]
        if missing:
            prompt, seed = missing[0]
            raise UserError(
                f"{side}: got no image for {len(missing)} of {len(present)} prompts and seeds, the first {prompt!r} with seed "
                f"{seed}. Generate both sides with the same prompts and seeds."
            )
    return [prompt for prompt, _ in old], list(old.values()), [new[key] for key in old]


def _by_prompt_and_seed(comparisons: Iterable[Comparison]) -> dict[tuple[str, Any], Content]:
    found: dict[tuple[str, Any], Content] = {}
    for row in comparisons:
        origins = row.provenance or ({},) * len(row.candidates)
        for number, (candidate, origin) in enumerate(zip(row.candidates, origins, strict=True), 1):
            place = f"{row.where or row.id}: candidate {number}"
            if not isinstance(origin.get("seed"), int | str):
                raise UserError(
                    f"{place}: got no seed in its provenance, want one to pair it by. Images of `mmalign generate` carry it."
                )
            if not candidate.images or not row.prompt.text:
                raise UserError(f"{place}: got no image or no prompt text, want both. Evaluate compares images of prompts.")
            key = (row.prompt.text, origin["seed"])
            if key in found:
                raise UserError(f"{place}: got prompt {key[0]!r} with seed {key[1]} again, want it once. Remove the copy.")
            images = tuple(one if one.where else replace(one, where=place) for one in candidate.images)
            found[key] = replace(candidate, images=images)
    return found


def write_report(
    evaluation: Evaluation,
    prompts: Sequence[str],
    before: Images,
    after: Images,
    output: Path,
    *,
    rows: int = 6,
    cols: int = 4,
    title: str = "Before and after training",
    checkpoints: Sequence[tuple[int, Images]] = (),
) -> None:
    """Write results.json, report.html, grid.png and, of checkpoints, checkpoints.png, each whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    grids = {"grid.png": before_after_grid(prompts, before, after, rows=rows, cols=cols)}
    columns: list[tuple[str, Images]] = []
    if checkpoints:
        columns = [("before", before), *((f"step {step}", images) for step, images in checkpoints), ("after", after)]
        grids["checkpoints.png"] = checkpoint_grid(prompts, columns, rows=rows)
    page = report_page(evaluation, prompts, before, after, title=title, num_shown=rows * cols, columns=columns, num_rows=rows)
    texts = {"results.json": json.dumps(evaluation.results(), indent=2) + "\n", "report.html": page}
    for name, text in texts.items():
        part = output / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, output / name)
    for name, grid in grids.items():
        part = output / f".{name}.part"
        grid.save(part, "PNG")
        os.replace(part, output / name)


def _comparisons(path: str) -> Iterable[Comparison]:
    for row in read(path, least=1):
        yield comparison(row, least=1)


if __name__ == "__main__":
    sys.exit(command_line(EvaluateConfig, main))
