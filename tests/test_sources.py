"""The order of the examples: the same union at each step however it is split, every epoch a permutation, resumable."""

from fractions import Fraction
from typing import Any

import pytest
import torch

from mmalign.errors import UserError
from mmalign.records import Example
from mmalign.sources import Draw, Mix, Offline, Order


def order(batch_size: int, accumulation: int, num_processes: int = 1, process: int = 0, **changes: Any) -> Order:
    sizes = {"num_examples": 10, "seed": 3, **changes}
    return Order(batch_size=batch_size, accumulation=accumulation, num_processes=num_processes, process=process, **sizes)


def steps(split: tuple[int, int, int], num_steps: int, **changes: Any) -> list[list[Draw]]:
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


MIX = Mix(Fraction("0.8"), (1, 4, 7), (0, 2, 3, 5, 6, 8, 9))  # wanted ones are few


def test_wanted_examples_have_their_share_of_any_stretch_however_few_they_are() -> None:
    drawn = [draw for batch in order(1, 1, mix=MIX).micro_batches(0, 210) for draw in batch]
    wanted = [index in MIX.first for _, index in drawn]
    for start in range(0, 170, 7):
        for length in (1, 5, 8, 10, 37):
            assert abs(sum(wanted[start : start + length]) - 0.8 * length) < 1.01
    assert sum(wanted) == 168
    for part in (MIX.first, MIX.others):
        own = [draw for draw in drawn if draw[1] in part]
        epochs = [own[n : n + len(part)] for n in range(0, len(own), len(part))]
        assert all(sorted(index for _, index in one) == sorted(part) for one in epochs), "every epoch is a permutation"
        assert all({number for number, _ in one} == {place} for place, one in enumerate(epochs))
        assert len({tuple(index for _, index in one) for one in epochs}) > 2


@pytest.mark.parametrize("split", [(8, 1, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)])
def test_a_mixed_step_has_the_same_examples_however_it_is_split_and_goes_on_where_it_stopped(
    split: tuple[int, int, int],
) -> None:
    assert steps(split, 9, mix=MIX) == steps((8, 1, 1), 9, mix=MIX)
    mixed = order(*split, mix=MIX)
    assert [*mixed.micro_batches(0, 4), *order(*split, mix=MIX).micro_batches(4, 9)] == list(mixed.micro_batches(0, 9))


@pytest.mark.parametrize("share", ["0.1", "0.333", "0.5", "0.999"])
def test_any_share_is_met_to_one_draw_far_into_a_run(share: str) -> None:
    mixed = order(1000, 1, mix=Mix(Fraction(share), MIX.first, MIX.others))
    (batch,) = mixed.micro_batches(1_000_000, 1_000_001)
    assert abs(sum(index in MIX.first for _, index in batch) - 1000 * float(share)) < 1.01


def labelled(*labels: float) -> list[Example]:
    return [Example(id=f"example {n}", samples=(), side={"labels": label}) for n, label in enumerate(labels)]


def test_offline_draws_the_wanted_share_by_the_labels() -> None:
    stream = Offline(wanted=0.75).open(labelled(0, 0, 1, 0, 0), Reader())
    assert stream.mix == Mix(Fraction(3, 4), (2,), (0, 1, 3, 4))
    got = [name for batch in stream.collated(order(4, 1, num_examples=5, mix=stream.mix), 0, 5) for name, _ in batch]
    assert got.count("example 2") == 15 and {got.count(f"example {n}") for n in (0, 1, 3, 4)} == {1, 2}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (labelled(1, 1), r"2 wanted and 0 unwanted examples, want some of both"),
        (labelled(0), r"0 wanted and 1 unwanted examples"),
        ([Example(id="plain", samples=())], r"examples without labels\. Use data\.view: unpaired"),
    ],
)
def test_a_share_of_what_is_not_there_is_refused(given: list[Example], told: str) -> None:
    with pytest.raises(UserError, match=f"source\\.wanted: got 0\\.8, and {told}"):
        Offline(wanted=0.8).open(given, Reader())


def test_a_share_is_refused_where_steps_are_of_one_size_and_out_of_bounds() -> None:
    class Sized(Reader):
        def groups(self, examples: list[Example]) -> tuple[tuple[int, ...], ...]:
            return (tuple(range(len(examples))),)

    with pytest.raises(UserError, match=r"source\.wanted: got 0\.8 where a step is of one size"):
        Offline(wanted=0.8).open(labelled(0, 1), Sized())
    for share in (0.0, 1.0, -0.1, 80.0):
        with pytest.raises(ValueError, match="want a share between 0 and 1"):
            Offline(wanted=share)


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
