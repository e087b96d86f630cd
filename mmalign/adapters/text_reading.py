"""Examples of texts as items and micro-batches of token ids, for worker processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.adapters.side import side_tensors
from mmalign.errors import UserError
from mmalign.language.chat import Encoder
from mmalign.records import Example


@dataclass(frozen=True)
class Reader:
    """Examples -> items, for worker processes; holds a tokenizer and no model."""

    encoder: Encoder
    extras: tuple[str, ...]
    draws: bool
    seed: int

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
            digest = hashlib.sha256(f"{self.seed} {epoch} {example.id}".encode()).digest()
            side["draw"] = int.from_bytes(digest[:6], "big") / 2**48
        return {"id": example.id, "encoded": encoded, "side": side, "k": len(example.samples)}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
        }
