"""How long, how large and how precisely to train: the settings of the loop."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import nn

from mmalign.config import Choice, Table, differences
from mmalign.errors import UserError
from mmalign.moving_reference import Following
from mmalign.optimisers import OPTIMISERS

POSITIVE = (
    *("steps", "epochs", "batch_size", "accumulation", "log_every", "keep_checkpoints"),
    *("candidate_microbatch", "checkpoint_every", "validate_every", "max_grad_norm"),
)

# What may differ between a checkpoint's config and the run that goes on from it.
FREE_ON_RESUME = (
    *("resume", "output", "overwrite", "dry_run", "source.num_workers", "adapter.validation", "data.check_images"),
    *(f"training.{name}" for name in ("log_every", "checkpoint_every", "keep_checkpoints", "validate_every", "trackers")),
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long, how large and how precisely to train.

    Args:
        steps, epochs: optimiser steps, or passes over the data; exactly one of the two.
        batch_size: examples per device and micro-batch.
        accumulation: micro-batches per optimiser step.
        schedule: of the learning rate, by diffusers' names.
        max_grad_norm: global norm that gradients are clipped to; None: no clipping.
        ema_decay: of the moving average of the weights, which is then what is saved; None: no average. Published: 0.9999. At
            step n it is at most (1 + n) / (10 + n), as in diffusers.
        moving_reference: how the reference follows the policy; None: it stays what the policy was at the start.
        candidate_microbatch: candidates back-propagated at a time: memory of that many, exact gradients, one more forward pass.
        mixed_precision: None: what `accelerate` was configured with.
        checkpoint_every, keep_checkpoints: steps between checkpoints (None: none), and how many to keep.
        validate_every: steps between validation samples; None: only at the end.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 1
    accumulation: int = 1
    optimiser: Annotated[Choice, Table(OPTIMISERS)]
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    moving_reference: Following | None = None
    candidate_microbatch: int | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    log_every: int = 1
    checkpoint_every: int | None = 500
    keep_checkpoints: int = 2
    validate_every: int | None = None
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps, epochs: got both or neither, want exactly one. Set the other to null.")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, want a positive number.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay}, want a number between 0 and 1, such as 0.9999.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: got {self.warmup_steps}, want 0 or more.")
        if OPTIMISERS.get(self.optimiser.name) is self.optimiser.target:
            _check_optimiser(self.optimiser.settings)

    def num_steps(self, num_examples: int, per_step: int) -> int:
        """Optimiser steps of the run; a last, partly filled step of the epochs is filled from the next epoch."""
        return self.steps if self.steps is not None else max(1, math.ceil((self.epochs or 0) * num_examples / per_step - 1e-9))


def _check_optimiser(settings: Mapping[str, Any]) -> None:
    """Refuse what would only fail, or climb, once the run has begun; a learning rate of 0 is one for trying things out."""
    for name in ("learning_rate", "weight_decay", "eps"):
        value = settings.get(name, 0.0)
        if not 0 <= value < math.inf:
            raise ValueError(f"optimiser.{name}: got {value}, want a finite number, 0 or more.")
    if not all(0 <= beta < 1 for beta in settings.get("betas", ())):
        raise ValueError(f"optimiser.betas: got {list(settings['betas'])}, want numbers from 0 to below 1.")


def start(training: Training, output: Path, *, dry_run: bool = False) -> Any:
    """The `accelerate` state of this process; call it before models are opened.

    Raises:
        UserError: a tracker that is not installed; sharded training; float16 without a GPU; another mixed precision than an
            earlier run of this process; or one of several processes that do not find each other, and would all write the same
            files.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    for tracker in training.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f'training.trackers: {tracker} is not installed. Run `pip install "mmalign[trackers]"`.')
    try:
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            # The loop accumulates by itself: whatever the launcher was told must not divide the loss again.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=list(training.trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "tensorboard")),
            step_scheduler_with_optimizer=False,
        )
    except ValueError as fault:
        if "already been initialized" not in str(fault):
            raise
        raise UserError(
            f"training.mixed_precision: got {training.mixed_precision} in a process whose earlier run had another one, which "
            "stays. Start this run in a process of its own."
        ) from fault
    if not dry_run:
        _check_launch(accelerator)
    return accelerator


def _check_launch(accelerator: Any) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if launched != accelerator.num_processes:
        raise UserError(
            f"launch: got {launched} processes, each of which works alone, want them connected. For several processes on CPUs "
            "set ACCELERATE_USE_CPU=1 in the environment; for GPUs see that each process has one."
        )
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UserError(
            f"launch: got {kind}, want one process or data parallelism (MULTI_GPU, MULTI_CPU): nothing is sharded yet."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise UserError("training.mixed_precision: got fp16 without a GPU to scale the loss for, want bf16 or no.")


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each key in which two resolved configs are different runs: `loss.0.beta: was 5000, is now 2000`.

    A run may be made longer or shorter where its learning rate does not depend on its length.
    """
    free = FREE_ON_RESUME
    if str(new.get("training", {}).get("schedule", "")).startswith("constant"):
        free += ("training.steps", "training.epochs")
    return [line for line in differences(dict(old), dict(new)) if not line.startswith(free)]


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, which trackers can filter by: `training.optimiser.learning_rate`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat |= flat_settings({str(place): one for place, one in enumerate(value)}, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def check_dropout(network: nn.Module, training: Training) -> None:
    """Refuse dropout whose masks would make numbers differ that must not.

    Raises:
        UserError: the model itself has dropout, or LoRA has it and candidates go one at a time.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if any("lora" not in name for name in names):
        raise UserError(
            f"model: its layer {names[0]} has dropout, whose masks would differ between policy and reference. Set the "
            "dropout in the model's config to 0."
        )
    if names and training.candidate_microbatch is not None:
        raise UserError(
            "training.candidate_microbatch: the network has dropout, whose masks would differ between the passes. "
            "Set lora.dropout to 0, or candidate_microbatch to null."
        )
