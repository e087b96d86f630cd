"""`mmalign quickstart`: align a small real diffusion model on this machine, by the verbs of any real run, and measure the gain.

The model is a Stable Diffusion of 1.7 million parameters, pretrained here on scanned digits (mmalign.digits). The preference is
"the digit that the prompt names, legible to a classifier"; a second classifier of another kind, fitted on other scans, judges
the result. Everything runs on the CPU and nothing is downloaded.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign import evaluate, generate, prepare, score, text_quickstart, train
from mmalign.config import Choice, command_line, read_config, resolved
from mmalign.digits import CAPTIONS, IMAGE_SIDE, SAMPLER_STEPS, Base, Pretraining, default_cache, pretrained
from mmalign.evaluate import EvaluateConfig
from mmalign.generate import GenerateConfig
from mmalign.models.quiet import quiet_libraries
from mmalign.report import Evaluation
from mmalign.score import ScoreConfig
from mmalign.scorers import SCORERS
from mmalign.stages import Stages, claimed, on_cpu
from mmalign.text_quickstart import Text, TextQuickstarted
from mmalign.train import TrainConfig

logger = logging.getLogger(__name__)

ANNOTATOR, JUDGE = "digit_legibility", "digit_judge"
PREFERENCE = "the digit that the prompt names, legible to a classifier"
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj"),
)
MADE = ("candidates", "cache", "lora", "before", "after")
MADE_FILES = (
    *("results.json", "report.html", "grid.png", "evaluation.yaml", "evaluation_environment.json"),
    *("config.yaml", "environment.json", "scored.parquet"),
)
# What a run must show; beneath it, it says so and ends with exit code 1.
LEAST_WIN_RATE, LEAST_LOW, LEAST_GAIN, MOST_DIVERSITY_CHANGE = 0.70, 0.55, 0.08, 0.20


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Settings of `mmalign quickstart`; the defaults are what was measured."""

    text: bool | Text = field(
        default=False,
        metadata={"help": "a language model instead: SmolLM2-135M-Instruct, of the extra text-quickstart; or text.base: tiny"},
    )
    out: Path | None = field(
        default=None,
        metadata={"help": "folder for the LoRA, the report and results.json; null: runs/quickstart, runs/quickstart_text"},
    )
    seed: int = field(default=0, metadata={"help": "of everything: pretraining, candidates, training, evaluation"})
    cache: Path | None = field(default=None, metadata={"help": "where pretrained models stay; null: ~/.cache/mmalign"})
    pretraining: Pretraining = field(default=Pretraining(), metadata={"help": "of the model that is then aligned"})
    groups: int = field(default=12, metadata={"help": "preference pairs per digit, each the best and worst of 4 candidates"})
    steps: int = field(default=60, metadata={"help": "of Diffusion-DPO, 16 pairs each"})
    pairs: int = field(default=20, metadata={"help": "images per digit before and after, on seeds not trained on"})

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        for name, least in (("groups", 1), ("steps", 1), ("pairs", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, want {least} or more.")

    @property
    def folder(self) -> Path:
        """`out`, or its default."""
        return self.out or Path("runs/quickstart" if self.text is False else "runs/quickstart_text")


@dataclass(frozen=True, kw_only=True)
class Quickstarted:
    """What was found and where it lies.

    Args:
        evaluation: before against after.
        seconds: of each stage, by the clock.
        out: the folder of everything.
        loading: two lines of stock diffusers code that load the result.
    """

    evaluation: Evaluation
    seconds: dict[str, float]
    out: Path
    loading: str

    @property
    def exit_code(self) -> int:
        """0 where the run shows what it must, else 1."""
        return 1 if shortfalls(self.evaluation) else 0

    def __str__(self) -> str:
        """The table, the time, the files and how to load the LoRA."""
        missing = shortfalls(self.evaluation)
        verdict = [f"Preference: {PREFERENCE}.", *(f"MISSED: {one}" for one in missing)]
        times = ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items())
        files = (self.out / name for name in ("report.html", "grid.png", "results.json"))
        return "\n".join(
            [
                *("", str(self.evaluation), "", *verdict),
                *(f"Seconds: {times}; {sum(self.seconds.values()):.0f} in all.", "", *map(str, files)),
                *("", f"LoRA: {self.out / 'lora'}. Stock diffusers loads it:", "", self.loading),
            ]
        )


def shortfalls(evaluation: Evaluation) -> list[str]:
    """What the evaluation lacks of what a quickstart must show, each a sentence; empty where all is shown."""
    rate, judge, change = evaluation.headline.win_rate, evaluation.held_out, evaluation.diversity_change
    gain = None if judge is None else judge.mean_after - judge.mean_before
    found = []
    if not (rate.rate > LEAST_WIN_RATE and rate.low > LEAST_LOW):
        found.append(
            f"win rate {rate.rate:.3f} with lower bound {rate.low:.3f}, want above {LEAST_WIN_RATE} and above {LEAST_LOW}."
        )
    if gain is None or gain < LEAST_GAIN:
        got = "unknown" if gain is None else f"{gain:+.3f}"
        found.append(f"correctness by the held-out judge changed by {got}, want at least +{LEAST_GAIN}.")
    if change is None or abs(change) > MOST_DIVERSITY_CHANGE:
        got = "unknown" if change is None else f"{change:+.1%}"
        found.append(f"diversity changed by {got}, want within {MOST_DIVERSITY_CHANGE:.0%}.")
    return found


def main(config: QuickstartConfig) -> Quickstarted | TextQuickstarted:
    """Align a small real diffusion model and measure the gain; with a bare --text a language model, by the settings of `text`.

    Raises:
        UserError: `out` holds other files, a folder cannot be written, or a package that `text` needs is missing.
    """
    if config.text is False:
        return of_digits(config)
    settings = Text() if config.text is True else config.text
    return text_quickstart.main(settings, out=config.folder, seed=config.seed, cache=config.cache, state=resolved(config))


def of_digits(config: QuickstartConfig) -> Quickstarted:
    """Pretrain a small real model on scanned digits, align it with a stated preference and measure the gain. About 4 minutes
    on 2 cores; the pretrained model is kept, and a second run with the same seed begins with it.

    Raises:
        UserError: `out` holds other files, or a folder cannot be written.
    """
    out = claimed(config.folder, resolved(config), MADE, MADE_FILES)
    stages = Stages()
    with quiet_libraries(), on_cpu():
        with stages.stage("pretrain", "a small Stable Diffusion learns to draw scanned digits"):
            cache = (config.cache or default_cache()).expanduser().absolute()
            base = pretrained(config.pretraining, seed=config.seed, cache=cache)
            logger.info("%s %s", "reused from an earlier run:" if base.reused else "kept for later runs:", base.folder)
        with stages.stage("generate", "it draws 4 candidates for each prompt"):
            made = generate.main(candidates_config(config, base, out / "candidates"))
        with stages.stage("score", f"a classifier prefers {PREFERENCE}"):
            scored = score.main(
                ScoreConfig(data=str(made.file), scorers=(_scorer(ANNOTATOR),), output=str(out / "scored.parquet"))
            )
        training = training_config(config, base, scored.output, out)
        with stages.stage("prepare", "images and prompts of the pairs are encoded once"):
            logger.info("%s", prepare.main(training))
        with stages.stage("train", "Diffusion-DPO on best against worst, a LoRA beside the frozen model"):
            trained = train.main(training)
        with stages.stage("evaluate", "the same prompts and new seeds, before and after"):
            before, after = (
                generate.main(evaluation_config(config, base, out / name, lora))
                for name, lora in (("before", None), ("after", trained.output))
            )
            evaluation = evaluate.main(comparison_config(before.file, after.file, trained.output, out)).evaluation
    for name in ("config.yaml", "environment.json"):
        shutil.copyfile(trained.output / name, out / name)
    result = Quickstarted(
        evaluation=evaluation, seconds=stages.seconds, out=out, loading=f"import diffusers; {trained.loading}"
    )
    _write_results(result, config, base)
    return result


def candidates_config(config: QuickstartConfig, base: Base, output: Path) -> GenerateConfig:
    """Candidates to choose from. Without guidance: with it this base errs so seldom that no preference is left to learn."""
    return _generation(base, output, prompts=CAPTIONS * config.groups, num_candidates=4, seed=2 * config.seed)


def evaluation_config(config: QuickstartConfig, base: Base, output: Path, lora: Path | None) -> GenerateConfig:
    """Images to be compared, of the base (lora None) or the tuned model; on other seeds than the candidates."""
    return _generation(
        base,
        output,
        prompts=CAPTIONS,
        num_candidates=config.pairs,
        seed=2 * config.seed + 1,
        lora=None if lora is None else str(lora),
    )


def training_config(config: QuickstartConfig, base: Base, data: Path, out: Path) -> TrainConfig:
    """The training run: `lora/config.yaml` afterwards, with which `mmalign train` repeats it."""
    settings = {
        "output": str(out / "lora"),
        "seed": config.seed,
        "adapter.name": "diffusion",
        "adapter.family": "sd15",
        "adapter.model": str(base.folder),
        "adapter.resolution": IMAGE_SIDE,
        "adapter.cache": str(out / "cache"),
        "adapter.lora": {"rank": 8, "targets": LORA_TARGETS},
        "data.importer": {"name": "comparisons", "path": str(data)},
        "data.view": {"name": "pair", "by": ANNOTATOR},
        "loss": {"name": "dpo", "beta": 1000.0},
        "training.steps": config.steps,
        "training.batch_size": 16,
        "training.optimiser": {"name": "adamw", "learning_rate": 3e-4},
        "training.warmup_steps": 10,
        "training.mixed_precision": "no",
    }
    return read_config(TrainConfig, None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def comparison_config(before: Path, after: Path, run: Path, out: Path) -> EvaluateConfig:
    """The annotator's win rate and the held-out judge, on the two folders of `evaluation_config`."""
    return EvaluateConfig(
        before=str(before),
        after=str(after),
        scorers=(_scorer(ANNOTATOR),),
        held_out=(_scorer(JUDGE),),
        output=str(out),
        run=str(run),
        rows=5,
        title="mmalign quickstart: before and after Diffusion-DPO",
    )


def _generation(base: Base, output: Path, **settings: Any) -> GenerateConfig:
    return GenerateConfig(
        family="sd15",
        model=str(base.folder),
        steps=SAMPLER_STEPS,
        guidance_scale=1.0,
        batch_size=40,
        device="cpu",
        output=output,
        **settings,
    )


def _scorer(name: str) -> Choice:
    return Choice(name=name, target=SCORERS[name])


def _write_results(result: Quickstarted, config: QuickstartConfig, base: Base) -> None:
    """Complete results.json, which `evaluate` began, in one piece."""
    more = {
        "seconds": result.seconds,
        "missed": shortfalls(result.evaluation),
        "preference": PREFERENCE,
        "seed": config.seed,
        "base": str(base.folder),
        "base_reused": base.reused,
        "lora": str(result.out / "lora"),
        "loading": result.loading,
    }
    part = result.out / ".results.json.part"
    part.write_text(json.dumps({**result.evaluation.results(), **more}, indent=2) + "\n", encoding="utf-8")
    os.replace(part, result.out / "results.json")


if __name__ == "__main__":
    sys.exit(command_line(QuickstartConfig, main, prog="mmalign quickstart"))
