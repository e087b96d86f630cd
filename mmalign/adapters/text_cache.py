"""Reference log-probabilities of texts on disk, token by token: they serve every loss, beta, learning rate and LD alpha."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.cache import TensorStore, content_key
from mmalign.cache.part import Fields
from mmalign.errors import UserError
from mmalign.likelihoods import TokenInputs, Tokens
from mmalign.likelihoods.networks import Measures
from mmalign.records import Example

if TYPE_CHECKING:
    from mmalign.adapters.text_policy import TextPolicy

T = TypeVar("T")
CHUNK = 64  # tokens of a record
BATCH = 4  # examples of a pass that fills


class ReferenceBank:
    """An opened cache of reference log-probabilities.

    A record holds the log-probabilities of up to 64 tokens of one sequence. Its key is made of the token ids of context and
    continuation, and of what the context shows: rows that are added, dropped, reordered or paired anew find what is there.
    The fingerprint of the store is that of the weights and of how they are run.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], part: int | None) -> None:
        """Use `of`."""
        self.folder = folder
        self.reading = part is None
        fields: Fields = {"logps": ((CHUNK,), torch.float32)}
        if self.reading and not folder.exists():
            raise UserError(f"adapter.cache: {folder} does not exist. Fill it with mmalign prepare, or set cache to null.")
        if self.reading:
            self.store = TensorStore.open(folder, fields=fields, fingerprint=fingerprint)
        else:
            self.store = TensorStore.open_or_create(folder, fields=fields, fingerprint=fingerprint, part=part or 0)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.store.num_bytes

    def measures(self, inputs: TokenInputs) -> Measures:
        """The reference's measures of these inputs, under the names of `TokenInputs.measures`.

        Raises:
            UserError: a sequence is not there.
        """
        layout = inputs.tokens.packed()
        values = self._read(inputs.tokens)
        # Added one by one in float32, a thousand nats would be off by a thousandth.
        sums = torch.zeros(layout.num_slots, dtype=torch.float64)
        weight = 1.0 if layout.weight is None else layout.weight.double()
        sums.index_add_(0, layout.slot, values.double() * weight)
        measured = replace(inputs, wanted=inputs.wanted & {"shared", "joint"}).of_slots({"logps": sums.float()})
        return {name: value.to(inputs.device, non_blocking=True) for name, value in measured.items()}

    def counts(self) -> dict[str, int]:
        """There is nothing beside reference logps."""
        return {}

    def fill(self, policy: TextPolicy, examples: Iterable[Example]) -> None:
        """Texts are tokenised when they are read: there is nothing to encode ahead."""

    def fill_references(self, policy: TextPolicy, examples: Iterable[Example], num_candidates: int, autocast: Any) -> None:
        """Add what is missing of these examples."""
        with policy.reference() as network, self.store:
            for group in _groups(examples, BATCH):
                batch = policy.collate([policy.item(example, 0) for example in group])
                inputs = policy.prepare(batch).inputs
                chosen = self._missing(inputs.tokens)
                if not chosen:
                    continue
                tokens = inputs.tokens.select(chosen)
                layout = tokens.packed() if inputs.pack else tokens.padded(pad=inputs.pad)
                with torch.no_grad(), autocast():
                    values = network(layout.token_by_token().to(inputs.device))["logps"].float().cpu()
                self._write(tokens, values)

    def close(self) -> None:
        """Give the lock of a writer back."""
        self.store.close()

    def _missing(self, tokens: Tokens) -> list[int]:
        """Continuations of which a record is missing, or of whose context one is."""
        keys = [
            [*_keys(tokens, number), *(_context_keys(tokens, owner) if tokens.context_weights is not None else [])]
            for number, owner in enumerate(tokens.context_of)
        ]
        absent = set(self.store.missing([key for row in keys for key in row]))
        return [number for number, row in enumerate(keys) if absent & set(row)]

    def _read(self, tokens: Tokens) -> Float[Tensor, " scored"]:
        """Log-probabilities of the scored tokens, in the order of a layout: by continuations, then contexts."""
        wanted = [(_keys(tokens, n), len(ids)) for n, ids in enumerate(tokens.continuations)]
        if tokens.context_weights is not None:
            wanted += [(_context_keys(tokens, n), len(ids) - 1) for n, ids in enumerate(tokens.contexts)]
        try:
            records = self.store.get([key for keys, _ in wanted for key in keys])["logps"]
        except UserError as fault:
            raise UserError(
                f"adapter.cache: {self.folder} lacks texts of this run. Fill it with mmalign prepare and the same config."
            ) from fault
        values, start = [], 0
        for keys, length in wanted:
            values.append(records[start : start + len(keys)].flatten()[:length])
            start += len(keys)
        weights = [] if tokens.weights is None else list(tokens.weights)
        if tokens.weights is None:
            weights = [torch.ones(len(ids)) for ids in tokens.continuations]
        weights += tokens.context_weights or ()
        return torch.cat(values)[torch.cat(weights) != 0]

    def _write(self, tokens: Tokens, values: Float[Tensor, " scored"]) -> None:
        """Records of sequences whose scored tokens have these values; a token that is not scored is kept as 0."""
        weights = list(tokens.weights or (torch.ones(len(ids)) for ids in tokens.continuations))
        keys = [_keys(tokens, n) for n in range(len(tokens.continuations))]
        if tokens.context_weights is not None:
            weights += tokens.context_weights
            keys += [_context_keys(tokens, n) for n in range(len(tokens.contexts))]
        whole = torch.zeros(sum(map(len, weights)))
        whole[torch.cat(weights) != 0] = values
        records: dict[str, Tensor] = {}
        for own, part in zip(keys, torch.split(whole, [len(one) for one in weights]), strict=True):
            padded = torch.zeros(len(own) * CHUNK)
            padded[: len(part)] = part
            records.update(zip(own, padded.view(-1, CHUNK), strict=True))
        self.store.add(list(records), {"logps": torch.stack(list(records.values()))})


def _keys(tokens: Tokens, number: int) -> list[str]:
    """Of the records of a continuation; those of tokens that are not scored differ, because they are kept as 0."""
    context, ids = tokens.contexts[tokens.context_of[number]], tokens.continuations[number]
    left_out = None if tokens.weights is None else tokens.weights[number] == 0
    # Whether weights are told depends on the other rows of a batch; the key must not.
    scored = "" if left_out is None or not left_out.any() else (~left_out).numpy().tobytes().hex()
    chunks = -(-len(ids) // CHUNK)
    shown = _shown(tokens, tokens.context_of[number])
    return [content_key("answer", _bytes(context), _bytes(ids), scored, chunk, *shown) for chunk in range(chunks)]


def _context_keys(tokens: Tokens, number: int) -> list[str]:
    ids = tokens.contexts[number]
    shown = _shown(tokens, number)
    return [content_key("prompt", _bytes(ids), chunk, *shown) for chunk in range(-(-(len(ids) - 1) // CHUNK))]


def _shown(tokens: Tokens, owner: int) -> tuple[str, ...]:
    """The key of what a context shows; nothing for one of text alone."""
    media = None if tokens.media is None else tokens.media[owner]
    return () if media is None else (media.key,)


def _bytes(ids: Tensor) -> bytes:
    return ids.numpy().astype(np.int32).tobytes()


def _groups(items: Iterable[T], size: int) -> Iterator[Sequence[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
