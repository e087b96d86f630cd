"""The `offline` source: a fixed data set, in the order of `Order`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mmalign.errors import UserError
from mmalign.records import Example
from mmalign.sources.order import Draw, Order
from mmalign.sources.prepared import Prepared, Shape


@dataclass(frozen=True, kw_only=True)
class Offline:
    """A fixed data set: what a view made of the rows (`records.Examples`).

    Args:
        num_workers: worker processes that read and resize ahead; 0 reads in the training process.
    """

    num_workers: int = 0
    online: ClassVar[bool] = False

    def check(self, examples: Any, adapter: Any) -> None:
        """Refuse examples that are not of the adapter's kind."""
        adapter.check_examples(examples.kinds)
        adapter.check_sources(examples.sources)

    def shape(self, examples: Any) -> Shape:
        """That of the first example."""
        return Shape(num_candidates=len(examples[0].samples), side=examples[0].side)

    def open(self, examples: Sequence[Example], policy: Any, *, accelerator: Any = None, seed: int = 0) -> OfflineStream:
        """Read with the policy's `item(example, epoch)` (in a worker) and `collate(items)`, prepare with its `prepare`.

        A policy that has `groups(examples)` says with it which examples may share a step.
        """
        divide = getattr(policy, "groups", None)
        return OfflineStream(examples, policy, self.num_workers, () if divide is None else divide(examples))


class OfflineStream:
    """An opened `offline` source. It has no memory: a step number tells its examples."""

    def __init__(
        self, examples: Sequence[Example], policy: Any, num_workers: int, groups: tuple[tuple[int, ...], ...] = ()
    ) -> None:
        """Use `Offline.open`."""
        self.examples, self.policy, self.num_workers, self.groups = examples, policy, num_workers, groups

    def batches(self, order: Order, first_step: int, last_step: int) -> Iterator[Prepared]:
        """One prepared micro-batch at a time.

        Raises:
            UserError: an example cannot be read.
        """
        return (self.policy.prepare(batch) for batch in self.collated(order, first_step, last_step))

    def collated(self, order: Order, first_step: int, last_step: int) -> Iterator[Any]:
        """The same micro-batches before they are prepared."""
        batches = DataLoader(
            _Items(self.examples, self.policy.item),
            batch_sampler=_Steps(order, first_step, last_step),
            collate_fn=_Collate(self.policy.collate),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # of the workers: the global one would differ on resume
            prefetch_factor=4 if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch


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
