"""What differs between families of diffusion and flow models: one record a family, behind one common forward."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]
Changes = dict[str, dict[str, Any]]


def no_size_condition(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> dict[str, Tensor]:
    """Of a family that is not told the size of an image."""
    return {}


def guided(guidance_scale: float, negative_prompt: str | None, count: int) -> dict[str, Any]:
    """Keywords of a stock pipeline with classifier-free guidance."""
    negative = None if negative_prompt is None else [negative_prompt] * count
    return {"guidance_scale": guidance_scale, "negative_prompt": negative}


def size_of_pipeline(pipe: Any) -> tuple[None, None]:
    """Of a pipeline whose call knows the size that its model was made for."""
    return (None, None)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between model families.

    Attributes:
        name: key in FAMILIES.
        pipeline: name of the stock diffusers pipeline class that loads and samples the result.
        network: the pipeline's component that is trained: `unet` or `transformer`.
        encoders: its frozen components that turn images and prompts into latents and conditions.
        tokenizers: its tokenizers and processors.
        lora_targets: layers that get LoRA by default, those of the diffusers training scripts.
        unused: layers of the network whose output is never used, as paths of modules; -1 is the last block. They never get a
            gradient, so that neither a full fine-tune nor a LoRA trains them.
        encode_prompt: (pipe, prompts) -> the condition of each prompt, by the keywords of `forward`, (n, ...) each. A family
            that edits takes (pipe, prompts, sources), sources being float pixels (n, 3, h, w) in [-1, 1].
        unconditional: (pipe, count, encode_prompt's sources) -> the conditions that classifier-free guidance pushes away from
            in a call of the stock pipeline without a negative prompt. None: those of the empty prompt.
        size_condition: (original (h, w), crop (top, left), target (h, w)) of one image -> further condition, unbatched.
        forward: (network, noisy (n, c, h, w), timestep, **condition) -> prediction of the same shape; for video
            (n, c, f, h, w). `timestep` is `Schedule.network_timestep`: 0 ... 999, for rectified flow 1000 sigma. Packing into
            tokens, the network's own time units and learned variances are its business.
        recognise: (model_index.json, config of the network, config of the scheduler) -> whether a pipeline is of this family.
        tiny: (changes of the parts' configs) -> a tiny random pipeline of the real classes, below 1 MB.
        call_options: (guidance_scale, negative_prompt, number of prompts) -> keywords of the stock pipeline's call.
        default_size: pipeline -> (height, width) in pixels that its call samples where no size is asked for; (None, None)
            leaves it to the pipeline.
        output: the field of the pipeline's result.
        size_multiple: sides of an image must be multiples of it, in pixels.
        frame_multiple: for video: the number of frames must be 1 more than a multiple of it. None: images.
        edits: whether a prompt carries a source image.
        embeds_guidance: whether its networks may be told a guidance scale: `forward` has the keyword `guidance_embedding`.
        lora_format: `diffusers`: the pipeline's own `load_lora_weights`; `peft`: a PEFT adapter folder of the network, for
            pipelines without it.
    """

    name: str
    pipeline: str
    network: str = "unet"
    encoders: tuple[str, ...] = ("vae", "text_encoder")
    tokenizers: tuple[str, ...] = ("tokenizer",)
    lora_targets: tuple[str, ...]
    unused: tuple[str, ...] = ()
    encode_prompt: Callable[..., dict[str, Tensor]]
    unconditional: Callable[..., dict[str, Tensor]] | None = None
    size_condition: Callable[[tuple[int, int], tuple[int, int], tuple[int, int]], dict[str, Tensor]] = no_size_condition
    forward: Callable[..., Tensor]
    recognise: Callable[[Config, Config, Config], bool]
    tiny: Callable[[Changes], Any] | None = None
    call_options: Callable[[float, str | None, int], dict[str, Any]] = guided
    default_size: Callable[[Any], tuple[int | None, int | None]] = size_of_pipeline
    output: str = "images"
    size_multiple: int = 8
    frame_multiple: int | None = None
    edits: bool = False
    embeds_guidance: bool = False
    lora_format: str = "diffusers"

    def pipeline_class(self) -> Any:
        """The stock diffusers class."""
        return getattr(importlib.import_module("diffusers"), self.pipeline)

    def with_guidance(self, value: float) -> Family:
        """The family with another guidance scale that its networks are told in training, by policy and reference alike.

        Raises:
            ValueError: a family whose networks are told none; a scale below 0.
        """
        if not self.embeds_guidance:
            raise ValueError(f"guidance_embedding: got {value}, but {self.name} is told no guidance. Remove the setting.")
        if not 0 <= value < math.inf:
            raise ValueError(f"guidance_embedding: got {value}, want 0 or more; published for FLUX.1 dev: 3.5.")
        return replace(self, forward=functools.partial(self.forward, guidance_embedding=value))

    def core(self, pipe: Any) -> Any:
        """The trained component of a pipeline."""
        return getattr(pipe, self.network)


def of_pipeline(name: str) -> Callable[[Config, Config, Config], bool]:
    """`recognise` for a family that the class of its pipeline tells."""

    def recognise(index: Config, network: Config, scheduler: Config) -> bool:
        return index.get("_class_name") == name

    return recognise


def weight_dtype(network: Any) -> torch.dtype:
    """Of the network's own weights; a LoRA's are float32 whatever they are, as are those that diffusers always keeps so."""
    kept = (".lora_", *(getattr(network, "_keep_in_fp32_modules", None) or ()))
    dtype: torch.dtype = next(
        p.dtype for name, p in network.named_parameters() if p.is_floating_point() and not any(part in name for part in kept)
    )
    return dtype


def stacked(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Conditions of several prompts as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
