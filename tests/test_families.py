"""The contract of FAMILIES: each samples, trains, caches, saves and loads as its stock pipeline does, on a tiny random model.

A family that is listed is tested here. What only some have is a branch of its own: sources of edits, frames of videos, LoRA
files of pipelines without a LoRA loader.
"""

import copy
import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import config_of, encoded, forget_accelerate, metrics_of, train, tree, write_rows
from torch import Tensor, nn

from mmalign import generate, prepare
from mmalign.errors import UserError
from mmalign.families import FAMILIES, Family
from mmalign.models.diffusion import (
    Denoiser,
    add_lora,
    decode_latents,
    encode_images,
    encode_prompt,
    latent_shape,
    lora_off,
    open_pipeline,
    save_full,
    save_lora,
    schedule_of,
    trainable_parameters,
)
from mmalign.models.tiny import tiny_folder
from mmalign.records import Comparison, Content, Media

# diffusers' Euler sampler calls numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SIZE = (32, 64)  # unequal, so that no axis can pass for the other
PROMPTS = ["a red cube", "two dogs"]
NEGATIVE = "blurry"
every_family = pytest.mark.parametrize("name", FAMILIES)
IMAGE_FAMILIES = [name for name, family in FAMILIES.items() if not family.edits and family.frame_multiple is None]


@pytest.fixture(scope="module", autouse=True)
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`model: tiny` of every family, built once, outside the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def opened(name: str, **options: Any) -> tuple[Family, Any, Denoiser]:
    family = FAMILIES[name]
    pipe = open_pipeline(name, "tiny", **options)
    return family, pipe, Denoiser(name, family.core(pipe))


def num_frames(family: Family) -> int | None:
    return None if family.frame_multiple is None else 1 + family.frame_multiple


def source_images(family: Family, count: int = 2) -> list[Image.Image]:
    """What a family that edits starts from; none of any other."""
    return [Image.open(io.BytesIO(encoded(*SIZE, seed=90 + n))) for n in range(count if family.edits else 0)]


def condition_of(family: Family, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Of prompts at SIZE, with nothing cropped away."""
    images = source_images(family, len(prompts))
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images]
    condition = encode_prompt(family, pipe, prompts, *([torch.stack(pixels)] if pixels else []))
    sizes = family.size_condition(SIZE, (0, 0), SIZE)
    return {**condition, **{key: torch.stack([value] * len(prompts)) for key, value in sizes.items()}}


def stock_call(family: Family, prompts: list[str], scale: float, negative: str | None, steps: int) -> dict[str, Any]:
    """Keywords of the stock pipeline's call, with one seed an image."""
    images = source_images(family, len(prompts))
    return {
        "prompt": list(prompts) if len(prompts) > 1 else prompts[0],
        "height": SIZE[0],
        "width": SIZE[1],
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        "output_type": "pt",
        **family.call_options(scale, negative, len(prompts)),
        **({"image": images if len(images) > 1 else images[0]} if images else {}),
        **({} if num_frames(family) is None else {"num_frames": num_frames(family)}),
    }


def sampled(family: Family, pipe: Any, *, scale: float = 1.0, negative: str | None = None, steps: int = 2) -> Tensor:
    """Pixels of the first prompt: (n, 3, h, w), of videos (n, 3, f, h, w)."""
    prompts = PROMPTS[:1] if family.edits else PROMPTS
    made = getattr(pipe(**stock_call(family, prompts, scale, negative, steps)), family.output)
    return made.float() if num_frames(family) is None else made.float().transpose(1, 2)


def inputs(family: Family, pipe: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of one forward of two samples."""
    generator = torch.Generator().manual_seed(3)
    shape = latent_shape(pipe, SIZE, num_frames(family))
    noisy = torch.randn(2, *shape, generator=generator)
    timestep = schedule_of(pipe, SIZE).network_timestep(torch.tensor([300, 700]))
    return {"noisy": noisy.to(dtype), "timestep": timestep, **condition_of(family, pipe, PROMPTS)}


def pull(family: Family, pipe: Any, denoiser: Denoiser, steps: int = 2) -> None:
    """Pull the prediction towards zero: any gradient will do."""
    arguments = inputs(family, pipe)
    optimizer = torch.optim.SGD(trainable_parameters(denoiser), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        denoiser(**arguments).square().mean().backward()
        nn.utils.clip_grad_norm_(trainable_parameters(denoiser), 1.0)
        optimizer.step()


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- the prediction is the stock pipeline's ---------------------------------------------------------------------------


def retraced(family: Family, pipe: Any, scheduler: Any, prompts: list[str], scale: float, negative: str | None) -> Tensor:
    """The pixels of a sampler of our own parts: the family's conditions and forward, our decoding, the pipeline's scheduler."""
    shape = latent_shape(pipe, SIZE, num_frames(family))
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(len(prompts))]
    latents = torch.stack(noise) * getattr(scheduler, "init_noise_sigma", 1.0)
    core, positive = family.core(pipe), condition_of(family, pipe, prompts)
    against = None if negative is None else condition_of(family, pipe, [negative] * len(prompts))
    for timestep in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        times = timestep.expand(len(prompts))
        output = family.forward(core, given, times, **positive)
        assert output.shape == latents.shape
        if against is not None:
            unguided = family.forward(core, given, times, **against)
            output = unguided + scale * (output - unguided)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return decode_latents(pipe, latents)


# Guided otherwise than by unguided + scale * (guided - unguided) of two prompts: Qwen-Image rescales the sum to the guided
# prediction's norm, SANA puts its instruction before the positive prompt alone.
OTHER_GUIDANCE = {"qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "sana"}


@pytest.mark.parametrize("guidance", [None, 3.0], ids=["plain", "guided"])
@every_family
def test_our_parts_retrace_the_images_of_the_stock_pipeline(
    name: str, guidance: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal pixels after several steps: the pipeline's conditions, timestep convention, packing, prediction and decoding."""
    if guidance is not None and name in OTHER_GUIDANCE:
        pytest.skip("guides in a way of its own")
    family, pipe, _ = opened(name)
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    scheduler, plain = copy.deepcopy(pipe.scheduler), pipe.scheduler.set_timesteps

    @functools.wraps(plain)
    def set_timesteps(*args: Any, **options: Any) -> None:
        given.append((args, options))
        plain(*args, **options)

    scale, negative = (1.0, None) if guidance is None else (guidance, NEGATIVE)
    prompts = PROMPTS[:1] if family.edits else PROMPTS
    with monkeypatch.context() as patch:
        patch.setattr(pipe.scheduler, "set_timesteps", set_timesteps, raising=False)
        stock = sampled(family, pipe, scale=scale, negative=negative, steps=3)
    (args, options) = given[-1]
    scheduler.set_timesteps(*args, **options)
    with torch.no_grad():
        ours = retraced(family, pipe, scheduler, prompts, scale, negative)
    torch.testing.assert_close(ours, stock, atol=2e-4, rtol=0)
    assert stock.flatten(1).std(1).min() > 1e-3, "an image of one colour would prove nothing"


@every_family
def test_the_prediction_depends_on_everything_it_is_given(name: str) -> None:
    family, pipe, denoiser = opened(name)
    arguments = inputs(family, pipe)
    with torch.no_grad():
        base = denoiser(**arguments)
        for key in ("noisy", "timestep"):
            changed = denoiser(**{**arguments, key: arguments[key].flip(0)})
            assert (changed - base).abs().max() > 1e-4, key
        swapped = {**arguments, **condition_of(family, pipe, PROMPTS[::-1])}
        assert (denoiser(**swapped) - base).abs().max() > 1e-5, "prompts"


@every_family
def test_a_batch_changes_no_prediction_and_conditions_have_one_shape_a_prompt(name: str) -> None:
    family, pipe, denoiser = opened(name)
    arguments = inputs(family, pipe)
    with torch.no_grad():
        whole = denoiser(**arguments)
        alone = [denoiser(**{key: value[n : n + 1] for key, value in arguments.items()}) for n in range(2)]
    torch.testing.assert_close(torch.cat(alone), whole, atol=1e-5, rtol=1e-4)
    long = condition_of(family, pipe, ["a much longer prompt about a red cube and two dogs", ""])
    short = condition_of(family, pipe, PROMPTS)
    assert {key: value.shape for key, value in long.items()} == {key: value.shape for key, value in short.items()}


@every_family
def test_latents_of_an_image_have_the_shape_that_is_told(name: str) -> None:
    family, pipe, _ = opened(name)
    frames = num_frames(family)
    pixels = torch.rand(2, 3, *([] if frames is None else [frames]), *SIZE) * 2 - 1
    mean, std = encode_images(pipe, pixels)
    assert mean.shape == std.shape == (2, *latent_shape(pipe, SIZE, frames))
    assert decode_latents(pipe, mean).shape == pixels.shape


# --- LoRA and full fine-tuning ----------------------------------------------------------------------------------------


@every_family
def test_the_gradient_reaches_the_lora_of_every_layer_that_the_prediction_uses(name: str) -> None:
    family, pipe, denoiser = opened(name)
    denoiser(**inputs(family, pipe)).square().mean().backward()
    used = {n: bool(p.grad is not None and p.grad.abs().max() > 0) for n, p in denoiser.core.named_parameters()}
    add_lora(denoiser, rank=2)
    denoiser(**inputs(family, pipe)).square().mean().backward()
    reached = {n: bool(p.grad is not None and p.grad.abs().max() > 0) for n, p in denoiser.core.named_parameters()}
    layers = [n.split(".lora_B.")[0] for n in reached if ".lora_B." in n]
    assert len(layers) == len(denoiser.lora_layers)
    assert [reached[f"{layer}.lora_B.default.weight"] for layer in layers] == [used[f"{layer}.weight"] for layer in layers]
    assert sum(used[f"{layer}.weight"] for layer in layers) >= 0.7 * len(layers)


def stock_with_lora(family: Family, folder: Path, scale: float) -> Any:
    """The stock pipeline as any user would load a LoRA into it."""
    stock = family.pipeline_class().from_pretrained(tiny_folder(family.name))
    stock.set_progress_bar_config(disable=True)
    if family.lora_format == "peft":
        from peft import PeftModel

        network = PeftModel.from_pretrained(family.core(stock), folder)
        if scale == 0:
            network.base_model.disable_adapter_layers()
        setattr(stock, family.network, network)
        return stock
    stock.load_lora_weights(folder, adapter_name="tuned")
    stock.set_adapters(["tuned"], [scale])
    return stock


@every_family
def test_a_trained_lora_gives_the_same_image_in_the_stock_pipeline_and_none_at_scale_0(name: str, tmp_path: Path) -> None:
    family, pipe, denoiser = opened(name)
    base = sampled(family, pipe)
    add_lora(denoiser, rank=2, alpha=6)
    torch.testing.assert_close(sampled(family, pipe), base, atol=1e-6, rtol=0)
    pull(family, pipe, denoiser)
    trained = sampled(family, pipe)
    with lora_off(denoiser):
        torch.testing.assert_close(sampled(family, pipe), base, atol=1e-6, rtol=0)
    save_lora(family, denoiser, tmp_path)
    torch.testing.assert_close(sampled(family, stock_with_lora(family, tmp_path, 1.0)), trained, atol=1e-4, rtol=0)
    torch.testing.assert_close(sampled(family, stock_with_lora(family, tmp_path, 0.0)), base, atol=1e-6, rtol=0)
    assert (trained - base).abs().max() > 1e-3


@every_family
def test_a_full_fine_tune_loads_in_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    family, pipe, denoiser = opened(name)
    base = sampled(family, pipe)
    denoiser.requires_grad_(True)
    pull(family, pipe, denoiser)
    trained = sampled(family, pipe)
    save_full(pipe, denoiser, tmp_path / "model")
    stock = family.pipeline_class().from_pretrained(tmp_path / "model")
    stock.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sampled(family, stock), trained, atol=1e-6, rtol=0)
    assert (trained - base).abs().max() > 1e-3
    saved, given = (json.loads((root / "model_index.json").read_text()) for root in (tmp_path / "model", tiny_folder(name)))
    assert {**given, "_diffusers_version": 0, "_name_or_path": 0} == {**saved, "_diffusers_version": 0, "_name_or_path": 0}


@every_family
def test_checkpointing_keeps_the_gradient_and_lora_is_float32_on_a_bfloat16_network(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        family, pipe, denoiser = opened(name)
        add_lora(denoiser, rank=2)
        denoiser.save_memory(gradient_checkpointing=checkpointing)
        denoiser(**inputs(family, pipe)).square().mean().backward()
        gradients.append([parameter.grad for parameter in trainable_parameters(denoiser)])
    torch.testing.assert_close(gradients[0], gradients[1])

    family, pipe, denoiser = opened(name, dtype=torch.bfloat16)
    add_lora(denoiser, rank=2)
    pull(family, pipe, denoiser)
    assert {parameter.dtype for parameter in trainable_parameters(denoiser)} == {torch.float32}
    assert all(torch.isfinite(parameter).all() for parameter in trainable_parameters(denoiser))


# --- the commands -----------------------------------------------------------------------------------------------------


def data_of(family: Family, folder: Path) -> Path:
    """Four pairs of images, of videos where the family makes them; with a source where it edits."""

    def candidate(seed: int) -> Content:
        shown = range(num_frames(family) or 1)
        return Content(images=tuple(Media(data=encoded(40, 36, seed=100 * seed + frame)) for frame in shown))

    rows = [
        Comparison(
            id=f"row{n}",
            prompt=Content(text=PROMPTS[n % 2], images=(Media(data=encoded(36, 40, seed=500 + n)),) if family.edits else ()),
            candidates=(candidate(2 * n), candidate(2 * n + 1)),
            ranks=(1.0, 2.0),
        )
        for n in range(4)
    ]
    return write_rows(rows, folder / "pairs.parquet")


def run_of(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Changes of the config of a run of two steps on `model: tiny`."""
    frames = num_frames(FAMILIES[name])
    adapter = {"model": "tiny", **({} if frames is None else {"frames": frames}), **changes.pop("adapter", {})}
    return {"family": name, "rows": data_of(FAMILIES[name], folder), "adapter": adapter, **changes}


@pytest.mark.parametrize("kind", ["lora", "full", "bf16"])
@every_family
def test_dpo_starts_at_its_reference_and_changes_the_image_in_the_stock_pipeline(name: str, kind: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    changes: dict[str, Any] = {"optimiser": {"learning_rate": 1e-2}, "mixed_precision": "bf16" if kind == "bf16" else "no"}
    adapter = {"lora": None if kind == "full" else {"rank": 2}}
    output = train(tmp_path / "out", **run_of(name, tmp_path, adapter=adapter, training=changes))
    rows = metrics_of(output)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[0]["logps/chosen"] == rows[0]["logps/ref_chosen"] != rows[1]["logps/chosen"]
    stock = family.pipeline_class().from_pretrained(tiny_folder(name))
    stock.set_progress_bar_config(disable=True)
    base = sampled(family, stock)
    if kind == "full":
        tuned = family.pipeline_class().from_pretrained(output / "pipeline")
        tuned.set_progress_bar_config(disable=True)
    else:
        tuned = stock_with_lora(family, output, 1.0)
    after = sampled(family, tuned)
    assert torch.isfinite(after).all()
    assert (after - base).abs().max() > 1e-4


@every_family
def test_training_from_the_cache_is_training_without_it(name: str, tmp_path: Path) -> None:
    changes = run_of(name, tmp_path, adapter={"draws": 2, "prompt_dropout": 0.3})
    plain = train(tmp_path / "plain", **changes)
    changes["adapter"]["cache"] = str(tmp_path / "cache")
    forget_accelerate()
    prepared = prepare.main(config_of(tree(tmp_path / "cached", **changes)))
    # The empty prompt counts once; what an edit is made from is part of its prompt, also of the empty one.
    assert (prepared.num_references, prepared.num_prompts) == (4, 8 if FAMILIES[name].edits else 3)
    cached = train(tmp_path / "cached", **changes)
    for one, other in zip(metrics_of(plain), metrics_of(cached), strict=True):
        # References are computed four examples at a time: the thousand tokens of a source are summed in another order.
        exactly = {"rel": 1e-4 if FAMILIES[name].edits else 0, "abs": 0}
        for key in ("loss", "logps/rejected"):
            assert one[key] == pytest.approx(other[key], **exactly)


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_generate_makes_the_images_of_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"prompts": tuple(PROMPTS), "num_candidates": 2, "steps": 2, "size": SIZE, "device": "cpu"}
    made = generate.main(generate.GenerateConfig(family=name, model="tiny", output=tmp_path, guidance_scale=2.0, **settings))
    assert (made.num_prompts, made.num_images) == (2, 4)
    images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "media").iterdir())]
    assert {image.shape for image in images} == {(*SIZE, 3)}
    assert len({image.tobytes() for image in images}) == 4


@every_family
def test_a_folder_of_another_family_is_refused_by_name(name: str) -> None:
    known = list(FAMILIES)
    other = known[(known.index(name) + 1) % len(known)]
    with pytest.raises(UserError, match=rf"got a model of {name} .*want {other}\. Set family: {name}\."):
        open_pipeline(other, tiny_folder(name))


@every_family
def test_a_tiny_pipeline_is_small_and_the_same_each_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights_of(FAMILIES[name].core(open_pipeline(name, "tiny")))
    assert sum(path.stat().st_size for path in tiny_folder(name).rglob("*")) < 2**20
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    again = weights_of(FAMILIES[name].core(open_pipeline(name, "tiny")))
    assert all(torch.equal(first[key], again[key]) for key in first)
