"""Stable Diffusion 1.x and 2.x, and SDXL: UNets on variance-preserving noise."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.families.family import Changes, Config, Family, of_pipeline, weight_dtype
from mmalign.families.parts import LATENT_SHAPE, tiny_text_config, tiny_tokenizer, tiny_vae

ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@torch.no_grad()
def _sd_encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    embeds, _ = pipe.encode_prompt(list(prompts), pipe.text_encoder.device, 1, False)
    return {"encoder_hidden_states": embeds}


@torch.no_grad()
def _sdxl_encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    device = pipe.text_encoder_2.device
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled}


def _sdxl_unconditional(pipe: Any, count: int) -> dict[str, Tensor]:
    """Zeros where the pipeline's config says so, as the published one and SPO's published code have it."""
    empty = _sdxl_encode_prompt(pipe, [""] * count)
    if not pipe.config.force_zeros_for_empty_prompt:
        return empty
    return {name: torch.zeros_like(value) for name, value in empty.items()}


def _sdxl_size_condition(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
) -> dict[str, Float[Tensor, " six"]]:
    """SDXL's time ids; Source: Podell et al., arXiv 2307.01952, section 2.2, in the order of the stock pipeline."""
    return {"time_ids": torch.tensor([*original, *crop, *target], dtype=torch.float32)}


def _sd_forward(unet: Any, noisy: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor) -> Tensor:
    dtype = weight_dtype(unet)
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
    dtype = weight_dtype(unet)
    # Time ids stay float32: bfloat16 would turn a side of 1001 pixels into 1000.
    added = {"text_embeds": text_embeds.to(dtype), "time_ids": time_ids.float()}
    embeds = encoder_hidden_states.to(dtype)
    output: Tensor = unet(noisy.to(dtype), timestep, embeds, added_cond_kwargs=added, return_dict=False)[0]
    return output


def _sd_of(wanted: str, index: Config, unet: Config, scheduler: Config) -> bool:
    """SD 2.x differs from SD 1.x in its text encoder (cross-attention width 1024 against 768); at any other width
    (small models of one's own) velocity prediction tells.
    """
    if index.get("_class_name") != "StableDiffusionPipeline":
        return False
    width = unet.get("cross_attention_dim")
    second = width == 1024 if width in (768, 1024) else scheduler.get("prediction_type") == "v_prediction"
    return wanted == ("sd2" if second else "sd15")


def _unet(cross_attention_dim: int, **changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": LATENT_SHAPE[1],
            "in_channels": LATENT_SHAPE[0],
            "out_channels": LATENT_SHAPE[0],
            "block_out_channels": (16, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": cross_attention_dim,
            **changes,
        }
    ).eval()


def _build_sd(family: str, changes: Changes) -> Any:
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    schedule = {**SCHEDULE, **changes.get("scheduler", {})}
    linear = {"use_linear_projection": True} if family == "sd2" else {}
    if family == "sd2":
        scheduler = DDIMScheduler(**{"clip_sample": False, "prediction_type": "v_prediction", **schedule})
    else:
        scheduler = PNDMScheduler(**{"skip_prk_steps": True, **schedule})
    activation = "gelu" if family == "sd2" else "quick_gelu"
    return StableDiffusionPipeline(
        vae=tiny_vae(**changes.get("vae", {})),
        text_encoder=CLIPTextModel(
            tiny_text_config(16, **{"hidden_act": activation, **changes.get("text_encoder", {})})
        ).eval(),
        tokenizer=tiny_tokenizer(),
        unet=_unet(16, **{**linear, **changes.get("unet", {})}),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _build_sdxl(changes: Changes) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added["projection_class_embeddings_input_dim"] = 6 * 8 + 24
    depth = {"transformer_layers_per_block": (1, 1), "use_linear_projection": True}
    return StableDiffusionXLPipeline(
        vae=tiny_vae(**{"scaling_factor": 0.13025, "force_upcast": True, **changes.get("vae", {})}),
        text_encoder=CLIPTextModel(tiny_text_config(16, **changes.get("text_encoder", {}))).eval(),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(24, hidden_act="gelu")).eval(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=_unet(16 + 24, **{**added, **depth, **changes.get("unet", {})}),
        scheduler=EulerDiscreteScheduler(**{**SCHEDULE, **changes.get("scheduler", {})}),
        add_watermarker=False,
    )


def _sd(name: str) -> Family:
    return Family(
        name=name,
        pipeline="StableDiffusionPipeline",
        lora_targets=ATTENTION_LAYERS,
        encode_prompt=_sd_encode_prompt,
        forward=_sd_forward,
        recognise=functools.partial(_sd_of, name),
        tiny=functools.partial(_build_sd, name),
    )


SD15 = _sd("sd15")
SD2 = _sd("sd2")
SDXL = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    encoders=("vae", "text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    lora_targets=ATTENTION_LAYERS,
    encode_prompt=_sdxl_encode_prompt,
    unconditional=_sdxl_unconditional,
    size_condition=_sdxl_size_condition,
    forward=_sdxl_forward,
    recognise=of_pipeline("StableDiffusionXLPipeline"),
    tiny=_build_sdxl,
)
