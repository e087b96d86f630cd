"""Families of models that see: what each one's processor, tower and layers want, as a table of facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from mmalign.multimodal import divisions
from mmalign.multimodal.divisions import Blocks, Outputs, Parts
from mmalign.multimodal.seen import Kind, SeenImage
from mmalign.multimodal.templates import Shown

# Of PaliGemma, whose processors bring no template: images, the token that begins a text, questions in lines, answers.
PREFIX = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}"
    "{% endfor %}{% endfor %}{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the vision tower and the projector make of one image.

    Args:
        tokens: one a placeholder, in whose embedding's place it is put; of Mllama, what is attended to across: patches of the
            first tile, of the second ...
        deep: further features of the same tokens, added to what the first layers give: Qwen3-VL's deepstack.
    """

    tokens: Float[Tensor, "n dim"]
    deep: tuple[Float[Tensor, "n dim"], ...] = ()


# --- what towers and projectors make of images --------------------------------------------------------------------------


def plain_features(model: Any, images: Sequence[SeenImage]) -> list[Features]:
    """Features of images whose pixels are of one shape, in one call."""
    pooled = _encoded(model, pixel_values=_joined(images, "pixel_values")).pooler_output
    return [Features(tokens=tokens) for tokens in pooled]


def resolution_features(model: Any, images: Sequence[SeenImage]) -> list[Features]:
    """LLaVA-Next and OneVision: patches padded to the most of them; images that are not alone in their prompts apart."""
    out: list[Features | None] = [None] * len(images)
    groups: dict[str, list[int]] = {}
    for number, image in enumerate(images):
        alone = int(image.tensors.get("batch_num_images", torch.ones(1))[0]) == 1
        groups.setdefault("video" if image.kind == "video" else "alone" if alone else "others", []).append(number)
    for kind, members in groups.items():
        chosen = [images[n] for n in members]
        for n, tokens in zip(members, _of_resolutions(model, chosen, kind), strict=True):
            out[n] = Features(tokens=tokens)
    return [features for features in out if features is not None]


def patch_features(model: Any, images: Sequence[SeenImage]) -> list[Features]:
    """Qwen's: images in one call, videos in another."""
    out: dict[int, Features] = {}
    for kind, pixels, grid in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
        members = [n for n, image in enumerate(images) if image.kind == kind]
        if not members:
            continue
        chosen = [images[n] for n in members]
        encode = model.model.get_image_features if kind == "image" else model.model.get_video_features
        found = encode(_joined(chosen, pixels), _joined(chosen, grid), return_dict=True)
        deep = getattr(found, "deepstack_features", None) or []
        sizes = [len(tokens) for tokens in found.pooler_output]
        levels = [torch.split(level, sizes) if isinstance(level, Tensor) else level for level in deep]
        for place, n in enumerate(members):
            out[n] = Features(tokens=found.pooler_output[place], deep=tuple(level[place] for level in levels))
    return [out[n] for n in range(len(images))]


def tile_features(model: Any, images: Sequence[SeenImage]) -> list[Features]:
    """Idefics3 and SmolVLM: the tiles of all images as those of one prompt."""
    counts = [image.tensors["pixel_values"].shape[1] for image in images]
    pixels = torch.cat([image.tensors["pixel_values"] for image in images], dim=1)
    mask = torch.cat([image.tensors["pixel_attention_mask"] for image in images], dim=1)
    pooled = _encoded(model, pixel_values=pixels, pixel_attention_mask=mask).pooler_output
    joined = pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))
    joined = joined.reshape(sum(counts), -1, joined.shape[-1])
    return [Features(tokens=part.flatten(0, 1)) for part in torch.split(joined, counts)]


def flat_tile_features(model: Any, images: Sequence[SeenImage]) -> list[Features]:
    """InternVL: tiles one behind the other."""
    counts = [len(image.tensors["pixel_values"]) for image in images]
    pooled = _encoded(model, pixel_values=_joined(images, "pixel_values")).pooler_output
    return [Features(tokens=part.flatten(0, 1)) for part in pooled.split(counts)]


def crossed_features(model: Any, images: Sequence[SeenImage]) -> list[Features]:
    """Mllama: the states that its layers attend to across."""
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    inner = model.model
    tensors = {name: _joined(images, name) for name in names}
    tensors["pixel_values"] = tensors["pixel_values"].to(next(inner.vision_model.parameters()).dtype)
    states = inner.multi_modal_projector(inner.vision_model(**tensors).last_hidden_state)
    return [Features(tokens=part.reshape(-1, part.shape[-1])) for part in states]


def _encoded(model: Any, **tensors: Tensor) -> Any:
    return model.model.get_image_features(**tensors, return_dict=True)


def _joined(images: Sequence[SeenImage], name: str) -> Tensor:
    return torch.cat([image.tensors[name] for image in images])


def _of_resolutions(model: Any, images: Sequence[SeenImage], kind: str) -> list[Tensor]:
    if kind == "video":
        return [_of_video(model, image) for image in images]
    pixels = [image.tensors["pixel_values"] for image in images]
    most = max(part.shape[1] for part in pixels)
    tensors = {
        "pixel_values": torch.cat([pad(part, (0, 0) * 3 + (0, most - part.shape[1])) for part in pixels]),
        "image_sizes": _joined(images, "image_sizes"),
    }
    if "batch_num_images" in images[0].tensors:
        tensors["batch_num_images"] = torch.ones(len(images), dtype=torch.long)
    if kind == "others":
        # An image with company is known by the number of its companions: one alone here is its own.
        repeats = 2 if len(images) == 1 else 1
        tensors = {name: tensor.repeat(repeats, *(1,) * (tensor.dim() - 1)) for name, tensor in tensors.items()}
        tensors["batch_num_images"] = torch.tensor([len(images) * repeats])
    return list(_encoded(model, **tensors).pooler_output)[: len(images)]


def _of_video(model: Any, video: SeenImage) -> Tensor:
    pixels = video.tensors["pixel_values_videos"]
    tokens: Tensor = model.model.get_video_features(pixels, return_dict=True).pooler_output[0]
    if len(tokens) < video.num_tokens:  # transformers 5.17 adds the line behind a video afterwards
        tokens = torch.cat([tokens, model.model.image_newline[None].to(tokens)])
    return tokens


# --- the facts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of one family, which the `model_type` of its configs names.

    Args:
        placeholders: of an image, and of a video where it sees videos, in a prompt that goes through no chat template.
        parts: `(outputs, ids, processor)` -> what each image of a prompt is made of.
        features: `(model, images)` -> of each, what tower and projector make of it.
        tower, projectors: where these parts lie in `model.model`; all else is the language model.
        ids: processor -> type of the token ids that stand for images (1) and videos (2).
        typed: name of the argument that brings token types to the model, where a wrong or absent one changes the numbers
            without a word; None: there is none.
        answer_type: token type of what follows a context.
        blocks: token types of a context -> the tokens of it that see each other in both directions.
        positions: `(types, images, config)` -> m-rope indices of a context.
        crossed: `(outputs, begun)` -> cross-attention mask of a context, before which `begun` tokens were put.
        given: `(shown, num_frames)` -> arguments of the processor.
        divided: a prompt as a text -> the part that goes through the processor, and what follows it.
        expanded: `(ids, processor)` -> which of the ids of that part are the context's.
        apart, together: pixels with their channels apart, and back.
        template: chat template of a family whose processors bring none; all prompts go through it.
    """

    placeholders: Mapping[Kind, str]
    parts: Callable[[Outputs, Sequence[int], Any], Parts]
    features: Callable[[Any, Sequence[SeenImage]], list[Features]]
    tower: str = "vision_tower"
    projectors: tuple[str, ...] = ("multi_modal_projector",)
    ids: Callable[[Any], dict[int, int]] = divisions.own_ids
    typed: str | None = None
    answer_type: int = 0
    blocks: Callable[[Tensor], Blocks] = divisions.causal
    positions: Callable[[Tensor, Sequence[SeenImage], Any], Tensor | None] = divisions.places
    crossed: Callable[[Outputs, int], Tensor | None] = divisions.no_cross_attention
    given: Callable[[Sequence[Shown], int | None], dict[str, Any]] = divisions.pictures
    divided: Callable[[str], tuple[str, str]] = divisions.undivided
    expanded: Callable[[list[int], Any], list[int]] = divisions.all_ids
    apart: Callable[[Tensor, Any, Kind], Tensor] = divisions.apart
    together: Callable[[Tensor, Tensor], Tensor] = divisions.together
    template: str | None = None


def _qwen(**more: Any) -> Family:
    return Family(
        placeholders={
            "image": "<|vision_start|><|image_pad|><|vision_end|>",
            "video": "<|vision_start|><|video_pad|><|vision_end|>",
        },
        parts=divisions.flat_patches,
        features=patch_features,
        tower="visual",
        typed="mm_token_type_ids",
        positions=divisions.grid_positions,
        apart=divisions.patches_apart,
        together=divisions.patches_together,
        **more,
    )


def _idefics(placeholders: Mapping[Kind, str]) -> Family:
    return Family(
        placeholders=placeholders,
        parts=divisions.tiles,
        features=tile_features,
        tower="vision_model",
        projectors=("connector",),
    )


FAMILIES: dict[str, Family] = {
    "llava": Family(placeholders={"image": "<image>\n"}, parts=divisions.one_each, features=plain_features),
    "llava_next": Family(
        placeholders={"image": "<image>\n"},
        parts=divisions.any_resolution,
        features=resolution_features,
        projectors=("multi_modal_projector", "image_newline"),
    ),
    "llava_onevision": Family(
        placeholders={"image": "<image>\n", "video": "<video>\n"},
        parts=divisions.any_resolution,
        features=resolution_features,
        projectors=("multi_modal_projector", "image_newline"),
    ),
    "qwen2_vl": _qwen(projectors=("visual.merger",)),
    "qwen2_5_vl": _qwen(projectors=("visual.merger",)),
    "qwen3_vl": _qwen(projectors=("visual.merger", "visual.deepstack_merger_list")),
    "idefics3": _idefics({"image": "<image>"}),
    "smolvlm": _idefics({"image": "<image>", "video": "<video>"}),
    "internvl": Family(
        placeholders={"image": "<IMG_CONTEXT>\n", "video": "<video>\n"},
        parts=divisions.flat_tiles,
        features=flat_tile_features,
        ids=divisions.image_ids,
    ),
    "gemma3": Family(
        placeholders={"image": "<start_of_image>"},
        parts=divisions.gemma_crops,
        features=plain_features,
        ids=divisions.soft_ids,
        typed="token_type_ids",
        blocks=divisions.image_blocks,
    ),
    "paligemma": Family(
        placeholders={"image": "<image>"},
        parts=divisions.one_each,
        features=plain_features,
        typed="token_type_ids",
        answer_type=1,
        blocks=divisions.prefix_block,
        divided=divisions.images_alone,
        expanded=divisions.image_ids_alone,
        template=PREFIX,
    ),
    "mllama": Family(
        placeholders={"image": "<|image|>"},
        parts=divisions.aspect_tiles,
        features=crossed_features,
        tower="vision_model",
        ids=divisions.no_ids,
        crossed=divisions.cross_attention,
    ),
}
