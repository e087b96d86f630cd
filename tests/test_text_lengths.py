"""The numbers of tokens that text losses divide by: of every candidate, of a gold answer, on average over a data set."""

import pytest
import torch
from torch import Tensor

from mmalign.adapters.text import TextAdapter
from mmalign.adapters.text_lengths import length_note, mean_length
from mmalign.losses import nll, tpo
from mmalign.records import Content, Example, Sample


def sample(completion: str) -> Sample:
    return Sample(prompt=Content(text="Name a colour:"), completion=Content(text=completion))


def example(number: int, chosen: str, rejected: str, gold: str) -> Example:
    return Example(id=str(number), samples=(sample(chosen), sample(rejected)), extras={"gold": sample(gold)})


EXAMPLES = [
    example(0, " red", " a table and a chair", " blue as the sea"),
    example(1, " green like the leaves of a tree in May", " no", " sky"),
    example(2, " yellow and orange", " why", " grey, I think"),
]


@pytest.fixture(scope="module")
def prepared() -> dict[str, Tensor]:
    policy = TextAdapter(model="tiny").open(asked=frozenset({"gold", "gold_lengths", "lengths", "mean_length"}))
    policy.survey(EXAMPLES)
    batch = policy.prepare(policy.collate([policy.item(one, 0) for one in EXAMPLES]))
    with torch.no_grad():
        return {**batch.inputs.measures(policy.network), **batch.side}


def test_every_candidate_and_the_gold_answer_come_with_their_number_of_tokens(prepared: dict[str, Tensor]) -> None:
    assert prepared["lengths"].shape == (3, 2) and prepared["gold_lengths"].shape == (3, 1)
    assert prepared["lengths"][1, 0] > prepared["lengths"][1, 1]
    assert prepared["gold_lengths"][0] > prepared["gold_lengths"][1]
    assert prepared["gold"].shape == prepared["gold_lengths"].shape


def test_the_mean_length_is_that_of_the_data_so_that_nll_by_token_is_the_mean_over_tokens(prepared: dict[str, Tensor]) -> None:
    best, lengths = prepared["policy"][:, 0], prepared["lengths"][:, 0]
    torch.testing.assert_close(prepared["mean_length"], lengths.mean().expand(3))
    data = {name: prepared[name] for name in ("policy", "lengths", "mean_length")}
    losses = nll(**data, reduction="token").losses
    torch.testing.assert_close(losses.mean(), -best.sum() / lengths.sum())
    parts = [nll(**{name: value[i : i + 1] for name, value in data.items()}, reduction="token").losses for i in range(3)]
    torch.testing.assert_close(torch.cat(parts), losses)


def test_of_many_examples_those_that_are_looked_at_are_spread_over_the_data() -> None:
    encoder = TextAdapter(model="tiny").open().reader.encoder
    rows = [example(n, " a" * (1 + n), " b", " c") for n in range(40)]  # sorted by length, as files often are
    lengths = [encoder(row.samples[:1]).lengths[0] for row in rows]
    assert mean_length(encoder, rows) == sum(lengths) / 40
    assert mean_length(encoder, rows, 10) == sum(lengths[::4]) / 10
    assert "(of 10 examples, spread over the data)" in length_note(encoder, rows, 10)
    assert "spread" not in length_note(encoder, rows)


def test_tpo_imitates_the_gold_answer_by_token(prepared: dict[str, Tensor]) -> None:
    data = {name: prepared[name] for name in ("policy", "gold", "gold_lengths", "lengths")}
    imitation = tpo(**data).losses - tpo(**data, alpha=0.0).losses
    torch.testing.assert_close(imitation, -(prepared["gold"] / prepared["gold_lengths"])[:, 0])
