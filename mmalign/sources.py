"""Where the training examples come from, and in which order: by step number, so that any step can be resumed or repeated."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mmalign.errors import UserError
from mmalign.records import Comparison, Dropped, Example, comparison

logger = logging.getLogger(__name__)

View = Callable[[Comparison], "tuple[Example, ...] | Dropped"]
Draw = tuple[int, int]  # (epoch, index of the example)


class Examples(Dataset[Example]):
    """The examples that a view makes of a dataset of comparisons; media are read only when an example is.

    `dropped` counts the rows the view does not use, by reason. `side` names the side data, `num_candidates` is k.
    """

    def __init__(self, rows: Any, view: View) -> None:
        """Args:
            rows: dataset with the columns of `records.features()`.
            view: comparison -> examples.

        Raises:
            UserError: no example is left, or the examples differ in k or in their side data.
        """
        self.rows = rows
        self.view = view
        self.index: list[tuple[int, int]] = []
        self.dropped: Counter[str] = Counter()
        shapes: dict[tuple[int, frozenset[str]], int] = {}
        for number, row in enumerate(_without_media(rows)):
            examples = view(row)
            if isinstance(examples, Dropped):
                self.dropped[examples.reason] += 1
                continue
            for place, example in enumerate(examples):
                self.index.append((number, place))
                shapes.setdefault((len(example.samples), frozenset(example.side)), number)
        self._check(shapes)
        ((self.num_candidates, self.side),) = shapes

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Example:
        number, place = self.index[index]
        examples = self.view(comparison(self.rows[number], where=f"row {number}"))
        assert not isinstance(examples, Dropped)
        return examples[place]

    def summary(self) -> str:
        """One line: examples, rows, and why rows were dropped."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items())) or "none"
        return f"{len(self)} examples of {self.num_candidates} from {len(self.rows)} rows; rows dropped: {dropped}"

    def _check(self, shapes: dict[tuple[int, frozenset[str]], int]) -> None:
        if not shapes:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items())) or "no rows"
            raise UserError(f"data: the view leaves no example ({reasons}). Judge the rows, or choose another data.view.")
        if len(shapes) > 1:
            kinds = "; ".join(
                f"row {row}: {k} candidates, side data {', '.join(sorted(side)) or 'none'}"
                for (k, side), row in list(shapes.items())[:4]
            )
            raise UserError(
                f"data: examples of one run must be alike, got {kinds}. Filter the rows, or set view.num_candidates."
            )


def _without_media(rows: Any) -> Iterator[Comparison]:
    """Every row as a comparison whose candidates are empty: what decides the index, without reading one image."""
    import pyarrow.compute as pc

    light = [name for name in rows.column_names if name not in ("candidates", "prompt")]
    tables = rows.with_format("arrow").iter(batch_size=1000)
    for table in tables:
        counts = pc.list_value_length(table["candidates"]).to_pylist()
        for values, count in zip(table.select(light).to_pylist(), counts, strict=True):
            row = {**values, "prompt": {"text": "", "images": []}, "candidates": [{"text": None, "images": []}] * count}
            yield comparison(row)


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
    def __init__(self, examples: Sequence[Example] | Examples, item: Callable[[Example, int], Any]) -> None:
        self.examples, self.item = examples, item

    def __getitem__(self, draw: Draw) -> Any:
        epoch, index = draw
        return self.item(self.examples[index], epoch)


def offline(
    examples: Examples,
    policy: Any,
    order: Order,
    first_step: int,
    last_step: int,
    *,
    num_workers: int = 0,
) -> Iterable[Any]:
    """A fixed dataset, in the order of `Order`.

    Args:
        examples: what a view made of the rows.
        policy: its `item(example, epoch)` reads one example (in a worker), its `collate(items)` makes a batch of several.
        order, first_step, last_step: what to yield, one micro-batch at a time.
        num_workers: worker processes that read and resize ahead; 0 reads in the training process.
    """
    return DataLoader(
        _Items(examples, policy.item),
        batch_sampler=_Steps(order, first_step, last_step),
        collate_fn=policy.collate,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )


SOURCES: dict[str, Callable[..., Iterable[Any]]] = {"offline": offline}
