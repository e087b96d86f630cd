"""SANA: a linear-attention transformer of rectified flow on the latents of a deep-compression autoencoder."""

import inspect
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.families.family import Changes, Family, guided, of_pipeline, stacked, weight_dtype
from mmalign.families.parts import IMAGE_SIZE, LATENT_SHAPE


@torch.no_grad()
def _encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """As the stock pipeline's call: behind its complex human instruction, which is cut off again, 300 tokens with a mask.

    The empty prompt goes without the instruction: it is the unconditional one of guidance, which the pipeline encodes so, and
    the one that prompts were dropped for in SANA's training.
    """
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    parts = []
    for prompt in prompts:
        embeds, mask, _, _ = pipe.encode_prompt(
            [prompt],
            do_classifier_free_guidance=False,
            device=pipe.text_encoder.device,
            clean_caption=False,
            complex_human_instruction=instruction if prompt else None,
        )
        parts.append({"encoder_hidden_states": embeds, "encoder_attention_mask": mask})
    return stacked(parts)


def _forward(
    network: Any, noisy: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
) -> Tensor:
    dtype = weight_dtype(network)
    output: Tensor = network(
        noisy.to(dtype),
        encoder_hidden_states=encoder_hidden_states.to(dtype),
        timestep=timestep * network.config.timestep_scale,
        encoder_attention_mask=encoder_attention_mask,
        return_dict=False,
    )[0]
    return output[:, : noisy.shape[1]]  # without a learned variance, where there is one


def _call_options(guidance_scale: float, negative_prompt: str | None, count: int) -> dict[str, Any]:
    """Captions and sizes as they are given; no negative prompt is the empty one."""
    options = guided(guidance_scale, negative_prompt or "", count)
    return {**options, "clean_caption": False, "use_resolution_binning": False}


def _default_size(pipe: Any) -> tuple[int, int]:
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return (side, side)


def _tiny_tokenizer() -> Any:
    """A GemmaTokenizer of printable characters and bytes: no merges; begins with <bos>."""
    from transformers import GemmaTokenizer

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    characters = [character for character in string.printable if not character.isspace()]
    entries = [*specials, "▁", *characters, *(f"<0x{byte:02X}>" for byte in range(256))]
    return GemmaTokenizer(
        vocab={entry: index for index, entry in enumerate(entries)}, add_bos_token=True, model_max_length=2048
    )


def _tiny_text_encoder(vocab_size: int, **changes: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return Gemma2Model(Gemma2Config(vocab_size=vocab_size, **{**shape, **heads, **ids, **changes})).eval()


def _tiny_vae(**changes: Any) -> Any:
    """An AutoencoderDC with factor 4 (the published one: 32): 3 x 32 x 32 pixels become 4 x 8 x 8 latents."""
    from diffusers import AutoencoderDC

    channels, depths = (8, 8, 16), (1, 1, 1)
    kinds, scales = ("ResBlock", "ResBlock", "EfficientViTBlock"), ((), (), (5,))
    encoder = {"encoder_block_out_channels": channels, "encoder_layers_per_block": depths, "encoder_block_types": kinds}
    decoder = {"decoder_block_out_channels": channels, "decoder_layers_per_block": depths, "decoder_block_types": kinds}
    attention = {"attention_head_dim": 8, "encoder_qkv_multiscales": scales, "decoder_qkv_multiscales": scales}
    sampling = {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"}
    rest = {"latent_channels": LATENT_SHAPE[0], "scaling_factor": 0.41407}
    return AutoencoderDC(**{**encoder, **decoder, **attention, **sampling, **rest, **changes}).eval()


def _build(changes: Changes) -> Any:
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    vae, tokenizer = _tiny_vae(**changes.get("vae", {})), _tiny_tokenizer()
    channels = {"in_channels": vae.config.latent_channels, "out_channels": vae.config.latent_channels}
    self_attention = {"num_attention_heads": 2, "attention_head_dim": 8}
    cross_attention = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    depth = {"num_layers": 2, "caption_channels": 16, "sample_size": IMAGE_SIZE // vae.spatial_compression_ratio}
    network = {**channels, **self_attention, **cross_attention, **depth, **changes.get("transformer", {})}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=_tiny_text_encoder(len(tokenizer), **changes.get("text_encoder", {})),
        vae=vae,
        transformer=SanaTransformer2DModel(**network).eval(),
        scheduler=DPMSolverMultistepScheduler(**{**flow, **changes.get("scheduler", {})}),
    )


SANA = Family(
    name="sana",
    pipeline="SanaPipeline",
    network="transformer",
    lora_targets=("to_k", "to_q", "to_v"),
    encode_prompt=_encode_prompt,
    forward=_forward,
    recognise=of_pipeline("SanaPipeline"),
    tiny=_build,
    call_options=_call_options,
    default_size=_default_size,
    size_multiple=32,
)
