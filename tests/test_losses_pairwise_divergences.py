"""f-divergences in the losses of DPO's family: their transforms, gradients and limits."""

import inspect
import math
from typing import Any

import pytest
import torch
from loss_inputs import call, data, settings_of, tensor
from text_golden import arrays, leaf, pairs

from mmalign.losses import LOSSES, dpo, ipo, ln_dpo
from mmalign.losses.divergences import transform

LENGTHS = torch.stack([arrays("inputs_seq")["chosen_len"], arrays("inputs_seq")["rejected_len"]], 1).double()
NO_REFERENCE = torch.zeros(8, 2, dtype=torch.float64)

RATIOS = torch.linspace(-30, 30, 61, dtype=torch.float64)[:, None]
DIVERGENT = [name for name in LOSSES if "divergence" in settings_of(name)]
KINDS = [("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.5), ("alpha", -1.0), ("alpha", 2.0), ("alpha", 0.0)]


def test_losses_of_differences_take_a_divergence_and_pointwise_losses_do_not() -> None:
    family = {"dpo", "robust", "ipo", "hinge", "exo", "discopop", "wpo", "dove", "ln_dpo", "ld_dpo", "length_dpo", "odpo"}
    assert set(DIVERGENT) == family
    assert all("divergence" not in inspect.signature(LOSSES[name]).parameters for name in ("kto", "bco", "apo_zero", "sppo"))


@pytest.mark.parametrize(("divergence", "alpha"), KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_transform_is_zero_at_zero_and_rises(divergence: str, alpha: float, dtype: torch.dtype) -> None:
    assert transform(torch.zeros(1, 2, dtype=dtype), divergence, alpha).tolist() == [[0.0, 0.0]]
    values = transform(RATIOS.to(dtype), divergence, alpha)
    assert values.isfinite().all() and (values.diff(dim=0) >= 0).all()


def test_the_transforms_are_the_published_ones_up_to_their_value_at_zero() -> None:
    t = RATIOS
    torch.testing.assert_close(transform(t, "forward_kl", 0.5), 1 - torch.exp(-t), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(transform(t, "js", 0.5), math.log(2) - torch.log1p(torch.exp(-t)), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(transform(t, "alpha", 0.5), (1 - torch.exp(-t / 2)) * 2, rtol=1e-12, atol=1e-15)


def test_alpha_runs_from_reverse_to_forward_kl() -> None:
    assert torch.equal(transform(RATIOS, "alpha", 1.0), transform(RATIOS, "forward_kl", 0.5))
    assert torch.equal(transform(RATIOS, "alpha", 0.0), RATIOS)
    torch.testing.assert_close(transform(RATIOS, "alpha", 1e-10), RATIOS, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", DIVERGENT)
@pytest.mark.parametrize(("divergence", "alpha"), KINDS)
def test_losses_with_a_divergence_have_its_gradient_and_no_reward_at_the_reference(
    name: str, divergence: str, alpha: float
) -> None:
    settings = {"divergence": divergence, "divergence_alpha": alpha}
    values = data(name)
    moved = "joint" if name == "dove" else "policy"
    if name == "dove":
        values = {"joint": tensor([-3.0, -4.0], [-2.0, -1.0], [-6.0, -5.5])}
        values["reference_joint"] = values["joint"] + tensor([0.5, -0.2], [-0.1, 0.9], [-2.0, 3.0])
    logps = leaf(values.pop(moved))
    assert torch.autograd.gradcheck(lambda one: call(name, {moved: one, **values}, **settings).losses, logps, eps=1e-7)
    reference = "reference_joint" if name == "dove" else "reference"
    agreed = {**values, moved: logps.detach(), reference: logps.detach()}
    if name == "ld_dpo":
        agreed["reference_shared"] = agreed["shared"]
    assert (call(name, agreed, **settings).rewards == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_a_divergence_stays_finite_where_the_policy_has_left_the_reference(divergence: str, dtype: torch.dtype) -> None:
    policy = torch.tensor([[-9000.0, -10.0], [-10.0, -9000.0]], dtype=dtype).requires_grad_()
    for name in ("dpo", "ipo", "hinge", "exo", "discopop", "robust"):
        result = call(name, {"policy": policy, "reference": torch.full((2, 2), -10.0, dtype=dtype)}, divergence=divergence)
        result.losses.sum().backward()
        assert result.losses.isfinite().all() and result.rewards.isfinite().all() and policy.grad.isfinite().all(), name


# Faults of TRL 1.16


@pytest.mark.parametrize("loss", [ipo, ln_dpo])
def test_a_constant_of_the_divergence_does_not_change_normalised_losses(loss: Any) -> None:
    # Where scores are divided by lengths a constant does not cancel: only h(0) = 0 leaves an unchanged policy at zero.
    policy, _ = pairs()
    settings = {"normalise": "length"} if loss is ipo else {}
    for divergence in ("forward_kl", "js", "alpha"):
        unchanged = loss(policy, policy, lengths=LENGTHS, divergence=divergence, **settings)
        plain = loss(policy, policy, lengths=LENGTHS, **settings)
        assert torch.equal(unchanged.losses, plain.losses) and (unchanged.rewards == 0).all()
    shifted = dpo(-1 / LENGTHS, NO_REFERENCE).losses
    assert (shifted - dpo(NO_REFERENCE, NO_REFERENCE).losses).abs().max() > 1e-3


def test_rewards_are_of_the_transformed_log_ratio() -> None:
    # TRL's metrics leave the transform out.
    policy, reference = pairs()
    result = dpo(policy, reference, divergence="forward_kl")
    torch.testing.assert_close(result.rewards, 0.1 * (1 - torch.exp(reference - policy)), rtol=1e-12, atol=1e-15)
    margins = result.rewards[:, 0] - result.rewards[:, 1]
    torch.testing.assert_close(result.losses, torch.log1p(torch.exp(-margins)), rtol=1e-12, atol=0)
