"""What is particular to Wan: prompts, flow shift, tokens with timesteps of their own, two transformers, bfloat16."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_folder, tiny_pipeline

from mmalign.errors import UserError
from mmalign.families import FAMILIES, encode_prompt, weight_dtype
from mmalign.models.diffusion import Denoiser, add_lora, encode_images, latent_shape, open_pipeline, save_full, schedule_of
from mmalign.models.sampling import sample_images

WAN = FAMILIES["wan"]
CALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "output_type": "latent"}


def calls_of(pipe: Any, **changes: Any) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """What the stock pipeline gives its transformer at each call, and what it gets."""
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, given, output: calls.append((given, output[0])), with_kwargs=True
    )
    try:
        pipe(generator=torch.Generator().manual_seed(0), **{**CALL, **changes})
    finally:
        hook.remove()
    return calls


@pytest.mark.parametrize("prompt", ["a red disc  &amp;amp; a\n blue one ", "x" * 600, ""])
def test_conditions_and_predictions_are_those_of_the_stock_call_with_guidance(prompt: str) -> None:
    pipe = open_pipeline("wan", tiny_folder("wan"))
    calls = calls_of(pipe, prompt=prompt, negative_prompt="grey", guidance_scale=4.0)
    assert len(calls) == 6
    for number, (given, output) in enumerate(calls):
        condition = encode_prompt("wan", pipe, ["grey" if number % 2 else prompt])
        assert condition["encoder_hidden_states"].shape == (1, 512, 16)
        torch.testing.assert_close(condition["encoder_hidden_states"], given["encoder_hidden_states"], atol=1e-6, rtol=0)
        with torch.no_grad():
            ours = WAN.forward(pipe.transformer, given["hidden_states"], given["timestep"], **condition)
        torch.testing.assert_close(ours, output, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("sampler", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_the_schedule_has_the_flow_shift_of_the_sampler(shift: float, sampler: str) -> None:
    import diffusers

    pipe = open_pipeline("wan", tiny_folder("wan"))
    if sampler.startswith("UniPC"):
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=shift)
    else:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = schedule_of(pipe)
    assert schedule.prediction == "flow"
    pipe.scheduler.set_timesteps(10)
    middle = float(pipe.scheduler.sigmas[5])
    nearest = int((schedule.sigma - middle).abs().argmin())
    assert abs(float(schedule.sigma[nearest]) - middle) < 2e-3
    # UniPC cuts what it gives the network down to an integer.
    assert abs(float(schedule.network_timesteps[nearest]) - float(pipe.scheduler.timesteps[5])) < 3
    s = (nearest + 1) / 1000
    assert float(schedule.sigma[nearest]) == pytest.approx(shift * s / (1 + (shift - 1) * s), rel=1e-5)


def small_tokens(folder: Path) -> Path:
    """Wan 2.2 5B in small: a VAE of factor 16 with patches, and a timestep for each token."""
    vae = {
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        "is_residual": True,
        "dim_mult": [1, 2, 4, 4],
    }
    return tiny_pipeline("wan", folder, vae=vae, pipeline={"expand_timesteps": True})


def test_wan_2_2_with_a_timestep_a_token_gets_the_same_prediction_from_one_a_video(tmp_path: Path) -> None:
    pipe = open_pipeline("wan", small_tokens(tmp_path / "small"))
    assert latent_shape(pipe, (64, 64), 5) == (4, 2, 4, 4)
    pixels = torch.rand(1, 3, 5, 64, 64) * 2 - 1
    assert encode_images(pipe, pixels)[0].shape == (1, 4, 2, 4, 4)
    calls = calls_of(pipe, prompt="a red disc", guidance_scale=1.0, height=64, width=64)
    assert len(calls) == 3
    for given, output in calls:
        assert given["timestep"].shape == (1, 8)
        with torch.no_grad():
            ours = WAN.forward(
                pipe.transformer, given["hidden_states"], given["timestep"][:, 0], **encode_prompt("wan", pipe, ["a red disc"])
            )
        torch.testing.assert_close(ours, output, atol=1e-5, rtol=0)
    denoiser = Denoiser("wan", pipe.transformer)
    saved = save_full(pipe, denoiser, tmp_path / "saved")
    assert json.loads((saved / "model_index.json").read_text())["expand_timesteps"] is True


def test_a_size_that_does_not_divide_into_patches_is_refused(tmp_path: Path) -> None:
    pipe = open_pipeline("wan", small_tokens(tmp_path / "small"))
    noisy = torch.randn(1, *latent_shape(pipe, (48, 64), 5))
    with pytest.raises(UserError, match=r"adapter\.resolution: got a size of 3 x 4 latents, want multiples of 2 x 2"):
        WAN.forward(pipe.transformer, noisy, torch.tensor([500.0]), **encode_prompt("wan", pipe, [""]))


@pytest.mark.parametrize("wanted", ["wan", "sd15"])
def test_wan_2_2_with_two_transformers_is_refused_by_name(wanted: str, tmp_path: Path) -> None:
    folder = tmp_path / "a14b"
    shutil.copytree(tiny_folder("wan"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    changes = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))
    with pytest.raises(UserError, match=r"family wan: got a pipeline of two transformers \(Wan 2\.2 A14B\), want one"):
        open_pipeline(wanted, folder)


def test_in_bfloat16_the_layers_that_diffusers_keeps_in_float32_do_not_tell_the_dtype() -> None:
    pipe = open_pipeline("wan", tiny_folder("wan"), dtype=torch.bfloat16)
    assert pipe.transformer.scale_shift_table.dtype == torch.float32
    assert weight_dtype(pipe.transformer) == torch.bfloat16
    denoiser = Denoiser("wan", pipe.transformer)
    add_lora(denoiser, rank=2)
    assert weight_dtype(denoiser.core) == torch.bfloat16
    with torch.no_grad():
        noisy = torch.randn(1, *latent_shape(pipe, (32, 32), 5))
        assert denoiser(noisy, torch.tensor([500.0]), **encode_prompt("wan", pipe, ["a disc"])).dtype == torch.bfloat16


def test_a_video_is_sampled_as_its_frames_and_does_not_depend_on_its_batch() -> None:
    pipe = open_pipeline("wan", tiny_folder("wan"))
    options: dict[str, Any] = {"steps": 2, "guidance_scale": 2.0, "size": (32, 48), "frames": 5}
    both = list(sample_images(WAN, pipe, ["a disc", "a cube"], [1, 2], **options))
    (alone,) = sample_images(WAN, pipe, ["a cube"], [2], **options)
    assert [len(video) for video in both] == [5, 5]
    assert alone[0].size == (48, 32)
    levels = [torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8).float() for frame in (both[1][4], alone[4])]
    assert (levels[0] - levels[1]).abs().max() <= 1
    assert both[0][0].tobytes() != both[1][0].tobytes()


@pytest.mark.parametrize("option", ["channels_last", "gradient_checkpointing"])
def test_options_that_save_memory_change_no_prediction(option: str) -> None:
    pipe = open_pipeline("wan", tiny_folder("wan"))
    denoiser = Denoiser("wan", pipe.transformer)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, *latent_shape(pipe, (32, 32), 5), generator=generator)
    condition = encode_prompt("wan", pipe, ["a disc"])
    before = denoiser(noisy, torch.tensor([500.0]), **condition)
    denoiser.save_memory(**{option: True})
    torch.testing.assert_close(denoiser(noisy, torch.tensor([500.0]), **condition), before, atol=1e-6, rtol=0)
