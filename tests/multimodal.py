"""Tiny models that see, pictures and samples, for the tests of the multimodal room."""

import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from mmalign.language.chat import Encoded
from mmalign.multimodal.families import FAMILIES
from mmalign.multimodal.processing import SightedEncoder
from mmalign.multimodal.seen import Seen
from mmalign.multimodal.tiny import tiny_parts
from mmalign.records import Content, Message, Sample
from mmalign.records.media import Media

VIDEO_FAMILIES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")


@functools.cache
def parts(family: str) -> tuple[Any, Any]:
    """Model in float64 and processor; not to be changed."""
    model, processor = tiny_parts({"family": family})
    return model.double().requires_grad_(False), processor


def encoder(family: str, **settings: Any) -> SightedEncoder:
    model, processor = parts(family)
    known = {"processor": processor, "model_type": family, "family": FAMILIES[family], "config": model.config}
    return SightedEncoder(**{**known, **settings})


def picture(seed: int, width: int = 40, height: int = 50) -> Media:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return Media(data=stream.getvalue(), where="pairs.jsonl:1")


def sample(question: str, answer: str, *images: Media, places: tuple[int, ...] = ()) -> Sample:
    message = Message(role="user", text=question, images=images, places=places)
    return Sample(prompt=Content(messages=(message,)), completion=Content(text=answer))


def sequence(encoded: Encoded, number: int) -> tuple[list[int], Seen | None]:
    """Ids of one sample, context and continuation, and what it shows."""
    place = encoded.context_of[number]
    seen = encoded.media[place] if encoded.media else None
    return [*encoded.contexts[place], *encoded.continuations[number]], seen


def arguments(family: str, ids: Sequence[int], seen: Seen | None) -> dict[str, Tensor]:
    """What the model is given of a sequence, made of nothing but ids and what its context shows."""
    facts = FAMILIES[family]
    given = {"input_ids": torch.tensor([ids])}
    answer = len(ids) - (0 if seen is None or seen.token_types is None else len(seen.token_types))
    if seen is None:
        return given
    if facts.typed == "token_type_ids":
        types = torch.full((len(ids),), facts.answer_type)
        for start, stop in seen.blocks:
            types[start:stop] = 1 - facts.answer_type
        given["token_type_ids"] = types[None]
    if seen.positions is not None:
        after = seen.next_position + torch.arange(answer)
        given["position_ids"] = torch.cat([seen.positions, after.expand(3, -1)], dim=1)[:, None]
    if seen.crossed is not None:
        last = seen.crossed[-1:].expand(answer, -1, -1)
        given["cross_attention_mask"] = torch.cat([seen.crossed, last])[None]
    along = 1 if family in ("idefics3", "smolvlm", "mllama") else 0
    for name in {name for image in seen.images for name in image.tensors} - {"second_per_grid_ts", "batch_num_images"}:
        found = [image.tensors[name] for image in seen.images if name in image.tensors]
        if family in ("llava_next", "llava_onevision") and name == "pixel_values":
            most = max(tensor.shape[1] for tensor in found)
            found = [pad(tensor, (0, 0) * 3 + (0, most - tensor.shape[1])) for tensor in found]
        given[name] = torch.cat(found, dim=along)
    if family == "llava_onevision" and "image_sizes" in given:
        given["batch_num_images"] = torch.tensor([len(given["image_sizes"])])
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def in_one_go(family: str, question: str, answer: str, images: Sequence[Media]) -> dict[str, Tensor]:
    """What the processor alone makes of prompt and answer together: its ids, token types, masks and tensors."""
    processor = parts(family)[1]
    opened = [media.open() for media in images]
    if family == "paligemma":
        text = "<image>" * len(opened) + question
        out = processor(text=[text], images=[opened], suffix=[answer], return_tensors="pt")
        out.pop("labels")
    else:
        shown = [{"type": "image", "image": image} for image in opened]
        conversation = [
            {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        out = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
    out.pop("attention_mask")
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in out.items()}


def token_logps(logits: Tensor, ids: Tensor, count: int) -> Tensor:
    """Log-probabilities of the last `count` tokens of one sequence."""
    predictions = logits[-count - 1 : -1].log_softmax(-1)
    return predictions.gather(1, ids[-count:, None])[:, 0]
