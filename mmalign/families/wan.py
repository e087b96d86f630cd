"""Wan text to video (2.1, and 2.2 with one transformer): a video transformer on rectified flow, prompts read by UMT5."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import UserError
from mmalign.families.family import Changes, Config, Family, weight_dtype
from mmalign.families.parts import tiny_t5_tokenizer

ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
MAX_TOKENS = 512  # the stock pipeline's call; its encode_prompt alone would take 226
LATENT_CHANNELS = 4


@torch.no_grad()
def _encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """UMT5's features with zeros behind them, to which the transformer attends: nothing is masked, as in the stock pipeline."""
    embeds, _ = pipe.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS, device=pipe.text_encoder.device
    )
    return {"encoder_hidden_states": embeds}


def _forward(
    network: Any, noisy: Float[Tensor, "n c f h w"], timestep: Tensor, *, encoder_hidden_states: Tensor
) -> Float[Tensor, "n c f h w"]:
    """One timestep a video. Wan 2.2 5B gives each token its own, all equal where no frame is given: the same numbers."""
    _, rows, columns = network.config.patch_size
    if noisy.shape[-2] % rows or noisy.shape[-1] % columns:
        sides = " x ".join(map(str, noisy.shape[-2:]))
        raise UserError(
            f"adapter.resolution: got a size of {sides} latents, want multiples of {rows} x {columns}, the model's patch. "
            "Use multiples of 16 pixels, of Wan 2.2 5B multiples of 32."
        )
    dtype = weight_dtype(network)
    output: Tensor = network(
        hidden_states=noisy.to(dtype),
        timestep=timestep,
        encoder_hidden_states=encoder_hidden_states.to(dtype),
        return_dict=False,
    )[0]
    return output


def _default_size(pipe: Any) -> tuple[int, int]:
    """Of the stock pipeline's call; it takes no None."""
    defaults = inspect.signature(type(pipe).__call__).parameters
    return defaults["height"].default, defaults["width"].default


def _recognise(index: Config, network: Config, scheduler: Config) -> bool:
    """A WanPipeline with one transformer.

    Raises:
        UserError: one of two transformers (Wan 2.2 A14B), each of which denoises a part of the timesteps.
    """
    if index.get("_class_name") != "WanPipeline":
        return False
    if (index.get("transformer_2") or [None])[-1] is not None or index.get("boundary_ratio") is not None:
        raise UserError(
            "family wan: got a pipeline of two transformers (Wan 2.2 A14B), want one. Use Wan 2.1, or Wan 2.2 TI2V 5B."
        )
    return True


def _transformer(**changes: Any) -> Any:
    from diffusers import WanTransformer3DModel

    shape = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "text_dim": 16, "freq_dim": 32, "ffn_dim": 48}
    depth = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "rope_max_seq_len": 32}
    return WanTransformer3DModel(**{**shape, **depth, **changes}).eval()


def _vae(**changes: Any) -> Any:
    """With Wan's factors, 4 in time and 8 in space: 3 x 5 x 32 x 32 pixels become 4 x 2 x 4 x 4 latents."""
    from diffusers import AutoencoderKLWan

    shape: dict[str, Any] = {"base_dim": 4, "z_dim": LATENT_CHANNELS, "dim_mult": [1, 1, 1, 2], "num_res_blocks": 1}
    statistics = {"latents_mean": [-0.76, -0.71, -0.91, 0.11], "latents_std": [2.82, 1.45, 2.33, 2.66]}
    return AutoencoderKLWan(**{**shape, **statistics, **changes}).eval()


def _text_encoder(**changes: Any) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2, "vocab_size": 98}
    return UMT5EncoderModel(UMT5Config(**{**shape, "is_encoder_decoder": False, "use_cache": False, **changes})).eval()


def _build(changes: Changes) -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return WanPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=_text_encoder(**changes.get("text_encoder", {})),
        vae=_vae(**changes.get("vae", {})),
        scheduler=UniPCMultistepScheduler(**{**flow, **changes.get("scheduler", {})}),
        transformer=_transformer(**changes.get("transformer", {})),
        **changes.get("pipeline", {}),
    )


WAN = Family(
    name="wan",
    pipeline="WanPipeline",
    network="transformer",
    lora_targets=ATTENTION_LAYERS,
    encode_prompt=_encode_prompt,
    forward=_forward,
    recognise=_recognise,
    tiny=_build,
    default_size=_default_size,
    output="frames",
    size_multiple=16,
    frame_multiple=4,
)
