"""A model that answers without images or under degraded ones: one that sees, or a plain language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmalign.answerers import Answerer, opened_encoder, opened_model, own_words, provenance_of, template_text
from mmalign.errors import UserError
from mmalign.records import Content

TINY = "tiny"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt as token ids, and what the model takes beside them where it shows something."""

    ids: list[int]
    shown: dict[str, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """One answer: its words, its number of tokens, and whether it came to an end by itself."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A frozen model and its encoder.

    Args:
        answerer: how it is sampled.
        model: of transformers.
        encoder: prompts -> token ids.
        tokenizer: of transformers.
        provenance: what made the answers, as recorded with each of them.
    """

    answerer: Answerer
    model: Any
    encoder: Any
    tokenizer: Any
    provenance: dict[str, Any]

    def asked(self, prompt: Content, condition: Any = None) -> Asked:
        """A prompt as the model takes it.

        Args:
            prompt: without images, or with those that are shown.
            condition: of `multimodal.degradations`, under which images are shown.
        Raises:
            UserError: a prompt that the template or the processor refuses, or images and a model that does not see.
        """
        if not prompt.media():
            return Asked(ids=self.encoder.prompt(prompt))
        if not hasattr(self.encoder, "arguments"):
            raise UserError(f"model: got {self.answerer.model}, which sees nothing, want a model that sees. Name another one.")
        told = self.encoder.arguments(prompt, condition)
        return Asked(ids=told.pop("input_ids")[0].tolist(), shown={n: t for n, t in told.items() if n != "attention_mask"})

    def answers(self, prompts: Sequence[Asked], seeds: Sequence[int]) -> list[Spoken]:
        """An answer to each prompt, alike whatever it is batched with, and never without a visible character.

        Prompts that show something are answered one by one.

        Args:
            prompts: up to where the model answers.
            seeds: one a prompt, for a temperature above 0.
        """
        from mmalign.language.generation import ends_of, generate_ids

        ends = ends_of(self.model, self.tokenizer)
        alone = any(one.shown for one in prompts)
        groups = [[n] for n in range(len(prompts))] if alone else [list(range(len(prompts)))]
        found: list[list[int]] = []
        for group in groups:
            found += generate_ids(
                self.model,
                [prompts[n].ids for n in group],
                max_new_tokens=self.answerer.max_new_tokens,
                pad=self.tokenizer.pad_token_id or 0,
                eos=ends,
                temperature=self.answerer.temperature,
                top_k=self.answerer.top_k,
                top_p=self.answerer.top_p,
                seeds=[seeds[n] for n in group],
                never_empty=self.tokenizer,
                shown=prompts[group[0]].shown,
            )
        return [
            Spoken(
                text=self.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                tokens=len(ids),
                ended=bool(ids) and ids[-1] in ends,
            )
            for ids in found
        ]


def opened_speaker(answerer: Answerer, device: Any) -> Speaker:
    """The model that is named, as one that sees where it does.

    Raises:
        UserError: no such model, processor, tokenizer or template.
    """
    if sees(answerer):
        return _sighted(answerer, device)
    encoder = opened_encoder(answerer)
    model = opened_model(answerer, device)
    return Speaker(
        answerer=answerer,
        model=model,
        encoder=encoder,
        tokenizer=encoder.tokenizer,
        provenance=provenance_of(answerer, model),
    )


def sees(answerer: Answerer) -> bool:
    """Whether the config of the model is that of a family that sees; the tiny model does.

    Raises:
        UserError: there is no config.
    """
    from transformers import AutoConfig

    from mmalign.multimodal.families import FAMILIES

    if answerer.model == TINY:
        return True
    try:
        config = AutoConfig.from_pretrained(
            str(answerer.model), revision=answerer.revision, trust_remote_code=answerer.trust_remote_code
        )
    except (OSError, ValueError) as fault:
        first = str(fault).strip().splitlines()[0]
        raise UserError(f"model: cannot open {answerer.model} ({first}). Name a folder or a hub id.") from fault
    return config.model_type in FAMILIES


def _sighted(answerer: Answerer, device: Any) -> Speaker:
    import torch

    from mmalign.multimodal.opening import family_of, fit_processor, open_processor, open_sighted
    from mmalign.multimodal.processing import SightedEncoder

    name = str(answerer.model)
    common: dict[str, Any] = {"revision": answerer.revision, "trust_remote_code": answerer.trust_remote_code}
    with own_words():
        processor = open_processor(name, tiny=answerer.tiny, **common)
        model = open_sighted(name, dtype=getattr(torch, answerer.dtype), device=device, tiny=answerer.tiny, **common)
        fit_processor(processor, model)
        if answerer.chat_template is not None:
            processor.chat_template = template_text(answerer.chat_template)
    model.requires_grad_(False)
    encoder = SightedEncoder(
        processor=processor,
        model_type=model.config.model_type,
        family=family_of(model),
        config=model.config,
        template=answerer.template or "auto",
        system_prompt=answerer.system_prompt,
        max_prompt_length=answerer.max_prompt_length,
    )
    return Speaker(
        answerer=answerer,
        model=model.eval(),
        encoder=encoder,
        tokenizer=processor.tokenizer,
        provenance=provenance_of(answerer, model),
    )
