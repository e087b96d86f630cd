"""Attention over a packed row, where continuations share the context that they continue."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmalign.likelihoods import Layout, Segment

NAME = "mmalign_packed"  # of the attention in transformers' tables, and of the keyword argument that brings the row
STRANGE = ("s_aux", "sinks", "position_bias", "cache", "alibi", "head_mask", "block_mask")  # not ours to get right


@dataclass(kw_only=True)
class Row:
    """A packed row as every attention layer of one forward pass sees it, and what its layers asked for.

    Args:
        segments: of the row, one after the other without a gap.
        kernel: "sdpa": one call a context and one for its continuations of one length, on any device. "flex": one call of
            FlexAttention, on CUDA.
        blocks: of contexts by number, (start, stop) of tokens that also see each other forwards: an image's, or a prefix.
        within_windows: whether a sliding window bounds what they see of each other.
        needed: places of the tokens whose last states are asked for; None: all. See `last_layer`.
    """

    segments: tuple[Segment, ...]
    kernel: Literal["sdpa", "flex"] = "sdpa"
    blocks: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    within_windows: bool = False
    needed: Int[Tensor, " needed"] | None = None
    windows: list[int | None] = field(default_factory=list)
    last: torch.nn.Module | None = None  # the attention layer that was called last
    lengths: list[int] = field(init=False)
    num_tokens: int = field(init=False)
    groups: list[tuple[int | None, list[int]]] = field(init=False)  # a context, and segments of one length that continue it
    _masks: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Find the calls of attention."""
        self.lengths = [segment.stop - segment.start for segment in self.segments]
        self.num_tokens = sum(self.lengths)
        self.groups = [(None, [number]) for number, segment in enumerate(self.segments) if segment.after is None]
        alike: dict[tuple[int, int], list[int]] = {}
        for number, segment in enumerate(self.segments):
            if segment.after is not None:
                alike.setdefault((segment.after, self.lengths[number]), []).append(number)
        self.groups += [(after, members) for (after, _), members in alike.items()]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Bool[Tensor, "queries keys"]:
        """Which keys each query sees: those up to its own place, the last query's being the last key's; in the window."""
        key = (queries, keys, window, device)
        if key not in self._masks:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            seen = distance >= 0
            self._masks[key] = seen if window is None else seen & (distance < window)
        return self._masks[key]  # type: ignore[no-any-return]

    def mask_of(self, number: int, window: int | None, device: torch.device) -> Bool[Tensor, "tokens tokens"]:
        """Which tokens of a context its tokens see, where some also see what follows them."""
        key = ("context", number, window, device)
        if key not in self._masks:
            length = self.lengths[number]
            seen = self.mask(length, length, window, device).clone()
            for start, stop in self.blocks[number]:
                places = torch.arange(start, stop, device=device)
                near = places[:, None] - places < (window if window is not None and self.within_windows else length)
                seen[start:stop, start:stop] |= near
            self._masks[key] = seen
        return self._masks[key]  # type: ignore[no-any-return]

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """The same for the whole row at once, as FlexAttention takes it."""
        from torch.nn.attention.flex_attention import create_block_mask

        key = ("block", window, device)
        if key not in self._masks:
            length = self.num_tokens
            seen = _mask_function(self.segments, length, window, device, self.blocks, self.within_windows)
            self._masks[key] = create_block_mask(seen, None, None, length, length, device=device)
        return self._masks[key]


@functools.cache
def register() -> str:
    """Make the attention known to transformers; a model that runs it attends to padded rows as with "sdpa".

    Returns: its name, for `model.set_attn_implementation`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def row_arguments(layout: Layout, kernel: Literal["sdpa", "flex"] = "sdpa", **blocks: Any) -> dict[str, Any]:
    """Keyword arguments of a model's forward for a packed layout.

    They reach every layer by name, so that gradient checkpointing sees them when it computes a layer again. The mask is a
    stand-in: transformers takes one of four axes as it is and builds none of its own.

    Args:
        layout: packed.
        kernel, blocks: see `Row`.
    """
    stand_in = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.ids.device)
    return {NAME: Row(segments=layout.segments, kernel=kernel, **blocks), "attention_mask": stand_in}


def attention(
    module: torch.nn.Module,
    query: Float[Tensor, "rows heads length dim"],
    key: Float[Tensor, "rows kv_heads keys dim"],
    value: Float[Tensor, "rows kv_heads keys dim_v"],
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "rows length heads dim_v"], None]:
    """Attention with the signature of transformers' attention functions.

    Padded rows go to transformers' own "sdpa"; with a softcap, which that lacks, they are worked out explicitly.
    Args:
        module: the layer.
        query, key, value: of all tokens.
        attention_mask: of padded rows; packed rows have the row instead.
        dropout: of attention weights.
        scaling: of scores; None: 1 / sqrt(dim).
        sliding_window: keys that a query sees, its own among them.
        softcap: Gemma 2's `attn_logit_softcapping`: 50.
        is_causal: False: both ways.
        others: those of other attention functions.
    Raises:
        ValueError: a packed row of a layer that is not causal, where the row does not tell who sees what follows; or that has
            attention sinks or a position bias.
    """
    row: Row | None = others.pop(NAME, None)
    if row is None:
        return _padded(module, query, key, value, attention_mask, dropout, scaling, softcap, is_causal, others)
    strange = [name for name in STRANGE if others.get(name) is not None]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if strange or not (causal or row.blocks):
        raise ValueError(f"packed attention: got {strange[0] if strange else 'a layer that is not causal'}, want neither.")
    row.windows.append(sliding_window)
    row.last = module
    if row.kernel == "flex":
        out = _flex(row, query, key, value, sliding_window, scaling, softcap)
    else:
        settings = {"dropout": dropout, "scaling": scaling, "softcap": softcap}
        out = torch.cat(_by_segment(row, query, key, value, sliding_window, settings), dim=2)
    return out.transpose(1, 2).contiguous(), None


def _by_segment(
    row: Row, query: Tensor, key: Tensor, value: Tensor, window: int | None, settings: dict[str, Any]
) -> list[Tensor]:
    """What every segment's tokens attend to, in the order of the row."""
    queries, keys, values = (torch.split(states, row.lengths, 2) for states in (query, key, value))
    out: list[Tensor] = [query] * len(row.lengths)
    for context, members in row.groups:
        queried, *seen = (_stacked([parts[number] for number in members]) for parts in (queries, keys, values))
        if context is not None:
            # A context's tokens that no continuation's window reaches are left out.
            first = 0 if window is None else max(0, row.lengths[context] - window + 1)
            before = (parts[context][:, :, first:].expand(len(members), -1, -1, -1) for parts in (keys, values))
            seen = [torch.cat(parts, dim=2) for parts in zip(before, seen, strict=True)]
        width = seen[0].shape[2]
        near = None if window is None or window >= width else window
        plain = context is None and near is None and settings["softcap"] is None
        if context is None and members[0] in row.blocks:
            mask: Tensor | None = row.mask_of(members[0], near, query.device)
        else:
            mask = None if plain else row.mask(queried.shape[2], width, near, query.device)
        attended = _attend(queried, seen[0], seen[1], mask, **settings)
        for place, number in enumerate(members):
            out[number] = attended[place : place + 1]
    return out


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """softmax(softcap * tanh(scaling * q k^T / softcap)) v over the keys of the mask; None: causal, and no softcap."""
    times = query.shape[1] // key.shape[1]
    # CUDA has no kernel for a mask and shared keys at once.
    shares = softcap is None and (mask is None or not query.is_cuda)
    if not shares:
        key, value = (_repeated(states, times) for states in (key, value))
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=shares and times > 1
        )
    assert mask is not None
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # As transformers' eager attention: the softmax in float32 at least.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return torch.dropout(weights, dropout, train=dropout > 0) @ value


def _padded(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    is_causal: bool | None,
    others: dict[str, Any],
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is None:
        settings = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **settings, **others)
        return attended
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    out = _attend(query, key, value, mask, dropout=dropout, scaling=scaling, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


def _repeated(states: Tensor, times: int) -> Tensor:
    """Keys or values, one head for each head of the queries."""
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def _mask_function(
    segments: Sequence[Segment],
    length: int,
    window: int | None,
    device: torch.device,
    blocks: Mapping[int, tuple[tuple[int, int], ...]] | None = None,
    within_windows: bool = False,
) -> Any:
    """(batch, head, query, key) -> whether the query sees the key, for FlexAttention."""
    owner, context, position = (torch.zeros(length, dtype=torch.long, device=device) for _ in range(3))
    block = torch.arange(-length, 0, device=device)  # of each token its own, but in blocks
    for number, segment in enumerate(segments):
        part = slice(segment.start, segment.stop)
        before = 0 if segment.after is None else segments[segment.after].stop - segments[segment.after].start
        owner[part] = number
        context[part] = number if segment.after is None else segment.after
        position[part] = torch.arange(before, before + segment.stop - segment.start, device=device)

    for number, spans in (blocks or {}).items():
        for start, stop in spans:
            first = segments[number].start
            block[first + start : first + stop] = first + start
    reach = length if window is None else window
    wide = reach if within_windows else length
    # Nothing but tensor functions inside: FlexAttention traces it.
    return lambda batch, head, q, k: (
        (
            ((owner[q] == owner[k]) | (context[q] == owner[k]))
            & ((position[q] >= position[k]) & (position[q] - position[k] < reach))
        )
        | ((block[q] == block[k]) & (position[q] - position[k] < wide))
    )


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(
    row: Row,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    cap = softcap or 1.0
    capped = None if softcap is None else lambda score, batch, head, q, k: torch.tanh(score / cap) * cap
    key, value = (_repeated(states, query.shape[1] // states.shape[1]) for states in (key, value))
    run = _compiled_flex() if query.is_cuda else flex_attention
    mask = row.block_mask(window, query.device)
    out: Tensor = run(query, key, value, score_mod=capped, block_mask=mask, scale=scaling)
    return out
