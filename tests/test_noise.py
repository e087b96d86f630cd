"""Noise schedules, what the network predicts under them, sampler steps, timestep samplers and beta conventions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.noise import (
    TIMESTEPS,
    Schedule,
    beta_conventions,
    error_factor,
    error_of,
    flow_schedule,
    min_snr,
    scaled_linear_alphas_cumprod,
    vp_schedule,
    zero_terminal_snr,
)

with np.load(Path(__file__).parent / "golden" / "schedules.npz") as arrays:
    GOLDEN = {key: torch.from_numpy(arrays[key]) for key in arrays.files}

VP_PREDICTIONS = ("epsilon", "v_prediction", "sample")


def stable_diffusion(prediction: str = "epsilon", **changes: Any) -> Schedule:
    alphas_cumprod = changes.get("alphas_cumprod", scaled_linear_alphas_cumprod(dtype=torch.float64))
    return vp_schedule(alphas_cumprod=alphas_cumprod, prediction=prediction)


def schedule_predicting(prediction: str) -> Schedule:
    """A float64 schedule whose network predicts that."""
    if prediction == "flow":
        return flow_schedule(shift=3.0, dtype=torch.float64)
    return stable_diffusion(prediction)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latents(timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Clean, noise and an imperfect residual for these timesteps."""
    shape = (*timestep.shape, 2, 3, 3)
    return normal(*shape, seed=1), normal(*shape, seed=2), 0.1 * normal(*shape, seed=3)


def wide(values: Tensor) -> Tensor:
    return values[..., None, None, None]


TIMESTEP = torch.tensor([[0, 1, 250], [500, 900, 999]])
EVERY_PREDICTION = pytest.mark.parametrize("prediction", [*VP_PREDICTIONS, "flow"])


# Tables


def test_scaled_linear_schedule_is_diffusers_table() -> None:
    single = scaled_linear_alphas_cumprod()
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, GOLDEN["sd_alphas_cumprod_float32"], rtol=1e-6, atol=0)
    double = scaled_linear_alphas_cumprod(dtype=torch.float64)
    torch.testing.assert_close(double, GOLDEN["sd_alphas_cumprod_float64"], rtol=1e-9, atol=0)


def test_snr_is_the_golden_one() -> None:
    snr = stable_diffusion().snr(torch.arange(1000))
    torch.testing.assert_close(snr, GOLDEN["sd_snr"], rtol=1e-9, atol=0)


def test_zero_terminal_snr_is_diffusers_table() -> None:
    rescaled = zero_terminal_snr(GOLDEN["sd_alphas_cumprod_float32"])
    torch.testing.assert_close(rescaled, GOLDEN["sd_alphas_cumprod_zero_snr_float32"], rtol=1e-5, atol=0)


def test_zero_terminal_snr_keeps_the_first_timestep_and_empties_the_last() -> None:
    before = scaled_linear_alphas_cumprod(dtype=torch.float64)
    after = zero_terminal_snr(before)
    assert after[-1].item() == 0.0 and before[-1].item() > 0
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-12)
    assert (after.diff() < 0).all()
    # The square roots were shifted and stretched together: their spacing changes by one factor.
    spacing = after.sqrt().diff() / before.sqrt().diff()
    torch.testing.assert_close(spacing, spacing[:1].expand(999), rtol=1e-9, atol=0)


def test_under_zero_terminal_snr_the_last_timestep_is_noise_and_v_asks_for_the_clean_image() -> None:
    schedule = stable_diffusion("v_prediction", alphas_cumprod=zero_terminal_snr(scaled_linear_alphas_cumprod()).double())
    last = torch.tensor([999, 999])
    clean, noise, _ = latents(last)
    assert torch.equal(schedule.add_noise(clean, noise, last), noise)
    assert torch.equal(schedule.target(clean, noise, last), -clean)
    assert schedule.snr(last).tolist() == [0.0, 0.0]
    # x0-hat stays defined: it is minus the network's output.
    assert torch.equal(schedule.clean(noise, -clean, last), clean)


def test_flow_sigmas_and_network_timesteps_are_those_of_sd3() -> None:
    # The published tables run from noise to data; an index here runs from data to noise.
    schedule = flow_schedule(num_timesteps=1000, shift=3.0)
    index = torch.arange(999, -1, -1)
    sigma = schedule.add_noise(torch.zeros(1000), torch.ones(1000), index)
    torch.testing.assert_close(sigma, GOLDEN["sd3_train_sigmas"], rtol=1e-6, atol=0)
    network_timestep = schedule.network_timestep(index)
    torch.testing.assert_close(network_timestep, GOLDEN["sd3_train_timesteps"], rtol=1e-6, atol=0)


def test_flow_without_shift_is_evenly_spaced_and_reaches_pure_noise() -> None:
    schedule = flow_schedule(num_timesteps=4, dtype=torch.float64)
    index = torch.arange(4)
    sigma = schedule.add_noise(torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), index)
    assert sigma.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert schedule.network_timestep(index).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_network_of_a_vp_schedule_is_given_the_index_itself() -> None:
    assert torch.equal(stable_diffusion().network_timestep(TIMESTEP), TIMESTEP)


# Adding noise and taking it back


@EVERY_PREDICTION
def test_a_perfect_prediction_gives_back_clean_and_noise(prediction: str) -> None:
    schedule = schedule_predicting(prediction)
    timestep = TIMESTEP.clamp(max=998) if prediction == "flow" else TIMESTEP
    clean, noise, _ = latents(timestep)
    noisy = schedule.add_noise(clean, noise, timestep)
    output = schedule.target(clean, noise, timestep)
    torch.testing.assert_close(schedule.clean(noisy, output, timestep), clean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(schedule.epsilon(noisy, output, timestep), noise, rtol=1e-9, atol=1e-11)


@EVERY_PREDICTION
def test_any_output_splits_x_t_into_the_clean_and_the_noise_it_implies(prediction: str) -> None:
    schedule = schedule_predicting(prediction)
    clean, noise, residual = latents(TIMESTEP)
    noisy = schedule.add_noise(clean, noise, TIMESTEP)
    output = schedule.target(clean, noise, TIMESTEP) + residual
    implied_clean = schedule.clean(noisy, output, TIMESTEP)
    implied_noise = schedule.epsilon(noisy, output, TIMESTEP)
    assert not torch.allclose(implied_clean, clean)
    torch.testing.assert_close(schedule.add_noise(implied_clean, implied_noise, TIMESTEP), noisy, rtol=1e-9, atol=1e-10)


def test_vp_formulas_worked_out_by_hand() -> None:
    # alphas_cumprod 0.64: alpha 0.8, sigma 0.6; clean 2, noise -1: x_t = 1.6 - 0.6 = 1, v = -0.8 - 1.2 = -2
    zero = torch.tensor([0])
    clean, noise = torch.tensor([2.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    targets = {"epsilon": -1.0, "v_prediction": -2.0, "sample": 2.0}
    for prediction, target in targets.items():
        schedule = stable_diffusion(prediction, alphas_cumprod=torch.tensor([0.64], dtype=torch.float64))
        assert schedule.add_noise(clean, noise, zero).item() == pytest.approx(1.0, rel=1e-14)
        assert schedule.target(clean, noise, zero).item() == pytest.approx(target, rel=1e-14)
        assert schedule.snr(zero).item() == pytest.approx(16 / 9, rel=1e-14)


def test_flow_formulas_worked_out_by_hand() -> None:
    # sigma 1/4: x_t = 3/4 * 2 + 1/4 * (-1) = 1.25; the velocity is noise - clean = -3; the ratio is (3/4)^2 / (1/4)^2
    schedule = flow_schedule(num_timesteps=4, dtype=torch.float64)
    zero = torch.tensor([0])
    clean, noise = torch.tensor([2.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    noisy = schedule.add_noise(clean, noise, zero)
    assert noisy.item() == 1.25 and schedule.target(clean, noise, zero).item() == -3.0
    assert schedule.snr(zero).item() == 9.0
    # an output of -1: clean = 1.25 + 0.25, noise = 1.25 - 0.75
    output = torch.tensor([-1.0], dtype=torch.float64)
    assert schedule.clean(noisy, output, zero).item() == 1.5
    assert schedule.epsilon(noisy, output, zero).item() == 0.5


def test_flow_shift_moves_timesteps_towards_noise() -> None:
    # s = 1/2, shift 3: 3/2 / (1 + 2/2) = 3/4
    schedule = flow_schedule(num_timesteps=2, shift=3.0, dtype=torch.float64)
    assert schedule.network_timestep(torch.tensor([0])).item() == 1.5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_those_of_diffusers(prediction: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = vp_schedule(alphas_cumprod=scheduler.alphas_cumprod, prediction=prediction)
    timestep = TIMESTEP.flatten()
    clean, noise, _ = latents(timestep)
    theirs = {"epsilon": noise, "v_prediction": scheduler.get_velocity(clean, noise, timestep), "sample": clean}
    noisy = schedule.add_noise(clean, noise, timestep)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, timestep), rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.target(clean, noise, timestep), theirs[prediction], rtol=1e-12, atol=1e-14)


@EVERY_PREDICTION
def test_one_timestep_a_candidate_and_one_a_sample_agree(prediction: str) -> None:
    schedule = schedule_predicting(prediction)
    clean, noise, _ = latents(TIMESTEP)
    folded = (clean.flatten(0, 1), noise.flatten(0, 1), TIMESTEP.flatten())
    assert torch.equal(schedule.add_noise(clean, noise, TIMESTEP).flatten(0, 1), schedule.add_noise(*folded))
    assert torch.equal(schedule.target(clean, noise, TIMESTEP).flatten(0, 1), schedule.target(*folded))


# Conversions between errors


@EVERY_PREDICTION
@pytest.mark.parametrize("to", ["epsilon", "sample"])
def test_error_factor_is_the_ratio_of_actually_computed_errors(prediction: str, to: str) -> None:
    schedule = schedule_predicting(prediction)
    timestep = TIMESTEP.clamp(max=998)
    clean, noise, residual = latents(timestep)
    noisy = schedule.add_noise(clean, noise, timestep)
    target = schedule.target(clean, noise, timestep)
    output = target + residual
    implied = {"epsilon": schedule.epsilon, "sample": schedule.clean}[to](noisy, output, timestep)
    error = (implied - {"epsilon": noise, "sample": clean}[to]).square().flatten(2).mean(2)
    source_error = (output - target).square().flatten(2).mean(2)
    factor = error_factor(schedule, timestep, prediction, to)
    torch.testing.assert_close(factor * source_error, error, rtol=1e-7, atol=0)


def test_v_errors_of_the_same_implied_image_are_what_error_factor_says() -> None:
    # One imperfect image seen as an epsilon, a v and a clean prediction of the same x_t.
    clean, noise, residual = latents(TIMESTEP)
    schedules = {prediction: stable_diffusion(prediction) for prediction in VP_PREDICTIONS}
    noisy = schedules["epsilon"].add_noise(clean, noise, TIMESTEP)
    implied_noise = noise + residual
    implied_clean = schedules["epsilon"].clean(noisy, implied_noise, TIMESTEP)
    errors = {
        prediction: (schedule.target(implied_clean, implied_noise, TIMESTEP) - schedule.target(clean, noise, TIMESTEP))
        .square()
        .flatten(2)
        .mean(2)
        for prediction, schedule in schedules.items()
    }
    for source in VP_PREDICTIONS:
        for to in VP_PREDICTIONS:
            factor = error_factor(schedules["epsilon"], TIMESTEP, source, to)
            torch.testing.assert_close(factor * errors[source], errors[to], rtol=1e-7, atol=0)


def test_error_factors_are_the_formulas() -> None:
    # alpha^2 0.64, sigma^2 0.36
    schedule = stable_diffusion(alphas_cumprod=torch.tensor([0.64], dtype=torch.float64))
    zero = torch.tensor([0])

    def factor(source: str, to: str) -> float:
        return error_factor(schedule, zero, source, to).item()

    assert factor("epsilon", "sample") == pytest.approx(0.36 / 0.64, rel=1e-12)
    assert factor("v_prediction", "epsilon") == pytest.approx(0.64, rel=1e-12)
    assert factor("v_prediction", "sample") == pytest.approx(0.36, rel=1e-12)
    assert factor("sample", "sample") == 1.0
    flow = flow_schedule(num_timesteps=4, dtype=torch.float64)  # sigma 1/4
    assert error_factor(flow, zero, "flow", "epsilon").item() == pytest.approx(0.75**2, rel=1e-12)
    assert error_factor(flow, zero, "flow", "sample").item() == pytest.approx(0.25**2, rel=1e-12)


# Sampler steps


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
def test_steps_are_those_of_diffusers_ddim_sampler(prediction: str, eta: float) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(20)
    schedule = vp_schedule(alphas_cumprod=scheduler.alphas_cumprod, prediction=prediction)
    noisy, output, noise = normal(1, 4, 4, seed=1), normal(1, 4, 4, seed=2), normal(1, 4, 4, seed=3)
    for timestep in scheduler.timesteps:
        step = schedule.step(timestep, (timestep - 50).clamp(min=0), eta=eta)
        ours = step.sample_weight * noisy + step.output_weight * output + step.std * noise
        theirs = scheduler.step(output, timestep, noisy, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_the_standard_deviation_of_a_step_is_eta_times_ddpms() -> None:
    schedule = stable_diffusion()
    timestep, previous = torch.tensor([[951, 501], [51, 1]]), torch.tensor([[901, 451], [1, 0]])
    full = schedule.step(timestep, previous, eta=1.0).std
    cumprod = GOLDEN["sd_alphas_cumprod_float64"]
    now, before = cumprod[timestep], cumprod[previous]
    torch.testing.assert_close(full.square(), (1 - before) / (1 - now) * (1 - now / before), rtol=1e-8, atol=0)
    torch.testing.assert_close(schedule.step(timestep, previous, eta=0.3).std, 0.3 * full, rtol=1e-12, atol=0)
    assert (schedule.step(timestep, previous, eta=0.0).std == 0).all()


def test_a_step_of_a_rectified_flow_is_refused() -> None:
    with pytest.raises(ValueError, match="flow"):
        flow_schedule().step(torch.tensor([500]), torch.tensor([450]))


# Timestep samplers. Each takes u, uniform on (0, 1): the caller's seed decides.


def midpoints(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_uniform_timesteps_cover_every_index_equally() -> None:
    counts = TIMESTEPS["uniform"](midpoints(5000), num_timesteps=1000).bincount(minlength=1000)
    assert counts.shape == (1000,) and (counts == 5).all()


def test_a_range_includes_both_its_ends_and_nothing_outside() -> None:
    counts = TIMESTEPS["range"](midpoints(300), num_timesteps=1000, low=250, high=252).bincount()
    assert counts[250:].tolist() == [100, 100, 100] and counts[:250].sum() == 0
    alone = TIMESTEPS["range"](midpoints(7), num_timesteps=1000, low=999, high=999)
    assert alone.tolist() == [999] * 7


@pytest.mark.parametrize("bounds", [(-1, 5), (5, 4), (0, 1000)])
def test_a_range_outside_the_schedule_is_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="range"):
        TIMESTEPS["range"](midpoints(3), num_timesteps=1000, low=bounds[0], high=bounds[1])


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_timesteps_have_the_asked_moments(mean: float, std: float) -> None:
    timestep = TIMESTEPS["logit_normal"](midpoints(20000), num_timesteps=100000, mean=mean, std=std)
    logit = torch.logit((timestep + 0.5) / 100000)
    assert logit.mean().item() == pytest.approx(mean, abs=2e-3)
    assert logit.std().item() == pytest.approx(std, rel=2e-3)
    assert timestep.min() >= 0 and timestep.max() < 100000


def test_logit_normal_puts_the_median_at_the_sigmoid_of_the_mean() -> None:
    middle = torch.tensor([0.5], dtype=torch.float64)
    assert TIMESTEPS["logit_normal"](middle, num_timesteps=1000, mean=1.0, std=3.0).tolist() == [731]  # sigma(1) = 0.7311


def test_a_fixed_list_draws_only_its_values_equally_often() -> None:
    values = (801, 694, 548, 338)
    drawn = TIMESTEPS["fixed"](midpoints(400), num_timesteps=1000, values=values)
    assert {value: int((drawn == value).sum()) for value in values} == dict.fromkeys(values, 100)
    assert len(drawn) == 400


@pytest.mark.parametrize("values", [(), (1000,), (3, -1)])
def test_a_fixed_list_outside_the_schedule_is_refused(values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="values"):
        TIMESTEPS["fixed"](midpoints(3), num_timesteps=1000, values=values)


SETTINGS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "range": {"low": 10, "high": 700},
    "logit_normal": {},
    "fixed": {"values": (1, 2, 3)},
}


@pytest.mark.parametrize("name", TIMESTEPS)
def test_a_seed_gives_the_same_timesteps_and_another_seed_others(name: str) -> None:
    def draw(seed: int) -> Tensor:
        u = torch.rand(50, generator=torch.Generator().manual_seed(seed))
        return TIMESTEPS[name](u, num_timesteps=1000, **SETTINGS[name])

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert draw(1).dtype == torch.int64


@pytest.mark.parametrize("name", TIMESTEPS)
@pytest.mark.parametrize("u", [0.0, 1e-30, 1 - 2**-24, 1 - 2**-53])
def test_timesteps_stay_in_the_schedule_at_the_ends_of_the_unit_interval(name: str, u: float) -> None:
    timestep = TIMESTEPS[name](torch.tensor([u], dtype=torch.float64), num_timesteps=1000, **SETTINGS[name])
    assert 0 <= timestep.item() < 1000


def test_a_wide_logit_normal_stays_in_the_schedule() -> None:
    # The sigmoid rounds to exactly 0 and 1 at these ends.
    ends = torch.tensor([2**-53, 1 - 2**-53], dtype=torch.float64)
    assert TIMESTEPS["logit_normal"](ends, num_timesteps=1000, mean=0.0, std=200.0).tolist() == [0, 999]


@pytest.mark.parametrize("name", TIMESTEPS)
def test_timesteps_rise_with_u_and_keep_its_shape(name: str) -> None:
    sampler: Callable[..., Tensor] = TIMESTEPS[name]
    timestep = sampler(midpoints(100).view(4, 25), num_timesteps=1000, **SETTINGS[name])
    assert timestep.shape == (4, 25) and (timestep.flatten().diff() >= 0).all()


# Conventions of beta


@pytest.mark.parametrize(
    ("num_elements", "summed"),
    [
        (4 * 64 * 64, 0.152587890625),  # SD 1.5 at 512 px: 5000 / (2 * 16384)
        (4 * 128 * 128, 0.03814697265625),  # SDXL at 1024 px: 5000 / (2 * 65536)
        (16 * 128 * 128, 0.0095367431640625),
    ],
)
def test_beta_5000_in_every_convention(num_elements: int, summed: float) -> None:
    assert beta_conventions(5000, num_elements) == {
        "mean, with 1/2": 5000,
        "mean, without 1/2": 2500,
        "sum, with 1/2": pytest.approx(2 * summed, rel=1e-12),
        "sum, without 1/2": pytest.approx(summed, rel=1e-12),
    }


def test_every_convention_of_beta_gives_the_same_logit() -> None:
    residual = normal(2, 4, 8, 8)
    squared = residual.square().flatten(1)
    conventions = beta_conventions(5000, 4 * 8 * 8)
    logits = [
        conventions["mean, with 1/2"] * 0.5 * squared.mean(1),
        conventions["mean, without 1/2"] * squared.mean(1),
        conventions["sum, with 1/2"] * 0.5 * squared.sum(1),
        conventions["sum, without 1/2"] * squared.sum(1),
    ]
    for logit in logits[1:]:
        torch.testing.assert_close(logit, logits[0], rtol=1e-12, atol=0)


def test_min_snr_weighs_the_error_of_the_clean_data_whatever_is_predicted() -> None:
    alphas = scaled_linear_alphas_cumprod(dtype=torch.float64)
    timestep = torch.tensor([0, 100, 500, 999])
    snr = alphas[timestep] / (1 - alphas[timestep])
    expected = {"epsilon": snr.clamp(max=5) / snr, "v_prediction": snr.clamp(max=5) / (snr + 1), "sample": snr.clamp(max=5)}
    for prediction, weights in expected.items():
        schedule = vp_schedule(alphas_cumprod=alphas, prediction=prediction)
        torch.testing.assert_close(min_snr(schedule, timestep), weights, rtol=1e-12, atol=0)
    flow = flow_schedule(dtype=torch.float64)
    found = min_snr(flow, timestep)
    torch.testing.assert_close(found, flow.sigma[timestep] ** 2 * flow.snr(timestep).clamp(max=5), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="gamma 0"):
        min_snr(flow, timestep, gamma=0)


def test_min_snr_is_finite_at_both_ends_of_a_schedule_that_ends_in_pure_noise() -> None:
    alphas = zero_terminal_snr(scaled_linear_alphas_cumprod())
    ends = torch.tensor([0, 999])
    assert min_snr(vp_schedule(alphas_cumprod=alphas, prediction="v_prediction"), ends).isfinite().all()
    assert min_snr(flow_schedule(), ends).isfinite().all()


@pytest.mark.parametrize(("kind", "prediction"), [("flow", "v_prediction"), ("epsilon", "flow"), ("v_prediction", "flow")])
def test_the_velocity_of_the_other_kind_of_model_is_refused(kind: str, prediction: Any) -> None:
    schedule = flow_schedule(num_timesteps=4) if kind == "flow" else stable_diffusion(kind)
    with pytest.raises(
        ValueError, match=rf"weights: got prediction {prediction} for a model of .*, which has none, want epsilon"
    ):
        error_of(schedule, torch.tensor([1]), prediction=prediction)


def test_a_spread_that_is_not_positive_is_refused() -> None:
    for std in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"timesteps: got std .*want a positive number"):
            TIMESTEPS["logit_normal"](torch.tensor([0.5]), 1000, std=std)


def test_flow_errors_as_epsilon_errors_have_the_weight_of_the_published_change_of_variables() -> None:
    flow, timestep = flow_schedule(dtype=torch.float64), torch.tensor([10, 500, 900])
    torch.testing.assert_close(
        error_of(flow, timestep, prediction="epsilon"), (1 - flow.sigma[timestep]) ** 2, rtol=1e-12, atol=0
    )
