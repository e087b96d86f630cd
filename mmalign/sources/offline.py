"""The `offline` source: a fixed data set, in the order of `Order`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mmalign.errors import UserError
from mmalign.records import Example, Examples
from mmalign.sources.order import Draw, Mix, Order
from mmalign.sources.prepared import Prepared, Shape


@dataclass(frozen=True, kw_only=True)
class Offline:
    """A fixed data set: what a view made of the rows (`records.Examples`).

    Args:
        num_workers: worker processes that read and resize ahead; 0 reads in the training process.
        wanted: share of the draws that are wanted examples (labels of the view `unpaired`): whatever their number, evenly
            spread over the steps, wanted and unwanted ones in orders and epochs of their own. None: all examples come equally
            often. Published: 0.8 (Diffusion-KTO, whose sampler draws with replacement).
    """

    num_workers: int = 0
    wanted: float | None = None
    online: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a share without meaning."""
        if self.wanted is not None and not 0 < self.wanted < 1:
            raise ValueError(
                f"wanted: got {self.wanted}, want a share between 0 and 1, or null for all examples equally often."
            )

    def check(self, examples: Any, adapter: Any) -> None:
        """Refuse examples that are not of the adapter's kind, and a share of wanted ones where there are no two kinds."""
        adapter.check_examples(examples.kinds)
        adapter.check_sources(examples.sources)
        self.mix(examples)

    def mix(self, examples: Sequence[Example]) -> Mix | None:
        """Wanted and unwanted examples, where `wanted` is set.

        Raises:
            UserError: examples without labels, or with one label only.
        """
        if self.wanted is None:
            return None
        labels = examples.labels if isinstance(examples, Examples) else [one.side.get("labels") for one in examples]
        if len(labels) < len(examples) or None in labels:
            raise UserError(
                f"source.wanted: got {self.wanted}, and examples without labels. Use data.view: unpaired, or leave wanted out."
            )
        first, others = (tuple(n for n, label in enumerate(labels) if (label == 1.0) is kind) for kind in (True, False))
        if not first or not others:
            raise UserError(
                f"source.wanted: got {self.wanted}, and {len(first)} wanted and {len(others)} unwanted examples, want some of "
                "both. Look at the labels, or set wanted to null."
            )
        return Mix(Fraction(str(self.wanted)), first, others)

    def lines(self, examples: Sequence[Example], draws: int) -> list[str]:
        """What a run's plan says of this many draws."""
        mix = self.mix(examples)
        if mix is None:
            return []
        first = int(draws * mix.share)
        passes = [f"{n / len(part):.2f} epochs of {len(part)}" for n, part in ((first, mix.first), (draws - first, mix.others))]
        return [f"mix        {self.wanted:.0%} wanted: {passes[0]} wanted examples, {passes[1]} unwanted ones"]

    def shape(self, examples: Any) -> Shape:
        """That of the first example, with what any other one has beside it."""
        others = examples.side if isinstance(examples, Examples) else {}
        return Shape(num_candidates=len(examples[0].samples), side={**others, **examples[0].side})

    def open(self, examples: Sequence[Example], policy: Any, *, accelerator: Any = None, seed: int = 0) -> OfflineStream:
        """Read with the policy's `item(example, epoch)` (in a worker) and `collate(items)`, prepare with its `prepare`.

        A policy that has `groups(examples)` says with it which examples may share a step.

        Raises:
            UserError: `wanted` with such groups, or with examples that have no two labels.
        """
        divide = getattr(policy, "groups", None)
        groups, mix = () if divide is None else divide(examples), self.mix(examples)
        if groups and mix is not None:
            raise UserError(
                f"source.wanted: got {self.wanted} where a step is of one size or length, which has its own share of wanted "
                "examples. Set wanted to null, or adapter.buckets to null (of texts: adapter.group_by_length: 1)."
            )
        return OfflineStream(examples, policy, self.num_workers, groups, mix)


class OfflineStream:
    """An opened `offline` source. It has no memory: a step number tells its examples."""

    def __init__(
        self,
        examples: Sequence[Example],
        policy: Any,
        num_workers: int,
        groups: tuple[tuple[int, ...], ...] = (),
        mix: Mix | None = None,
    ) -> None:
        """Use `Offline.open`."""
        self.examples, self.policy, self.num_workers, self.groups, self.mix = examples, policy, num_workers, groups, mix

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
