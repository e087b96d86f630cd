"""Diffusion pipelines: open one, read its noise schedule, encode its images and prompts. All names of the room meet here."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.errors import UserError
from mmalign.families import FAMILIES, Family, encode_prompt, find_family
from mmalign.models.denoiser import Denoiser
from mmalign.models.latents import decode_latents, encode_images, latent_shape, vae_dtype
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
from mmalign.models.pipeline_folder import absent_parts, check_family, check_tokenizers, detect_family, local_folder
from mmalign.models.quiet import quiet_libraries
from mmalign.models.schedules import schedule_of
from mmalign.models.tiny import TINY, tiny_folder

__all__ = [
    "FAMILIES",
    "LORA_FILE",
    "Denoiser",
    "Family",
    "add_lora",
    "decode_latents",
    "detect_family",
    "encode_images",
    "encode_prompt",
    "find_family",
    "frozen_copy",
    "latent_shape",
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
        UserError: nothing there, a single-file checkpoint, a broken folder, a model of another family, or a tokenizer whose
            packages are not installed.
    """
    family = find_family(family)
    folder = model_folder(family, model, revision=revision, variant=variant, local_files_only=local_files_only)
    check_family(folder, model, family)
    check_tokenizers(folder, model, family)
    options: dict[str, Any] = {"dtype": {"vae": torch.float32, "default": dtype}, "variant": variant, "local_files_only": True}
    if "safety_checker" in inspect.signature(family.pipeline_class().__init__).parameters:
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    options |= absent_parts(family, folder)
    try:
        with quiet_libraries():
            pipe = family.pipeline_class().from_pretrained(str(folder), **options)
    except (OSError, ValueError, RuntimeError, KeyError) as fault:
        raise UserError(f"{model}: diffusers cannot load it ({fault}). Download or save the model again.") from fault
    nn.Module.to(pipe.vae, vae_dtype(pipe.vae.config, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe
