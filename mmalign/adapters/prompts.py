"""Prompts of examples: a text and, for a family that edits, the source image that the candidates are edits of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from mmalign.adapters.images import frame
from mmalign.errors import UserError
from mmalign.families import Family, encode_prompt
from mmalign.families.family import stacked
from mmalign.records import Example, Media

# (text,), or (text, key of the source image): what conditions are told apart by, also in a cache.
Prompt = tuple[str, ...]


def prompt_of(text: str, source: str | None) -> Prompt:
    """A text and, where there is one, the key of its source image."""
    return (text,) if source is None else (text, source)


def check_sources(family: Family, numbers: Mapping[int, str]) -> None:
    """Refuse prompts without a source image where the family edits, and with one where it does not.

    Args:
        family: of the model.
        numbers: how many images prompts have, each number with its first row, as `records.Examples.sources` has them.
    Raises:
        UserError: names the first such row.
    """
    for number, where in numbers.items():
        if family.edits and number != 1:
            raise UserError(
                f"{where}: got a prompt with {number} images, want 1: {family.name} edits a source image. "
                'Write "prompt": {"text": ..., "image": ...}, or remove the row.'
            )
        if not family.edits and number:
            raise UserError(
                f"{where}: got a prompt with an image, want a text alone: {family.name} makes images from texts. "
                "Set a family that edits (qwen_image_edit), or remove the image."
            )


def source_of(example: Example) -> Media:
    """The source image of an example.

    Raises:
        UserError: it has none, or several.
    """
    images = example.samples[0].prompt.images
    if len(images) != 1:
        raise UserError(f"data: example {example.id}: got a prompt with {len(images)} images, want 1 to be edited.")
    return replace(images[0], where=images[0].where or f"example {example.id}: prompt")


def texts_of(family: Family, texts: Sequence[str]) -> list[Prompt]:
    """Prompts without a source image.

    Raises:
        UserError: the family edits.
    """
    if family.edits:
        raise UserError(f"source: got {family.name}, which edits source images. Train it on a data set: source: offline.")
    return [(text,) for text in texts]


def source_image(media: Media, size: tuple[int, int]) -> Image.Image:
    """A source as an image, cut as in training."""
    return Image.fromarray(framed_source(media, size).permute(1, 2, 0).numpy())


def framed_source(media: Media, size: tuple[int, int]) -> UInt8[Tensor, "3 h w"]:
    """The pixels of a source, cut as its edits are: from the middle.

    Raises:
        UserError: it is damaged.
    """
    return frame(media.open(), target=size, crop="center", flip=False).pixels


def encoded_prompts(family: Family, pipe: Any, prompts: Sequence[Prompt], sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The condition of each prompt, one at a time so that no batch changes the numbers.

    Args:
        family, pipe: what encodes.
        prompts: texts, and keys into `sources` where the family edits.
        sources: 8-bit pixels (3, h, w) by key.
    """
    return stacked(
        [
            encode_prompt(family, pipe, [text], *(sources[key][None].float() / 127.5 - 1 for key in keys))
            for text, *keys in prompts
        ]
    )
