"""Bugs found in other preference trainers, and the tests that keep each of them out of this one.

ties train as "the first image won"             test_records.py::test_a_tie_is_never_won_by_the_first_image
                                                test_adapter_diffusion.py::test_a_soft_tie_pulls_to_neither_side
                                                test_metrics.py::test_a_tie_is_neither_right_nor_wrong
ipo crashes when it is chosen                   test_adapter_diffusion.py::test_every_loss_trains
log-sigmoid of the batch mean                   test_losses.py::test_a_batch_of_two_is_two_batches_of_one
clipping an emptied iterator does nothing       test_loop.py::test_clipping_bounds_the_update_and_without_it_the_update_is_the_gradient
                                                test_models_diffusion.py::test_parameters_to_clip_can_be_walked_twice_and_clipping_clips
shared x_t is sent through the network twice    test_loop.py::test_one_step_is_one_pass_of_the_policy_and_one_of_the_reference
MaPO is NaN at zero error                       test_losses.py::test_gradient_of_both_mapo_parametrisations_is_the_derivative_at_every_size_of_error
the two candidates get different noise          test_adapter_diffusion.py::test_the_candidates_of_an_example_share_noise_and_timestep_and_examples_do_not
resume replays or repeats data                  test_sources.py::test_a_run_that_goes_on_repeats_and_leaves_out_nothing
                                                test_resume.py::test_a_run_killed_at_any_moment_and_resumed_ends_bit_for_bit_as_if_uninterrupted
the second image is stretched to the first      test_adapter_diffusion.py::test_each_image_keeps_its_own_aspect_ratio_crop_and_sdxl_time_ids
                                                test_adapter_diffusion.py::test_a_square_stays_a_square_whatever_the_shape_of_its_image
the optimiser steps on every micro-batch        test_loop.py::test_four_accumulated_examples_are_one_batch_of_four
                                                test_rival_bugs.py::test_the_optimiser_steps_once_for_all_accumulated_batches
checkpointing is skipped when LoRA is on        test_models_diffusion.py::test_checkpointing_with_lora_recomputes_and_keeps_the_gradient
                                                test_rival_bugs.py::test_a_lora_run_with_checkpointing_recomputes_and_trains_its_lora
LoRA loads a second model as the reference      test_rival_bugs.py::test_the_reference_of_a_lora_is_the_policys_own_network
the number of checkpoints kept is misread       test_resume.py::test_rotation_keeps_the_last_checkpoints
accuracy of an untrained policy is 0            test_metrics.py::test_an_untrained_policy_has_accuracy_one_half_and_saturation_one_half
LoRA stays off after an error                   test_models_diffusion.py::test_lora_is_on_again_after_an_error_and_still_trains
dropout differs between policy and reference    test_rival_bugs.py::test_without_dropout_training_starts_at_ln_2_in_every_network_mode
validation shows weights without the average    test_loop.py::test_the_moving_average_is_what_is_saved_and_validated_with_the_last_weights_beside
the SDXL VAE overflows in half precision        test_models_diffusion.py::test_a_vae_that_overflows_in_half_precision_is_kept_in_float32
beta means something else in every tool         test_noise.py::test_every_convention_of_beta_gives_the_same_logit
shared noise is uniform instead of Gaussian     test_families_qwen_z.py::test_the_shared_noise_of_a_flow_model_is_gaussian

Of TRL 1.16, on texts:

label_smoothing does nothing to sigmoid         test_losses_pairwise_identities.py::test_label_smoothing_changes_dpo
WPO's weights beside sft raise RuntimeError     test_losses_pairwise_identities.py::test_the_weights_of_wpo_and_a_likelihood_term_go_together
the alpha divergence raises in float64          test_losses_pairwise_identities.py::test_the_alpha_divergence_works_in_float64
robust gives NaN at 0.5 and warns above         test_losses_pairwise_identities.py::test_robust_refuses_labels_that_say_nothing_or_the_opposite
WPO's weight is not limited to 1                test_losses_pairwise_identities.py::test_the_weight_of_wpo_never_passes_one
sft is a token mean of each micro-batch         test_losses_terms.py::test_nll_by_token_is_the_same_however_the_rows_are_split_and_trls_is_not
the cache of references hangs on the run        test_text_cache.py::test_training_from_the_cache_is_training_without_it
constants of divergences change ipo             test_losses_pairwise_divergences.py::test_a_constant_of_the_divergence_does_not_change_normalised_losses
AOT sorts the rows of each process              test_losses_pairwise_batch.py::test_aot_on_several_processes_is_aot_on_the_whole_batch
rewards leave the divergence out                test_losses_pairwise_divergences.py::test_rewards_are_of_the_transformed_log_ratio
                                                test_losses_golden_text.py::test_plain_log_ratios_times_beta_are_the_rewards_that_trl_logs_of_every_loss
"""  # noqa: E501 (names of tests are not broken)

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import final_weights, metrics_of, train
from test_adapter_diffusion import opened
from torch.optim.optimizer import register_optimizer_step_post_hook

HERE = Path(__file__).parent


def test_every_test_of_the_table_exists() -> None:
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", __doc__)
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"^def {name}\(", (HERE / file).read_text(), re.MULTILINE), f"{file}::{name}"


def test_the_optimiser_steps_once_for_all_accumulated_batches(tmp_path: Path) -> None:
    taken: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda optimiser, args, kwargs: taken.append(optimiser))
    try:
        train(tmp_path / "out", training={"steps": 3, "batch_size": 1, "accumulation": 4})
    finally:
        handle.remove()
    assert len(taken) == 3


def test_a_lora_run_with_checkpointing_recomputes_and_trains_its_lora(tmp_path: Path) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    calls: dict[bool, int] = {}
    for on in (False, True):
        seen: list[int] = []

        def count(module: torch.nn.Module, args: Any, seen: list[int] = seen) -> None:
            seen.extend([1] * isinstance(module, BasicTransformerBlock))

        handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
        try:
            output = train(tmp_path / str(on), adapter={"gradient_checkpointing": on})
        finally:
            handle.remove()
        calls[on] = len(seen)
        moved = [float(value.abs().max()) for name, value in final_weights(output).items() if "lora_B" in name]
        assert min(moved) > 0
    # Policy and reference are one pass each; the policy's is done again in the backward pass.
    assert calls[True] == calls[False] * 3 // 2


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_the_reference_of_a_lora_is_the_policys_own_network(tmp_path: Path, lora: Any) -> None:
    policy, _ = opened(tmp_path, lora=lora)
    with policy.reference() as network:
        assert (network is policy.network) == (lora is not None)
    if lora is None:
        assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_without_dropout_training_starts_at_ln_2_in_every_network_mode(tmp_path: Path, lora: Any, training: bool) -> None:
    policy, examples = opened(tmp_path, lora=lora)
    inputs = policy.prepare(policy.collate([policy.item(examples[0], 0)])).inputs
    policy.network.train(training)
    with torch.no_grad(), policy.reference() as network:
        reference = inputs.logps(network)
    assert torch.equal(inputs.logps(policy.network).detach(), reference)
    output = train(tmp_path / "run", adapter={"lora": lora}, training={"steps": 1})
    assert metrics_of(output)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
