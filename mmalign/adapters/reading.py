"""Reads examples into batches, in worker processes: nothing here holds a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmalign.adapters.buckets import nearest_size
from mmalign.adapters.images import Framed, frame, frame_video
from mmalign.adapters.prompts import framed_source, prompt_of, source_of
from mmalign.adapters.side import side_tensors
from mmalign.cache import content_key
from mmalign.errors import UserError
from mmalign.records import Content, Example, Media


@runtime_checkable
class Frames(Protocol):
    """Sizes and crops of images whose latents are cached."""

    def get(self, key: str, target: tuple[int, int]) -> Framed:
        """The frame of one image, without pixels."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Example -> item -> batch.

    Args:
        size: (height, width) of the framed images.
        crop, flip, draws: as in the adapter's settings.
        seed: of flips and random crops.
        size_condition: the family's condition of one image's (original size, crop, target size).
        frames: where latents are cached; then no image is decoded.
        num_frames: of a video: its first so many, at the file's own rate. None: images.
        edits: whether prompts carry a source image.
        buckets: sizes instead of the one.
    """

    size: tuple[int, int]
    crop: Literal["center", "random"]
    flip: bool
    draws: int | None
    seed: int
    size_condition: Callable[..., dict[str, Tensor]]
    frames: Frames | None = None
    num_frames: int | None = None
    edits: bool = False
    buckets: tuple[tuple[int, int], ...] = ()

    def item(self, example: Example, epoch: int) -> dict[str, Any]:
        """One example in one epoch: framed pixels, or only their keys where latents are cached.

        Raises:
            UserError: as `contents`, or a damaged image.
        """
        draw = epoch if self.draws is None else epoch % self.draws
        size = self.size_of(example)
        media = self.contents(example)
        keys = [one.key() for one in media]
        text = example.samples[0].prompt.text or ""
        source = self.source(example)
        prompt = prompt_of(text, None if source is None else source.key())
        # The same draws whichever candidate is preferred: a flipped label changes the label only.
        unordered = content_key(*prompt, tuple(sorted(keys)))
        seeds = [f"{self.seed}/{unordered}/{key}/{draw}" for key in keys]
        named = [self._framed(one, key, seed, size) for one, key, seed in zip(media, keys, seeds, strict=True)]
        return {
            "id": example.id,
            "key": content_key(*prompt, tuple(keys)),
            "unordered": unordered,
            "draw": draw,
            "prompt": text,
            "source": prompt[1] if source is not None else None,
            "source_pixels": framed_source(source, self.size) if source is not None and self.frames is None else None,
            "images": [name for name, _ in named],
            "framed": [framed for _, framed in named],
            "side": example.side,
            "size": size,
        }

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Several items as one micro-batch; pixels of each distinct image once.

        Raises:
            UserError: the items differ in their number of candidates or in their side data.
            ValueError: the items are of several buckets.
        """
        sizes = {item["size"] for item in items}
        if len(sizes) > 1:
            raise ValueError(f"collate: got items of the sizes {sorted(sizes)}, want those of one bucket.")
        counts = {len(item["images"]) for item in items}
        if len(counts) > 1:
            raise UserError(
                f"data: got {sorted(counts)} candidates in one batch, want one number. "
                "Set data.view.num_candidates, or filter the rows."
            )
        pixels = {name: f.pixels for item in items for name, f in zip(item["images"], item["framed"], strict=True)}
        known = {name: value for name, value in pixels.items() if value.numel()}
        return {
            **{
                name: [item[name] for item in items]
                for name in ("id", "key", "unordered", "draw", "prompt", "source", "images")
            },
            "sources": {item["source"]: item["source_pixels"] for item in items if item["source_pixels"] is not None},
            "names": list(known),
            "pixels": torch.stack(list(known.values())) if known else None,
            "sizes": self._sizes([item["framed"] for item in items]),
            "side": side_tensors([item["side"] for item in items]),
            "size": next(iter(sizes)),
        }

    def contents(self, example: Example) -> list[Content]:
        """The image or the video of each candidate, read but not decoded.

        Raises:
            UserError: a candidate without exactly one image; a video that is too short, or longer than another candidate's.
        """
        if self.num_frames is not None:
            return videos_of(example, self.num_frames)
        images = [image_of(example, place) for place in range(len(example.samples))]
        return [Content(images=(_loaded(one, one.where),)) for one in images]

    def size_of(self, example: Example) -> tuple[int, int]:
        """(height, width) that an example is trained at: the bucket nearest its first, chosen, image in shape.

        Raises:
            UserError: the image is missing or damaged.
        """
        if not self.buckets:
            return self.size
        width, height = image_of(example, 0).size()
        return nearest_size(self.buckets, height, width)

    def source(self, example: Example) -> Media | None:
        """The source image of an example, read but not decoded; None for a family that does not edit.

        Raises:
            UserError: it has none, or several.
        """
        return _loaded(source_of(example), "") if self.edits else None

    def cut(self, content: Content, size: tuple[int, int], *, flip: bool, rng: random.Random | None = None) -> Framed:
        """Decode an image or a video and bring it to size.

        Raises:
            UserError: it is damaged, or an animation where an image is wanted.
        """
        if self.num_frames is None:
            return frame(content.images[0].open(), target=size, crop=self.crop, flip=flip, rng=rng)
        return frame_video(content.frames(self.num_frames), target=size, crop=self.crop, flip=flip, rng=rng)

    def cache_key(self, image_key: str, flip: bool, size: tuple[int, int]) -> str:
        """The key of an image's latents: its content, its orientation and, where there are several, its size."""
        oriented = f"{image_key}-flipped" if flip else image_key
        return f"{oriented}-{size[0]}x{size[1]}" if self.buckets else oriented

    def _framed(self, content: Content, key: str, seed: str, size: tuple[int, int]) -> tuple[str, Framed]:
        rng = random.Random(seed)
        flip = self.flip and rng.random() < 0.5
        name = self.cache_key(key, flip, size)
        if self.frames is not None:
            return name, self.frames.get(name, size)
        framed = self.cut(content, size, flip=flip, rng=rng)
        return (f"{name}@{framed.crop}" if self.crop == "random" else name), framed

    def _sizes(self, framed: Sequence[Sequence[Framed]]) -> dict[str, Tensor]:
        rows = [[self.size_condition(f.original, f.crop, f.target) for f in one] for one in framed]
        return {name: torch.stack([torch.stack([c[name] for c in row]) for row in rows]) for name in rows[0][0]}


def image_of(example: Example, place: int) -> Media:
    """The image of one candidate.

    Raises:
        UserError: the candidate has none, or several.
    """
    images = example.samples[place].completion.images
    if len(images) != 1:
        raise UserError(f"data: example {example.id}: got {len(images)} images in candidate {place + 1}, want 1.")
    return replace(images[0], where=images[0].where or f"example {example.id}")


def videos_of(example: Example, num_frames: int) -> list[Content]:
    """The videos of the candidates, read but not decoded.

    Raises:
        UserError: a candidate has none, or one of fewer than `num_frames` frames; the candidates differ in length.
    """
    videos, lengths = [], []
    for number, sample in enumerate(example.samples, 1):
        name = f"data: example {example.id}: candidate {number}"
        if not sample.completion.images:
            raise UserError(f"{name}: got no video, want one. Complete or remove the row.")
        videos.append(Content(images=tuple(_loaded(one, name) for one in sample.completion.images)))
        lengths.append(videos[-1].num_frames())
        where = videos[-1].images[0].where
        if lengths[-1] < num_frames:
            raise UserError(
                f"{where}: got a video of {lengths[-1]} frames, want {num_frames} or more. Set adapter.frames lower, or remove "
                "the row."
            )
        if lengths[-1] != lengths[0]:
            raise UserError(
                f"{where}: got a video of {lengths[-1]} frames beside one of {lengths[0]}, want one length in an example. "
                "Cut them to one length, or remove the row."
            )
    return videos


def _loaded(media: Media, name: str) -> Media:
    named = replace(media, where=media.where or name)
    return replace(named, data=named.read())
