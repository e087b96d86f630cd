"""FLUX.1 dev and schnell: transformers on rectified flow over latents packed 2 x 2 into tokens, prompts read by CLIP and T5."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.families.family import Changes, Family, of_pipeline, weight_dtype
from mmalign.families.parts import LATENT_SHAPE, tiny_t5, tiny_t5_tokenizer, tiny_text_config, tiny_tokenizer, tiny_vae

# Attention and feed-forward of both streams, as in diffusers' train_dreambooth_lora_flux.py.
LORA_LAYERS = (
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)


@torch.no_grad()
def _encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """512 tokens of T5, padding included as in the stock pipeline, and CLIP's pooled output."""
    embeds, pooled, _ = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _pack(latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n tokens channels"]:
    """Squares of 2 x 2 latents as tokens, row by row; a token's channels are (c, row, column)."""
    n, c, h, w = latents.shape
    return latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def _unpack(tokens: Float[Tensor, "n tokens channels"], like: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    n, c, h, w = like.shape
    return tokens.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def _positions(latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "tokens 3"]:
    """(0, row, column) of each token."""
    rows, columns = (torch.arange(side // 2, device=latents.device) for side in latents.shape[2:])
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).reshape(-1, 3).float()


def _forward(
    network: Any,
    noisy: Float[Tensor, "n c h w"],
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    guidance_embedding: float = 1.0,
) -> Tensor:
    """FLUX.1 dev is distilled from guided predictions and told their scale, FLUX.1 schnell is not.

    Args:
        guidance_embedding: the scale that is told, the same for policy and reference. 1 is what diffusers' guide to training
            FLUX.1 dev recommends, 3.5 its scripts' default and the pipeline's; no paper on preference training names one.
    """
    dtype = weight_dtype(network)
    told = torch.full((len(noisy),), guidance_embedding, device=noisy.device) if network.config.guidance_embeds else None
    tokens = network(
        hidden_states=_pack(noisy.to(dtype)),
        timestep=timestep / 1000,
        guidance=told,
        encoder_hidden_states=encoder_hidden_states.to(dtype),
        pooled_projections=pooled_projections.to(dtype),
        txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, device=noisy.device),
        img_ids=_positions(noisy),
        return_dict=False,
    )[0]
    return _unpack(tokens, noisy)


def _call_options(guidance_scale: float, negative_prompt: str | None, count: int) -> dict[str, Any]:
    """The scale is the one that FLUX.1 dev is told; with a negative prompt that of true guidance, at a told scale of 1."""
    if negative_prompt is None:
        return {"guidance_scale": guidance_scale}
    return {"guidance_scale": 1.0, "true_cfg_scale": guidance_scale, "negative_prompt": [negative_prompt] * count}


def _build(changes: Changes) -> Any:
    """Of the kind of FLUX.1 dev: told its guidance, with a shift that depends on the resolution."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    network = {
        "in_channels": 4 * LATENT_SHAPE[0],
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 2, 2),
    }
    schedule = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    text = {"hidden_act": "quick_gelu", **changes.get("text_encoder", {})}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{**schedule, **changes.get("scheduler", {})}),
        vae=tiny_vae(**{"scaling_factor": 0.3611, "shift_factor": 0.1159, **changes.get("vae", {})}),
        text_encoder=CLIPTextModel(tiny_text_config(16, **text)).eval(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_t5(32),
        tokenizer_2=tiny_t5_tokenizer(),
        transformer=FluxTransformer2DModel(**{**network, **changes.get("transformer", {})}).eval(),
    )


FLUX = Family(
    name="flux",
    pipeline="FluxPipeline",
    network="transformer",
    encoders=("vae", "text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    lora_targets=LORA_LAYERS,
    encode_prompt=_encode_prompt,
    forward=_forward,
    recognise=of_pipeline("FluxPipeline"),
    tiny=_build,
    call_options=_call_options,
    size_multiple=16,
    embeds_guidance=True,
)
