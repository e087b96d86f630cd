"""Diffusion pipelines: open one, read its noise schedule, encode its images and prompts. All names of the room meet here."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.errors import UserError
from mmalign.models.families import FAMILIES, Denoiser, Family, encode_prompt, find_family
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
from mmalign.models.quiet import quiet_libraries
from mmalign.models.tiny import TINY, tiny_folder
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
    "model_folder",
    "open_pipeline",
    "save_full",
    "save_lora",
    "schedule_of",
    "trainable_parameters",
    "training_plan",
    "vae_dtype",
]


def model_folder(
    family: Family,
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model: a local one, that of a hub id in the hub's cache, or for `tiny` a tiny random pipeline.

    Raises:
        UserError: as `open_pipeline`.
    """
    if model == TINY:
        return tiny_folder(family.name)
    return local_folder(model, revision=revision, variant=variant, local_files_only=local_files_only)


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
        model: folder with `model_index.json`, hub id `owner/name`, or `tiny` for a tiny random pipeline of the family.
        dtype: of all weights, but a VAE that overflows in half precision is loaded and kept in float32: cast it
            before sampling with stock code, which wants one dtype.
        revision, variant: of a hub id; variant ("fp16") also of a folder.
        local_files_only: use only what the hub cache holds.
    Raises:
        UserError: nothing there, a single-file checkpoint, a broken folder, or a model of another family.
    """
    family = find_family(family)
    folder = model_folder(family, model, revision=revision, variant=variant, local_files_only=local_files_only)
    check_family(folder, model, family=family.name, pipeline=family.pipeline, known=tuple(FAMILIES))
    options: dict[str, Any] = {"dtype": {"vae": torch.float32, "default": dtype}, "variant": variant, "local_files_only": True}
    if "safety_checker" in inspect.signature(family.pipeline_class().__init__).parameters:
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        with quiet_libraries():
            pipe = family.pipeline_class().from_pretrained(str(folder), **options)
    except (OSError, ValueError, RuntimeError, KeyError) as fault:
        raise UserError(f"{model}: diffusers cannot load it ({fault}). Download or save the model again.") from fault
    nn.Module.to(pipe.vae, vae_dtype(pipe.vae.config, dtype))
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
    """The dtype to keep a VAE in when the pipeline has `dtype`: float32 where its config says force_upcast.

    The SDXL VAE overflows to NaN in float16 and loses detail in bfloat16; the repaired one (fp16-fix) says
    force_upcast false and runs in `dtype`. Those of SD 1.x and 2.x say nothing, which diffusers reads as true.
    """
    return torch.float32 if vae_config.get("force_upcast", False) else dtype


@torch.no_grad()
def encode_images(
    pipe: Any, pixels: Float[Tensor, "n 3 height width"], *, check: bool = True
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
    """Mean and standard deviation of the scaled latents: (x - shift) * scaling of the VAE's posterior, as float32.

    Computed in the VAE's dtype, which `open_pipeline` chose.

    A latent is mean + std * noise. AutoencoderTiny has no posterior: its std is 0.
    Args:
        pixels: in [-1, 1], on any device; sides divisible by the VAE's factor (8).
        check: look for NaN, for which the host must wait for the device.
    Raises:
        UserError: the VAE gave NaN or infinite latents, and `check` is on.
    """
    vae = pipe.vae
    shift, scaling = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):  # AutoencoderKL
        mean, std = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
    else:  # AutoencoderTiny
        mean, std = encoded.latents.float(), torch.zeros_like(encoded.latents, dtype=torch.float32)
    if check and not torch.isfinite(mean).all():
        raise UserError(f"VAE: got NaN or infinite latents in {vae.dtype}. Set dtype: bfloat16, or use a VAE made for float16.")
    return (mean - shift) * scaling, std * scaling
