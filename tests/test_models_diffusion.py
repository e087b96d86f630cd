"""UNets, tiny and random, of the real classes: encode, train, save, load in the stock pipeline. What is wrong is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import IMAGE_SIZE, LATENT_SHAPE, tiny_folder, tiny_pipeline

from mmalign.checkpoints import remove_leftovers
from mmalign.errors import UserError
from mmalign.models.diffusion import (
    FAMILIES,
    LORA_FILE,
    Denoiser,
    add_lora,
    encode_images,
    encode_prompt,
    find_family,
    frozen_copy,
    load_lora,
    lora_off,
    open_pipeline,
    save_full,
    save_lora,
    schedule_of,
    trainable_parameters,
    training_plan,
    vae_dtype,
)

# diffusers' Euler sampler calls numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PROMPTS = ["a red cube", "two dogs"]
UNETS = [name for name, family in FAMILIES.items() if family.network == "unet"]  # tests/test_families.py has them all
families = pytest.mark.parametrize("family", UNETS)


def opened(family: str, **options: Any) -> tuple[Any, Denoiser]:
    pipe = open_pipeline(family, tiny_folder(family), **options)
    return pipe, Denoiser(family, pipe.unet)


def inputs(family: str, pipe: Any) -> dict[str, torch.Tensor]:
    """Arguments of one forward of two samples."""
    generator = torch.Generator().manual_seed(3)
    condition = encode_prompt(family, pipe, PROMPTS)
    sizes = find_family(family).size_condition((40, 48), (2, 4), (IMAGE_SIZE, IMAGE_SIZE))
    condition |= {name: torch.stack([value, value]) for name, value in sizes.items()}
    noisy = torch.randn(2, *LATENT_SHAPE, generator=generator)
    return {"noisy": noisy, "timestep": torch.tensor([10, 700]), **condition}


def train(family: str, pipe: Any, denoiser: Denoiser, steps: int = 2) -> None:
    """Pull the prediction towards zero: any gradient will do."""
    optimizer = torch.optim.SGD(trainable_parameters(denoiser), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        denoiser(**inputs(family, pipe)).square().mean().backward()
        optimizer.step()


def sample(pipe: Any) -> np.ndarray:
    images = pipe(
        PROMPTS[0],
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    return np.asarray(images[0])


@families
@pytest.mark.parametrize("targets", [None, ("conv_in", "to_q", "conv1", "ff.net.2")], ids=["attention", "all kinds"])
def test_a_trained_lora_gives_the_same_image_in_the_stock_pipeline(
    family: str, targets: tuple[str, ...] | None, tmp_path: Path
) -> None:
    pipe, denoiser = opened(family)
    base_image = sample(pipe)
    add_lora(denoiser, rank=2, alpha=6, targets=targets)
    assert np.array_equal(sample(pipe), base_image), "a fresh LoRA leaves the model as it was"
    train(family, pipe, denoiser)
    trained_image = sample(pipe)
    save_lora(find_family(family), denoiser, tmp_path / "out")

    stock = find_family(family).pipeline_class().from_pretrained(tiny_folder(family))
    stock.load_lora_weights(tmp_path / "out")
    stock_image = sample(stock)
    assert np.abs(stock_image - base_image).max() > 1e-3
    np.testing.assert_allclose(stock_image, trained_image, atol=1e-5)
    assert stock.unet.peft_config["default_0"].lora_alpha == 6
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LORA_FILE]


@families
@pytest.mark.parametrize("targets", [None, ("conv_in", "to_q", "conv1", "ff.net.2")], ids=["attention", "all kinds"])
def test_a_saved_lora_is_loaded_to_train_on(family: str, targets: tuple[str, ...] | None, tmp_path: Path) -> None:
    pipe, denoiser = opened(family)
    add_lora(denoiser, rank=2, alpha=6, targets=targets)
    train(family, pipe, denoiser)
    save_lora(find_family(family), denoiser, tmp_path)
    with torch.no_grad():
        expected = denoiser(**inputs(family, pipe))

    again_pipe, again = opened(family)
    load_lora(again, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs(family, again_pipe)), expected)
    assert training_plan(again) == training_plan(denoiser)
    before = [parameter.clone() for parameter in trainable_parameters(again)]
    assert len(before) == len(trainable_parameters(denoiser))
    train(family, again_pipe, again)
    assert any(not torch.equal(old, new) for old, new in zip(before, trainable_parameters(again), strict=True))


@families
def test_the_reference_is_the_policy_with_its_lora_off(family: str) -> None:
    pipe, denoiser = opened(family)
    reference = frozen_copy(denoiser)
    assert trainable_parameters(reference) == []
    add_lora(denoiser, rank=2)
    train(family, pipe, denoiser)
    with torch.no_grad():
        wanted = reference(**inputs(family, pipe))
        with lora_off(denoiser):
            assert torch.equal(denoiser(**inputs(family, pipe)), wanted)
        assert not torch.allclose(denoiser(**inputs(family, pipe)), wanted)


def test_lora_is_on_again_after_an_error_and_still_trains() -> None:
    pipe, denoiser = opened("sd15")
    add_lora(denoiser, rank=2)
    train("sd15", pipe, denoiser)
    trained = [id(parameter) for parameter in trainable_parameters(denoiser)]
    with torch.no_grad():
        policy = denoiser(**inputs("sd15", pipe))
    with pytest.raises(RuntimeError, match="from inside"), lora_off(denoiser):
        raise RuntimeError("from inside")
    with torch.no_grad():
        assert torch.equal(denoiser(**inputs("sd15", pipe)), policy)
    assert [id(parameter) for parameter in trainable_parameters(denoiser)] == trained


def test_a_network_without_lora_cannot_pass_for_its_own_reference() -> None:
    _, denoiser = opened("sd15")
    with pytest.raises(ValueError, match="no LoRA"), lora_off(denoiser):
        pass


@families
def test_a_full_fine_tune_loads_in_the_stock_pipeline(family: str, tmp_path: Path) -> None:
    pipe, denoiser = opened(family)
    base_image = sample(pipe)
    train(family, pipe, denoiser)
    trained_image = sample(pipe)
    for _ in range(2):  # the second replaces the first
        save_full(pipe, denoiser, tmp_path / "model")
    stock = find_family(family).pipeline_class().from_pretrained(tmp_path / "model")
    stock.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(stock), trained_image)
    assert not np.array_equal(trained_image, base_image)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    saved, given = (json.loads((root / "model_index.json").read_text()) for root in (tmp_path / "model", tiny_folder(family)))
    assert {**given, "_diffusers_version": 0} == {**saved, "_diffusers_version": 0}


# Saves a pipeline over another; killed just before its n-th rename or removal of a folder, for n = 1, 2 ...
KILLED_SAVES = """
import os, signal, sys
from pathlib import Path
from mmalign.models.diffusion import Denoiser, open_pipeline, save_full

root, base = Path(sys.argv[1]), sys.argv[2]
pipe = open_pipeline("sd15", base)
denoiser = Denoiser("sd15", pipe.unet)
kill_at, killed = 0, True
while killed:
    kill_at += 1
    folder = root / str(kill_at) / "pipeline"
    save_full(pipe, denoiser, folder)
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event, arguments):
            global count
            count += event in ("os.rename", "shutil.rmtree")
            if event in ("os.rename", "shutil.rmtree") and count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        save_full(pipe, denoiser, folder)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_a_full_save_that_is_killed_leaves_the_pipeline_of_before_or_the_new_one(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED_SAVES, str(tmp_path), str(tiny_folder("sd15"))], check=True, timeout=1200)
    runs = list(tmp_path.iterdir())
    assert len(runs) >= 4
    for run in runs:
        remove_leftovers(run)
        assert [path.name for path in run.iterdir()] == ["pipeline"]
        assert open_pipeline("sd15", run / "pipeline").unet is not None


def test_final_weights_are_on_disk_when_a_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    pipe, denoiser = opened("sd15")
    whole = save_full(pipe, denoiser, tmp_path / "pipeline")
    add_lora(denoiser, rank=2)
    lora = save_lora(find_family("sd15"), denoiser, tmp_path / "lora")
    for path in (*whole.rglob("*"), whole, tmp_path, lora, lora.parent):
        assert path.stat().st_ino in synced, path


def test_a_full_save_leaves_a_folder_of_other_files_alone(tmp_path: Path) -> None:
    pipe, denoiser = opened("sd15")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="other files"):
        save_full(pipe, denoiser, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@families
def test_checkpointing_with_lora_recomputes_and_keeps_the_gradient(family: str) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        pipe, denoiser = opened(family)
        add_lora(denoiser, rank=2)
        train(family, pipe, denoiser, steps=1)
        denoiser.zero_grad()
        denoiser.save_memory(gradient_checkpointing=checkpointing)
        runs: list[int] = []
        block = denoiser.core.up_blocks[-1].resnets[-1]
        block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        denoiser(**inputs(family, pipe)).square().mean().backward()
        gradients.append([parameter.grad for parameter in trainable_parameters(denoiser)])
        calls.append(len(runs))
    assert calls == [1, 2], "one forward, and with checkpointing another inside the backward pass"
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@families
def test_every_memory_choice_keeps_the_prediction(family: str) -> None:
    pipe, denoiser = opened(family)
    with torch.no_grad():
        plain = denoiser(**inputs(family, pipe))
        for channels_last in (False, True):
            denoiser.save_memory(channels_last=channels_last)
            torch.testing.assert_close(denoiser(**inputs(family, pipe)), plain, atol=1e-5, rtol=1e-4)
    assert denoiser.core.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@families
def test_prompts_are_encoded_as_stock_sampling_encodes_them(family: str) -> None:
    pipe, denoiser = opened(family)
    seen: list[dict[str, torch.Tensor]] = []

    def record(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append({"encoder_hidden_states": options["encoder_hidden_states"], **(options["added_cond_kwargs"] or {})})

    handle = denoiser.core.register_forward_pre_hook(record, with_kwargs=True)
    pipe(PROMPTS, num_inference_steps=1, guidance_scale=4.0, output_type="latent")
    handle.remove()
    positive = encode_prompt(family, pipe, PROMPTS)
    for name, value in positive.items():
        torch.testing.assert_close(seen[0][name][2:], value)
    sizes = find_family(family).size_condition((IMAGE_SIZE, IMAGE_SIZE), (0, 0), (IMAGE_SIZE, IMAGE_SIZE))
    for name, value in sizes.items():
        assert torch.equal(seen[0][name], value.expand(4, -1))
    assert set(positive) | set(sizes) == set(seen[0])


def test_sdxl_conditions_on_both_encoders_and_on_each_images_own_size() -> None:
    pipe, _ = opened("sdxl")
    condition = encode_prompt("sdxl", pipe, PROMPTS)
    assert condition["encoder_hidden_states"].shape == (2, 16, 16 + 24)
    assert condition["text_embeds"].shape == (2, 24)
    sizes = find_family("sdxl").size_condition((768, 1001), (3, 5), (1024, 1024))
    assert sizes["time_ids"].tolist() == [768, 1001, 3, 5, 1024, 1024]
    assert find_family("sd15").size_condition((768, 1001), (3, 5), (512, 512)) == {}


def test_sdxl_sizes_keep_every_pixel_under_bfloat16() -> None:
    pipe, denoiser = opened("sdxl", dtype=torch.bfloat16)
    arguments = inputs("sdxl", pipe)
    seen: list[torch.Tensor] = []
    denoiser.core.add_time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    arguments["time_ids"] = torch.tensor([[1001.0, 1001, 0, 0, 1024, 1024]] * 2)
    with torch.no_grad():
        denoiser(**arguments)
    assert seen[0].flatten().tolist()[0] == 1001.0


@families
def test_lora_weights_are_float32_on_a_bfloat16_network(family: str) -> None:
    pipe, denoiser = opened(family, dtype=torch.bfloat16)
    add_lora(denoiser, rank=2)
    assert {parameter.dtype for parameter in trainable_parameters(denoiser)} == {torch.float32}
    frozen = {parameter.dtype for parameter in denoiser.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16}
    train(family, pipe, denoiser)
    assert all(torch.isfinite(parameter).all() for parameter in trainable_parameters(denoiser))


def test_lora_initialisation_is_seeded_and_leaves_the_global_generator_alone() -> None:
    first, second, other = opened("sd15")[1], opened("sd15")[1], opened("sd15")[1]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    add_lora(first, rank=2, seed=1)
    assert torch.equal(torch.rand(3), expected)
    add_lora(second, rank=2, seed=1)
    add_lora(other, rank=2, seed=2)
    weights = [torch.cat([p.flatten() for p in trainable_parameters(d)]) for d in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_parameters_to_clip_can_be_walked_twice_and_clipping_clips() -> None:
    pipe, denoiser = opened("sd15")
    add_lora(denoiser, rank=2)
    parameters = trainable_parameters(denoiser)
    torch.optim.SGD(parameters, lr=0.1)
    (denoiser(**inputs("sd15", pipe)).square().mean() * 1e6).backward()
    assert torch.nn.utils.clip_grad_norm_(parameters, 1.0) > 1
    norm = torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None]).sum().sqrt()
    assert norm.item() == pytest.approx(1.0, abs=1e-4)


def test_the_plan_counts_what_is_trained() -> None:
    _, denoiser = opened("sd15")
    assert "100.00 %" in training_plan(denoiser)
    add_lora(denoiser, rank=2, targets=["to_q"])
    queries = [m for n, m in denoiser.core.named_modules() if n.endswith("to_q.base_layer")]
    count = sum(2 * (layer.in_features + layer.out_features) for layer in queries)
    assert f"on {len(queries)} layers (to_q): {count:,} of" in training_plan(denoiser)


def test_an_unknown_lora_target_is_refused_with_the_nearest_layer() -> None:
    _, denoiser = opened("sd15")
    with pytest.raises(UserError, match=r"'to_qq'.*Did you mean to_q\?"):
        add_lora(denoiser, rank=2, targets=["to_k", "to_qq"])
    with pytest.raises(UserError, match="empty list"):
        add_lora(denoiser, rank=2, targets=[])
    with pytest.raises(UserError, match=r"lora\.rank: got 0"):
        add_lora(denoiser, rank=0)
    assert "100.00 %" in training_plan(denoiser), "nothing was changed"


def test_a_lora_of_another_network_or_none_is_refused(tmp_path: Path) -> None:
    _, denoiser = opened("sd15")
    with pytest.raises(UserError, match=LORA_FILE):
        load_lora(denoiser, tmp_path)
    add_lora(denoiser, rank=2)
    save_lora(find_family("sd15"), denoiser, tmp_path)
    _, larger = opened("sdxl")
    with pytest.raises(UserError, match=r"do not fit this sdxl network \(size mismatch for .* and \d+ more\)"):
        load_lora(larger, tmp_path)


@pytest.mark.parametrize(("found", "asked"), [(f, a) for f in UNETS for a in UNETS if f != a])
def test_a_folder_of_another_family_is_refused_by_name(found: str, asked: str) -> None:
    with pytest.raises(UserError, match=rf"got a model of {found} .*want {asked}\. Set family: {found}\."):
        open_pipeline(asked, tiny_folder(found))


def test_published_widths_tell_the_family_whatever_the_prediction(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("sd15"), tmp_path / "model"))
    for width, prediction, family in [(768, "v_prediction", "sd15"), (1024, "epsilon", "sd2")]:
        for name, key, value in [
            ("unet/config.json", "cross_attention_dim", width),
            ("scheduler/scheduler_config.json", "prediction_type", prediction),
        ]:
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=f"Set family: {family}"):
            open_pipeline("sdxl", folder)


def test_places_without_a_pipeline_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_pipeline("sd15", tmp_path / "absent")
    with pytest.raises(UserError, match=r"model_index\.json"):
        open_pipeline("sd15", tmp_path)
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    with pytest.raises(UserError, match="single file"):
        open_pipeline("sd15", single)
    with pytest.raises(UserError, match="neither a folder nor a hub model"):
        open_pipeline("sd15", "nobody/absent-model", local_files_only=True)
    broken = Path(shutil.copytree(tiny_folder("sd15"), tmp_path / "broken"))
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="diffusers cannot load it"):
        open_pipeline("sd15", broken)
    (broken / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        open_pipeline("sd15", broken)


def test_an_unknown_family_name_is_refused_and_an_address_is_followed() -> None:
    with pytest.raises(UserError, match=r"Did you mean sdxl\?"):
        find_family("sdxll")
    with pytest.raises(UserError, match="cannot be imported"):
        find_family("no_such_package.models:thing")
    with pytest.raises(UserError, match="want a mmalign Family"):
        find_family("mmalign.models.diffusion:FAMILIES")
    assert find_family("sd15") is FAMILIES["sd15"]


def test_the_schedule_is_the_one_the_sampler_was_made_for(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, EDMEulerScheduler

    for family, prediction in [("sd15", "epsilon"), ("sd2", "v_prediction"), ("sdxl", "epsilon")]:
        pipe, _ = opened(family)
        schedule = schedule_of(pipe)
        assert schedule.prediction == prediction
        clean, noise = torch.randn(2, 3, *LATENT_SHAPE).unbind()
        timestep = torch.tensor([0, 500, 999])
        stock = DDIMScheduler.from_config(pipe.scheduler.config)
        torch.testing.assert_close(schedule.add_noise(clean, noise, timestep), stock.add_noise(clean, noise, timestep))

    zero = tiny_pipeline("sd2", tmp_path, scheduler={"rescale_betas_zero_snr": True})
    assert schedule_of(open_pipeline("sd2", zero)).alpha[-1] == 0
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(UserError, match="EDMEulerScheduler, which has no betas"):
        schedule_of(pipe)


@families
def test_scaled_latents_decode_back_as_the_stock_pipeline_decodes(family: str) -> None:
    pipe, _ = opened(family)
    pixels = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = encode_images(pipe, pixels)
    assert mean.shape == std.shape == (2, *LATENT_SHAPE)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean / pipe.vae.config.scaling_factor, posterior.mean)
    torch.testing.assert_close(std / pipe.vae.config.scaling_factor, posterior.std)


def test_a_shift_of_the_latents_is_subtracted_before_scaling(tmp_path: Path) -> None:
    folder = tiny_pipeline("sd15", tmp_path, vae={"shift_factor": 0.5, "scaling_factor": 2.0})
    pixels = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    mean, std = encode_images(open_pipeline("sd15", folder), pixels)
    plain = encode_images(open_pipeline("sd15", tiny_folder("sd15")), pixels)
    torch.testing.assert_close(mean, (plain[0] / 0.18215 - 0.5) * 2.0)
    torch.testing.assert_close(std, plain[1] / 0.18215 * 2.0)


def test_a_tiny_autoencoder_encodes_without_spread() -> None:
    from diffusers import AutoencoderTiny

    pipe, _ = opened("sd15")
    channels = (8, 8, 8)
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        scaling_factor=1.0,
    )
    pixels = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    mean, std = encode_images(pipe, pixels)
    with torch.no_grad():
        torch.testing.assert_close(mean, pipe.vae.encode(pixels).latents)
    assert torch.equal(std, torch.zeros_like(mean))


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_of_a_half_precision_pipeline_are_those_of_the_float32_vae(family: str, dtype: torch.dtype) -> None:
    pixels = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, half = (encode_images(opened(family, dtype=one)[0], pixels) for one in (torch.float32, dtype))
    torch.testing.assert_close(half, whole, atol=1e-6, rtol=0)


def test_a_vae_that_overflows_in_half_precision_is_kept_in_float32(tmp_path: Path) -> None:
    assert vae_dtype({"force_upcast": True}, torch.float16) == torch.float32
    assert vae_dtype({"force_upcast": False}, torch.float16) == torch.float16
    pipe, denoiser = opened("sdxl", dtype=torch.float16)
    assert (pipe.vae.dtype, pipe.text_encoder.dtype, denoiser.core.dtype) == (torch.float32, torch.float16, torch.float16)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.fill_(2e4)  # sums of 27 products pass 65504, the largest float16
    pixels = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    mean, _ = encode_images(pipe, pixels)
    assert torch.isfinite(mean).all()
    repaired = tiny_pipeline("sdxl", tmp_path, vae={"force_upcast": False})
    pipe = open_pipeline("sdxl", repaired, dtype=torch.float16)
    assert pipe.vae.dtype == torch.float16
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.fill_(2e4)
    with pytest.raises(UserError, match="NaN or infinite latents"):
        encode_images(pipe, pixels)
