"""How likely a network finds noisy candidates: what is computed, in which precision, with which gradient, at what cost."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign.likelihoods import DenoisingInputs, TransitionInputs, winner_guard
from mmalign.losses import LOSSES, rank_dpo, spo
from mmalign.noise import scaled_linear_alphas_cumprod, vp_schedule

DIMS = (2, 4, 4)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class ConvNet(nn.Module):
    """A small float64 network that looks at the noisy latents, the timestep and a condition; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 5, 3, padding=1, dtype=torch.float64)
        self.second = nn.Conv2d(5, 2, 3, padding=1, dtype=torch.float64)
        self.of_time = nn.Linear(1, 5, dtype=torch.float64)
        self.of_prompt = nn.Linear(3, 5, dtype=torch.float64)
        for index, parameter in enumerate(self.parameters()):
            parameter.data = 0.3 * normal(*parameter.shape, seed=100 + index)
        self.rows: list[int] = []

    def forward(self, noisy: Tensor, timestep: Tensor, *, prompt: Tensor) -> Tensor:
        self.rows.append(len(noisy))
        assert len(timestep) == len(prompt) == len(noisy)
        shift = self.of_time(timestep[:, None].double() / 1000) + self.of_prompt(prompt)
        return self.second(torch.tanh(self.first(noisy) + shift[:, :, None, None]))


def denoising(batch: int = 3, k: int = 2, **changes: Any) -> DenoisingInputs:
    """k noisy candidates a prompt that share timestep and noise, as `prepare` makes them."""
    noise = normal(batch, 1, *DIMS, seed=1).expand(batch, k, *DIMS)
    timestep = torch.tensor([[100], [500], [900]])[:batch].expand(batch, k)
    schedule = vp_schedule(alphas_cumprod=scaled_linear_alphas_cumprod(dtype=torch.float64))
    fields = {
        "noisy": schedule.add_noise(normal(batch, k, *DIMS, seed=2), noise, timestep),
        "timestep": timestep,
        "target": noise,
        "condition": {"prompt": normal(batch, 3, seed=3)},
    }
    return DenoisingInputs(**{**fields, **changes})


def transition(batch: int = 3, m: int = 1, k: int = 2, **changes: Any) -> TransitionInputs:
    fields = {
        "noisy": normal(batch, m, *DIMS, seed=4),
        "next_noisy": normal(batch, k, *DIMS, seed=5),
        "timestep": torch.tensor([[100], [500], [900]])[:batch].expand(batch, m),
        "sample_weight": 1 + 0.1 * normal(batch, m, seed=6),
        "output_weight": 0.3 * normal(batch, m, seed=7),
        "std": 0.2 + normal(batch, m, seed=8).abs(),
        "condition": {"prompt": normal(batch, 3, seed=3)},
    }
    return TransitionInputs(**{**fields, **changes})


def stored(prediction: Tensor) -> Callable[..., Tensor]:
    return lambda noisy, timestep, **condition: prediction.flatten(0, 1)


def gradients(network: nn.Module) -> list[Tensor]:
    taken = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    return taken


# Denoising: the number


def test_logps_are_minus_half_the_mean_squared_error() -> None:
    # errors by hand: residuals (1, 2, 2, 1) and (0, 0, 0, 4): means 10/4 and 16/4
    target = torch.tensor([[[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 0.0], [0.0, 0.0]]]]], dtype=torch.float64)
    output = torch.tensor([[[[[2.0, 4.0], [1.0, 3.0]]], [[[0.0, 0.0], [0.0, 4.0]]]]], dtype=torch.float64)
    inputs = DenoisingInputs(noisy=torch.zeros_like(target), timestep=torch.zeros(1, 2).long(), target=target)
    assert inputs.logps(stored(output)).tolist() == [[-1.25, -2.0]]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_all_candidates_cost_one_call_of_the_network(k: int) -> None:
    network, inputs = ConvNet(), denoising(k=k)
    assert inputs.logps(network).shape == (3, k)
    assert network.rows == [3 * k]


def test_every_candidate_gets_its_own_latents_timestep_and_its_prompts_condition() -> None:
    network = ConvNet()
    inputs = denoising(k=3, timestep=torch.tensor([[1, 200, 400], [900, 3, 77], [5, 6, 7]]))
    together = inputs.logps(network)
    for row in range(3):
        for column in range(3):
            output = network(
                inputs.noisy[row, column][None],
                inputs.timestep[row, column][None],
                prompt=inputs.condition["prompt"][row][None],
            )
            expected = -0.5 * (output[0] - inputs.target[row, column]).square().mean()
            torch.testing.assert_close(together[row, column], expected, rtol=1e-12, atol=0)


def test_a_condition_named_per_candidate_goes_to_its_candidate() -> None:
    network, prompts = ConvNet(), normal(3, 2, 3, seed=9)
    inputs = denoising(condition={"prompt": prompts}, per_candidate=frozenset({"prompt"}))
    together = inputs.logps(network)
    for column in range(2):
        alone = replace(denoising(), condition={"prompt": prompts[:, column]}).logps(network)[:, column]
        torch.testing.assert_close(together[:, column], alone, rtol=1e-12, atol=0)


def test_error_weight_multiplies_each_candidates_error() -> None:
    network, weight = ConvNet(), torch.tensor([[1.0, 2.0], [0.0, 0.5], [3.0, 1.0]], dtype=torch.float64)
    plain, heavy = denoising().logps(network), denoising(error_weight=weight).logps(network)
    torch.testing.assert_close(heavy, weight * plain, rtol=1e-14, atol=0)


def test_candidates_with_shared_timestep_and_noise_differ_only_by_their_clean_latents() -> None:
    inputs = denoising()
    clean = normal(3, 2, *DIMS, seed=2)
    schedule = vp_schedule(alphas_cumprod=scaled_linear_alphas_cumprod(dtype=torch.float64))
    alpha = schedule.snr(inputs.timestep[:, 0]).div(1 + schedule.snr(inputs.timestep[:, 0])).sqrt()
    expected = alpha[:, None, None, None] * (clean[:, 0] - clean[:, 1])
    torch.testing.assert_close(inputs.noisy[:, 0] - inputs.noisy[:, 1], expected, rtol=1e-10, atol=1e-12)
    identical = denoising(noisy=inputs.noisy[:, :1].expand(-1, 2, *DIMS)).logps(ConvNet())
    torch.testing.assert_close(identical[:, 0], identical[:, 1], rtol=1e-13, atol=0)


def test_asking_twice_gives_the_same_number_to_the_bit() -> None:
    network, inputs = ConvNet(), denoising()
    assert torch.equal(inputs.logps(network), inputs.logps(network))


def test_a_replaced_network_sees_the_same_draw() -> None:
    # Policy and reference: the same inputs, so a copy of the network gives a log-ratio of exactly zero.
    policy, reference = ConvNet(), ConvNet()
    inputs = denoising()
    assert torch.equal(inputs.logps(policy), inputs.logps(reference))


# Denoising: the precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_subtracted_in_float32(dtype: torch.dtype) -> None:
    target = normal(4, 2, 4, 16, 16, seed=1, dtype=torch.float32)
    prediction = (target + 0.3 * normal(4, 2, 4, 16, 16, seed=2, dtype=torch.float32)).to(dtype)
    inputs = DenoisingInputs(noisy=target.to(dtype), timestep=torch.zeros(4, 2).long(), target=target)
    logps = inputs.logps(stored(prediction))
    exact = -0.5 * (prediction.double() - target.double()).square().flatten(2).mean(2)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), exact, rtol=1e-6, atol=0)
    # What code that stays in half precision gets for the same numbers.
    rival = -0.5 * (prediction - target.to(dtype)).square().flatten(2).mean(2)
    assert (rival.double() / exact - 1).abs().max() > 1e-4 > (logps.double() / exact - 1).abs().max()


def test_autocast_does_not_touch_the_error_arithmetic() -> None:
    network = nn.Conv2d(2, 2, 3, padding=1)
    inputs = denoising(noisy=normal(3, 2, *DIMS, seed=2).float(), target=normal(3, 2, *DIMS, seed=3).float())
    outputs = []

    def forward(noisy: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        outputs.append(network(noisy))
        return outputs[-1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = inputs.logps(forward)
    assert outputs[0].dtype == torch.bfloat16 and logps.dtype == torch.float32
    residual = outputs[0].double().unflatten(0, (3, 2)) - inputs.target.double()
    torch.testing.assert_close(logps.double(), -0.5 * residual.square().flatten(2).mean(2), rtol=1e-6, atol=0)


def test_float32_error_arithmetic_keeps_a_dpo_logit_that_half_precision_loses() -> None:
    # beta 5000 times the difference of errors that agree to three digits: the RMS fault of the logit, as in training.
    target = normal(64, 2, 4, 16, 16, seed=1, dtype=torch.float32).bfloat16()
    prediction = target + (0.3 * normal(64, 2, 4, 16, 16, seed=2, dtype=torch.float32)).bfloat16()
    reference = prediction + (0.003 * normal(64, 2, 4, 16, 16, seed=3, dtype=torch.float32)).bfloat16()
    inputs = DenoisingInputs(noisy=target, timestep=torch.zeros(64, 2).long(), target=target)

    def logit(policy: Tensor, other: Tensor) -> Tensor:
        return 5000 * (policy - other).diff(dim=1).double()

    def in_bfloat16(output: Tensor) -> Tensor:
        return -0.5 * (output - target).square().flatten(2).mean(2)

    def exact(output: Tensor) -> Tensor:
        return -0.5 * (output.double() - target.double()).square().flatten(2).mean(2)

    truth = logit(exact(prediction), exact(reference))
    ours = logit(inputs.logps(stored(prediction)), inputs.logps(stored(reference)))
    theirs = logit(in_bfloat16(prediction), in_bfloat16(reference))
    assert (ours - truth).square().mean().sqrt() < 1e-3
    assert (theirs - truth).square().mean().sqrt() > 0.1


# Denoising: one candidate at a time


def joint_and_alone(inputs: Any, loss: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor], ConvNet]:
    """Gradients of one joint backward, and of one backward per candidate driven by d loss / d logps."""
    network = ConvNet()
    loss(inputs.logps(network)).backward()
    joint = gradients(network)
    network.rows.clear()
    measured, settled = inputs.settle(network)
    logps = measured["policy"]
    assert not logps.requires_grad
    logps.requires_grad_()
    loss(logps).backward()
    for column in range(logps.shape[1]):
        part = slice(column, column + 1)
        (settled.candidates(part).logps(network) * logps.grad[:, part]).sum().backward()
    return joint, gradients(network), network


def assert_same(joint: list[Tensor], alone: list[Tensor]) -> None:
    largest = max(float(gradient.abs().max()) for gradient in joint)
    assert largest > 0
    for one, other in zip(joint, alone, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12 * largest)


@pytest.mark.parametrize("guard", [None, winner_guard, partial(winner_guard, mu=0.99, per="batch")])
@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "dro", "robust", "spo", "mapo"])
def test_one_candidate_at_a_time_gives_the_joint_gradient_of_every_pairwise_loss(name: str, guard: Any) -> None:
    inputs = denoising(safeguard=guard)
    reference = inputs.logps(ConvNet()).detach() + 0.01 * normal(3, 2, seed=11)
    side = {} if name == "mapo" else {"reference": reference}
    joint, alone, network = joint_and_alone(inputs, lambda logps: LOSSES[name](logps, **side).losses.mean())
    assert_same(joint, alone)
    assert network.rows == [6, 3, 3]  # never more than one candidate with a graph


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_one_candidate_at_a_time_gives_the_joint_gradient_for_every_k(k: int) -> None:
    inputs = denoising(k=k, error_weight=normal(3, k, seed=12).abs())
    weights = normal(3, k, seed=13)
    joint, alone, _ = joint_and_alone(inputs, lambda logps: (logps * weights).sum(1).sigmoid().sum())
    assert_same(joint, alone)


def test_one_candidate_at_a_time_gives_the_joint_gradient_of_a_list() -> None:
    inputs = denoising(k=4)
    reference = inputs.logps(ConvNet()).detach() + 1e-3 * normal(3, 4, seed=11)
    scores = normal(3, 4, seed=12).sigmoid()
    joint, alone, _ = joint_and_alone(inputs, lambda logps: rank_dpo(logps, reference, scores).losses.mean())
    assert_same(joint, alone)


def test_candidates_keep_their_own_conditions_weights_and_scales() -> None:
    network = ConvNet()
    inputs = denoising(
        k=4,
        condition={"prompt": normal(3, 4, 3, seed=9)},
        per_candidate=frozenset({"prompt"}),
        error_weight=normal(3, 4, seed=10).abs(),
        gradient_scale=normal(3, 4, seed=11).abs(),
    )
    joint = inputs.logps(network)
    for part in (slice(0, 1), slice(1, 3), slice(2, 4)):
        torch.testing.assert_close(inputs.candidates(part).logps(network), joint[:, part], rtol=1e-12, atol=0)


def test_settled_inputs_give_the_same_logps_without_asking_the_safeguard_again() -> None:
    inputs, network = denoising(safeguard=winner_guard), ConvNet()
    measured, settled = inputs.settle(network)
    logps = measured["policy"]
    assert settled.safeguard is None and settled.gradient_scale.shape == (3, 2)
    torch.testing.assert_close(settled.logps(network), logps, rtol=1e-14, atol=0)
    torch.testing.assert_close(inputs.logps(network), logps, rtol=1e-14, atol=0)


def test_a_safeguard_that_must_see_the_pair_refuses_to_be_split() -> None:
    with pytest.raises(ValueError, match="settle"):
        denoising(safeguard=winner_guard).candidates(slice(0, 1))


# Transitions


def test_transition_logps_are_the_mean_log_density_of_torchs_normal() -> None:
    network = ConvNet()
    for m in (1, 2):
        inputs = transition(m=m)
        output = network(
            inputs.noisy.flatten(0, 1),
            inputs.timestep.flatten(),
            prompt=inputs.condition["prompt"].repeat_interleave(m, dim=0),
        ).unflatten(0, (3, m))
        sample_weight, output_weight, std = (
            getattr(inputs, name)[..., None, None, None] for name in ("sample_weight", "output_weight", "std")
        )
        step = torch.distributions.Normal(sample_weight * inputs.noisy + output_weight * output, std)
        expected = step.log_prob(inputs.next_noisy).flatten(2).mean(2)
        torch.testing.assert_close(inputs.logps(network), expected, rtol=1e-12, atol=0)


def test_a_transition_to_its_own_mean_has_the_density_of_the_peak() -> None:
    # output 3, mean 2 * 1 - 0.5 * 3 = 0.5, std 0.1: log density at the mean is -ln 0.1 - ln(2 pi)/2; one std away, -1/2 more
    output = torch.full((1, 1, *DIMS), 3.0, dtype=torch.float64)
    inputs = TransitionInputs(
        noisy=torch.ones(1, 1, *DIMS, dtype=torch.float64),
        next_noisy=torch.tensor([0.5, 0.6], dtype=torch.float64).view(1, 2, 1, 1, 1).expand(1, 2, *DIMS),
        timestep=torch.tensor([[7]]),
        sample_weight=torch.tensor([[2.0]], dtype=torch.float64),
        output_weight=torch.tensor([[-0.5]], dtype=torch.float64),
        std=torch.tensor([[0.1]], dtype=torch.float64),
    )
    peak = math.log(10) - 0.5 * math.log(2 * math.pi)
    assert inputs.logps(stored(output))[0].tolist() == pytest.approx([peak, peak - 0.5], rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_successors_of_one_state_cost_one_pass(k: int) -> None:
    network = ConvNet()
    assert transition(m=1, k=k).logps(network).shape == (3, k)
    assert network.rows == [3]


def test_a_shared_state_is_the_same_state_given_to_every_successor() -> None:
    shared = transition(m=1)
    repeated = {
        name: getattr(shared, name).expand(-1, 2, *getattr(shared, name).shape[2:])
        for name in ("noisy", "timestep", "sample_weight", "output_weight", "std")
    }
    network = ConvNet()
    torch.testing.assert_close(shared.logps(network), replace(shared, **repeated).logps(network), rtol=1e-12, atol=0)
    assert network.rows == [3, 6]


@pytest.mark.parametrize("m", [1, 2])
def test_guidance_combines_both_outputs_of_one_call(m: int) -> None:
    network = ConvNet()
    unconditional = {"prompt": normal(3, 3, seed=20)}
    inputs = transition(m=m, unconditional=unconditional, guidance_scale=5.0)

    def output(prompt: Tensor) -> Tensor:
        rows = inputs.noisy.flatten(0, 1), inputs.timestep.flatten()
        return network(*rows, prompt=prompt.repeat_interleave(m, dim=0)).unflatten(0, (3, m))

    without, with_prompt = output(unconditional["prompt"]), output(inputs.condition["prompt"])
    combined = without + 5.0 * (with_prompt - without)
    network.rows.clear()
    guided = inputs.logps(network)
    assert network.rows == [2 * 3 * m]
    plain = transition(m=m).logps(stored(combined))
    torch.testing.assert_close(guided, plain, rtol=1e-12, atol=0)


def test_guidance_of_one_is_the_conditional_output() -> None:
    network = ConvNet()
    guided = transition(unconditional={"prompt": normal(3, 3, seed=20)}, guidance_scale=1.0).logps(network)
    torch.testing.assert_close(guided, transition().logps(network), rtol=1e-12, atol=0)


@pytest.mark.parametrize("m", [1, 2])
def test_one_successor_at_a_time_gives_the_joint_gradient(m: int) -> None:
    inputs = transition(m=m, std=torch.full((3, m), 2.0, dtype=torch.float64))
    reference = inputs.logps(ConvNet()).detach() + 0.01 * normal(3, 2, seed=11)
    joint, alone, _ = joint_and_alone(inputs, lambda logps: spo(logps, reference).losses.mean())
    assert_same(joint, alone)


def test_transition_arithmetic_is_float32_for_half_precision_outputs() -> None:
    output = (0.3 * normal(3, 1, *DIMS, seed=21)).bfloat16()
    inputs = transition()
    single = {name: getattr(inputs, name).float() for name in ("noisy", "next_noisy", "sample_weight", "output_weight", "std")}
    logps = replace(inputs, **single).logps(stored(output))
    assert logps.dtype == torch.float32
    exact = inputs.logps(stored(output.double()))
    torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=1e-6)


# Subsets of the batch
