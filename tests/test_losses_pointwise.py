"""Losses that judge candidates one by one: TRL's numbers, values by hand, what they are the same as."""

import math
from typing import Any

import pytest
import torch
from loss_inputs import tensor
from text_golden import arrays, assert_equal, case, leaf, lists, pairs

from mmalign.losses import apo_zero_unpaired, bco, dpo, gpo, kto, nca, sppo


def unpaired() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stored = arrays("inputs_kto")
    return stored["logps"][:, None], stored["ref_logps"][:, None], stored["label"]


# Unpaired: KTO, APO-zero


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("kto", {"beta": 0.1}),
        ("kto_w", {"beta": 0.1, "desirable_weight": 1.33}),
        ("kto_negkl", {"beta": 0.1}),
        ("kto_b0.5", {"beta": 0.5}),
    ],
)
def test_kto_with_the_anchor_of_mismatched_completions_repeats_trl(name: str, settings: dict[str, float]) -> None:
    stored, expected = arrays("inputs_kto"), case("trl116_kto", name)
    policy, reference, labels = unpaired()
    anchor = (stored["kl_logps"] - stored["ref_kl_logps"]).mean()
    logps = leaf(policy)
    result = kto(logps, reference, labels, -anchor if name == "kto_negkl" else anchor, **settings)
    result.losses.mean().backward()
    assert_equal(result.losses.mean(), expected["loss"])
    assert_equal(logps.grad[:, 0], expected["grad_logps"])


def test_apo_zero_unpaired_repeats_trl_and_is_kto_without_an_anchor() -> None:
    expected = case("trl116_kto", "apo_zero_unpaired")
    policy, reference, labels = unpaired()
    logps = leaf(policy)
    result = apo_zero_unpaired(logps, reference, labels)
    result.losses.mean().backward()
    assert_equal(result.losses.mean(), expected["loss"])
    assert_equal(logps.grad[:, 0], expected["grad_logps"])
    assert_equal(result.rewards[labels == 1].mean(), expected["rewards_chosen_mean"])
    assert_equal(result.rewards[labels == 0].mean(), expected["rewards_rejected_mean"])
    below = torch.tensor(-3.0, dtype=torch.float64)
    assert torch.equal(kto(policy, reference, labels, below).losses, result.losses)


def test_apo_zero_unpaired_weighs_the_classes_as_kto_does() -> None:
    policy, reference, labels = unpaired()
    plain = apo_zero_unpaired(policy, reference, labels).losses
    heavy = apo_zero_unpaired(policy, reference, labels, desirable_weight=2.0, undesirable_weight=3.0).losses
    torch.testing.assert_close(heavy, plain * torch.where(labels == 1, 2.0, 3.0).double(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("loss", [kto, apo_zero_unpaired, bco])
@pytest.mark.parametrize("label", [0, 1])
def test_a_batch_without_one_of_the_classes_is_finite_and_equal_to_those_rows_of_a_full_batch(loss: Any, label: int) -> None:
    policy, reference, labels = unpaired()
    kept = labels == label
    anchor = {"anchor": torch.tensor(0.4, dtype=torch.float64)} if loss is kto else {}
    logps = leaf(policy[kept])
    alone = loss(logps, reference[kept], labels[kept], **anchor)
    alone.losses.sum().backward()
    assert logps.grad.isfinite().all() and (logps.grad != 0).all()
    whole = loss(policy, reference, labels, **anchor)
    assert torch.equal(alone.losses, whole.losses[kept])


# BCO


def test_bco_of_pairs_without_a_shift_repeats_trl() -> None:
    expected = case("trl116_dpo_seq", "bco_pair_b0.1")
    policy, reference = pairs()
    for data, settings in ({}, {"shifted": True}), ({"shift": torch.tensor(2.5, dtype=torch.float64)}, {"shifted": False}):
        logps = leaf(policy)
        result = bco(logps, reference, **data, **settings)
        result.losses.mean().backward()
        assert_equal(result.losses, expected["per_sample"])
        assert_equal(result.losses.mean(), expected["loss"])
        assert_equal(logps.grad[:, 0], expected["grad_chosen_logps"])
        assert_equal(logps.grad[:, 1], expected["grad_rejected_logps"])
        assert_equal(
            result.rewards.mean(0), torch.stack([expected["metric_reward_chosen"], expected["metric_reward_rejected"]])
        )


def test_a_mix_of_dpo_and_bco_repeats_trl() -> None:
    expected = case("trl116_dpo_seq", "mix_sigmoid0.8_bco0.2")
    policy, reference = pairs()
    logps = leaf(policy)
    losses = 0.8 * dpo(logps, reference).losses + 0.2 * bco(logps, reference).losses
    losses.mean().backward()
    assert_equal(losses.mean(), expected["loss"])
    assert_equal(logps.grad[:, 0], expected["grad_chosen_logps"])
    assert_equal(logps.grad[:, 1], expected["grad_rejected_logps"])


def test_bco_shifts_every_reward_by_the_running_mean() -> None:
    policy, reference, shift = tensor([3.0, -1.0]), tensor([0.0, 0.0]), torch.tensor(1.0, dtype=torch.float64)
    result = bco(policy, reference, shift=shift, beta=0.5)
    expected = math.log(1 + math.exp(-0.5 * (3 - 1))) + math.log(1 + math.exp(0.5 * (-1 - 1)))
    assert result.losses.item() == pytest.approx(expected, rel=1e-12)
    assert result.rewards.tolist() == [[1.5, -0.5]]  # as the policy has earned them


def test_bco_of_unpaired_rows_is_bco_of_the_pairs_they_make() -> None:
    policy, reference = pairs()
    shift = torch.tensor(-0.7, dtype=torch.float64)
    together = bco(policy, reference, shift=shift).losses
    apart = sum(
        bco(policy[:, [column]], reference[:, [column]], torch.full((8,), label), shift).losses
        for column, label in ((0, True), (1, False))
    )
    torch.testing.assert_close(together, apart, rtol=1e-14, atol=0)


def test_bco_refuses_labels_of_pairs_and_single_rows_without() -> None:
    policy, reference = pairs()
    with pytest.raises(ValueError, match=r"bco: got 2 candidates a row with labels, want 2 without labels or 1 with"):
        bco(policy, reference, torch.ones(8))
    with pytest.raises(ValueError, match=r"bco: got 1 candidates a row without labels"):
        bco(policy[:, :1], reference[:, :1])


# GPO


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_gpo_repeats_the_derived_numbers(beta: float) -> None:
    expected = case("derived_list", f"gpo_K4_b{beta}")
    policy, reference, _ = lists()
    logps = leaf(policy[:1])
    result = gpo(logps, reference[:1], expected["s_mean"][None], beta=beta)
    result.losses.mean().backward()
    assert_equal(result.losses[0], expected["loss"])
    assert_equal(logps.grad[0], expected["grad"])
    alone = [gpo(policy[:1, [i]], reference[:1, [i]], expected["s_mean"][None, [i]], beta=beta).losses for i in range(4)]
    assert_equal(torch.cat(alone), expected["per_response"])


def test_sppo_of_a_list_repeats_the_derived_numbers_and_gpo_on_win_rates_less_one_half_is_sppo() -> None:
    expected = case("derived_list", "sppo_K4_b0.1")
    policy, reference, _ = lists()
    wins = expected["p_mean"][None]
    for loss, data, settings in ((sppo, wins, {"beta": 0.1, "target": "scores"}), (gpo, wins - 0.5, {"beta": 0.1})):
        logps = leaf(policy[:1])
        result = loss(logps, reference[:1], scores=data, **settings)
        result.losses.mean().backward()
        assert_equal(result.losses[0], expected["loss"])
        assert_equal(logps.grad[0], expected["grad"])


# Refusals


@pytest.mark.parametrize("loss", [kto, apo_zero_unpaired, bco, gpo, nca])
def test_a_beta_that_teaches_nothing_is_refused_under_the_name_of_the_loss(loss: Any) -> None:
    policy, reference, labels = unpaired()
    given = {"scores": policy} if loss in (gpo, nca) else {"labels": labels}
    with pytest.raises(ValueError, match=rf"^{loss.__name__}\.beta: got 0.0, want a positive number"):
        loss(policy, reference, **given, beta=0.0)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("loss", [kto, apo_zero_unpaired, bco])
def test_gradients_of_both_classes_are_derivatives(loss: Any, label: float) -> None:
    policy, reference, _ = unpaired()
    more = {"anchor": torch.tensor(0.3, dtype=torch.float64)} if loss is kto else {}
    labels = torch.full((8,), label, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logps: loss(logps, reference, labels, **more).losses, leaf(policy))
