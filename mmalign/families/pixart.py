"""PixArt-alpha and PixArt-sigma: transformers on variance-preserving noise that also learn its variance, with T5 captions."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.families.family import Changes, Family, guided, no_size_condition, of_pipeline, weight_dtype
from mmalign.families.parts import IMAGE_SIZE, LATENT_SHAPE, tiny_t5, tiny_t5_tokenizer, tiny_vae

# Those of train_pixart_lora_hf.py of the PixArt-sigma repository.
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    *("proj", "proj_out", "linear", "linear_1", "linear_2"),
)


@torch.no_grad()
def _encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """120 (alpha) or 300 (sigma) tokens with a mask; captions only lower-cased and stripped, not cleaned of web remains."""
    embeds, mask, _, _ = pipe.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, device=pipe.text_encoder.device, clean_caption=False
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _alpha_size_condition(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
) -> dict[str, Float[Tensor, " values"]]:
    """Height and width of the original image, and height / width of the trained one, as the published data loader gives them.

    Source: Chen et al., arXiv 2310.00426; SDXL's micro-conditions.
    """
    return {
        "resolution": torch.tensor(original, dtype=torch.float32),
        "aspect_ratio": torch.tensor([target[0] / target[1]], dtype=torch.float32),
    }


def _forward(
    network: Any,
    noisy: Tensor,
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    resolution: Tensor | None = None,
    aspect_ratio: Tensor | None = None,
) -> Tensor:
    """The noise; of the 2 c channels of the output the second half is the learned variance, which is left out.

    Sizes stay float32, and reach only a network that was trained with them (alpha at 1024 px).
    """
    dtype = weight_dtype(network)
    if not network.use_additional_conditions:
        resolution = aspect_ratio = None
    output: Tensor = network(
        noisy.to(dtype),
        encoder_hidden_states=encoder_hidden_states.to(dtype),
        timestep=timestep,
        added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
        encoder_attention_mask=encoder_attention_mask,
        return_dict=False,
    )[0]
    return output[:, : noisy.shape[1]]


def _call_options(guidance_scale: float, negative_prompt: str | None, count: int) -> dict[str, Any]:
    """Captions and sizes as they are given; no negative prompt is the empty one."""
    options = guided(guidance_scale, negative_prompt or "", count)
    return {**options, "clean_caption": False, "use_resolution_binning": False}


def _build(name: str, changes: Changes) -> Any:
    import diffusers

    attention = {"num_attention_heads": 3, "attention_head_dim": 8, "cross_attention_dim": 24, "num_layers": 2}
    channels = {"in_channels": LATENT_SHAPE[0], "out_channels": 2 * LATENT_SHAPE[0], "caption_channels": 16}
    network = {**attention, **channels, "sample_size": LATENT_SHAPE[1], **changes.get("transformer", {})}
    scaling = 0.18215 if name == "PixArtAlphaPipeline" else 0.13025
    schedule = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", **changes.get("scheduler", {})}
    return getattr(diffusers, name)(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(16, **changes.get("text_encoder", {})),
        vae=tiny_vae(**{"scaling_factor": scaling, "sample_size": IMAGE_SIZE, **changes.get("vae", {})}),
        transformer=diffusers.PixArtTransformer2DModel(**network).eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(**schedule),
    )


def _pixart(name: str, pipeline: str, size_condition: Any) -> Family:
    return Family(
        name=name,
        pipeline=pipeline,
        network="transformer",
        lora_targets=LORA_TARGETS,
        lora_format="peft",
        encode_prompt=_encode_prompt,
        size_condition=size_condition,
        forward=_forward,
        recognise=of_pipeline(pipeline),
        tiny=functools.partial(_build, pipeline),
        call_options=_call_options,
        size_multiple=16,
    )


PIXART_ALPHA = _pixart("pixart_alpha", "PixArtAlphaPipeline", _alpha_size_condition)
PIXART_SIGMA = _pixart("pixart_sigma", "PixArtSigmaPipeline", no_size_condition)
