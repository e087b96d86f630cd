"""A frozen teacher of another language model: what it makes of a layout, opened beside the policy and never trained."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign.errors import UserError
from mmalign.language.distillation import Lesson
from mmalign.language.network import TokenNetwork
from mmalign.language.opening import load_weights, lora_layers, lora_off
from mmalign.likelihoods import Layout


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Frozen models that a policy learns from: `teacher(layout) -> Lesson`.

    Args:
        network: the teacher.
        reference: what it was tuned from. None with `lora`: the teacher without its LoRA.
        lora: the teacher's layers with low-rank weights.
        with_reference: whether lessons hold the reference's part.
        top_k: see `Lesson`.
    """

    network: TokenNetwork
    reference: TokenNetwork | None = None
    lora: tuple[Any, ...] = ()
    with_reference: bool = False
    top_k: int | None = None

    def __call__(self, layout: Layout) -> Lesson:
        """What it makes of the scored tokens, without a graph."""
        with torch.no_grad():
            states = self.network.states(layout)
            head = self.network.head(states)
            if not self.with_reference:
                return Lesson(states=states, head=head, top_k=self.top_k)
            reference = self.reference or self.network
            off: AbstractContextManager[None] = nullcontext() if self.reference is not None else lora_off(self.lora)
            with off:
                before = reference.states(layout)
                return Lesson(
                    states=states,
                    head=head,
                    reference_states=before,
                    reference_head=reference.head(before),
                    top_k=self.top_k,
                )

    @property
    def networks(self) -> list[TokenNetwork]:
        """The models it consists of."""
        return [self.network] if self.reference is None else [self.network, self.reference]

    @property
    def num_parameters(self) -> int:
        """Weights of all models."""
        return sum(weight.numel() for network in self.networks for weight in network.parameters())


def frozen_network(model: Any, *, lora: Path | None = None, pack: bool = True) -> tuple[TokenNetwork, tuple[Any, ...]]:
    """A model, with the LoRA or the weights that a run left in a folder, and its layers with low-rank weights; all frozen.

    Raises:
        UserError: the folder holds nothing that fits.
    """
    if lora is not None:
        load_weights(model, lora)
    network = TokenNetwork(model.requires_grad_(False), pack=pack)
    return network.eval(), tuple(lora_layers(model)) if lora is not None else ()


def check_vocabulary(where: str, model: Any, tokenizer: Any, policy: Any, policy_tokenizer: Any) -> None:
    """Refuse a teacher that does not speak in the policy's tokens.

    Args:
        where: the key of the config that names the teacher.
        model, tokenizer: the teacher's.
        policy, policy_tokenizer: the policy's.
    Raises:
        UserError: another number of words, or words of other ids.
    """
    theirs, ours = (one.get_output_embeddings().weight.shape[0] for one in (model, policy))
    if theirs != ours:
        raise UserError(
            f"{where}: got a teacher with {theirs} words in its output layer for a policy with {ours}, want the same "
            "vocabulary. Choose a teacher of the policy's family."
        )
    known: Mapping[str, int] = policy_tokenizer.get_vocab()
    other: Mapping[str, int] = tokenizer.get_vocab()
    if known != other:
        word = min(word for word in known.keys() | other.keys() if known.get(word) != other.get(word))
        raise UserError(
            f"{where}: got a teacher whose tokenizer differs from the policy's, first in {word!r} (id {other.get(word)}, "
            f"want {known.get(word)}). Choose a teacher of the policy's family."
        )
