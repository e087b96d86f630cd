"""Families of models that see: how their processors' tensors divide into images, and what their layers want of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.multimodal.seen import Kind, SeenImage
from mmalign.multimodal.templates import Shown

Outputs = Mapping[str, Any]  # of a processor, for one prompt
Parts = list[tuple[Kind, dict[str, Tensor], int]]  # of each image: kind, its tensors, placeholders that its features fill
Blocks = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the vision tower and the projector make of one image.

    Args:
        tokens: one a placeholder, in whose embedding's place it is put.
        deep: further features of the same tokens, added to what the first layers give: Qwen3-VL's deepstack.
    """

    tokens: Float[Tensor, "n dim"]
    deep: tuple[Float[Tensor, "n dim"], ...] = ()


# --- what most families do ----------------------------------------------------------------------------------------------


def pictures(shown: Sequence[Shown]) -> dict[str, Any]:
    """Arguments of a processor: images as RGB, videos as arrays of frames (t, h, w, 3)."""
    images = [files[0].open() for kind, files in shown if kind == "image"]
    videos = [_frames(files) for kind, files in shown if kind == "video"]
    given: dict[str, Any] = {"images": [images]} if images else {}
    return {**given, "videos": [videos], "do_sample_frames": False} if videos else given


def undivided(text: str) -> tuple[str, str]:
    """The whole prompt goes through the processor, and nothing behind it through the tokenizer alone."""
    return text, ""


def all_ids(ids: list[int], processor: Any) -> list[int]:
    """All that the processor makes of its part of the prompt is in the context."""
    return ids


def no_cross_attention(outputs: Outputs, begun: int) -> Int[Tensor, "context images tiles"] | None:
    """Images are met in the sequence."""
    return None


def causal(types: Int[Tensor, " context"]) -> Blocks:
    """Every token sees what comes before it, and itself."""
    return ()


def places(types: Int[Tensor, " context"], images: Sequence[SeenImage], config: Any) -> Int[Tensor, "3 context"] | None:
    """Places in the sequence count."""
    return None


def channels(pixels: Float[Tensor, "..."], processor: Any) -> Float[Tensor, "n channels m"]:
    """Pixels (..., channels, h, w) with their channels apart."""
    return pixels.reshape(-1, pixels.shape[-3], pixels.shape[-2] * pixels.shape[-1])


def one_each(outputs: Outputs, ids: Sequence[int], processor: Any) -> Parts:
    """The parts of a prompt where every image is one entry of `pixel_values`, and all have as many tokens."""
    pixels = outputs["pixel_values"]
    count = sum(token == processor.image_token_id for token in ids) // len(pixels)
    return [("image", {"pixel_values": one}, count) for one in pixels.split(1)]


def plain_features(model: Any, images: Sequence[SeenImage]) -> list[Features]:
    """Features of images whose pixels are of one shape, in one call."""
    pixels = torch.cat([image.tensors["pixel_values"] for image in images])
    pooled = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    return [Features(tokens=tokens) for tokens in pooled]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of one family, which the `model_type` of its configs names.

    Args:
        placeholders: of an image, and of a video where it sees videos, in a prompt that goes through no chat template.
        parts: `(outputs, ids, processor)` -> what each image of a prompt is made of.
        features: `(model, images)` -> of each, what tower and projector make of it.
        tower, projectors: where these parts lie in `model.model`; all else is the language model.
        blocks: token types of a context -> the tokens of it that see each other in both directions.
        answer_type: token type of what follows a context, where token types are an argument of the model.
        typed: name of the argument that brings token types to the model; None: there is none.
        positions: `(types, images, config)` -> m-rope indices of a context.
        crossed: `(outputs, begun)` -> cross-attention mask of a context, before which `begun` tokens were put.
        given: what a prompt shows -> arguments of the processor.
        divided: a prompt as a text -> the part that goes through the processor, and what follows it.
        expanded: `(ids, processor)` -> which of the ids of that part are the context's.
        channels: `(pixels, processor)` -> the same with the channels apart.
        processor_settings: further arguments of the processor.
        template: chat template of a family whose processors bring none; all prompts go through it.
    """

    placeholders: Mapping[Kind, str]
    parts: Callable[[Outputs, Sequence[int], Any], Parts]
    features: Callable[[Any, Sequence[SeenImage]], list[Features]]
    tower: str = "vision_tower"
    projectors: tuple[str, ...] = ("multi_modal_projector",)
    blocks: Callable[[Tensor], Blocks] = causal
    answer_type: int = 0
    typed: str | None = None
    positions: Callable[[Tensor, Sequence[SeenImage], Any], Tensor | None] = places
    crossed: Callable[[Outputs, int], Tensor | None] = no_cross_attention
    given: Callable[[Sequence[Shown]], dict[str, Any]] = pictures
    divided: Callable[[str], tuple[str, str]] = undivided
    expanded: Callable[[list[int], Any], list[int]] = all_ids
    channels: Callable[[Tensor, Any], Tensor] = channels
    processor_settings: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None


def _frames(files: Sequence[Any]) -> Any:
    frames = files[0].frames() if len(files) == 1 else [media.open() for media in files]
    return np.stack([np.asarray(frame) for frame in frames])


FAMILIES: dict[str, Family] = {
    "llava": Family(placeholders={"image": "<image>\n"}, parts=one_each, features=plain_features),
}
