"""Examples of texts as items and micro-batches of token ids, for worker processes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.adapters.side import side_tensors
from mmalign.config import Choice
from mmalign.errors import UserError
from mmalign.language.chat import Encoded, Encoder
from mmalign.records import Example


@dataclass(frozen=True)
class Reader:
    """Examples -> items, for worker processes; holds a tokenizer and no model.

    Args:
        encoder: how samples become token ids.
        extras: names of the further completions that the losses ask for.
        draws: whether they ask for a draw.
        seed: of the draws.
        weights: `(example, encoded) -> weights`, see `weights_of`; None: all tokens weigh 1.
    """

    encoder: Encoder
    extras: tuple[str, ...]
    draws: bool
    seed: int
    weights: Choice | None = None

    def item(self, example: Example, epoch: int) -> dict[str, Any]:
        """Token ids of an example's candidates and of the further completions that the losses ask for.

        Raises:
            UserError: a candidate is empty, a completion is missing, or the template refuses the conversation.
        """
        missing = [name for name in self.extras if name not in example.extras]
        if missing:
            raise UserError(f"{example.id}: has no {missing[0]}, which the loss asks for. Add it, or filter the rows.")
        samples = (*example.samples, *(example.extras[name] for name in self.extras))
        try:
            encoded = self.encoder(samples)
        except UserError as fault:
            raise UserError(f"{example.id}: {fault}") from fault
        side = dict(example.side)
        if self.draws:
            side["draw"] = drawn_number(self.seed, epoch, example.id)
        weights = None if self.weights is None else weights_of(self.weights, example, encoded)
        return {"id": example.id, "encoded": encoded, "side": side, "k": len(example.samples), "weights": weights}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Several items as one micro-batch; see `collated`."""
        return collated(items, weighted=self.weights is not None)


def drawn_number(seed: int, epoch: int, example: str) -> float:
    """A number in [0, 1) that belongs to an example in an epoch, however batches are split."""
    digest = hashlib.sha256(f"{seed} {epoch} {example}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def collated(items: Sequence[Mapping[str, Any]], *, weighted: bool) -> dict[str, Any]:
    """Several items as one micro-batch.

    Raises:
        UserError: the items differ in their number of candidates or in their side data.
    """
    counts = {item["k"] for item in items}
    if len(counts) > 1:
        raise UserError(
            f"data: got {sorted(counts)} candidates in one batch, want one number. "
            "Set data.view.num_candidates, or filter the rows."
        )
    return {
        "id": [item["id"] for item in items],
        "encoded": [item["encoded"] for item in items],
        "side": side_tensors([item["side"] for item in items]),
        "k": next(iter(counts)),
        "weights": [item["weights"] for item in items] if weighted else None,
    }


def weights_of(choice: Choice, example: Example, encoded: Encoded) -> list[list[float]]:
    """Weights of the scored tokens of each candidate of an example: factors of their log-probabilities.

    Args:
        choice: a function `(example, encoded) -> one list a candidate, of one number a scored token`.
        example: the example.
        encoded: its token ids, further completions after the candidates; `encoded.lengths` are the numbers wanted.

    Raises:
        UserError: another number of lists or weights, or one that is negative or not finite.
    """
    found = [[float(weight) for weight in row] for row in choice.build(example, encoded)]
    got, wanted = [len(row) for row in found], list(encoded.lengths[: len(example.samples)])
    where = f"{example.id}: adapter.token_weights: {choice.name}"
    if got != wanted:
        raise UserError(f"{where} gives {got} weights, want {wanted}: one for each scored token of each candidate.")
    strange = next((weight for row in found for weight in row if not 0 <= weight < math.inf), None)
    if strange is not None:
        raise UserError(f"{where} gives a weight of {strange:g}, want 0 or more, and finite.")
    return found
