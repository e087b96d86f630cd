"""UNet diffusion families (SD 1.x, SD 2.x, SDXL): open a pipeline, encode images and prompts, one common forward."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.errors import UserError
from mmalign.models.lora import (
    LORA_FILE,
    add_lora,
    frozen_copy,
    load_lora,
    lora_off,
    save_full,
    save_lora,
    trainable_parameters,
    training_plan,
)
from mmalign.models.pipeline_folder import check_family, detect_family, local_folder
from mmalign.noise import Schedule, vp_schedule

__all__ = [
    "FAMILIES",
    "LORA_FILE",
    "Denoiser",
    "Family",
    "add_lora",
    "detect_family",
    "encode_images",
    "encode_prompt",
    "find_family",
    "frozen_copy",
    "load_lora",
    "lora_off",
    "open_pipeline",
    "save_full",
    "save_lora",
    "schedule_of",
    "trainable_parameters",
    "training_plan",
    "unconditional",
    "vae_dtype",
]

logger = logging.getLogger(__name__)

ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between model families.

    Attributes:
        name: key in FAMILIES.
        pipeline: name of the stock diffusers pipeline class that loads and samples the result.
        lora_targets: layers that get LoRA by default, those of the diffusers training scripts.
        encode_prompt: (pipe, prompts) -> the condition of each prompt, by the keywords of `forward`, (n, ...) each.
        size_condition: (original (h, w), crop (top, left), target (h, w)) of one image -> further condition, unbatched.
        forward: (unet, noisy, timestep, **condition) -> network output.
    """

    name: str
    pipeline: str
    lora_targets: tuple[str, ...]
    encode_prompt: Callable[[Any, Sequence[str]], dict[str, Tensor]]
    size_condition: Callable[[tuple[int, int], tuple[int, int], tuple[int, int]], dict[str, Tensor]]
    forward: Callable[..., Tensor]

    def pipeline_class(self) -> Any:
        """The stock diffusers class."""
        return getattr(importlib.import_module("diffusers"), self.pipeline)


class Denoiser(nn.Module):
    """The trained network of a pipeline behind the forward that all families share.

    Its `unet` is the pipeline's own module: sampling with the pipeline samples from the policy.
    """

    def __init__(self, family: str | Family, unet: Any) -> None:
        """Wrap the UNet of a pipeline; nothing is copied, frozen or moved."""
        super().__init__()
        self.family = find_family(family)
        self.unet = unet
        self.lora_layers: list[Any] = []  # set by add_lora, so that lora_off need not walk all modules at each step

    def forward(
        self, noisy: Float[Tensor, "n c h w"], timestep: Float[Tensor, " n"] | Tensor, **condition: Tensor
    ) -> Float[Tensor, "n c h w"]:
        """The network's prediction (noise, velocity or sample, as its schedule says), in the network's dtype."""
        return self.family.forward(self.unet, noisy, timestep, **condition)

    def save_memory(
        self,
        *,
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        attention: Literal["sdpa", "sliced"] = "sdpa",
    ) -> None:
        """Choose how the network runs; none of these changes its numbers beyond rounding.

        Args:
            gradient_checkpointing: recompute activations in the backward pass: about a third slower, memory of one
                block. Works with LoRA on a frozen network (non-reentrant).
            channels_last: memory format that suits convolutions on tensor cores.
            compile: torch.compile in place, so that saved names stay stock. The first step takes minutes.
            attention: "sdpa" is torch's fused attention; "sliced" computes one head at a time, for very small memory.
        """
        from diffusers.models.attention_processor import AttnProcessor2_0

        if attention == "sliced":
            self.unet.set_attention_slice("max")
        else:
            self.unet.set_attn_processor(AttnProcessor2_0())
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()
        if compile:
            self.unet.compile()


def find_family(family: str | Family) -> Family:
    """The entry of FAMILIES, or the object at an address `your_package.module:thing`.

    Raises:
        UserError: no such name, with the nearest known one.
    """
    if isinstance(family, Family):
        return family
    if family in FAMILIES:
        return FAMILIES[family]
    if ":" in family:
        module, _, name = family.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as fault:
            raise UserError(f"family: got {family!r}, which cannot be imported ({fault}).") from fault
        if not isinstance(found, Family):
            raise UserError(f"family: got {family!r}, a {type(found).__name__}, want a mmalign Family.")
        return found
    near = difflib.get_close_matches(family, FAMILIES, n=1)
    remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(FAMILIES)}, or your_package.module:thing."
    raise UserError(f"family: got {family!r}, an unknown name. {remedy}")


def open_pipeline(
    family: str | Family,
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> Any:
    """Open the stock diffusers pipeline at a local folder (never touches the network) or a hub id.

    Args:
        family: a name in FAMILIES, an address, or a Family.
        model: folder with `model_index.json`, or hub id `owner/name`.
        dtype: of all weights. `encode_images` lifts a VAE that overflows in half precision to float32 by itself.
        revision, variant: of a hub id; variant ("fp16") also of a folder.
        local_files_only: use only what the hub cache holds.
    Raises:
        UserError: nothing there, a single-file checkpoint, a broken folder, or a model of another family.
    """
    family = find_family(family)
    folder = local_folder(model, revision=revision, variant=variant, local_files_only=local_files_only)
    check_family(folder, model, family=family.name, pipeline=family.pipeline, known=tuple(FAMILIES))
    options: dict[str, Any] = {"dtype": dtype, "variant": variant, "local_files_only": True}
    if "safety_checker" in inspect.signature(family.pipeline_class().__init__).parameters:
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        pipe = family.pipeline_class().from_pretrained(str(folder), **options)
    except (OSError, ValueError, RuntimeError, KeyError) as fault:
        raise UserError(f"{model}: diffusers cannot load it ({fault}). Download or save the model again.") from fault
    pipe.set_progress_bar_config(disable=True)
    return pipe


def schedule_of(pipe: Any) -> Schedule:
    """The training noise schedule that the pipeline's sampler was made for.

    Read from the scheduler's config through diffusers' DDPMScheduler: betas, prediction type, zero-terminal SNR.
    Raises:
        UserError: a sampler without betas (flow matching, EDM).
    """
    from diffusers import DDPMScheduler

    config = pipe.scheduler.config
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        got = type(pipe.scheduler).__name__
        raise UserError(f"scheduler: got {got}, which has no betas, want one of a variance-preserving model (DDIM ...).")
    known = inspect.signature(DDPMScheduler.__init__).parameters
    scheduler = DDPMScheduler.from_config({name: value for name, value in config.items() if name in known})
    return vp_schedule(alphas_cumprod=scheduler.alphas_cumprod, prediction=scheduler.config.prediction_type)


def vae_dtype(vae_config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """The dtype to run a VAE in when the pipeline has `dtype`: float32 where its config says force_upcast.

    The SDXL VAE overflows to NaN in float16 and loses detail in bfloat16; the repaired one (fp16-fix) says
    force_upcast false and runs in `dtype`.
    """
    return torch.float32 if vae_config.get("force_upcast", False) else dtype


@torch.no_grad()
def encode_images(
    pipe: Any, pixels: Float[Tensor, "n 3 height width"]
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
    """Mean and standard deviation of the scaled latents: (x - shift) * scaling of the VAE's posterior, in float32.

    A latent is mean + std * noise. AutoencoderTiny has no posterior: its std is 0.
    Args:
        pixels: in [-1, 1], on any device; sides divisible by the VAE's factor (8).
    Raises:
        UserError: the VAE gave NaN or infinite latents.
    """
    vae, stored = pipe.vae, pipe.vae.dtype
    dtype = vae_dtype(vae.config, stored)
    shift, scaling = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    vae.to(dtype)
    try:
        encoded = vae.encode(pixels.to(vae.device, dtype))
    finally:
        vae.to(stored)
    if hasattr(encoded, "latent_dist"):  # AutoencoderKL
        mean, std = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
    else:  # AutoencoderTiny
        mean, std = encoded.latents.float(), torch.zeros_like(encoded.latents, dtype=torch.float32)
    if not torch.isfinite(mean).all():
        raise UserError(f"VAE: got NaN or infinite latents in {dtype}. Set dtype: bfloat16, or use a VAE made for float16.")
    return (mean - shift) * scaling, std * scaling


def encode_prompt(family: str | Family, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The condition of each prompt, by the keywords of the forward, (n, ...) each.

    A prompt that is dropped in training is the empty one, `encode_prompt(family, pipe, [""])`, as in the published
    Diffusion-DPO code.
    """
    return find_family(family).encode_prompt(pipe, prompts)


@torch.no_grad()
def unconditional(family: str | Family, pipe: Any, *, num: int = 1) -> dict[str, Tensor]:
    """The condition that stock sampling guides away from, `num` times.

    It is the empty prompt, but zeros for an SDXL whose pipeline says `force_zeros_for_empty_prompt`.
    """
    condition = encode_prompt(family, pipe, [""] * num)
    if pipe.config.get("force_zeros_for_empty_prompt", False):
        return {name: torch.zeros_like(value) for name, value in condition.items()}
    return condition


@torch.no_grad()
def _sd_encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    embeds, _ = pipe.encode_prompt(list(prompts), pipe.text_encoder.device, 1, False)
    return {"encoder_hidden_states": embeds}


@torch.no_grad()
def _sdxl_encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    device = pipe.text_encoder_2.device
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled}


def _sd_size_condition(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
) -> dict[str, Float[Tensor, " six"]]:
    return {}


def _sdxl_size_condition(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
) -> dict[str, Float[Tensor, " six"]]:
    """SDXL's time ids; Source: Podell et al., arXiv 2307.01952, section 2.2, in the order of the stock pipeline."""
    return {"time_ids": torch.tensor([*original, *crop, *target], dtype=torch.float32)}


def _sd_forward(unet: Any, noisy: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor) -> Tensor:
    dtype = unet.conv_in.weight.dtype
    output: Tensor = unet(noisy.to(dtype), timestep, encoder_hidden_states.to(dtype), return_dict=False)[0]
    return output


def _sdxl_forward(
    unet: Any,
    noisy: Tensor,
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    text_embeds: Tensor,
    time_ids: Tensor,
) -> Tensor:
    dtype = unet.conv_in.weight.dtype
    # Time ids stay float32: bfloat16 would turn a side of 1001 pixels into 1000.
    added = {"text_embeds": text_embeds.to(dtype), "time_ids": time_ids.float()}
    embeds = encoder_hidden_states.to(dtype)
    output: Tensor = unet(noisy.to(dtype), timestep, embeds, added_cond_kwargs=added, return_dict=False)[0]
    return output


def _sd(name: str) -> Family:
    return Family(
        name=name,
        pipeline="StableDiffusionPipeline",
        lora_targets=ATTENTION_LAYERS,
        encode_prompt=_sd_encode_prompt,
        size_condition=_sd_size_condition,
        forward=_sd_forward,
    )


FAMILIES: dict[str, Family] = {
    "sd15": _sd("sd15"),
    "sd2": _sd("sd2"),
    "sdxl": Family(
        name="sdxl",
        pipeline="StableDiffusionXLPipeline",
        lora_targets=ATTENTION_LAYERS,
        encode_prompt=_sdxl_encode_prompt,
        size_condition=_sdxl_size_condition,
        forward=_sdxl_forward,
    ),
}
