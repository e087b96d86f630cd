"""What the contexts of a language model show: images and videos as their processor makes them, and what goes with the ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

Kind = Literal["image", "video"]


@dataclass(frozen=True, kw_only=True)
class SeenImage:
    """One image or video as its processor makes it for the vision tower. Equal keys are equal tensors.

    Args:
        key: hash of the tensors and of the family that they are for: pixels, processor settings and degradation are all in it.
        kind: image, or video.
        tensors: under the processor's names, of this image alone; `Family.features` takes them.
        num_tokens: placeholders in the ids that its features fill; 0 where the model attends to images across (Mllama).
    """

    key: str
    kind: Kind = "image"
    tensors: Mapping[str, Tensor] = field(compare=False)
    num_tokens: int = field(compare=False)

    def to(self, device: torch.device | str) -> SeenImage:
        """The same on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one context shows, and what a family wants to know of its tokens beside their ids. Equal keys are equal contents.

    A context of text alone has none, but where its tokens see each other in both directions (PaliGemma's prefix).

    Args:
        key: hash of all that is shown.
        images: in the order of their placeholders in the ids.
        token_types: what each token of the context stands for: 0 a text, 1 an image, 2 a video. None: not told.
        positions: m-rope indices (time, height, width) of each token; a continuation goes on at `next_position` on all three
            axes. None: places in the sequence.
        blocks: (start, stop) of tokens of the context that see each other in both directions, beside what comes before them.
        crossed: of each token of the context, which tiles of which image it attends to across: Mllama's cross-attention mask,
            of which a continuation repeats the last row. None: no cross attention.
    """

    key: str
    images: tuple[SeenImage, ...]
    token_types: Int[Tensor, " context"] | None = field(default=None, compare=False)
    positions: Int[Tensor, "3 context"] | None = field(default=None, compare=False)
    blocks: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    crossed: Int[Tensor, "context images tiles"] | None = field(default=None, compare=False)

    @property
    def next_position(self) -> int | None:
        """M-rope index of the first token of a continuation; None where places in the sequence count.

        That of the last token + 1, the maximum + 1 but for videos of more frames than rows: transformers goes on with texts
        behind them from an earlier index when it runs a whole sequence.
        """
        return None if self.positions is None else int(self.positions[:, -1].max()) + 1

    def to(self, device: torch.device | str) -> Seen:
        """The same on a device."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name in ("token_types", "positions", "crossed")
            for value in (getattr(self, name),)
        }
        return replace(self, images=tuple(image.to(device) for image in self.images), **moved)


def image_key(family: str, kind: Kind, tensors: Mapping[str, Tensor]) -> str:
    """Hash of what a vision tower is given of an image."""
    digest = hashlib.sha256(f"{family} {kind}".encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def seen_key(images: Sequence[SeenImage], blocks: Sequence[tuple[int, int]] = ()) -> str:
    """Hash of all that a context shows, in its order."""
    told = " ".join([*(image.key for image in images), *(f"{start}:{stop}" for start, stop in blocks)])
    return hashlib.sha256(told.encode()).hexdigest()
