"""`mmalign train`: tune a model on preferences. The same run as `accelerate launch -m mmalign.train --config x.yaml a.b=c`."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign import checkpoints
from mmalign.adapters.step_reward import StepRewardPolicy
from mmalign.adapters.text_reward import TextRewardPolicy
from mmalign.config import command_line, resolved, write_resolved
from mmalign.errors import UserError
from mmalign.experiment import (
    TrainConfig,
    build_objective,
    check_images,
    check_output,
    find_checkpoint,
    open_policy,
    read_examples,
    seen_by_losses,
)
from mmalign.loop import METRICS, fit
from mmalign.memory import OPTIMISER_BYTES, memory_estimate
from mmalign.model_card import write_card
from mmalign.models.lora import LORA_FILES
from mmalign.noise import beta_conventions
from mmalign.objective import Objective
from mmalign.scorers.preference import HEAD_FILES
from mmalign.sources import Offline, OfflineStream, Shape
from mmalign.training import start

__all__ = ["TrainConfig", "Trained", "main"]

FOLDERS = (
    "validation",
    "raw",
    "pipeline",
    "model",
    "reward",
    "tensorboard",
    "wandb",
)  # beside the checkpoints, in a run's output
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"),
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a run left: its folder, and stock code that loads the tuned weights. Of a dry run, the plan.

    Only one of several processes has it `told`.
    """

    output: Path
    loading: str
    plan: str = ""
    told: bool = True
    library: str = "diffusers"

    def __str__(self) -> str:
        if not self.told:
            return ""
        if self.plan:
            return self.plan
        return f"tuned weights: {self.output}\nload them with:\nimport {self.library}\n{self.loading}"


def main(config: TrainConfig) -> Trained:
    """Read the data, open the model, train, save.

    Raises:
        UserError: any fault of config, data, model or checkpoint, told before training starts; or a loss that is not finite.
    """
    check_output(config)
    accelerator = start(config.training, config.output, dry_run=config.dry_run)
    with accelerator.main_process_first():  # one process reads and decodes; the others find it done
        examples, summary = read_examples(config.data)
    objective = build_objective(config, examples)
    checkpoint = find_checkpoint(config, accelerator)
    if objective.of_batches and config.training.batch_size * accelerator.num_processes < 2:
        raise UserError(
            f"training.batch_size: got 1 on one process with loss {objective.of_batches[0]}, which takes the rows of a "
            "micro-batch over all processes together, want 2 or more. More accumulation does not make up for it."
        )
    policy = open_policy(config, examples, objective, accelerator)
    source = config.source.build()
    shape = seen_by_losses(config, examples)
    plan = _plan(config, policy, objective, examples, shape, accelerator.num_processes, summary)
    loading = policy.loading_lines(config.output)
    if config.dry_run:
        return Trained(config.output, loading, plan, accelerator.is_main_process, policy.library)
    if accelerator.is_main_process and config.adapter.settings.get("cache") is None:
        check_images(examples, config.data.check_images)
    stream = source.open(examples, policy, accelerator=accelerator, seed=config.seed)
    if isinstance(stream, OfflineStream):  # a fault of the data shows before any file does
        first = (stream.groups[0] if stream.groups else range(len(examples)))[: config.training.batch_size]
        policy.prepare(policy.collate([policy.item(examples[i], 0) for i in first]))
    if accelerator.is_main_process:
        logger.info("%s", plan)
        _make_folder(config.output)
        for folder in (config.output, config.output / "raw"):
            checkpoints.remove_leftovers(folder)
        begun = (config.output / "config.yaml").exists()
        if checkpoint is None and begun:
            _clear(config.output)
        if checkpoint is None or not begun:
            write_resolved(config, config.output)
    accelerator.wait_for_everyone()
    settings = resolved(config)
    fit(
        policy,
        objective,
        stream,
        config.training,
        accelerator=accelerator,
        num_examples=len(examples),
        seed=config.seed,
        output=config.output,
        config=settings,
        data=examples.fingerprint,
        resume=checkpoint,
    )
    if accelerator.is_main_process:
        adapter = config.adapter.settings
        write_card(
            config.output,
            base_model=str(adapter["model"]),
            config=settings,
            data=summary,
            plan=plan,
            loading=loading,
            lora=adapter.get("lora") is not None,
            library=policy.library,
            reward=isinstance(policy, StepRewardPolicy | TextRewardPolicy),
        )
    return Trained(config.output, loading, told=accelerator.is_main_process, library=policy.library)


def _plan(
    config: TrainConfig,
    policy: Any,
    objective: Objective,
    examples: Sequence[Any],
    seen: Shape,
    num_processes: int,
    summary: str,
) -> str:
    """The arithmetic of the run."""
    training = config.training
    per_step = num_processes * training.batch_size * training.accumulation
    num_examples = len(examples)
    steps = training.num_steps(num_examples, per_step)
    source = config.source.build()
    epochs = "" if source.online else f" = {steps * per_step / num_examples:.2f} epochs"
    lines = [
        f"data       {summary}",
        f"batch      {num_processes} devices x {training.batch_size} x {training.accumulation} accumulated "
        f"= {per_step} examples of {seen.num_candidates} per step",
        f"length     {steps} steps = {steps * per_step} examples{epochs}",
        *(source.lines(examples, steps * per_step) if isinstance(source, Offline) else ()),
        f"trained    {policy.plan()}",
        *policy.notes(examples),
    ]
    for term in objective.terms:
        beta = term.settings.get("beta")
        if isinstance(beta, int | float) and objective.needs_reference and seen.errors:
            shape = policy.latent_shape
            latents = " x ".join(map(str, shape))
            others = ", ".join(f"{value:.4g} ({name})" for name, value in beta_conventions(beta, math.prod(shape)).items())
            lines.append(f"beta       {term.name}: {others}, on {latents} latents")
        elif beta == "auto":
            auto = objective.auto_beta
            lines.append(
                f"beta       {term.name}: auto, so that the mean gradient factor is {auto.target:g}; "
                f"{auto.maximum:g} until policy and reference differ"
            )
    lines.append(f"memory     {_memory(config, policy, objective, seen.num_candidates)}")
    return "\n".join(lines)


def _memory(config: TrainConfig, policy: Any, objective: Objective, num_candidates: int) -> str:
    adapter, training = config.adapter.settings, config.training
    network, trained = policy.network, sum(p.numel() for p in policy.parameters())
    total = sum(p.numel() for p in network.parameters())
    lora = adapter.get("lora") is not None
    base = total - trained if lora else total
    per_sample = policy.activations()
    precision: Any = training.mixed_precision or "no"
    known = training.optimiser.name in OPTIMISER_BYTES
    estimate = memory_estimate(
        num_parameters=base,
        num_trained=trained,
        num_samples=training.batch_size * min(training.candidate_microbatch or num_candidates, num_candidates),
        activations_per_sample=per_sample or 0.0,
        num_encoder_parameters=policy.num_encoder_parameters,
        precision=precision,
        optimiser=training.optimiser.name if known else "adamw",
        reference_copy=not lora and objective.needs_reference,
        ema=training.ema_decay is not None,
    )
    missing = "" if per_sample is not None else "; activations not counted for a network of this size"
    return f"{estimate}{missing}" + ("" if known else "; the optimiser counted as adamw")


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
    except OSError as fault:
        raise UserError(f"output: {output} cannot be written ({fault}). Choose another folder.") from fault


def _clear(output: Path) -> None:
    """Remove what a run of before left in the folder where one starts: an overwritten one, or one killed early."""
    for path in output.glob("*"):
        if path.name.startswith("checkpoint-") or path.name in FOLDERS:
            shutil.rmtree(path)
        elif path.name in (
            METRICS,
            "README.md",
            *TOKENIZER_FILES,
            *HEAD_FILES,
            *(name for names in LORA_FILES.values() for name in names),
        ):
            path.unlink()


if __name__ == "__main__":
    sys.exit(command_line(TrainConfig, main))
