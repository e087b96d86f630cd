"""Z-Image: a single-stream transformer on rectified flow, prompts read by Qwen3 as a chat."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.families.captions import lengths, padded
from mmalign.families.family import Changes, Family, guided, of_pipeline, weight_dtype
from mmalign.families.parts import LATENT_SHAPE, tiny_qwen_tokenizer, tiny_vae

ATTENTION_LAYERS = ("to_k", "to_q", "to_v", "to_out.0")
MAX_TOKENS = 512  # where the stock pipeline cuts a prompt
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@torch.no_grad()
def _encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The encoder's last but one layer on the tokens of the chat; the padding goes before the network sees it."""
    captions, _ = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device, do_classifier_free_guidance=False)
    embeds, mask = padded(captions, MAX_TOKENS)
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


def _forward(
    network: Any,
    noisy: Float[Tensor, "n c h w"],
    timestep: Tensor,
    *,
    prompt_embeds: Tensor,
    prompt_embeds_mask: Tensor,
) -> Tensor:
    """The network counts time from noise (0) to data (1) and predicts clean - noise."""
    dtype = weight_dtype(network)
    captions = prompt_embeds.to(dtype)
    output = network(
        list(noisy.to(dtype).unsqueeze(2)),
        (1000 - timestep) / 1000,
        [caption[:length] for caption, length in zip(captions, lengths(prompt_embeds_mask), strict=True)],
        return_dict=False,
    )[0]
    return -torch.stack(output).squeeze(2)


def _call_options(guidance_scale: float, negative_prompt: str | None, count: int) -> dict[str, Any]:
    """The stock pipeline counts guidance from 0, which is none: its 4 is 5 here."""
    return guided(max(guidance_scale - 1, 0.0), negative_prompt, count)


def _build(changes: Changes) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    network = {
        "in_channels": LATENT_SHAPE[0],
        "dim": 16,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 2, 2],
        "axes_lens": [1024, 512, 512],
    }
    vae = {"scaling_factor": 0.3611, "shift_factor": 0.1159, **changes.get("vae", {})}
    # Half of float32, because its timestep embedding alone has 300,000 weights.
    transformer = ZImageTransformer2DModel(**{**network, **changes.get("transformer", {})}).bfloat16().eval()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **changes.get("scheduler", {})}),
        vae=tiny_vae(**vae),
        text_encoder=_tiny_text_encoder(**changes.get("text_encoder", {})),
        tokenizer=tiny_qwen_tokenizer(chat_template=CHAT_TEMPLATE),
        transformer=transformer,
    )


def _tiny_text_encoder(**changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    tokens = tiny_qwen_tokenizer().get_vocab()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokens)}
    ends = {"bos_token_id": tokens["<|endoftext|>"], "eos_token_id": tokens["<|im_end|>"]}
    return Qwen3Model(Qwen3Config(**{**shape, **heads, **ends, **changes})).eval()


Z_IMAGE = Family(
    name="z_image",
    pipeline="ZImagePipeline",
    network="transformer",
    lora_targets=ATTENTION_LAYERS,
    encode_prompt=_encode_prompt,
    forward=_forward,
    recognise=of_pipeline("ZImagePipeline"),
    tiny=_build,
    call_options=_call_options,
    size_multiple=16,
)
