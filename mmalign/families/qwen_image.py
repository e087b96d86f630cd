"""Qwen-Image, Qwen-Image-Edit and Edit-Plus (2509, 2511): a double-stream flow transformer, prompts read by Qwen2.5-VL."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.families.captions import padded, trimmed
from mmalign.families.family import Changes, Family, of_pipeline, stacked, weight_dtype
from mmalign.families.parts import tiny_qwen_tokenizer

ATTENTION_LAYERS = ("to_k", "to_q", "to_v", "to_out.0")
# The last block's text stream ends in these, and nothing reads it.
UNUSED_LAYERS = ("transformer_blocks.-1.attn.to_add_out", "transformer_blocks.-1.txt_mlp")
# The stock pipeline's call cuts prompts there; with an image of a megapixel come up to 1,400 tokens of it, and nothing is cut.
MAX_TOKENS = 512
MAX_TOKENS_WITH_IMAGE = 2560
SCHEDULE = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
}
LATENT_CHANNELS = 4
MEGAPIXEL = 1024 * 1024
NEGATIVE = " "  # of Qwen's own examples; the stock pipelines guide only where one is given


@torch.no_grad()
def _encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Alone, so that no prompt is padded: features of the stock template without its first 34 tokens."""
    device = pipe.text_encoder.device
    rows = [pipe.encode_prompt([prompt], device=device, max_sequence_length=MAX_TOKENS)[0][0] for prompt in prompts]
    embeds, mask = padded(rows, MAX_TOKENS)
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


@torch.no_grad()
def _encode_edit(pipe: Any, prompts: Sequence[str], sources: Float[Tensor, "n 3 h w"], *, shown_area: int) -> dict[str, Tensor]:
    """What the encoder says about instruction and source image, and the latents of the source: the mode of the posterior.

    As in the stock pipelines, the encoder is shown the source at `shown_area` pixels, and the VAE at a megapixel, whatever the
    size of the edited image.
    """
    rows = []
    for prompt, source in zip(prompts, sources, strict=True):
        shown, whole = _scaled(pipe, source, shown_area), _scaled(pipe, source, MEGAPIXEL)
        pixels = pipe.image_processor.preprocess(whole, whole.height, whole.width)
        caption = pipe.encode_prompt([prompt], image=[shown], device=pipe.text_encoder.device)[0][0]
        embeds, mask = padded([caption], MAX_TOKENS_WITH_IMAGE)
        latents = pipe._encode_vae_image(pixels.unsqueeze(2).to(pipe.vae.device, pipe.vae.dtype), generator=None)
        rows.append({"prompt_embeds": embeds, "prompt_embeds_mask": mask, "image_latents": latents.float().squeeze(2)})
    return stacked(rows)


def _of_a_space(encode: Callable[..., dict[str, Tensor]], pipe: Any, count: int, *sources: Tensor) -> dict[str, Tensor]:
    """Qwen's own negative prompt."""
    return encode(pipe, [NEGATIVE] * count, *sources)


def _scaled(pipe: Any, source: Float[Tensor, "3 h w"], area: int) -> Any:
    """The source as an image of so many pixels and sides that are multiples of 32, by the stock pipeline's own hand."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
    from PIL import Image

    eight_bit = ((source.float() + 1) * 127.5).round().clamp(0, 255).byte()
    image = Image.fromarray(eight_bit.permute(1, 2, 0).cpu().numpy())
    width, height, _ = calculate_dimensions(area, image.width / image.height)
    return pipe.image_processor.resize(image, height, width)


def _forward(
    network: Any,
    noisy: Float[Tensor, "n c h w"],
    timestep: Tensor,
    *,
    prompt_embeds: Tensor,
    prompt_embeds_mask: Tensor,
    image_latents: Float[Tensor, "n c height width"] | None = None,
) -> Tensor:
    dtype = weight_dtype(network)
    embeds, mask = trimmed(prompt_embeds, prompt_embeds_mask)
    images = [noisy] if image_latents is None else [noisy, image_latents]
    tokens = torch.cat([_packed(image) for image in images], dim=1)
    shapes = [(1, image.shape[2] // 2, image.shape[3] // 2) for image in images]
    output = network(
        hidden_states=tokens.to(dtype),
        timestep=timestep / 1000,
        encoder_hidden_states=embeds.to(dtype),
        encoder_hidden_states_mask=mask,
        img_shapes=[shapes] * len(noisy),
        return_dict=False,
    )[0]
    return _unpacked(output[:, : shapes[0][1] * shapes[0][2]], noisy.shape)


def _packed(latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n tokens dim"]:
    """Patches of 2 x 2 latents as tokens of (channel, row, column)."""
    n, c, h, w = latents.shape
    return latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, (h // 2) * (w // 2), c * 4)


def _unpacked(tokens: Float[Tensor, "n tokens dim"], shape: torch.Size) -> Float[Tensor, "n c h w"]:
    n, c, h, w = shape
    return tokens.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(shape)


def _call_options(guidance_scale: float, negative_prompt: str | None, count: int) -> dict[str, Any]:
    """Guidance is `true_cfg_scale` and needs a negative prompt; Qwen's own is a space."""
    if guidance_scale <= 1:
        return {"true_cfg_scale": 1.0}
    return {"true_cfg_scale": guidance_scale, "negative_prompt": [negative_prompt or NEGATIVE] * count}


def _build(changes: Changes) -> Any:
    from diffusers import QwenImagePipeline

    return QwenImagePipeline(tokenizer=tiny_qwen_tokenizer(), **_parts(changes, num_halvings=2))


def _build_edit(pipeline: str, changes: Changes) -> Any:
    """A megapixel becomes 64 x 64 latents, 1024 tokens of a source, and for the encoder 16 image tokens."""
    import diffusers
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": size}
    tokenizer = tiny_qwen_tokenizer()
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**patches),
    )
    parts = _parts(changes, num_halvings=4, base_dim=2, num_res_blocks=0)
    return getattr(diffusers, pipeline)(tokenizer=tokenizer, processor=processor, **parts)


def _parts(changes: Changes, num_halvings: int, base_dim: int = 4, num_res_blocks: int = 1) -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    network = {
        "in_channels": 4 * LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    }
    vae = {
        "base_dim": base_dim,
        "z_dim": LATENT_CHANNELS,
        "dim_mult": [1] * (num_halvings + 1),
        "num_res_blocks": num_res_blocks,
        "temperal_downsample": [False] * num_halvings,
        "latents_mean": [-0.76, -0.7, 0.1, 0.97],
        "latents_std": [2.8, 1.45, 2.3, 1.2],
    }
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(**{**SCHEDULE, **changes.get("scheduler", {})}),
        "vae": _without_biases(AutoencoderKLQwenImage(**{**vae, **changes.get("vae", {})}).eval()),
        "text_encoder": _tiny_text_encoder(**changes.get("text_encoder", {})),
        "transformer": QwenImageTransformer2DModel(**{**network, **changes.get("transformer", {})}).eval(),
    }


def _without_biases(vae: Any) -> Any:
    """Random biases would say more in the latents than the picture does."""
    for name, parameter in vae.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.zeros_(parameter)
    return vae


def _tiny_text_encoder(**changes: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokens = tiny_qwen_tokenizer().get_vocab()
    width = {"hidden_size": 16, "intermediate_size": 32}
    text = {"vocab_size": len(tokens), "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    ends = {"bos_token_id": tokens["<|endoftext|>"], "eos_token_id": tokens["<|im_end|>"]}
    patches = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        text_config={**width, **text, **ends, "rope_parameters": rope, **changes},
        vision_config={**width, **patches, **vision},
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _qwen(
    name: str, pipeline: str, encode: Callable[..., dict[str, Tensor]], build: Callable[[Changes], Any], *, edits: bool
) -> Family:
    return Family(
        name=name,
        pipeline=pipeline,
        network="transformer",
        tokenizers=("tokenizer", "processor") if edits else ("tokenizer",),
        lora_targets=ATTENTION_LAYERS,
        unused=UNUSED_LAYERS,
        encode_prompt=encode,
        unconditional=functools.partial(_of_a_space, encode),
        forward=_forward,
        recognise=of_pipeline(pipeline),
        tiny=build,
        call_options=_call_options,
        size_multiple=16,
        edits=edits,
    )


def _qwen_edit(name: str, pipeline: str, shown_area: int) -> Family:
    encode = functools.partial(_encode_edit, shown_area=shown_area)
    return _qwen(name, pipeline, encode, functools.partial(_build_edit, pipeline), edits=True)


QWEN_IMAGE = _qwen("qwen_image", "QwenImagePipeline", _encode_prompt, _build, edits=False)
QWEN_IMAGE_EDIT = _qwen_edit("qwen_image_edit", "QwenImageEditPipeline", MEGAPIXEL)
QWEN_IMAGE_EDIT_PLUS = _qwen_edit("qwen_image_edit_plus", "QwenImageEditPlusPipeline", 384 * 384)
