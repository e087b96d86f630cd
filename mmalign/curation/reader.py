"""A language model that says how likely it finds answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.language.chat import Encoded, Encoder
from mmalign.language.network import TokenNetwork
from mmalign.language.opening import load_weights, open_model, open_tokenizer
from mmalign.likelihoods import Tokens
from mmalign.records import Sample


def opened(what: str, model: str, revision: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        what: who asks for it, for messages.
        model: folder, hub id, or `tiny`.
        revision: of a hub id.
        dtype: float32, bfloat16 or float16.
        device: auto, cpu, cuda ...

    Raises:
        UserError: no such model or device.
    """
    where = torch_device(device)
    try:
        network = open_model(model, revision=revision, dtype=getattr(torch, dtype), device=where)
        return network, open_tokenizer(model, revision=revision)
    except UserError as fault:
        raise UserError(f"{what}: {str(fault).partition(': ')[2]}") from fault


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A language model that says how likely it finds answers.

    Args:
        network, encoder: the model, and how samples become its tokens.
        limit: tokens of the longest prompt and answer together; None: any.
    """

    network: TokenNetwork
    encoder: Encoder
    limit: int | None

    @classmethod
    def open(
        cls,
        what: str,
        *,
        model: str,
        weights: str | None,
        revision: str | None,
        system_prompt: str | None,
        max_length: int | None,
        dtype: str,
        device: str,
    ) -> "Reader":
        """Open one; see `likelihood` for the settings."""
        network, tokenizer = opened(what, model, revision, dtype, device)
        if weights is not None:
            load_weights(network, Path(weights).expanduser())
        limit = max_length or getattr(network.config, "max_position_embeddings", None)
        return cls(
            network=TokenNetwork(network), encoder=Encoder(tokenizer=tokenizer, system_prompt=system_prompt), limit=limit
        )

    def encode(self, samples: Mapping[str, Sequence[Sample]]) -> dict[str, Encoded]:
        """Token ids under the same keys, what needs most memory first; those that are too long are left out."""
        encoded = dict(zip(samples, self.encoder.all(list(samples.values())), strict=True))
        lengths = {key: longest(one) for key, one in encoded.items()}
        order = sorted(encoded, key=lambda key: (-lengths[key], key))
        return {key: encoded[key] for key in order if self.limit is None or lengths[key] <= self.limit}

    @torch.no_grad()
    def sums(self, rows: Sequence[Encoded]) -> list[tuple[float, ...]]:
        """Summed log-probability of every sample of every row, in nats."""
        contexts, continuations, owners, weights = list[Tensor](), list[Tensor](), list[int](), list[Tensor]()
        for row in rows:
            owners += [len(contexts) + owner for owner in row.context_of]
            contexts += [torch.tensor(ids) for ids in row.contexts]
            continuations += [torch.tensor(ids) for ids in row.continuations]
            for ids, places in zip(row.continuations, row.scored, strict=True):
                weights.append(torch.zeros(len(ids)))
                weights[-1][list(places)] = 1.0
        tokens = Tokens(
            contexts=tuple(contexts), continuations=tuple(continuations), context_of=tuple(owners), weights=tuple(weights)
        )
        layout = tokens.packed() if self.network.packs else tokens.padded()
        sums = iter(self.network(layout.to(next(self.network.parameters()).device))["logps"].double().tolist())
        return [tuple(next(sums) for _ in row.continuations) for row in rows]


def longest(row: Encoded) -> int:
    """Tokens of the longest prompt and answer together."""
    return max(len(row.contexts[c]) + len(ids) for c, ids in zip(row.context_of, row.continuations, strict=True))
