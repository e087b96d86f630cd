"""Model families of UNet diffusion (SD 1.x, SD 2.x, SDXL): what differs between them, behind one common forward."""

import difflib
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmalign.errors import UserError

ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between model families.

    Attributes:
        name: key in FAMILIES.
        pipeline: name of the stock diffusers pipeline class that loads and samples the result.
        lora_targets: layers that get LoRA by default, those of the diffusers training scripts.
        encode_prompt: (pipe, prompts) -> the condition of each prompt, by the keywords of `forward`, (n, ...) each.
        size_condition: (original (h, w), crop (top, left), target (h, w)) of one image -> further condition, unbatched.
        forward: (unet, noisy, timestep, **condition) -> network output.
    """

    name: str
    pipeline: str
    lora_targets: tuple[str, ...]
    encode_prompt: Callable[[Any, Sequence[str]], dict[str, Tensor]]
    size_condition: Callable[[tuple[int, int], tuple[int, int], tuple[int, int]], dict[str, Tensor]]
    forward: Callable[..., Tensor]

    def pipeline_class(self) -> Any:
        """The stock diffusers class."""
        return getattr(importlib.import_module("diffusers"), self.pipeline)


class Denoiser(nn.Module):
    """The trained network of a pipeline behind the forward that all families share.

    Its `unet` is the pipeline's own module: sampling with the pipeline samples from the policy.
    """

    def __init__(self, family: str | Family, unet: Any) -> None:
        """Wrap the UNet of a pipeline; nothing is copied, frozen or moved."""
        super().__init__()
        self.family = find_family(family)
        self.unet = unet
        self.lora_layers: list[Any] = []  # set by add_lora, so that lora_off need not walk all modules at each step

    def forward(
        self, noisy: Float[Tensor, "n c h w"], timestep: Shaped[Tensor, " n"], **condition: Tensor
    ) -> Float[Tensor, "n c h w"]:
        """The network's prediction (noise, velocity or sample, as its schedule says), in the network's dtype."""
        return self.family.forward(self.unet, noisy, timestep, **condition)

    def save_memory(
        self,
        *,
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        """Choose how the network runs; none of these changes its numbers beyond rounding.

        Args:
            gradient_checkpointing: recompute activations in the backward pass: about a third slower, memory of one
                block. Works with LoRA on a frozen network (non-reentrant).
            channels_last: memory format that suits convolutions on tensor cores.
            compile: torch.compile in place, so that saved names stay stock. The first step takes minutes.
        """
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.unet.set_attn_processor(AttnProcessor2_0())
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if gradient_checkpointing:
            # Ours, because torch.compile cannot trace into diffusers' own choice of this very function.
            self.unet.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False))
        else:
            self.unet.disable_gradient_checkpointing()
        if compile:
            self.unet.compile()


def find_family(family: str | Family) -> Family:
    """The entry of FAMILIES, or the object at an address `your_package.module:thing`.

    Raises:
        UserError: no such name, with the nearest known one.
    """
    if isinstance(family, Family):
        return family
    if family in FAMILIES:
        return FAMILIES[family]
    if ":" in family:
        module, _, name = family.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as fault:
            raise UserError(f"family: got {family!r}, which cannot be imported ({fault}).") from fault
        if not isinstance(found, Family):
            raise UserError(f"family: got {family!r}, a {type(found).__name__}, want a mmalign Family.")
        return found
    near = difflib.get_close_matches(family, FAMILIES, n=1)
    remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(FAMILIES)}, or your_package.module:thing."
    raise UserError(f"family: got {family!r}, an unknown name. {remedy}")


def encode_prompt(family: str | Family, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The condition of each prompt, by the keywords of the forward, (n, ...) each.

    A prompt that is dropped in training is the empty one, `encode_prompt(family, pipe, [""])`, as in the published
    Diffusion-DPO code.
    """
    return find_family(family).encode_prompt(pipe, prompts)


@torch.no_grad()
def _sd_encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    embeds, _ = pipe.encode_prompt(list(prompts), pipe.text_encoder.device, 1, False)
    return {"encoder_hidden_states": embeds}


@torch.no_grad()
def _sdxl_encode_prompt(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    device = pipe.text_encoder_2.device
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled}


def _sd_size_condition(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
) -> dict[str, Float[Tensor, " six"]]:
    return {}


def _sdxl_size_condition(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
) -> dict[str, Float[Tensor, " six"]]:
    """SDXL's time ids; Source: Podell et al., arXiv 2307.01952, section 2.2, in the order of the stock pipeline."""
    return {"time_ids": torch.tensor([*original, *crop, *target], dtype=torch.float32)}


def _sd_forward(unet: Any, noisy: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor) -> Tensor:
    dtype = unet.conv_in.weight.dtype
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
    dtype = unet.conv_in.weight.dtype
    # Time ids stay float32: bfloat16 would turn a side of 1001 pixels into 1000.
    added = {"text_embeds": text_embeds.to(dtype), "time_ids": time_ids.float()}
    embeds = encoder_hidden_states.to(dtype)
    output: Tensor = unet(noisy.to(dtype), timestep, embeds, added_cond_kwargs=added, return_dict=False)[0]
    return output


def _sd(name: str) -> Family:
    return Family(
        name=name,
        pipeline="StableDiffusionPipeline",
        lora_targets=ATTENTION_LAYERS,
        encode_prompt=_sd_encode_prompt,
        size_condition=_sd_size_condition,
        forward=_sd_forward,
    )


FAMILIES: dict[str, Family] = {
    "sd15": _sd("sd15"),
    "sd2": _sd("sd2"),
    "sdxl": Family(
        name="sdxl",
        pipeline="StableDiffusionXLPipeline",
        lora_targets=ATTENTION_LAYERS,
        encode_prompt=_sdxl_encode_prompt,
        size_condition=_sdxl_size_condition,
        forward=_sdxl_forward,
    ),
}
