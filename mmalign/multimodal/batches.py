"""Prompts that show something, several in one call of a model's `generate`: which go together, and their tensors as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")  # with one entry a token, on axis 1

Shown = Mapping[str, Tensor]  # what a model takes of one prompt beside its ids and mask; see `SightedEncoder.arguments`


def alike(prompts: Sequence[Shown | None]) -> list[list[int]]:
    """Numbers of the prompts that one call takes, group by group: those whose tensors have the same names and forms.

    How many images a prompt shows and how long it is do not matter where a family puts images one behind the other; prompts
    that show nothing are a group of their own.
    """
    groups: dict[Any, list[int]] = {}
    for number, shown in enumerate(prompts):
        form = tuple((name, tensor.shape[2 if name in PER_TOKEN else 1 :]) for name, tensor in sorted((shown or {}).items()))
        groups.setdefault(form, []).append(number)
    return list(groups.values())


def stacked(prompts: Sequence[Shown], lengths: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of prompts that go together, whose ids are padded on the left.

    Args:
        prompts: of one group of `alike`.
        lengths: tokens of each.
    """
    longest = max(lengths)
    out = {}
    for name in prompts[0]:
        parts = [shown[name] for shown in prompts]
        if name in PER_TOKEN:
            before = [longest - length for length in lengths]
            parts = [pad(part, (0, 0) * (part.dim() - 2) + (gap, 0)) for part, gap in zip(parts, before, strict=True)]
        out[name] = torch.cat(parts)
    return out
