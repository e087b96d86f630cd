"""Stable Diffusion 3 and 3.5: multimodal diffusion transformers on rectified flow, prompts read by two CLIPs and T5."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.families.family import Changes, Family, of_pipeline, weight_dtype
from mmalign.families.parts import LATENT_SHAPE, tiny_t5, tiny_t5_tokenizer, tiny_text_config, tiny_tokenizer, tiny_vae

# Both streams of the attention, as in diffusers' train_dreambooth_lora_sd3.py.
JOINT_ATTENTION_LAYERS = (
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
)


@torch.no_grad()
def _encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """77 tokens of both CLIPs side by side, then 256 of T5; zeros for a T5 that was left out, as the stock pipeline has it."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(prompts), None, None, device=pipe.text_encoder.device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _forward(
    network: Any,
    noisy: Float[Tensor, "n c h w"],
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
) -> Tensor:
    dtype = weight_dtype(network)
    output: Tensor = network(
        hidden_states=noisy.to(dtype),
        timestep=timestep,
        encoder_hidden_states=encoder_hidden_states.to(dtype),
        pooled_projections=pooled_projections.to(dtype),
        return_dict=False,
    )[0]
    return output


def _build(changes: Changes) -> Any:
    """Of the kind of SD 3.5 medium: normalised queries and keys, a second attention in the first block."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    network = {
        "sample_size": LATENT_SHAPE[1],
        "in_channels": LATENT_SHAPE[0],
        "out_channels": LATENT_SHAPE[0],
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16 + 24,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    first = {"hidden_act": "quick_gelu", **changes.get("text_encoder", {})}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**network, **changes.get("transformer", {})}).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **changes.get("scheduler", {})}),
        vae=tiny_vae(**{"scaling_factor": 1.5305, "shift_factor": 0.0609, **changes.get("vae", {})}),
        text_encoder=CLIPTextModelWithProjection(tiny_text_config(16, **first)).eval(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(24, hidden_act="gelu")).eval(),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=tiny_t5(48),
        tokenizer_3=tiny_t5_tokenizer(),
    )


SD3 = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    network="transformer",
    encoders=("vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
    lora_targets=JOINT_ATTENTION_LAYERS,
    encode_prompt=_encode_prompt,
    forward=_forward,
    recognise=of_pipeline("StableDiffusion3Pipeline"),
    tiny=_build,
    size_multiple=16,
)
