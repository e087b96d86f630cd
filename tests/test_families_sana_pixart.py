"""Only SANA and PixArt: instruction, masks, micro-conditions, learned variance, the autoencoder, LoRA as a PEFT folder."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IMAGE_SIZE, LATENT_SHAPE, tiny_folder, tiny_pipeline
from torch import Tensor

from mmalign.errors import UserError
from mmalign.families import FAMILIES
from mmalign.memory import SIZES
from mmalign.models.diffusion import (
    Denoiser,
    add_lora,
    decode_latents,
    encode_images,
    encode_prompt,
    latent_shape,
    load_lora,
    open_pipeline,
    save_lora,
    schedule_of,
    trainable_parameters,
    training_plan,
)
from mmalign.models.lora import loading_code
from mmalign.models.peft_adapter import PEFT_CONFIG_FILE, PEFT_FILE
from mmalign.models.sampling import lora_file, sample_images, use_lora

PROMPTS = [" A <b>red</b> Cube (1:01)", "two dogs"]
every = pytest.mark.parametrize("name", ["sana", "pixart_alpha", "pixart_sigma"])
pixarts = pytest.mark.parametrize("name", ["pixart_alpha", "pixart_sigma"])
# PixArt-alpha at 1024 px is the one with micro-conditions; the stock pipeline knows it by its sample size.
WITH_SIZES = {"sample_size": 128}


def opened(name: str, folder: Path | None = None, **options: Any) -> tuple[Any, Denoiser]:
    pipe = open_pipeline(name, folder or tiny_folder(name), **options)
    return pipe, Denoiser(name, pipe.transformer)


def inputs(name: str, pipe: Any, prompts: list[str] = PROMPTS) -> dict[str, Tensor]:
    """Arguments of one forward of two samples."""
    sizes = FAMILIES[name].size_condition((40, 48), (2, 4), (IMAGE_SIZE, IMAGE_SIZE))
    noisy = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(3))
    condition = encode_prompt(name, pipe, prompts) | {key: torch.stack([value] * 2) for key, value in sizes.items()}
    return {"noisy": noisy, "timestep": torch.tensor([10, 700]), **condition}


def predicted(denoiser: Denoiser, **arguments: Tensor) -> Tensor:
    with torch.no_grad():
        return denoiser(**arguments)


def pull(name: str, pipe: Any, denoiser: Denoiser) -> None:
    """Two steps towards a prediction of zero: any gradient will do."""
    optimizer = torch.optim.SGD(trainable_parameters(denoiser), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        denoiser(**inputs(name, pipe)).square().mean().backward()
        optimizer.step()


# --- the stock pipeline's call ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sana", {}),
        ("sana", {"timestep_scale": 0.001}),
        ("pixart_alpha", {}),
        ("pixart_alpha", WITH_SIZES),
        ("pixart_sigma", {}),
    ],
    ids=["sana", "sana-1.5", "alpha-512", "alpha-1024", "sigma"],
)
def test_the_forward_is_what_the_network_returns_in_the_stock_call(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    family, size = FAMILIES[name], (32, 64)
    pipe, denoiser = opened(name, tiny_pipeline(name, tmp_path / "model", transformer=changes))
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def record(module: Any, args: tuple[Any, ...], options: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        seen.append(({**options, "hidden_states": args[0]}, output[0]))

    handle = denoiser.core.register_forward_hook(record, with_kwargs=True)
    options = family.call_options(3.0, None, len(PROMPTS))
    pipe(PROMPTS, height=size[0], width=size[1], num_inference_steps=3, output_type="latent", **options)
    handle.remove()
    condition = encode_prompt(name, pipe, ["", "", *PROMPTS])  # unguided first, as the stock pipelines batch them
    sizes = family.size_condition(size, (0, 0), size)
    condition |= {key: torch.stack([value] * 4) for key, value in sizes.items()}
    assert len(seen) == len(pipe.scheduler.timesteps) == 3
    for timestep, (given, output) in zip(pipe.scheduler.timesteps, seen, strict=True):
        ours = predicted(denoiser, noisy=given["hidden_states"], timestep=timestep.expand(4), **condition)
        assert ours.shape == (4, LATENT_SHAPE[0], 8, 16)
        torch.testing.assert_close(ours, output[:, : LATENT_SHAPE[0]], atol=1e-6, rtol=1e-5)
        for key in ("encoder_hidden_states", "encoder_attention_mask"):
            torch.testing.assert_close(condition[key], given[key])
    assert ours.std() > 0.1


def test_a_sana_prompt_stands_behind_the_instruction_and_the_empty_one_does_not() -> None:
    pipe, _ = opened("sana")
    options = {"do_classifier_free_guidance": False, "device": "cpu"}
    bare = pipe.encode_prompt([PROMPTS[1]], **options)[0]
    assert not torch.allclose(encode_prompt("sana", pipe, [PROMPTS[1]])["encoder_hidden_states"], bare)
    empty = encode_prompt("sana", pipe, [""])
    torch.testing.assert_close(empty["encoder_hidden_states"], pipe.encode_prompt([""], **options)[0])
    assert empty["encoder_attention_mask"].sum() == 1


def test_images_without_a_size_have_the_models_own() -> None:
    for name in ("sana", "pixart_sigma"):
        pipe, _ = opened(name)
        (image,) = sample_images(FAMILIES[name], pipe, PROMPTS[:1], [1], steps=1, guidance_scale=2.0)
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize(("name", "multiple"), [("sana", 32), ("pixart_sigma", 16)])
def test_a_size_between_the_multiples_of_the_network_is_refused(name: str, multiple: int) -> None:
    pipe, _ = opened(name)
    images = sample_images(FAMILIES[name], pipe, PROMPTS[:1], [1], steps=1, guidance_scale=2.0, size=(multiple, multiple + 8))
    with pytest.raises(UserError, match=rf"size: got \[{multiple}, {multiple + 8}\], want multiples of {multiple} for {name}"):
        next(images)


@every
def test_padding_does_not_change_the_prediction(name: str) -> None:
    pipe, denoiser = opened(name)
    arguments = inputs(name, pipe)
    whole, mask = predicted(denoiser, **arguments), arguments["encoder_attention_mask"]
    length = int(mask.sum(1).max())
    assert 0 < length < mask.shape[1] / 2
    assert mask.sum(1).min() < length, "one prompt is padded within the shorter batch too"
    short = {key: value[:, :length] if key.startswith("encoder") else value for key, value in arguments.items()}
    torch.testing.assert_close(predicted(denoiser, **short), whole, atol=1e-6, rtol=1e-5)
    embeds = torch.where(mask[:, :, None] == 1, arguments["encoder_hidden_states"], 7.0)
    torch.testing.assert_close(predicted(denoiser, **{**arguments, "encoder_hidden_states": embeds}), whole)
    unmasked = {**arguments, "encoder_attention_mask": torch.ones_like(mask)}
    assert not torch.allclose(predicted(denoiser, **unmasked), whole, atol=1e-3)


# --- PixArt -----------------------------------------------------------------------------------------------------------


def test_pixart_alpha_is_told_the_original_size_and_the_trained_ratio(tmp_path: Path) -> None:
    sizes = FAMILIES["pixart_alpha"].size_condition((768, 1001), (3, 5), (1024, 512))
    assert sizes["resolution"].tolist() == [768, 1001]
    assert sizes["aspect_ratio"].tolist() == [2.0]
    assert FAMILIES["pixart_sigma"].size_condition((768, 1001), (3, 5), (1024, 512)) == {}

    folder = tiny_pipeline("pixart_alpha", tmp_path, transformer=WITH_SIZES)
    pipe, denoiser = opened("pixart_alpha", folder)
    arguments = inputs("pixart_alpha", pipe)
    base = predicted(denoiser, **arguments)
    for key in ("resolution", "aspect_ratio"):
        changed = predicted(denoiser, **{**arguments, key: arguments[key] * 2})
        assert (changed - base).abs().max() > 1e-4, key

    half, denoiser = opened("pixart_alpha", folder, dtype=torch.bfloat16)
    seen: list[Tensor] = []
    denoiser.core.adaln_single.emb.additional_condition_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    predicted(denoiser, **{**inputs("pixart_alpha", half), "resolution": torch.tensor([[1001.0, 768.0]] * 2)})
    assert seen[0].tolist() == [1001.0, 768.0] * 2, "bfloat16 would make 1000 of it"


def test_sizes_do_not_reach_a_network_without_micro_conditions() -> None:
    pipe, denoiser = opened("pixart_alpha")
    arguments = inputs("pixart_alpha", pipe)
    changed = predicted(denoiser, **{**arguments, "resolution": arguments["resolution"] * 2})
    assert torch.equal(changed, predicted(denoiser, **arguments))


@pixarts
def test_the_learned_variance_is_split_off(name: str) -> None:
    pipe, denoiser = opened(name)
    arguments = inputs(name, pipe)
    base = predicted(denoiser, **arguments)
    bias = denoiser.core.proj_out.bias.data.view(2, 2, 2 * LATENT_SHAPE[0])  # patch height, patch width, channel
    bias[..., LATENT_SHAPE[0] :] += 5
    assert torch.equal(predicted(denoiser, **arguments), base)
    bias[..., : LATENT_SHAPE[0]] += 5
    torch.testing.assert_close(predicted(denoiser, **arguments), base + 5)


@pixarts
def test_pixart_noise_is_variance_preserving_on_linear_betas(name: str) -> None:
    from diffusers import DDPMScheduler

    schedule = schedule_of(opened(name)[0])
    stock = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    clean, noise = torch.randn(2, 3, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0)).unbind()
    timestep = torch.tensor([0, 500, 999])
    torch.testing.assert_close(schedule.add_noise(clean, noise, timestep), stock.add_noise(clean, noise, timestep))
    assert torch.equal(schedule.target(clean, noise, timestep), noise)
    assert schedule.network_timestep(timestep).tolist() == [0, 500, 999]


@pixarts
def test_published_checkpoints_that_name_the_networks_former_class_are_opened(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder(name), tmp_path / "model"))
    for file, key, value in [
        ("model_index.json", "transformer", ["diffusers", "Transformer2DModel"]),
        ("transformer/config.json", "_class_name", "Transformer2DModel"),
    ]:
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, key: value}))
    pipe, denoiser = opened(name, folder)
    assert type(pipe.transformer).__name__ == "PixArtTransformer2DModel"
    now, before = predicted(denoiser, **inputs(name, pipe)), predicted(opened(name)[1], **inputs(name, pipe))
    assert torch.equal(now, before)


def test_a_tokenizer_whose_packages_are_missing_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_folder("pixart_sigma"), tmp_path / "model"))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as where it is not installed
    opened("pixart_sigma", folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"")  # all that the published folders have
    with pytest.raises(UserError, match=r"its tokenizer is a SentencePiece model, .* pip install sentencepiece\."):
        opened("pixart_sigma", folder)


# --- SANA -------------------------------------------------------------------------------------------------------------


def test_sana_flows_with_the_shift_of_its_sampler(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe, _ = opened("sana")
    schedule = schedule_of(pipe)
    assert schedule.prediction == "flow"
    pipe.scheduler.set_timesteps(999)  # s = 0.999 ... 0.001: all that training draws but pure noise
    torch.testing.assert_close(schedule.sigma[:999].flip(0), pipe.scheduler.sigmas[:-1], atol=1e-6, rtol=1e-5)
    inside = schedule.network_timestep(torch.arange(999)).flip(0)
    assert (inside - pipe.scheduler.timesteps).abs().max() < 1.001, "the sampler rounds down to whole timesteps"
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(schedule_of(pipe).sigma, schedule.sigma)


def test_the_deep_compression_autoencoder_goes_to_scaled_latents_and_back(tmp_path: Path) -> None:
    channels, depths = (4, 4, 4, 4, 8, 8), (1,) * 6
    shape = {
        **{f"{part}_block_out_channels": channels for part in ("encoder", "decoder")},
        **{f"{part}_layers_per_block": depths for part in ("encoder", "decoder")},
        **{f"{part}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3 for part in ("encoder", "decoder")},
        **{f"{part}_qkv_multiscales": ((), (), (), (5,), (5,), (5,)) for part in ("encoder", "decoder")},
        **{"attention_head_dim": 4, "latent_channels": 8, "scaling_factor": 0.5},
    }
    folder = tiny_pipeline("sana", tmp_path, vae=shape, transformer={"sample_size": 2})
    pipe, denoiser = opened("sana", folder)
    pixels = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = encode_images(pipe, pixels)
    assert mean.shape == (2, *latent_shape(pipe, (64, 128))) == (2, 8, 2, 4), "32 pixels of a side make one latent"
    assert torch.equal(std, torch.zeros_like(mean))
    with torch.no_grad():
        latent = pipe.vae.encode(pixels).latent
        torch.testing.assert_close(mean, latent * 0.5)
        torch.testing.assert_close(decode_latents(pipe, mean), (pipe.vae.decode(latent).sample / 2 + 0.5).clamp(0, 1))
    condition = encode_prompt("sana", pipe, PROMPTS)
    assert predicted(denoiser, noisy=mean, timestep=torch.tensor([1, 2]), **condition).shape == mean.shape


# --- LoRA as a PEFT adapter folder ------------------------------------------------------------------------------------


def sampled(name: str, pipe: Any) -> Tensor:
    images: Tensor = pipe(
        PROMPTS[1],
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        **FAMILIES[name].call_options(3.0, None, 1),
    ).images
    return images


@every
def test_the_loading_lines_give_the_trained_image_in_stock_code(name: str, tmp_path: Path) -> None:
    import diffusers

    pipe, denoiser = opened(name)
    family = FAMILIES[name]
    base = sampled(name, pipe)
    add_lora(denoiser, rank=2, alpha=6)
    pull(name, pipe, denoiser)
    trained = sampled(name, pipe)
    save_lora(family, denoiser, tmp_path / "lora")
    names: dict[str, Any] = {"diffusers": diffusers}
    exec(loading_code(family, tiny_folder(name), tmp_path / "lora"), names)
    stock = sampled(name, names["pipe"])
    torch.testing.assert_close(stock, trained, atol=1e-5, rtol=0)
    assert (trained - base).abs().max() > 1e-3


def test_a_peft_folder_is_loaded_to_train_on_and_to_sample_with(tmp_path: Path) -> None:
    pipe, denoiser = opened("pixart_sigma")
    base = sampled("pixart_sigma", pipe)
    add_lora(denoiser, rank=2, alpha=6, targets=["to_q", "proj_out"])
    pull("pixart_sigma", pipe, denoiser)
    for _ in range(2):  # the second replaces the first
        assert save_lora(denoiser.family, denoiser, tmp_path) == tmp_path / PEFT_FILE
    assert sorted(path.name for path in tmp_path.iterdir()) == [PEFT_CONFIG_FILE, PEFT_FILE]
    assert json.loads((tmp_path / PEFT_CONFIG_FILE).read_text())["inference_mode"] is True

    other_pipe, again = opened("pixart_sigma")
    load_lora(again, tmp_path)
    arguments = inputs("pixart_sigma", pipe)
    assert torch.equal(predicted(again, **arguments), predicted(denoiser, **arguments))
    assert training_plan(again) == training_plan(denoiser)
    before = [parameter.clone() for parameter in trainable_parameters(again)]
    pull("pixart_sigma", other_pipe, again)
    assert all(not torch.equal(old, new) for old, new in zip(before, trainable_parameters(again), strict=True))

    for scale, wanted in [(1.0, sampled("pixart_sigma", pipe)), (0.0, base)]:
        sampler, _ = opened("pixart_sigma")
        use_lora(FAMILIES["pixart_sigma"], sampler, tmp_path, scale=scale)
        torch.testing.assert_close(sampled("pixart_sigma", sampler), wanted, atol=1e-6, rtol=0)
    assert lora_file(tmp_path) == tmp_path / PEFT_FILE


def test_a_folder_that_peft_itself_saved_is_loaded(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    pipe, denoiser = opened("pixart_alpha")
    config = LoraConfig(r=4, target_modules=["to_k", "linear_1"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = get_peft_model(opened("pixart_alpha")[0].transformer, config)
    wrapped.save_pretrained(tmp_path)
    base = predicted(denoiser, **inputs("pixart_alpha", pipe))
    load_lora(denoiser, tmp_path)
    arguments = inputs("pixart_alpha", pipe)
    wanted = predicted(Denoiser("pixart_alpha", wrapped.base_model.model), **arguments)
    torch.testing.assert_close(predicted(denoiser, **arguments), wanted)
    assert not torch.allclose(wanted, base)


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    pipe, denoiser = opened("pixart_sigma")
    with pytest.raises(UserError, match=f"got no {PEFT_FILE}"):
        load_lora(denoiser, tmp_path)
    with pytest.raises(UserError, match=f"want a folder with {PEFT_FILE}"):
        use_lora(FAMILIES["pixart_sigma"], pipe, tmp_path)
    add_lora(denoiser, rank=2)
    save_lora(denoiser.family, denoiser, tmp_path / "good")
    larger = tiny_pipeline("pixart_sigma", tmp_path / "model", transformer={"num_layers": 1})
    with pytest.raises(UserError, match="do not fit this network"):
        load_lora(opened("pixart_sigma", larger)[1], tmp_path / "good")
    wider = {"num_attention_heads": 6, "cross_attention_dim": 48}
    wider_folder = tiny_pipeline("pixart_sigma", tmp_path / "wider", transformer=wider)
    with pytest.raises(UserError, match="do not fit this network"):
        load_lora(opened("pixart_sigma", wider_folder)[1], tmp_path / "good")
    with pytest.raises(UserError, match=r"want a folder with pytorch_lora_weights\.safetensors"):
        use_lora(FAMILIES["sana"], opened("sana")[0], tmp_path / "good")
    (tmp_path / "good" / PEFT_CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="not readable as a PEFT adapter"):
        load_lora(opened("pixart_sigma")[1], tmp_path / "good")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pixart_alpha", {"caption_channels": 4096}),
        ("pixart_sigma", {"caption_channels": 4096, "use_additional_conditions": False}),
        ("sana", {}),
    ],
)
def test_memory_estimates_count_the_published_networks(name: str, options: dict[str, Any]) -> None:
    import diffusers

    kind = diffusers.SanaTransformer2DModel if name == "sana" else diffusers.PixArtTransformer2DModel
    with torch.device("meta"):
        network = kind(**options)
    assert sum(parameter.numel() for parameter in network.parameters()) == SIZES[name].denoiser
    targets = tuple(f".{target}" for target in FAMILIES[name].lora_targets)
    layers = [layer.weight.shape for path, layer in network.named_modules() if f".{path}".endswith(targets)]
    assert sum(shape[0] + shape[1:].numel() for shape in layers) == SIZES[name].lora_per_rank
