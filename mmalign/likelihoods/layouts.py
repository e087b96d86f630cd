"""Continuations of contexts as token ids, and how a network runs them: packed in one row, or padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FEW = 0.9  # of a row's tokens: what is asked for of more of them is not worth picking out


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens of a packed row that follow each other: a context, or a continuation of one.

    Args:
        start, stop: where it stands in the row.
        after: index of the context that its tokens also attend to; None for a context.
    """

    start: int
    stop: int
    after: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Token sequences as a network runs them, and which of its predictions are scored.

    Args:
        ids: tokens. Padded: a row for each continuation, right-padded. Packed: one row.
        positions: of each token in its own sequence, from 0: a continuation goes on where its context ends.
        mask: which tokens are there (padded), or None (packed: all).
        segments: of the packed row, contexts before their continuations; empty when padded. Attention is causal within a
            segment, and a continuation sees its whole context and no other segment.
        at: flat index into `ids` of the hidden state that predicts a scored token.
        target: the scored tokens.
        slot: the sum that each scored token belongs to, in ascending order.
        weight: factor of each scored token's log-probability; None: 1.
        counts: number of scored tokens of each sum, known without asking the device.
        media: what is shown beside the tokens: packed, of each context; padded, of each row; None: nothing anywhere.
        begins: padded: where the continuation of each row begins; empty when packed.
        needed: packed: the places in `at`, each once, where they are few; None: not told.
        opposed: pairs of sums, all of them, whose gradients are known to be opposite: the loss sees only their difference.
    """

    ids: Int[Tensor, "rows length"]
    positions: Int[Tensor, "rows length"]
    mask: Bool[Tensor, "rows length"] | None
    segments: tuple[Segment, ...]
    at: Int[Tensor, " scored"]
    target: Int[Tensor, " scored"]
    slot: Int[Tensor, " scored"]
    weight: Float[Tensor, " scored"] | None
    counts: tuple[int, ...]
    media: tuple[Any | None, ...] | None = None
    begins: tuple[int, ...] = ()
    needed: Int[Tensor, " needed"] | None = None
    opposed: tuple[tuple[int, int], ...] | None = None

    @property
    def num_slots(self) -> int:
        """Number of sums."""
        return len(self.counts)

    def token_by_token(self) -> Layout:
        """The same, in which every scored token has a sum of its own, without weights."""
        count = len(self.target)
        return replace(self, slot=torch.arange(count, device=self.target.device), weight=None, counts=(1,) * count)

    def to(self, device: torch.device | str) -> Layout:
        """The same on a device; the only copies of a step, and none back. Media stay: a network moves what it needs of them."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name in ("ids", "positions", "mask", "at", "target", "slot", "weight", "needed")
            for value in (getattr(self, name),)
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Continuations of contexts, as token ids on the CPU.

    Args:
        contexts: distinct prompts, at least one token each.
        continuations: what is scored, at least one token each (EOS included where the text ends with one).
        context_of: of each continuation, the index of its context.
        weights: of each continuation, the factor of each token's log-probability; None: 1. Weight 0 is not scored.
        context_weights: the same for the tokens of each context but its first; None: contexts are not scored.
        heads: of each continuation, how many of its first tokens make its head, which has a sum of its own; None: all.
        media: of each context, what is shown in it, for the network alone to read; None: nothing anywhere.
        targets: of each continuation, what is scored in the places of its tokens; None: they themselves.
    """

    contexts: tuple[Int[Tensor, " _"], ...]
    continuations: tuple[Int[Tensor, " _"], ...]
    context_of: tuple[int, ...]
    weights: tuple[Float[Tensor, " _"], ...] | None = None
    context_weights: tuple[Float[Tensor, " _"], ...] | None = None
    heads: tuple[int, ...] | None = None
    media: tuple[Any | None, ...] | None = None
    targets: tuple[Int[Tensor, " _"], ...] | None = None

    def __post_init__(self) -> None:
        """Refuse empty sequences."""
        if any(len(ids) == 0 for ids in (*self.contexts, *self.continuations)):
            raise ValueError("tokens: got an empty context or continuation, want at least one token each.")
        if len(self.context_of) != len(self.continuations):
            raise ValueError(f"tokens: got {len(self.context_of)} context indices for {len(self.continuations)} continuations.")
        if self.media is not None and len(self.media) != len(self.contexts):
            raise ValueError(f"tokens: got media of {len(self.media)} contexts for {len(self.contexts)}, want one entry each.")

    def select(self, chosen: Sequence[int]) -> Tokens:
        """Only some of the continuations, in this order, with the contexts they need."""
        needed = sorted({self.context_of[i] for i in chosen})
        place = {context: n for n, context in enumerate(needed)}
        return Tokens(
            contexts=tuple(self.contexts[c] for c in needed),
            continuations=tuple(self.continuations[i] for i in chosen),
            context_of=tuple(place[self.context_of[i]] for i in chosen),
            weights=None if self.weights is None else tuple(self.weights[i] for i in chosen),
            context_weights=None if self.context_weights is None else tuple(self.context_weights[c] for c in needed),
            heads=None if self.heads is None else tuple(self.heads[i] for i in chosen),
            media=None if self.media is None else tuple(self.media[c] for c in needed),
            targets=None if self.targets is None else tuple(self.targets[i] for i in chosen),
        )

    @property
    def num_slots(self) -> int:
        """Sums: one a continuation, or its head and its tail; then, where contexts are scored, one a context."""
        parts = 1 if self.heads is None else 2
        return parts * len(self.continuations) + (0 if self.context_weights is None else len(self.contexts))

    def scored(self) -> Float[Tensor, " continuations"]:
        """Number of scored tokens of each continuation."""
        if self.weights is None:
            return torch.tensor([float(len(ids)) for ids in self.continuations])
        return torch.stack([(weights != 0).sum() for weights in self.weights]).float()

    def packed(self) -> Layout:
        """One row without padding, every context once. The last token of a continuation is a target only, and not run."""
        ids, positions, segments = [], [], []
        starts: list[int] = []
        at: list[Tensor] = []
        length = 0
        for context in self.contexts:
            starts.append(length)
            segments.append(Segment(start=length, stop=length + len(context)))
            ids.append(context)
            positions.append(torch.arange(len(context)))
            length += len(context)
        for number, continuation in enumerate(self.continuations):
            owner = self.context_of[number]
            before, run = len(self.contexts[owner]), len(continuation) - 1
            if run:
                segments.append(Segment(start=length, stop=length + run, after=owner))
                ids.append(continuation[:-1])
                positions.append(torch.arange(before, before + run))
            last = torch.tensor([starts[owner] + before - 1])
            at.append(torch.cat([last, torch.arange(length, length + run)]))
            length += run
        at_context = [torch.arange(start, start + len(c) - 1) for start, c in zip(starts, self.contexts, strict=True)]
        layout = self._layout(torch.cat(ids)[None], torch.cat(positions)[None], None, tuple(segments), at, at_context)
        needed = torch.from_numpy(np.unique(layout.at.numpy()))
        return replace(layout, media=self.media, needed=needed if len(needed) < FEW * length else None)

    def padded(self, *, multiple: int = 1, pad: int = 0) -> Layout:
        """A right-padded row for each continuation, its context before it.

        Args:
            multiple: the length is rounded up to one of this.
            pad: token that fills up.
        """
        rows = [torch.cat([self.contexts[c], ids]) for c, ids in zip(self.context_of, self.continuations, strict=True)]
        length = -(-max(len(row) for row in rows) // multiple) * multiple
        ids = torch.full((len(rows), length), pad)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = row, True
        positions = torch.arange(length).expand(len(rows), -1)
        at: list[Tensor] = []
        first: dict[int, int] = {}
        for number, (owner, continuation) in enumerate(zip(self.context_of, self.continuations, strict=True)):
            start = number * length + len(self.contexts[owner]) - 1
            at.append(torch.arange(start, start + len(continuation)))
            first.setdefault(owner, number)
        at_context = [
            torch.arange(first[number] * length, first[number] * length + len(context) - 1)
            for number, context in enumerate(self.contexts)
        ]
        return replace(
            self._layout(ids, positions, mask, (), at, at_context),
            media=None if self.media is None else tuple(self.media[owner] for owner in self.context_of),
            begins=tuple(len(self.contexts[owner]) for owner in self.context_of),
        )

    def _layout(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        segments: tuple[Segment, ...],
        at: list[Tensor],
        at_context: list[Tensor],
    ) -> Layout:
        """Which predictions are scored, in which slots; tokens of weight 0 are left out."""
        parts = 1 if self.heads is None else 2
        targets = list(self.continuations if self.targets is None else self.targets)
        slots = [
            torch.full((len(ids),), number)
            if self.heads is None
            else 2 * number + (torch.arange(len(ids)) >= self.heads[number]).long()
            for number, ids in enumerate(self.continuations)
        ]
        weights = list(self.weights) if self.weights is not None else [torch.ones(len(ids)) for ids in self.continuations]
        if self.context_weights is not None:
            at = at + at_context
            targets += [context[1:] for context in self.contexts]
            first = parts * len(self.continuations)
            slots += [torch.full((len(context) - 1,), first + n) for n, context in enumerate(self.contexts)]
            weights += list(self.context_weights)
        weight, slot = torch.cat(weights), torch.cat(slots)
        weighs = self.weights is not None or self.context_weights is not None
        keep: Any = weight != 0 if weighs else slice(None)
        plain = not weighs or bool((weight[keep] == 1).numpy().all())
        return Layout(
            ids=ids,
            positions=positions,
            mask=mask,
            segments=segments,
            at=torch.cat(at)[keep],
            target=torch.cat(targets)[keep],
            slot=slot[keep],
            weight=None if plain else weight[keep],
            counts=tuple(torch.bincount(slot[keep], minlength=self.num_slots).tolist()),
        )
