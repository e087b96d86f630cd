"""How families divide what their processors make of a prompt: the tensors and placeholders of each image, and positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
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
ASSUMED_RATE = 1.0  # frames a second, where no file tells


# --- images of a prompt -------------------------------------------------------------------------------------------------


def one_each(outputs: Outputs, ids: Sequence[int], processor: Any) -> Parts:
    """Every image is one entry of `pixel_values`, and all have as many tokens: LLaVA-1.5, PaliGemma."""
    pixels = outputs["pixel_values"]
    count = sum(token == processor.image_token_id for token in ids) // len(pixels)
    return [("image", {"pixel_values": one}, count) for one in pixels.split(1)]


def gemma_crops(outputs: Outputs, ids: Sequence[int], processor: Any) -> Parts:
    """Gemma 3: an entry of `pixel_values` for every image, and one for every crop of it that pan and scan adds."""
    pixels = outputs["pixel_values"]
    return [("image", {"pixel_values": one}, processor.image_seq_length) for one in pixels.split(1)]


def any_resolution(outputs: Outputs, ids: Sequence[int], processor: Any) -> Parts:
    """LLaVA-Next and OneVision: as many patches as an image's size asks for, without those that pad it to its neighbours'.

    OneVision takes only the first patch of an image that is not alone in its prompt; `batch_num_images` tells.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    found: Parts = []
    together = outputs.get("batch_num_images")
    of_images = {**outputs}
    if together is not None:
        of_images["batch_num_images"] = together.flatten().tolist()
    for number, size in enumerate(outputs.get("image_sizes", ())):
        pinpoints = processor.image_processor.image_grid_pinpoints
        patches = image_size_to_num_patches(size, pinpoints, outputs["pixel_values"].shape[-1])
        tensors = {"image_sizes": size[None]}
        if together is not None:
            alone = of_images["batch_num_images"] == [1]
            tensors["batch_num_images"] = torch.tensor([1 if alone else 2])
            patches = patches if alone else 1
        tensors["pixel_values"] = outputs["pixel_values"][number : number + 1, :patches]
        count = processor.replace_image_token(of_images, number).count(processor.image_token)
        found.append(("image", tensors, count))
    for number, frames in enumerate(outputs.get("pixel_values_videos", ())):
        count = processor.replace_video_token(outputs, number).count(processor.video_token)
        found.append(("video", {"pixel_values_videos": frames[None]}, count))
    return _in_order(found, ids, processor)


def flat_patches(outputs: Outputs, ids: Sequence[int], processor: Any) -> Parts:
    """Qwen's: patches of all images one behind the other, as many as each grid (t, h, w) has."""
    found: Parts = []
    for kind, pixels, name in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
        if name not in outputs:
            continue
        maker = processor.image_processor if kind == "image" else processor.video_processor
        sizes = outputs[name].prod(-1).tolist()
        for number, patches in enumerate(outputs[pixels].split(sizes)):
            tensors = {pixels: patches, name: outputs[name][number : number + 1]}
            if kind == "video" and "second_per_grid_ts" in outputs:
                tensors["second_per_grid_ts"] = torch.as_tensor(outputs["second_per_grid_ts"])[number : number + 1]
            found.append((kind, tensors, sizes[number] // maker.merge_size**2))  # type: ignore[arg-type]
    return _in_order(found, ids, processor)


def tiles(outputs: Outputs, ids: Sequence[int], processor: Any) -> Parts:
    """Idefics3 and SmolVLM: tiles of all images one behind the other; the last of each image is the whole of it.

    SmolVLM's processor writes the frames of a video as whole images.
    """
    whole = processor.tokenizer.convert_tokens_to_ids("<global-img>")
    counts, open_tiles, last, closes = [], 0, -1, False
    for token in ids:
        if token == processor.image_token_id:
            if last != token:
                open_tiles += 1
                closes = last == whole
        elif last == processor.image_token_id and closes:
            counts.append(open_tiles)
            open_tiles = 0
        last = token
    found: Parts = []
    start = 0
    for count in counts:
        part = slice(start, start + count)
        tensors = {name: outputs[name][:, part] for name in ("pixel_values", "pixel_attention_mask")}
        found.append(("image", tensors, count * processor.image_seq_len))
        start += count
    return found


def flat_tiles(outputs: Outputs, ids: Sequence[int], processor: Any) -> Parts:
    """InternVL: tiles of images and frames of videos one behind the other, each with as many tokens.

    An image stands between a start and an end token with all its tiles; so does each frame of a video, named `Frame1: `.
    """
    begin, each = processor.start_image_token_id, processor.image_seq_length
    runs = [len(list(group)) for token, group in groupby(ids) if token == processor.image_token_id]
    assert sum(token == begin for token in ids) == len(runs)
    pixels = outputs["pixel_values"].split([run // each for run in runs])
    return [("image", {"pixel_values": part}, run) for part, run in zip(pixels, runs, strict=True)]


def aspect_tiles(outputs: Outputs, ids: Sequence[int], processor: Any) -> Parts:
    """Mllama: images are attended to across, and fill no placeholders."""
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    count = outputs["pixel_values"].shape[1]
    return [("image", {name: outputs[name][:, n : n + 1] for name in names}, 0) for n in range(count)]


def _in_order(found: Parts, ids: Sequence[int], processor: Any) -> Parts:
    """Images and videos in the order of their placeholders."""
    if len({kind for kind, _, _ in found}) < 2:
        return found
    left = {kind: [part for part in found if part[0] == kind] for kind in ("image", "video")}
    kinds = {processor.image_token_id: "image", processor.video_token_id: "video"}
    out: Parts = []
    fill: dict[str, int] = {"image": 0, "video": 0}
    for token in ids:
        kind = kinds.get(token)
        if kind is None:
            continue
        if fill[kind] == 0:
            out.append(left[kind].pop(0))
            fill[kind] = out[-1][2]
        fill[kind] -= 1
    return out


# --- texts of a prompt --------------------------------------------------------------------------------------------------


def pictures(shown: Sequence[Shown], num_frames: int | None = None) -> dict[str, Any]:
    """Arguments of a processor: images as RGB, videos as arrays of frames (t, h, w, 3).

    Args:
        shown: by a prompt, in order.
        num_frames: of a video with more of them, this many, evenly spaced from the first to the last. The times of frames are
            told by the rate of their file; frames that are images of their own, and files that tell no rate, are taken for one
            a second, as TEMPLE and LLaVA-Hound have them.
    """
    images = [files[0].open() for kind, files in shown if kind == "image"]
    videos = [_clip(files) for kind, files in shown if kind == "video"]
    given: dict[str, Any] = {"images": [images]} if images else {}
    if not videos:
        return given
    told, kept = [], []
    for frames, rate in videos:
        count = len(frames)
        places = np.linspace(0, count - 1, min(count, num_frames or count)).round().astype(int)
        told.append({"fps": rate, "total_num_frames": count, "duration": count / rate, "frames_indices": places.tolist()})
        kept.append(frames[places])
    return {**given, "videos": [kept], "video_metadata": told, "do_sample_frames": False}


def undivided(text: str) -> tuple[str, str]:
    """The whole prompt goes through the processor, and nothing behind it through the tokenizer alone."""
    return text, ""


def images_alone(text: str) -> tuple[str, str]:
    """PaliGemma: its processor ends whatever text it gets with a line, so that it gets the images alone."""
    count = text.count("<image>")
    head = "<image>" * count
    if not text.startswith(head):
        raise ValueError("images stand before all text of a prompt")
    return head, text[len(head) :]


def all_ids(ids: list[int], processor: Any) -> list[int]:
    """All that the processor makes of its part of the prompt is in the context."""
    return ids


def image_ids_alone(ids: list[int], processor: Any) -> list[int]:
    """Nothing but images of what the processor makes."""
    return [token for token in ids if token == processor.image_token_id]


# --- what layers want of tokens ----------------------------------------------------------------------------------------


def own_ids(processor: Any) -> dict[int, int]:
    """Token id -> type of tokens that stand for images (1) and videos (2), as most processors name them."""
    kinds = {processor.image_token_id: 1}
    if getattr(processor, "video_token_id", None) is not None:
        kinds[processor.video_token_id] = 2
    return kinds


def image_ids(processor: Any) -> dict[int, int]:
    """InternVL: frames of videos are tokens as images are."""
    return {processor.image_token_id: 1}


def soft_ids(processor: Any) -> dict[int, int]:
    """Gemma 3: a processor's image token only begins an image, whose tokens are the tokenizer's."""
    return {processor.tokenizer.image_token_id: 1}


def no_ids(processor: Any) -> dict[int, int]:
    """No token stands for a part of an image: Mllama."""
    return {}


def causal(types: Int[Tensor, " context"]) -> Blocks:
    """Every token sees what comes before it, and itself."""
    return ()


def image_blocks(types: Int[Tensor, " context"]) -> Blocks:
    """Gemma 3: the tokens of an image see each other."""
    found, start = [], 0
    for kind, group in groupby(types.tolist()):
        stop = start + len(list(group))
        if kind:
            found.append((start, stop))
        start = stop
    return tuple(found)


def prefix_block(types: Int[Tensor, " context"]) -> Blocks:
    """PaliGemma: all tokens of a prompt see each other, images or not."""
    return ((0, len(types)),)


def places(types: Int[Tensor, " context"], images: Sequence[SeenImage], config: Any) -> Int[Tensor, "3 context"] | None:
    """Places in the sequence count."""
    return None


def grid_positions(types: Int[Tensor, " context"], images: Sequence[SeenImage], config: Any) -> Int[Tensor, "3 context"] | None:
    """M-rope indices: places for texts, (time, row, column) for images, after which texts go on at the longer side.

    Source: transformers' `get_rope_index` of Qwen2-VL, Qwen2.5-VL and Qwen3-VL; a text behind a video goes on as it does there.
    Args:
        types: 0 text, 1 image, 2 video.
        images: with their grids.
        config: of the model: the size of merged patches; `tokens_per_second` spaces the frames of Qwen2.5-VL's videos.
    """
    vision = config.vision_config
    merge = vision.spatial_merge_size
    grids = iter([grid for image in images for grid in _grids(image, config)])
    parts, start, at = [], 0, 0
    runs = [(kind, len(list(group))) for kind, group in groupby(types.tolist())]
    for kind, length in runs:
        stop = start + length
        if kind == 0:
            parts.append(torch.arange(at, at + length).expand(3, -1))
            at += length
        while kind and start < stop:
            (time, height, width), step = next(grids)
            h, w = height // merge, width // merge
            times = (torch.arange(time) * step).long()
            axes = torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")
            parts.append(torch.stack(axes).reshape(3, -1) + at)
            at += max(h, w)
            start += time * h * w
        start = stop
    return torch.cat(parts, dim=1)


def _grids(image: SeenImage, config: Any) -> list[tuple[list[int], float | Tensor]]:
    """Grids, and how many indices their frames are apart; before each frame of Qwen3-VL a time is written, and it is alone."""
    if image.kind == "image":
        return [(image.tensors["image_grid_thw"][0].tolist(), 1)]
    time, height, width = image.tensors["video_grid_thw"][0].tolist()
    if config.model_type == "qwen3_vl":
        return [([1, height, width], 1)] * time
    if config.model_type == "qwen2_vl":
        return [([time, height, width], 1)]
    seconds = image.tensors.get("second_per_grid_ts", torch.ones(1))
    return [([time, height, width], config.vision_config.tokens_per_second * seconds[0])]


def no_cross_attention(outputs: Outputs, begun: int) -> Int[Tensor, "context images tiles"] | None:
    """Images are met in the sequence."""
    return None


def cross_attention(outputs: Outputs, begun: int) -> Int[Tensor, "context images tiles"] | None:
    """Mllama's mask; the tokens put before what the processor made see no image."""
    mask: Tensor = outputs["cross_attention_mask"][0].long()
    return torch.cat([mask.new_zeros(begun, *mask.shape[1:]), mask])


# --- pixels ----------------------------------------------------------------------------------------------------------------


def apart(pixels: Float[Tensor, "..."], processor: Any, kind: Kind) -> Float[Tensor, "n channels m"]:
    """Pixels (..., channels, h, w) with their channels apart."""
    return pixels.reshape(-1, pixels.shape[-3], pixels.shape[-2] * pixels.shape[-1])


def together(changed: Float[Tensor, "n channels m"], pixels: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What `apart` took apart."""
    return changed.reshape(pixels.shape)


def patches_apart(pixels: Float[Tensor, "n flat"], processor: Any, kind: Kind) -> Float[Tensor, "n channels m"]:
    """Qwen's patches (channels, frames, h, w), flat; of a still image, whose frames are copies, the first one."""
    maker = processor.image_processor if kind == "image" else processor.video_processor
    frames = maker.temporal_patch_size
    split = pixels.reshape(len(pixels), 3, frames, -1)
    return split[:, :, 0] if kind == "image" else split.flatten(2)


def patches_together(changed: Float[Tensor, "n channels m"], pixels: Float[Tensor, "n flat"]) -> Float[Tensor, "n flat"]:
    """Patches flat again, a still image's frame copied."""
    copies = pixels.shape[1] // changed[0].numel()
    return changed[:, :, None].expand(-1, -1, copies, -1).reshape(pixels.shape)


def _clip(files: Sequence[Any]) -> tuple[Any, float]:
    """Frames of a video, and how many of them make a second."""
    if len(files) > 1:
        return np.stack([np.asarray(media.open()) for media in files]), ASSUMED_RATE
    return np.stack([np.asarray(frame) for frame in files[0].frames()]), files[0].frame_rate() or ASSUMED_RATE
