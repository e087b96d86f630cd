"""`mmalign prepare`: encode each distinct image and prompt of a run's data once, into the cache that training reads.

Takes the very config of the run; what it fills is `adapter.cache`. For a loss that asks for a reference it also computes the
reference's logps, and training needs no reference pass: of texts token by token, of images for every seeded draw of
`adapter.draws`.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.config import command_line
from mmalign.errors import UserError
from mmalign.experiment import TrainConfig, build_objective, open_policy, read_examples
from mmalign.training import start

__all__ = ["PrepareConfig", "PreparedData", "main"]

logger = logging.getLogger(__name__)
PrepareConfig = TrainConfig


@dataclass(frozen=True)
class PreparedData:
    """What is in the cache now, and what its reference logps save.

    Args:
        passes_made: reference passes of single samples that the bank holds.
        passes_saved: those that each run of this config does without, whatever its beta, learning rate and loss.
    """

    folder: Path
    num_references: int
    num_bytes: int
    num_images: int = 0
    num_prompts: int = 0
    passes_made: int = 0
    passes_saved: int = 0

    def __str__(self) -> str:
        encoded = f"{self.num_images} images, {self.num_prompts} prompts, " if self.num_prompts else ""
        size = f"{self.num_bytes / 2**20:.1f} MB"
        return f"cache      {self.folder}: {encoded}reference logps of {self.num_references} examples, {size}{self._saving()}"

    def _saving(self) -> str:
        if not self.passes_made:
            return ""
        runs = self.passes_saved / self.passes_made
        share = (
            "as many as one run needs"
            if round(runs, 1) == 1
            else f"one run would need {self.passes_saved}, {runs:.1f} times as many"
        )
        return (
            f"\nsaving     {self.passes_made} passes of the reference are done and kept ({share}); no run on these data makes "
            "them again, whatever its beta, learning rate and loss"
        )


def main(config: TrainConfig) -> PreparedData:
    """Fill the cache; what is there already is kept, so that it can be stopped and started again.

    Raises:
        UserError: no `adapter.cache`, a cache of other weights or sizes, or faulty data.
    """
    if config.adapter.settings.get("cache") is None:
        raise UserError("adapter.cache: got none, want the folder to fill. Set it in the config that you train with.")
    accelerator = start(config.training, config.output)
    with accelerator.main_process_first():
        examples, summary = read_examples(config.data)
    objective = build_objective(config, examples)
    policy = open_policy(config, examples, objective, accelerator, caching=accelerator.process_index)
    if accelerator.is_main_process:
        logger.info("data       %s", summary)
    share = _Share(examples, range(accelerator.process_index, len(examples), accelerator.num_processes))
    k = len(examples[0].samples)
    cache, references = policy.cache, objective.needs_reference and policy.keeps_references
    try:
        cache.fill(policy, _progress(share, "encode", accelerator))
        accelerator.wait_for_everyone()
        if references:
            cache.fill_references(policy, _progress(share, "reference", accelerator), k, accelerator.autocast)
            accelerator.wait_for_everyone()
    finally:
        cache.close()
    training = config.training
    per_step = training.batch_size * training.accumulation * accelerator.num_processes
    return PreparedData(
        folder=cache.folder,
        **cache.counts(),
        num_references=len(examples) if references else 0,
        num_bytes=cache.num_bytes,
        passes_made=len(examples) * k * (config.adapter.settings.get("draws") or 1) if references else 0,
        passes_saved=k * per_step * training.num_steps(len(examples), per_step) if references else 0,
    )


class _Share:
    """The examples of one process, read when iterated."""

    def __init__(self, examples: Any, indices: range) -> None:
        self.examples, self.indices = examples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Any:
        return (self.examples[i] for i in self.indices)


def _progress(items: _Share, what: str, accelerator: Any) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=what, disable=not accelerator.is_main_process)


if __name__ == "__main__":
    sys.exit(command_line(PrepareConfig, main))
