"""Metrics of preferences: values by hand, ties one half, sums that add over batches and processes."""

import math
from pathlib import Path

import pytest
import torch
from loss_inputs import tensor
from text_golden import arrays as golden
from text_golden import assert_equal, pair_lengths, pairs
from torch import Tensor

from mmalign.losses import dpo
from mmalign.metrics import (
    Sums,
    add,
    averages,
    flip_threshold,
    forget_after,
    idealised_margin,
    idealised_ranking_accuracy,
    k3,
    preference_metrics,
    ranking_accuracy,
    table,
)


def values(sums: Sums) -> dict[str, float]:
    return averages(sums, table(sums).tolist())


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


def test_the_table_adds_up_over_processes() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 2, generator=generator)
    halves = [preference_metrics(torch.zeros(3), part, {"logps": part - 5}) for part in rewards.split(3)]
    whole = preference_metrics(torch.zeros(6), rewards, {"logps": rewards - 5})
    total = torch.stack([table(half) for half in halves]).sum(0)
    assert averages(halves[0], total.tolist()) == pytest.approx(values(whole))


# Quantiles


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_quantiles_of_the_margins_are_exact_to_within_a_bin(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    margins = scale * (torch.randn(2000, generator=generator) + 0.4)
    sums: Sums = {}
    for part in margins.split(7):  # quantiles of seven would say little
        sums = add(sums, preference_metrics(torch.zeros(len(part)), torch.stack([part, 0 * part], 1), {}))
    got = values(sums)
    for share in (0.1, 0.5, 0.9):
        exact = float(margins.double().quantile(share))
        assert got[f"rewards/margin_q{100 * share:.0f}"] == pytest.approx(exact, rel=0.2, abs=3e-4)
    assert "rewards/margin" not in got


def test_quantiles_know_no_ties_and_stop_at_the_outermost_edges() -> None:
    rewards, prob = rows((1e6, 0.0), (2e6, 0.0), (-9e6, 0.0)), torch.tensor([1.0, 1.0, 0.5])
    assert values(preference_metrics(torch.zeros(3), rewards, {}, prob=prob))["rewards/margin_q10"] == 8192
    assert values(preference_metrics(torch.zeros(3), rewards, {}))["rewards/margin_q10"] == -8192
    only_ties = preference_metrics(torch.zeros(3), rewards, {}, prob=torch.full((3,), 0.5))
    assert not any("margin" in name for name in values(only_ties))
    assert "rewards/margin" in only_ties  # the table has the same rows on every process


# Likelihoods


def test_log_ratios_and_lengths_by_hand() -> None:
    policy, reference = rows((-3.0, -9.0), (-8.0, -4.0)), rows((-5.0, -6.0), (-7.0, -7.0))
    lengths = rows((2.0, 3.0), (4.0, 1.0))
    sums = preference_metrics(
        torch.zeros(2), 0.1 * (policy - reference), {"logps": policy, "logps/ref": reference}, lengths=lengths, beta=0.1
    )
    got = values(sums)
    assert (got["logps/ratio_chosen"], got["logps/ratio_rejected"]) == (0.5, 0.0)  # t = (2, -3), (-1, 3): not the rewards
    assert got["rewards/chosen"] == pytest.approx(0.05)
    assert got["logps/chosen_falling"] == 0.5
    assert (got["lengths/chosen"], got["lengths/rejected"], got["lengths/difference"]) == (3.0, 2.0, 1.0)
    assert (got["ranking/accuracy"], got["ranking/accuracy_mean"]) == (0.5, 1.0)  # -1.5 over -3; -2 over -4
    assert got["ranking/reference"] == 0.75  # the second is tied
    assert got["ranking/idealised"] == 1.0
    by_hand = [(math.exp(-t) - 1 + t) for t in (2, -3, -1, 3)]
    assert got["kl/k3"] == pytest.approx(sum(by_hand) / 4)


def test_what_needs_a_reference_lengths_or_beta_is_left_out_without() -> None:
    logps = rows((-3.0, -9.0))
    bare = values(preference_metrics(torch.zeros(1), logps, {"logps": logps}))
    assert bare["ranking/accuracy"] == 1.0
    assert not any(name.startswith(("kl/", "lengths/", "logps/ratio", "ranking/f", "ranking/i")) for name in bare)
    with_reference = values(preference_metrics(torch.zeros(1), logps, {"logps": logps, "logps/ref": logps}))
    assert with_reference["ranking/reference"] == 1.0 and with_reference["kl/k3"] == 0.0
    assert "ranking/idealised" not in with_reference
    single = values(preference_metrics(torch.zeros(1), logps[:, :1], {"logps": logps[:, :1]}))
    assert not any(name.startswith("ranking/") for name in single)


def test_falling_of_unpaired_rows_is_that_of_the_desirable_ones() -> None:
    policy, reference = rows((-3.0,), (-9.0,), (-2.0,)), rows((-2.0,), (-1.0,), (-4.0,))
    got = values(
        preference_metrics(
            torch.zeros(3),
            policy,
            {"logps": policy, "logps/ref": reference},
            labels=torch.tensor([1.0, 0.0, 1.0]),
            lengths=rows((3.0,), (5.0,), (1.0,)),
        )
    )
    assert got["logps/chosen_falling"] == 0.5
    assert (got["logps/ratio_chosen"], got["logps/ratio_rejected"]) == (0.5, -8.0)
    assert (got["lengths/chosen"], got["lengths/rejected"]) == (2.0, 5.0)
    assert "lengths/difference" not in got


def test_a_pair_is_ranked_right_if_and_only_if_its_dpo_loss_is_below_its_threshold() -> None:
    stored = golden("ranking_accuracy")
    policy, reference = pairs()
    got = values(preference_metrics(torch.zeros(8), policy, {"logps": policy, "logps/ref": reference}, beta=0.1))
    assert got["ranking/accuracy"] == got["ranking/flip_satisfied"] == float(stored["rank_acc_policy_sum"])
    assert got["ranking/flip_threshold"] == pytest.approx(float(stored["flip_threshold_b01"].mean()), rel=1e-12)
    assert got["ranking/reference"] == float(stored["rank_acc_ref_sum"])
    wrong = reference[:, 0] < reference[:, 1]
    assert got["ranking/flipped"] == float((policy[:, 0] > policy[:, 1])[wrong].double().mean())
    assert got["rewards/accuracies"] != float(stored["reward_acc"])  # the rewards given here are logps


def test_of_a_list_every_ordered_pair_is_ranked() -> None:
    policy, reference = rows((-1.0, -3.0, -2.0)), rows((-1.0, -2.0, -3.0))
    got = values(preference_metrics(torch.zeros(1), policy, {"logps": policy, "logps/ref": reference}, beta=1.0))
    assert got["ranking/accuracy"] == pytest.approx(2 / 3)
    assert got["ranking/reference"] == 1.0
    thresholds = [math.log1p(math.exp(margin)) for margin in (1, 2, 1)]
    assert got["ranking/flip_threshold"] == pytest.approx(sum(thresholds) / 3)
    assert "ranking/flipped" not in got  # nothing to flip


def test_the_candidates_are_ranked_too_where_the_rewards_are_of_a_further_completion() -> None:
    logps = rows((-1.0, -3.0), (-5.0, -3.0))
    got = values(
        preference_metrics(torch.zeros(2), rows((0.5,), (1.5,)), {"logps": logps, "logps/ref": logps}, lengths=logps.abs())
    )
    assert (got["rewards/chosen"], got["ranking/accuracy"], got["ranking/accuracy_mean"]) == (1.0, 0.5, 0.5)
    assert not any(name.startswith(("rewards/m", "rewards/a")) for name in got)


def test_measures_of_another_width_are_reported_too() -> None:
    got = values(preference_metrics(torch.zeros(2), rows((1.0, 0.0), (1.0, 0.0)), {"rationale": rows((-4.0,), (-2.0,))}))
    assert got["rationale/chosen"] == -3.0


# Of a whole data set


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_idealised_ranking_repeats_the_published_code(beta: float) -> None:
    stored = golden("ranking_accuracy")
    _, reference = pairs()
    lengths = pair_lengths()
    means = reference / lengths
    summed = idealised_margin(reference[:, 0] - reference[:, 1], beta=beta)
    assert_equal(summed, stored[f"ideal_logratio_sum_b{beta}"])
    assert_equal(idealised_margin(means[:, 0] - means[:, 1], beta=beta).exp(), stored[f"ideal_ratio_norm_b{beta}"])
    assert_equal(idealised_ranking_accuracy(reference, beta=beta), stored[f"ideal_acc_sum_b{beta}"])
    assert_equal(idealised_ranking_accuracy(reference, lengths, beta=beta), stored[f"ideal_acc_norm_b{beta}"])


def test_ranking_accuracy_repeats_the_published_code() -> None:
    stored = golden("ranking_accuracy")
    policy, reference = pairs()
    lengths = pair_lengths()
    assert_equal(ranking_accuracy(policy), stored["rank_acc_policy_sum"])
    assert_equal(ranking_accuracy(policy, lengths), stored["rank_acc_policy_norm"])
    assert_equal(ranking_accuracy(reference), stored["rank_acc_ref_sum"])
    assert_equal(ranking_accuracy(reference, lengths), stored["rank_acc_ref_norm"])
    assert float(ranking_accuracy(torch.zeros(3, 2))) == 0.5


def test_flip_thresholds_repeat_the_published_numbers_and_tell_which_pairs_are_ranked_right() -> None:
    stored = golden("ranking_accuracy")
    policy, reference = pairs()
    thresholds = flip_threshold(reference[:, 0] - reference[:, 1], beta=0.1)
    assert_equal(thresholds, stored["flip_threshold_b01"])
    losses = dpo(policy, reference, beta=0.1).losses
    assert_equal(losses, stored["dpo_loss_b01"])
    assert torch.equal(losses <= thresholds, stored["ranked_correct"])
    assert torch.equal(losses <= thresholds, policy[:, 0] >= policy[:, 1])


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 0.1, "agreement": 1.0}, {"beta": 0.1, "agreement": 0.0}])
def test_an_ideal_without_meaning_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"want beta above 0, agreement in \(0, 1\)"):
        idealised_margin(torch.zeros(1), **settings)


def test_k3_is_the_divergence_on_average_over_the_policys_own_samples_and_finite_for_any() -> None:
    policy, reference = tensor(0.7, 0.2, 0.1).log(), tensor(0.3, 0.3, 0.4).log()
    divergence = (policy.exp() * (policy - reference)).sum()
    assert_equal((policy.exp() * k3(policy, reference)).sum(), divergence)
    assert (k3(policy, reference) > 0).all() and (k3(policy, policy) == 0).all()
    far = k3(torch.tensor([-1000.0, 1000.0]), torch.zeros(2))
    torch.testing.assert_close(far, torch.tensor([math.exp(20) - 21, 999.0]).double())


def test_metrics_beyond_a_step_and_a_line_cut_short_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    forget_after(file, 2)
    assert not file.exists()
    file.write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n{"step": 3, "loss": 0.3}\n{"step": 4, "lo')
    forget_after(file, 2)
    assert file.read_text() == '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
