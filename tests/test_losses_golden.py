"""Losses and likelihoods against numbers computed by the authors' published code (tests/golden/README.md)."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.likelihoods import DenoisingInputs, TransitionInputs
from mmalign.losses import PreferenceLoss, bradley_terry, dpo, dro, hinge, ipo, kto, mapo, rank_dpo, robust, spo
from mmalign.noise import Schedule, beta_conventions, vp_schedule

GOLDEN = Path(__file__).parent / "golden"


@cache
def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def assert_equal(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    """Relative to each element, and to the largest one where cancellation makes an element tiny."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def pairs(halves: Tensor) -> Tensor:
    """[w0..w3, l0..l3] -> (4, 2, ...), the winner first."""
    return torch.stack(halves.chunk(2), dim=1)


def halves(paired: Tensor) -> Tensor:
    return torch.cat([paired[:, 0], paired[:, 1]])


def leaf(values: Tensor) -> Tensor:
    return values.clone().requires_grad_()


def stored(prediction: Tensor) -> Callable[..., Tensor]:
    """A network that returns one stored prediction (batch, k, ...), candidates folded into the batch."""
    return lambda noisy, timestep, **condition: prediction.flatten(0, 1)


def denoising_logps(arrays: dict[str, Tensor], prediction: Tensor, noisy: str, target: str, timestep: str) -> Tensor:
    inputs = DenoisingInputs(
        noisy=pairs(arrays[noisy]), timestep=pairs(arrays[timestep]), target=pairs(arrays[target]), condition={}
    )
    return inputs.logps(stored(prediction))


def stable_diffusion() -> Schedule:
    """The schedule that noised the golden latents: diffusers' float32 table in float64 arithmetic."""
    return vp_schedule(alphas_cumprod=golden("schedules")["sd_alphas_cumprod_float32"].double(), prediction="epsilon")


# Diffusion-DPO


def diffusion_dpo(prediction: Tensor, beta: float) -> tuple[Tensor, Tensor, PreferenceLoss]:
    arrays = golden("diffusion_dpo")
    fields = {"noisy": "noisy_latents", "target": "noise", "timestep": "timesteps"}
    policy = denoising_logps(arrays, prediction, **fields)
    reference = denoising_logps(arrays, pairs(arrays["ref_pred"]), **fields)
    return policy, reference, dpo(policy, reference, beta=beta)


@pytest.mark.parametrize("beta", [5000, 2000])
def test_dpo_repeats_the_numbers_of_diffusion_dpo(beta: int) -> None:
    arrays, case = golden("diffusion_dpo"), f"sf_beta{beta}_"
    policy, reference, result = diffusion_dpo(pairs(arrays["model_pred"]), beta)
    assert_equal(-2 * halves(policy), arrays[case + "model_losses"])
    assert_equal(-2 * halves(reference), arrays[case + "ref_losses"])
    assert_equal(-2 * (policy[:, 0] - policy[:, 1]), arrays[case + "model_diff"])
    assert_equal(-2 * (reference[:, 0] - reference[:, 1]), arrays[case + "ref_diff"])
    assert_equal(-2 * policy.mean(), arrays[case + "raw_model_loss"])
    assert_equal(-2 * reference.mean(), arrays[case + "raw_ref_loss"])
    assert_equal(result.losses.mean(), arrays[case + "loss"])
    assert_equal(halves(result.rewards), arrays[case + "reward"])
    margins = result.rewards[:, 0] - result.rewards[:, 1]
    assert_equal(margins, arrays[case + "inside_term"])
    assert_equal((margins > 0).double().mean(), arrays[case + "implicit_acc"])


@pytest.mark.parametrize("beta", [5000, 2000])
def test_dpo_repeats_the_gradient_of_diffusion_dpo(beta: int) -> None:
    arrays = golden("diffusion_dpo")
    prediction = leaf(pairs(arrays["model_pred"]))
    diffusion_dpo(prediction, beta)[2].losses.mean().backward()
    assert_equal(halves(prediction.grad), arrays[f"sf_beta{beta}_grad_model_pred"])


def test_dpo_of_an_untrained_policy_is_ln_2_with_the_published_gradient() -> None:
    arrays = golden("diffusion_dpo")
    prediction = leaf(pairs(arrays["ref_pred"]))
    result = diffusion_dpo(prediction, 5000)[2]
    result.losses.mean().backward()
    assert_equal(result.losses.mean(), arrays["sf_init_loss"])
    assert_equal(halves(prediction.grad), arrays["sf_init_grad"])
    assert float((result.rewards[:, 0] > result.rewards[:, 1]).double().mean()) == float(arrays["sf_init_acc"])


def test_dpo_in_float32_stays_near_the_published_float32_loss() -> None:
    arrays = {key: value.float() if value.is_floating_point() else value for key, value in golden("diffusion_dpo").items()}
    fields = {"noisy": "noisy_latents", "target": "noise", "timestep": "timesteps"}
    policy = denoising_logps(arrays, pairs(arrays["model_pred"]), **fields)
    reference = denoising_logps(arrays, pairs(arrays["ref_pred"]), **fields)
    assert policy.dtype == torch.float32
    result = dpo(policy, reference, beta=5000)
    assert_equal(result.losses.mean(), arrays["sf_beta5000_loss_float32"], rtol=1e-4)


@pytest.mark.parametrize("beta", [5000, 2000])
def test_the_beta_for_summed_errors_is_the_golden_one(beta: int) -> None:
    expected = float(golden("diffusion_dpo")[f"sf_beta{beta}_equiv_beta_sum_norm"])
    assert beta_conventions(beta, 4 * 8 * 8)["sum, without 1/2"] == pytest.approx(expected, rel=1e-12)


def test_shared_noise_makes_the_golden_noisy_latents() -> None:
    arrays = golden("diffusion_dpo")
    schedule = stable_diffusion()
    noisy = schedule.add_noise(pairs(arrays["x0"]), pairs(arrays["noise"]), pairs(arrays["timesteps"]))
    assert_equal(halves(noisy), arrays["noisy_latents"])


# MaPO

MAPO = {"noisy": "noisy_latents", "target": "noise", "timestep": "timesteps"}


@pytest.mark.parametrize(("beta", "snr"), [(0.1, 0.5), (0.5, 1.0)])
def test_mapo_repeats_the_numbers_of_the_public_code(beta: float, snr: float) -> None:
    arrays, case = golden("mapo"), f"beta{beta}_snr{snr}_"
    prediction = leaf(pairs(arrays["model_pred"]))
    policy = denoising_logps(arrays, prediction, **MAPO)
    result = mapo(policy, beta=beta, snr=snr, scale=1000.0)
    assert_equal(result.losses.mean(), arrays[case + "loss"])
    assert_equal(-2 * policy[:, 0], arrays[case + "losses_w"])
    assert_equal(-2 * policy[:, 1], arrays[case + "losses_l"])
    assert_equal(-2 * policy[:, 0] - result.losses, arrays[case + "ratio_losses"])
    assert_equal(result.rewards[:, 0], arrays[case + "reward_w"])
    assert_equal(result.rewards[:, 1], arrays[case + "reward_l"])
    assert_equal(result.rewards[:, 0] - result.rewards[:, 1], arrays[case + "log_odds_times_T"])
    assert_equal((result.rewards[:, 0] > result.rewards[:, 1]).double().mean(), arrays[case + "acc"])
    result.losses.mean().backward()
    assert_equal(halves(prediction.grad), arrays[case + "grad_model_pred"])


def test_mapo_defaults_are_the_published_ones() -> None:
    arrays = golden("mapo")
    policy = denoising_logps(arrays, pairs(arrays["model_pred"]), **MAPO)
    assert_equal(mapo(policy).losses.mean(), arrays["beta0.1_snr0.5_loss"])


def test_mapo_takes_the_limit_where_the_public_code_divides_zero_by_zero() -> None:
    arrays = golden("mapo")
    prediction = leaf(pairs(arrays["zero_case_model_pred"]))
    policy = denoising_logps(arrays, prediction, **MAPO)
    assert policy[0, 0].item() == 0.0
    loss = mapo(policy).losses.mean()
    loss.backward()
    assert_equal(loss, arrays["zero_case_limit_loss"])
    assert prediction.grad.isfinite().all()
    assert (prediction.grad[0, 0] == 0).all()


@pytest.mark.parametrize("beta", [8, 64, 1024])
def test_mapo_in_the_papers_parametrisation_repeats_the_derived_numbers(beta: int) -> None:
    arrays, case = golden("mapo"), f"paper_beta{beta}_"
    prediction = leaf(pairs(arrays["model_pred"]))
    result = mapo(denoising_logps(arrays, prediction, **MAPO), beta=float(beta), parametrisation="aaai")
    result.losses.mean().backward()
    assert_equal(result.losses.mean(), arrays[case + "loss"])
    assert_equal(result.rewards[:, 0], arrays[case + "phi_w"])
    assert_equal(result.rewards[:, 1], arrays[case + "phi_l"])
    assert_equal(halves(prediction.grad), arrays[case + "grad_model_pred"])


def test_mapo_arrays_have_the_golden_noisy_latents() -> None:
    arrays = golden("mapo")
    schedule = stable_diffusion()
    assert_equal(schedule.add_noise(arrays["x0"], arrays["noise"], arrays["timesteps"]), arrays["noisy_latents"])


# SPO


def spo_schedule() -> Schedule:
    return vp_schedule(alphas_cumprod=golden("spo_sampler")["alphas_cumprod"], prediction="epsilon")


def transition(arrays: dict[str, Tensor], *, shared: bool) -> TransitionInputs:
    """The steps of one training case; `shared` keeps x_t once for both successors."""
    noisy = torch.stack([arrays["latents_w"], arrays["latents_l"]], dim=1)
    timestep = arrays["timesteps"][:, None].expand(-1, 2)
    if shared:
        noisy, timestep = noisy[:, :1], timestep[:, :1]
    step = spo_schedule().step(timestep, (timestep - 50).clamp(0, 999), eta=1.0)
    return TransitionInputs(
        noisy=noisy,
        next_noisy=torch.stack([arrays["next_latents_w"], arrays["next_latents_l"]], dim=1),
        timestep=timestep,
        sample_weight=step.sample_weight,
        output_weight=step.output_weight,
        std=step.std,
        condition={},
    )


@pytest.mark.parametrize("case", ["k4_shared", "mspo_separate", "clip_mixed", "init"])
def test_spo_repeats_the_numbers_of_the_public_code(case: str) -> None:
    arrays = golden(f"spo_{case}")
    inputs = transition(arrays, shared=False)
    prediction = leaf(torch.stack([arrays["noise_pred_w"], arrays["noise_pred_l"]], dim=1))
    policy = inputs.logps(stored(prediction))
    reference = inputs.logps(stored(torch.stack([arrays["noise_ref_w"], arrays["noise_ref_l"]], dim=1)))
    result = spo(policy, reference, beta=10.0, clip=0.1)
    result.losses.mean().backward()
    assert_equal(result.losses.mean(), arrays["loss"])
    for column, arm in enumerate("wl"):
        assert_equal(policy[:, column], arrays[f"logp_{arm}"])
        assert_equal(reference[:, column], arrays[f"logp_ref_{arm}"])
        assert_equal(result.rewards[:, column], arrays[f"reward_{arm}"])
        assert_equal((result.rewards[:, column] / 10.0).exp(), arrays[f"ratio_{arm}"])
        assert_equal(prediction.grad[:, column], arrays[f"grad_noise_pred_{arm}"], rtol=1e-8)
    assert_equal((result.rewards[:, 0] > result.rewards[:, 1]).double().mean(), arrays["acc"])


@pytest.mark.parametrize("case", ["k4_shared", "init"])
def test_spo_over_one_pass_of_a_shared_state_is_the_same_loss_with_the_summed_gradient(case: str) -> None:
    arrays = golden(f"spo_{case}")
    inputs = transition(arrays, shared=True)
    prediction = leaf(arrays["noise_pred_w"][:, None])
    policy = inputs.logps(stored(prediction))
    reference = inputs.logps(stored(arrays["noise_ref_w"][:, None]))
    loss = spo(policy, reference).losses.mean()
    loss.backward()
    assert_equal(loss, arrays["loss"])
    both = arrays["grad_noise_pred_w"] + arrays["grad_noise_pred_l"]
    assert_equal(prediction.grad[:, 0], both, rtol=1e-8)


def test_spo_has_no_gradient_where_both_ratios_are_clamped() -> None:
    arrays = golden("spo_k4_shared")
    inputs = transition(arrays, shared=False)
    prediction = leaf(torch.stack([arrays["noise_pred_w"], arrays["noise_pred_l"]], dim=1))
    reference = inputs.logps(stored(torch.stack([arrays["noise_ref_w"], arrays["noise_ref_l"]], dim=1)))
    spo(inputs.logps(stored(prediction)), reference).losses.sum().backward()
    assert (prediction.grad[3] == 0).all()
    assert (prediction.grad[0] != 0).any()


def test_step_coefficients_draw_the_golden_candidates() -> None:
    arrays, schedule = golden("spo_sampler"), spo_schedule()
    timestep, previous = arrays["cand_t"], arrays["cand_prev_timestep"]
    assert_equal(schedule.clean(arrays["cand_xt"], arrays["cand_eps"], timestep), arrays["cand_x0_pred"])
    step = schedule.step(timestep, previous, eta=1.0)
    per_sample = (slice(None), None, None, None)
    mean = step.sample_weight[per_sample] * arrays["cand_xt"] + step.output_weight[per_sample] * arrays["cand_eps"]
    drawn = mean + step.std[per_sample] * arrays["cand_variance_noise"]
    assert_equal(drawn, arrays["cand_x_prev"])


def test_step_standard_deviations_over_the_grid_are_the_golden_ones() -> None:
    arrays = golden("spo_sampler")
    step = spo_schedule().step(arrays["ddim_timesteps"], arrays["grid_prev_timesteps"], eta=1.0)
    assert_equal(step.std, arrays["grid_std"])
    assert float(step.std[-1]) > 0  # the last step, to timestep 0, stays trainable


# Diffusion-DRO


@pytest.mark.parametrize("margin", [0.001, 0.0, 0.05])
def test_dro_repeats_the_numbers_of_the_public_code(margin: float) -> None:
    arrays, case = golden("diffusion_dro"), f"margin{margin}_"
    inputs = DenoisingInputs(
        noisy=torch.stack([arrays["xt_expert"], arrays["xt_policy"]], dim=1),
        timestep=arrays["t"][:, None].expand(-1, 2),
        target=torch.stack([arrays["eps_expert"], arrays["eps_policy"]], dim=1),
        condition={},
    )
    prediction = leaf(pairs(arrays["pred_eps"]))
    policy = inputs.logps(stored(prediction))
    reference = inputs.logps(stored(pairs(arrays["pred_eps_ref"])))
    result = dro(policy, reference, margin=margin)
    result.losses.mean().backward()
    assert_equal(-2 * policy, torch.stack([arrays[case + "loss_expert"], arrays[case + "loss_policy"]], dim=1))
    assert_equal(-2 * reference, torch.stack([arrays[case + "loss_expert0"], arrays[case + "loss_policy0"]], dim=1))
    assert_equal(result.rewards[:, 1] - result.rewards[:, 0], arrays[case + "diff"])
    assert_equal(result.losses.mean(), arrays[case + "loss"])
    assert_equal(result.losses.mean() - margin, arrays[case + "paper_loss"])
    assert torch.equal(result.losses > 0, arrays[case + "active"])
    assert_equal(halves(prediction.grad), arrays[case + "grad_pred_eps"])


def test_dro_defaults_are_the_published_ones() -> None:
    arrays = golden("diffusion_dro")
    errors = torch.stack([arrays["margin0.001_loss_expert"], arrays["margin0.001_loss_policy"]], dim=1)
    reference_errors = torch.stack([arrays["margin0.001_loss_expert0"], arrays["margin0.001_loss_policy0"]], dim=1)
    assert_equal(dro(-errors / 2, -reference_errors / 2).losses.mean(), arrays["margin0.001_loss"])


def test_expert_states_are_noised_by_the_golden_schedule() -> None:
    arrays = golden("diffusion_dro")
    schedule = stable_diffusion()
    noisy = schedule.add_noise(arrays["x0_expert"], arrays["eps_expert"], arrays["t"])
    assert_equal(noisy, arrays["xt_expert"])


# RankDPO

RANK_BY = {"label": "label", "pred": "model"}
LOGARITHM = {"ln": "natural", "log2": "log2"}


def rank_logps(noise: str, prediction: Tensor) -> tuple[Tensor, Tensor]:
    arrays = golden(f"rankdpo_{noise}")
    inputs = DenoisingInputs(
        noisy=arrays[f"{noise}_noisy_latents"],
        timestep=arrays["timesteps"],
        target=arrays[f"{noise}_noise"],
        condition={},
    )
    return inputs.logps(stored(prediction)), inputs.logps(stored(arrays[f"{noise}_ref_pred"]))


@pytest.mark.parametrize("log", ["ln", "log2"])
@pytest.mark.parametrize("rank_by", ["label", "pred"])
@pytest.mark.parametrize("noise", ["indep", "shared"])
def test_rank_dpo_repeats_the_derived_numbers(noise: str, rank_by: str, log: str) -> None:
    arrays, case = golden(f"rankdpo_{noise}"), f"{noise}_{rank_by}_{log}_"
    policy, reference = rank_logps(noise, arrays[f"{noise}_model_pred"])
    settings = {"beta": 5000.0, "rank_by": RANK_BY[rank_by], "discount": LOGARITHM[log], "ties": "stable"}
    result = rank_dpo(policy, reference, arrays["phi"], **settings)
    assert_equal(result.losses, arrays[case + "loss_per_prompt"])
    assert_equal(result.losses.mean(), arrays[case + "loss"])
    assert_equal(result.rewards, -2500 * arrays[f"{noise}_s_theta"])


@pytest.mark.parametrize("log", ["ln", "log2"])
@pytest.mark.parametrize("rank_by", ["label", "pred"])
@pytest.mark.parametrize("noise", ["indep", "shared"])
def test_rank_dpo_weighs_every_ordered_pair_by_the_golden_weight(noise: str, rank_by: str, log: str) -> None:
    arrays = golden(f"rankdpo_{noise}")
    weights = arrays[f"{noise}_{rank_by}_{log}_weights"]
    rewards = -2500 * arrays[f"{noise}_s_theta"]
    reference = torch.zeros_like(rewards)
    policy = leaf(rewards / 5000)
    settings = {"beta": 5000.0, "rank_by": RANK_BY[rank_by], "discount": LOGARITHM[log], "ties": "stable"}
    rank_dpo(policy, reference, arrays["phi"], **settings).losses.sum().backward()
    preferred = arrays["phi"][:, :, None] > arrays["phi"][:, None, :]
    logits = rewards[:, :, None] - rewards[:, None, :]
    pull = 5000 * preferred * weights * torch.sigmoid(-logits)
    assert_equal(policy.grad, pull.sum(1) - pull.sum(2))


@pytest.mark.parametrize("rank_by", ["label", "pred"])
@pytest.mark.parametrize("noise", ["indep", "shared"])
def test_rank_dpo_repeats_the_derived_gradient(noise: str, rank_by: str) -> None:
    arrays = golden(f"rankdpo_{noise}")
    prediction = leaf(arrays[f"{noise}_model_pred"])
    policy, reference = rank_logps(noise, prediction)
    rank_dpo(policy, reference, arrays["phi"], rank_by=RANK_BY[rank_by], ties="stable").losses.mean().backward()
    assert_equal(prediction.grad, arrays[f"{noise}_{rank_by}_ln_grad_model_pred"])


@pytest.mark.parametrize(
    ("noise", "unweighted", "gain_only"),
    [
        ("indep", 3.407280214498098, 0.6660752050464428),
        ("shared", 5.347883927834684, 0.9113374030349334),
    ],
)
def test_rank_dpo_repeats_the_papers_ablations(noise: str, unweighted: float, gain_only: float) -> None:
    arrays = golden(f"rankdpo_{noise}")
    rewards = -2500 * arrays[f"{noise}_s_theta"] / 5000
    values = {"policy": rewards, "reference": torch.zeros_like(rewards), "scores": arrays["phi"]}
    assert rank_dpo(**values, gain="none", discount="none").losses.mean().item() == pytest.approx(unweighted, rel=1e-9)
    assert rank_dpo(**values, discount="none").losses.mean().item() == pytest.approx(gain_only, rel=1e-9)


def test_rank_dpo_of_two_images_is_the_golden_constant_times_dpo() -> None:
    arrays = golden("rankdpo_shared")
    rewards = -2500 * arrays["shared_s_theta"][:, :2]
    zeros = torch.zeros_like(rewards)
    scores = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(3, 2)
    ranked = rank_dpo(rewards / 5000, zeros, scores, beta=5000.0).losses
    paired = dpo(rewards / 5000, zeros, beta=5000.0).losses
    assert_equal(paired, arrays["k2_dpo_per_prompt"])
    assert_equal(ranked, arrays["k2_loss_per_prompt"])
    assert_equal(ranked / paired, arrays["k2_constant"].expand(3))


@pytest.mark.parametrize("noise", ["indep", "shared"])
def test_ranked_arrays_have_the_golden_noisy_latents(noise: str) -> None:
    arrays = golden(f"rankdpo_{noise}")
    schedule = stable_diffusion()
    noisy = schedule.add_noise(arrays["x0"], arrays[f"{noise}_noise"], arrays["timesteps"])
    assert_equal(noisy, arrays[f"{noise}_noisy_latents"])


# The step-aware preference model's own training


def test_bradley_terry_repeats_the_loss_and_gradients_of_the_step_aware_models_training() -> None:
    arrays = golden("spm_criterion")
    features = {name: leaf(arrays[f"{name}_features"]) for name in ("image_0", "image_1", "text")}
    images = torch.stack([features["image_0"], features["image_1"]], dim=1)
    scores = arrays["logit_scale_exp"] * (images * features["text"][:, None]).sum(2)
    weight = 1 / arrays["num_examples_per_prompt"]
    assert set(arrays["label_0"].tolist()) == {0.0, 0.5, 1.0} and len(set(weight.tolist())) > 1
    loss = bradley_terry(scores, arrays["label_0"], weight / weight.mean()).losses.mean()
    loss.backward()
    assert_equal(loss, arrays["inbatch0_loss"])
    for name, values in features.items():
        assert_equal(values.grad, arrays[f"inbatch0_grad_{name}"])


# TRL on summed text log-probabilities

TRL_PAIRWISE = {
    "sigmoid_b0.1": (dpo, {"beta": 0.1}),
    "sigmoid_b0.5": (dpo, {"beta": 0.5}),
    "hinge_b0.1": (hinge, {"beta": 0.1}),
    "hinge_b0.5": (hinge, {"beta": 0.5}),
    "ipo_b0.1": (ipo, {"beta": 0.1}),
    "robust_b0.1": (robust, {"beta": 0.1}),
    "robust_b0.5_e0.3": (robust, {"beta": 0.5, "label_smoothing": 0.3}),
}
# TRL averages IPO's log-probabilities over tokens before the loss.
TRL_BY_LENGTH = ("ipo_b0.1",)


@pytest.mark.parametrize("case", TRL_PAIRWISE)
def test_pairwise_losses_repeat_the_numbers_of_trl(case: str) -> None:
    arrays = golden("trl")
    loss, settings = TRL_PAIRWISE[case]
    policy = torch.stack([arrays["inputs/chosen_logps"], arrays["inputs/rejected_logps"]], dim=1)
    reference = torch.stack([arrays["inputs/ref_chosen_logps"], arrays["inputs/ref_rejected_logps"]], dim=1)
    lengths = torch.stack([arrays["inputs/chosen_len"], arrays["inputs/rejected_len"]], dim=1)
    policy = leaf(policy)
    scale = 1 / lengths.double() if case in TRL_BY_LENGTH else torch.ones_like(policy)
    result = loss(policy * scale, reference * scale, **settings)
    result.losses.mean().backward()
    assert_equal(result.losses, arrays[f"{case}/per_sample"])
    assert_equal(result.losses.mean(), arrays[f"{case}/loss"])
    assert_equal(policy.grad[:, 0], arrays[f"{case}/grad_chosen_logps"])
    assert_equal(policy.grad[:, 1], arrays[f"{case}/grad_rejected_logps"])


KTO_CASES = {
    "kto": {"beta": 0.1},
    "kto_w": {"beta": 0.1, "desirable_weight": 1.33},
    "kto_negkl": {"beta": 0.1},
    "kto_b0.5": {"beta": 0.5},
}


@pytest.mark.parametrize("case", KTO_CASES)
def test_kto_repeats_the_numbers_of_trl(case: str) -> None:
    arrays, settings = golden("trl"), KTO_CASES[case]
    policy = leaf(arrays["inputs_kto/logps"][:, None])
    reference, label = arrays["inputs_kto/ref_logps"][:, None], arrays["inputs_kto/label"]
    anchor = (arrays["inputs_kto/kl_logps"] - arrays["inputs_kto/ref_kl_logps"]).mean()
    if case == "kto_negkl":
        anchor = -anchor
    result = kto(policy, reference, label, anchor, **settings)
    result.losses.mean().backward()
    assert_equal(anchor.clamp(min=0), arrays[f"{case}/kl"])
    assert_equal(result.losses.mean(), arrays[f"{case}/loss"])
    assert_equal(policy.grad[:, 0], arrays[f"{case}/grad_logps"])
    assert_equal(result.rewards[label == 1].mean(), arrays[f"{case}/rewards_chosen_mean"])
    assert_equal(result.rewards[label == 0].mean(), arrays[f"{case}/rewards_rejected_mean"])
