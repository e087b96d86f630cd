"""Metrics of preferences: values by hand, ties one half, sums that add over batches and processes."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmalign.metrics import Sums, add, forget_after, preference_metrics


def values(sums: Sums) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in sums.items() if count}


def rows(*numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers)


def test_a_pair_worked_out_by_hand() -> None:
    rewards = rows((1.0, 0.0), (0.0, 2.0), (1.0, 1.0))
    got = values(preference_metrics(torch.tensor([0.3, 0.6, 0.9]), rewards, {"logps": rewards - 5, "logps/ref": rewards - 6}))
    assert got["loss"] == pytest.approx(0.6)
    assert got["rewards/accuracies"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert (got["rewards/chosen"], got["rewards/rejected"]) == (pytest.approx(2 / 3), pytest.approx(1))
    assert got["rewards/margins"] == pytest.approx((1 - 2 + 0) / 3)
    factors = [1 / (1 + math.exp(margin)) for margin in (1, -2, 0)]
    assert got["rewards/saturation"] == pytest.approx(sum(factors) / 3)
    assert got["logps/chosen"] == pytest.approx(2 / 3 - 5)
    assert got["logps/ref_rejected"] == pytest.approx(1 - 6)


def test_an_untrained_policy_has_accuracy_one_half_and_saturation_one_half() -> None:
    got = values(preference_metrics(torch.zeros(4), torch.zeros(4, 2), {}))
    assert got["rewards/accuracies"] == 0.5
    assert got["rewards/saturation"] == 0.5
    assert got["rewards/margins"] == 0.0


def test_of_a_list_every_ordered_pair_counts_and_equal_scores_are_no_pair() -> None:
    scores = rows((1.0, 0.5, 0.5))
    got = values(preference_metrics(torch.zeros(1), rows((2.0, 3.0, 1.0)), {}, scores=scores))
    assert got["rewards/accuracies"] == 0.5  # 2 > 3 is wrong, 2 > 1 is right, the third pair is tied
    without = values(preference_metrics(torch.zeros(1), rows((2.0, 3.0, 1.0)), {}))
    assert without["rewards/accuracies"] == pytest.approx(2 / 3)


def test_a_tie_is_neither_right_nor_wrong() -> None:
    rewards, prob = rows((1.0, 0.0), (9.0, 0.0), (0.0, 9.0)), torch.tensor([1.0, 0.5, 0.5])
    got = values(preference_metrics(torch.zeros(3), rewards, {}, prob=prob))
    assert got["rewards/accuracies"] == 1.0
    assert got["rewards/margins"] == 1.0
    assert got["rewards/saturation"] == pytest.approx(1 / (1 + math.e))


def test_unpaired_rows_are_told_apart_by_their_label() -> None:
    sums = preference_metrics(torch.zeros(3), rows((1.0,), (2.0,), (6.0,)), {}, labels=torch.tensor([1.0, 0.0, 0.0]))
    got = values(sums)
    assert (got["rewards/chosen"], got["rewards/rejected"]) == (1.0, 4.0)
    assert "rewards/accuracies" not in got


def test_a_batch_without_a_class_leaves_no_number_for_it() -> None:
    sums = preference_metrics(torch.zeros(1), rows((1.0,)), {}, labels=torch.tensor([1.0]))
    assert "rewards/rejected" in sums  # the table has the same rows on every process
    assert "rewards/rejected" not in values(sums)


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    losses, rewards = torch.rand(6, generator=generator), torch.randn(6, 2, generator=generator)
    whole = preference_metrics(losses, rewards, {"mse": rewards**2})
    parts: Sums = {}
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts = add(parts, preference_metrics(losses[part], rewards[part], {"mse": rewards[part] ** 2}))
    assert values(parts) == pytest.approx(values(whole))


def test_metrics_beyond_a_step_and_a_line_cut_short_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    forget_after(file, 2)
    assert not file.exists()
    file.write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n{"step": 3, "loss": 0.3}\n{"step": 4, "lo')
    forget_after(file, 2)
    assert file.read_text() == '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
