"""How long, how large and how precisely to train: the settings of the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mmalign.config import Choice, Table
from mmalign.optimisers import OPTIMISERS

POSITIVE = (
    *("steps", "epochs", "batch_size", "accumulation", "log_every", "keep_checkpoints"),
    *("candidate_microbatch", "checkpoint_every", "validate_every", "max_grad_norm"),
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
        ema_decay: of the moving average of the weights, which is then what is saved; None: no average. Published: 0.9999.
        candidate_microbatch: candidates back-propagated at a time: memory of that many, exact gradients, one more forward pass.
        mixed_precision: None: what `accelerate` was configured with.
        checkpoint_every, keep_checkpoints: steps between checkpoints, and how many to keep.
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
    candidate_microbatch: int | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    log_every: int = 1
    checkpoint_every: int | None = None
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

    def num_steps(self, num_examples: int, per_step: int) -> int:
        """Optimiser steps of the run; a last, partly filled step of the epochs is filled from the next epoch."""
        return self.steps if self.steps is not None else max(1, math.ceil((self.epochs or 0) * num_examples / per_step - 1e-9))


def start(training: Training, output: Path) -> Any:
    """The `accelerate` state of this process; call it before models are opened."""
    from accelerate import Accelerator

    return Accelerator(
        mixed_precision=training.mixed_precision,
        log_with=list(training.trackers) or None,
        project_dir=str(output),
        step_scheduler_with_optimizer=False,
    )
