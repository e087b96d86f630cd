"""Where the training examples come from, and in which order: by step number, so that any step can be resumed or repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mmalign.errors import UserError
from mmalign.records import Example

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


class _Steps(Sampler[list[Draw]]):
    def __init__(self, order: Order, first_step: int, last_step: int) -> None:
        self.order, self.first_step, self.last_step = order, first_step, last_step

    def __iter__(self) -> Iterator[list[Draw]]:
        return self.order.micro_batches(self.first_step, self.last_step)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.order.accumulation


class _Items(Dataset[Any]):
    def __init__(self, examples: Sequence[Example], item: Callable[[Example, int], Any]) -> None:
        self.examples, self.item = examples, item

    def __getitem__(self, draw: Draw) -> Any:
        epoch, index = draw
        try:
            return self.item(self.examples[index], epoch)
        except UserError as fault:  # a DataLoader would wrap it in the traceback of its worker
            return fault


class _Collate:
    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> Any:
        fault = next((item for item in items if isinstance(item, UserError)), None)
        return self.collate(items) if fault is None else fault


def offline(
    examples: Sequence[Example],
    policy: Any,
    order: Order,
    first_step: int,
    last_step: int,
    *,
    num_workers: int = 0,
) -> Iterator[Any]:
    """A fixed dataset, in the order of `Order`.

    Args:
        examples: what a view made of the rows (`records.Examples`).
        policy: its `item(example, epoch)` reads one example (in a worker), its `collate(items)` makes a batch of several.
        order, first_step, last_step: what to yield, one micro-batch at a time.
        num_workers: worker processes that read and resize ahead; 0 reads in the training process.
    Raises:
        UserError: an example cannot be read.
    """
    batches = DataLoader(
        _Items(examples, policy.item),
        batch_sampler=_Steps(order, first_step, last_step),
        collate_fn=_Collate(policy.collate),
        num_workers=num_workers,
        generator=torch.Generator(),  # of the workers' seeds; else the global one is advanced, and dropout differs on resume
        prefetch_factor=4 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


SOURCES: dict[str, Callable[..., Iterable[Any]]] = {"offline": offline}
