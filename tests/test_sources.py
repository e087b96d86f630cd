"""The order of the examples: the same union at each step however it is split, every epoch a permutation, resumable."""

from typing import Any

import pytest
import torch

from mmalign.errors import UserError
from mmalign.records import Example
from mmalign.sources import Draw, Offline, Order


def order(batch_size: int, accumulation: int, num_processes: int = 1, process: int = 0, **changes: int) -> Order:
    sizes = {"num_examples": 10, "seed": 3, **changes}
    return Order(batch_size=batch_size, accumulation=accumulation, num_processes=num_processes, process=process, **sizes)


def steps(split: tuple[int, int, int], num_steps: int, **changes: int) -> list[list[Draw]]:
    """The examples of each step, over all processes and micro-batches, sorted."""
    batch_size, accumulation, num_processes = split
    found: list[list[Draw]] = [[] for _ in range(num_steps)]
    for process in range(num_processes):
        batches = list(order(*split, process, **changes).micro_batches(0, num_steps))
        assert {len(batch) for batch in batches} == {batch_size}
        for number, batch in enumerate(batches):
            found[number // accumulation] += batch
    return [sorted(draws) for draws in found]


@pytest.mark.parametrize("split", [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_a_step_has_the_same_examples_however_it_is_split(split: tuple[int, int, int]) -> None:
    assert steps(split, 12) == steps((4, 1, 1), 12)
    assert all(len(set(draws)) == 4 for draws in steps(split, 12))


def test_every_epoch_is_a_permutation_and_no_two_are_alike() -> None:
    drawn = [draw for batch in order(1, 1).micro_batches(0, 30) for draw in batch]
    epochs = [[index for epoch, index in drawn if epoch == number] for number in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [epoch for epoch, _ in drawn] == [0] * 10 + [1] * 10 + [2] * 10


def test_a_run_that_goes_on_repeats_and_leaves_out_nothing() -> None:
    whole = list(order(2, 2).micro_batches(0, 7))
    assert list(order(2, 2).micro_batches(0, 3)) + list(order(2, 2).micro_batches(3, 7)) == whole


def test_the_order_is_the_seeds() -> None:
    assert list(order(2, 1).micro_batches(0, 5)) == list(order(2, 1).micro_batches(0, 5))
    assert list(order(2, 1).micro_batches(0, 5)) != list(order(2, 1, seed=4).micro_batches(0, 5))


def test_a_step_larger_than_the_data_goes_through_it_more_than_once() -> None:
    (draws,) = steps((8, 1, 1), 1, num_examples=3)
    assert [epoch for epoch, _ in draws] == [0, 0, 0, 1, 1, 1, 2, 2]


def examples(number: int, name: str = "example") -> list[Example]:
    return [Example(id=f"{name} {n}", samples=()) for n in range(number)]


class Reader:
    """Stands for an adapter: its items are the examples' ids."""

    def item(self, example: Example, epoch: int) -> tuple[str, int]:
        if example.id.startswith("broken"):
            raise UserError("pairs.jsonl:3: got a damaged image, want one that decodes. Replace it.")
        return example.id, epoch

    def collate(self, items: list[Any]) -> list[Any]:
        return items


@pytest.mark.parametrize("num_workers", [0, 1])
def test_offline_batches_follow_the_order_with_and_without_workers(num_workers: int) -> None:
    got = list(Offline(num_workers=num_workers).open(examples(10), Reader()).collated(order(2, 1), 2, 9))
    expected = [[(f"example {index}", epoch) for epoch, index in batch] for batch in order(2, 1).micro_batches(2, 9)]
    assert got == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_of_the_data_is_told_in_its_own_words_from_a_worker_too(num_workers: int) -> None:
    with pytest.raises(UserError) as told:
        stream = Offline(num_workers=num_workers).open(examples(4, "broken"), Reader())
        list(stream.collated(order(2, 1, num_examples=4), 0, 2))
    assert str(told.value) == "pairs.jsonl:3: got a damaged image, want one that decodes. Replace it."


def test_reading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(Offline().open(examples(4), Reader()).collated(order(2, 1, num_examples=4), 0, 2))
    assert torch.equal(torch.get_rng_state(), before)
