"""Which examples each process sees at each step, by step number, so that any step can be resumed or repeated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch

Draw = tuple[int, int]  # (epoch, index of the example)


@dataclass(frozen=True)
class Mix:
    """Two parts of the examples, drawn in a proportion of their own.

    Args:
        share: of the draws, that `first` has; between 0 and 1.
        first, others: examples.
    """

    share: Fraction
    first: tuple[int, ...]
    others: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which examples each process sees at each step.

    All examples in a new seeded order every epoch, one epoch after another without a gap: every step is full. Step s takes
    `batch_size * num_processes * accumulation` of them, dealt so that the union over processes and micro-batches is the
    same however it is split.

    With `groups`, tuples of examples that are all there are, a step is of one group: each has an order and epochs of its own
    (a step can begin a group's next epoch), and its turns come evenly, as often as its share of the examples.

    With `mix`, its first part has its share of any stretch of draws, to one draw, evenly spread; either part has an order and
    epochs of its own.
    """

    num_examples: int
    batch_size: int
    accumulation: int
    seed: int
    num_processes: int = 1
    process: int = 0
    groups: tuple[tuple[int, ...], ...] = ()
    mix: Mix | None = None

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
        if self.mix is not None:
            return self._mixed(position, self.mix)
        if not self.groups:
            epoch, place = divmod(position, self.num_examples)
            return epoch, self._permutation(epoch, 0, self.num_examples)[place]
        step, place = divmod(position, self.per_step)
        group, turn = self._turn(step)
        members = self.groups[group]
        epoch, place = divmod(turn * self.per_step + place, len(members))
        return epoch, members[self._permutation(epoch, group, len(members))[place]]

    def _mixed(self, position: int, mix: Mix) -> Draw:
        before, after = (int(place * mix.share) for place in (position, position + 1))  # draws of the first part
        part, turn, members = (0, before, mix.first) if after > before else (1, position - before, mix.others)
        epoch, place = divmod(turn, len(members))
        return epoch, members[self._permutation(epoch, part, len(members))[place]]

    def _turn(self, step: int) -> tuple[int, int]:
        """The group of a step, and how many steps it had before: its j-th is due at (j + its start) / its size."""
        turns: list[tuple[int, int]] = self.__dict__.setdefault("_turns", [])
        if len(turns) <= step:
            counts: list[int] = self.__dict__.setdefault("_counts", [0] * len(self.groups))
            starts: list[float] = torch.rand(len(self.groups), generator=torch.Generator().manual_seed(self.seed)).tolist()
            while len(turns) <= step:
                due = [(count + start) / len(group) for count, start, group in zip(counts, starts, self.groups, strict=True)]
                turn = due.index(min(due))
                turns.append((turn, counts[turn]))
                counts[turn] += 1
        return turns[step]

    def _permutation(self, epoch: int, group: int, count: int) -> list[int]:
        cached: dict[int, tuple[int, list[int]]] = self.__dict__.setdefault("_cached", {})
        if group not in cached or cached[group][0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + 7_919 * group)
            cached[group] = epoch, torch.randperm(count, generator=generator).tolist()
        return cached[group][1]
