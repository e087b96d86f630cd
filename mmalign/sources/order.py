"""Which examples each process sees at each step, by step number, so that any step can be resumed or repeated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

Draw = tuple[int, int]  # (epoch, index of the example)


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which examples each process sees at each step.

    All examples in a new seeded order every epoch, one epoch after another without a gap: every step is full. Step s takes
    `batch_size * num_processes * accumulation` of them, dealt so that the union over processes and micro-batches is the
    same however it is split.
    """

    num_examples: int
    batch_size: int
    accumulation: int
    seed: int
    num_processes: int = 1
    process: int = 0

    @property
    def per_step(self) -> int:
        """Effective batch size: examples of one optimiser step over all processes."""
        return self.batch_size * self.num_processes * self.accumulation

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[list[Draw]]:
        """This process's micro-batches from step `first_step` up to, without, `last_step`."""
        for step in range(first_step, last_step):
            for micro in range(self.accumulation):
                start = step * self.per_step + (micro * self.num_processes + self.process) * self.batch_size
                yield [self._draw(position) for position in range(start, start + self.batch_size)]

    def _draw(self, position: int) -> Draw:
        epoch, place = divmod(position, self.num_examples)
        return epoch, self._permutation(epoch)[place]

    def _permutation(self, epoch: int) -> list[int]:
        cached: tuple[int, list[int]] | None = self.__dict__.get("_cached")
        if cached is None or cached[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            cached = epoch, torch.randperm(self.num_examples, generator=generator).tolist()
            object.__setattr__(self, "_cached", cached)
        return cached[1]
