"""Prompts with answers as token ids, for scorers of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmalign.errors import UserError

Prompt = str | Sequence[Mapping[str, Any]]  # a text, or messages as chat templates want them
Template = Literal["always", "auto", "never"]
FULL = "model"  # the folder, in a run's output, of a full fine-tune


class ConversationReader:
    """Tokenises a prompt and an answer as the one text that a reward model reads."""

    def __init__(
        self, tokenizer: Any, template: Template, max_length: int, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Keep the settings.

        Args:
            tokenizer: of transformers.
            template: always: a prompt that is a text is the user's message, where the tokenizer has a template. auto: only
                messages go through it, as in training with `template: auto`. never: prompt and answer one after the other.
            max_length: tokens; a longer text loses its beginning.
            template_kwargs: given to the template, by names of its own.
        """
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.template_kwargs = template_kwargs or {}

    def __call__(self, prompt: Prompt, text: str) -> tuple[list[int], int]:
        """Token ids, and how many of them are the prompt's.

        Raises:
            UserError: messages, and no template; or one that refuses them; an image, which no such scorer sees.
        """
        if not isinstance(prompt, str) and any(_shows(one) for one in prompt):
            raise UserError(
                "scorer: got a prompt with images, which a reward model of texts does not see. Name a measure of texts "
                "(text_length, short_words), or judge by people: mmalign annotate."
            )
        if self._is_chat(prompt):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(one) for one in prompt]
            before = self._rendered(messages, goes_on=True)
            whole = self._rendered([*messages, {"role": "assistant", "content": text}], goes_on=False)
            asked, said = (self.tokenizer(one, add_special_tokens=False)["input_ids"] for one in (before, whole))
        else:
            before = prompt if isinstance(prompt, str) else "\n".join(str(one["content"]) for one in prompt)
            asked, said = (self.tokenizer(one)["input_ids"] for one in (before, before + text))
            end = self.tokenizer.eos_token_id
            said = [*said, end] if end is not None and said[-1:] != [end] else said
        common = next((n for n, (a, b) in enumerate(zip(asked, said, strict=False)) if a != b), min(len(asked), len(said) - 1))
        cut = max(0, len(said) - self.max_length)
        return said[cut:], max(1, common - cut)

    def _is_chat(self, prompt: Prompt) -> bool:
        if self.template == "never":
            return False
        if isinstance(prompt, str):
            return self.template == "always" and self.tokenizer.chat_template is not None
        if self.tokenizer.chat_template is None:
            raise UserError("scorer: got messages, and the model's tokenizer has no chat template. Set template: never.")
        return True

    def _rendered(self, messages: list[dict[str, Any]], *, goes_on: bool) -> str:
        try:
            out: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=goes_on, **self.template_kwargs
            )
        except Exception as fault:  # jinja's errors have no common base with those that templates raise
            raise UserError(
                f"scorer: the model's chat template refuses the conversation {str(messages)[:80]} ({fault}). Correct the roles."
            ) from fault
        return out


def _shows(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return not isinstance(content, str) and any(part.get("type") != "text" for part in content or ())


def open_reader(
    model: str,
    *,
    revision: str | None,
    template: Template,
    max_length: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ConversationReader:
    """The reader for a model's own tokenizer.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(weights_of(model), revision=revision)
    except (OSError, ValueError) as fault:
        raise UserError(
            f"scorer.model: got {model}, and no tokenizer is there ({told(fault)}). Name a folder or hub id."
        ) from fault
    return ConversationReader(tokenizer, template, max_length, template_kwargs)


def padded(texts: Sequence[Sequence[int]], pad: int) -> tuple[Int[Tensor, "rows length"], Bool[Tensor, "rows length"]]:
    """Token ids padded on the right, and where they are."""
    ids = torch.full((len(texts), max(map(len, texts))), pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(list(text)), True
    return ids, mask


def weights_of(model: str) -> str:
    """Where the model lies: a folder, a hub id, or in a run's output the folder `model`."""
    full = Path(model) / FULL
    return str(full) if (full / "config.json").is_file() else model


def is_lora(model: str) -> bool:
    """Whether a folder holds low-rank weights."""
    return (Path(model) / "adapter_config.json").is_file()


def told(fault: BaseException) -> str:
    """The first line of a message."""
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]
