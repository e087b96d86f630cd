"""Reward models of texts as scorers: any sequence classifier of transformers with one label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.scorers.conversation import (
    ConversationReader,
    Prompt,
    Template,
    is_lora,
    open_reader,
    padded,
    told,
    weights_of,
)


@dataclass(frozen=True, kw_only=True)
class TextReward:
    """A reward model that is asked for a score of every text (see `text_reward`)."""

    name: str
    model: Any
    reader: ConversationReader
    batch_size: int
    judges: ClassVar[str] = "texts"

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Scores in the model's own units. Texts of like length go together."""
        rows = [self.reader(prompt, text)[0] for prompt, text in zip(prompts, texts, strict=True)]
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        scores = torch.zeros(len(rows))
        pad = self.model.config.get_text_config().pad_token_id
        size = self.batch_size if pad is not None else 1  # without one the model tells no end of a shorter text
        for start in range(0, len(order), size):
            group = order[start : start + size]
            ids, mask = (one.to(self.model.device) for one in padded([rows[n] for n in group], pad or 0))
            logits = self.model(input_ids=ids, attention_mask=mask.long()).logits
            scores[group] = logits[:, 0].float().cpu()
        return scores


def text_reward(
    *,
    model: str,
    revision: str | None = None,
    template: Template = "always",
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None,
    max_length: int = 4096,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    batch_size: int = 8,
    device: str = "auto",
) -> TextReward:
    """A reward model's score of an answer to its prompt.

    Source: sequence classifiers with one label, as `adapter: text_reward`, TRL and OpenRLHF train them; the score is the
        model's own, at the token where transformers reads it.
    Args:
        model: folder or hub id for `AutoModelForSequenceClassification`, or the output of a run of `adapter: text_reward`.
        revision: hub branch, tag or commit.
        template: see `ConversationReader`; auto for a model that was trained here on prompts that are plain texts.
        chat_template_kwargs: given to the chat template, by names of its own: those that it was trained with.
        max_length: tokens of prompt and answer.
        dtype: of the weights.
        batch_size: texts per forward.
        device: `auto` is the GPU if there is one.
    Raises:
        UserError: no such model, or one with several labels.
    """
    from transformers import AutoModelForSequenceClassification

    how: dict[str, Any] = {"template": template, "max_length": max_length, "template_kwargs": chat_template_kwargs}
    reader = open_reader(model, revision=revision, **how)
    folder = weights_of(model)
    more = {"num_labels": 1, "pad_token_id": reader.tokenizer.pad_token_id} if is_lora(folder) else {}
    try:
        network = AutoModelForSequenceClassification.from_pretrained(
            folder, revision=revision, dtype=getattr(torch, dtype), **more
        )
    except (OSError, ValueError, RuntimeError) as fault:
        raise UserError(f"text_reward.model: cannot open {model} ({told(fault)}). Name a sequence classifier.") from fault
    if network.config.num_labels != 1:
        raise UserError(
            f"text_reward.model: got {model} with {network.config.num_labels} labels, want a reward model with one."
        )
    network = network.to(torch_device(device)).eval().requires_grad_(False)
    return TextReward(name="text_reward", model=network, reader=reader, batch_size=batch_size)
