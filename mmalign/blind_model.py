"""A model that answers prompts with images, without them or under degraded ones: one that sees, or a plain language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from mmalign.answerers import (
    Answerer,
    opened_encoder,
    opened_model,
    own_words,
    provenance_of,
    sees_by_run,
    template_text,
)
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
    """One answer: its words, its number of tokens, whether it came to an end by itself, and its token ids."""

    text: str
    tokens: int
    ended: bool
    ids: list[int] = field(default_factory=list, repr=False)


def asked(encoder: Any, prompt: Content, condition: Any = None, *, name: Any = "one") -> Asked:
    """A prompt as the model takes it.

    Args:
        encoder: `SightedEncoder`, or `language.chat.Encoder`.
        prompt: without images, or with those that are shown.
        condition: of `multimodal.degradations`, under which images are shown.
        name: of the model, for messages.
    Raises:
        UserError: a prompt that the template or the processor refuses, or images and a model that does not see.
    """
    if not prompt.media():
        return Asked(ids=encoder.prompt(prompt))
    if not hasattr(encoder, "arguments"):
        raise UserError(f"model: got {name}, which sees nothing, want a model that sees. Name another one.")
    told = encoder.arguments(prompt, condition)
    return Asked(ids=told.pop("input_ids")[0].tolist(), shown={n: t for n, t in told.items() if n != "attention_mask"})


def spoken(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Asked],
    seeds: Sequence[int] = (),
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[Spoken]:
    """An answer to each prompt, alike whatever it is batched with, and never without a visible character.

    Prompts that show something are answered together as far as their tensors go together.

    Args:
        model, tokenizer: of transformers.
        prompts: up to where the model answers.
        seeds: one a prompt, for a temperature above 0.
        max_new_tokens, temperature, top_k, top_p: of `language.generation.generate_ids`.
    """
    from mmalign.language.generation import ends_of, generate_ids
    from mmalign.multimodal.batches import alike, stacked

    ends = ends_of(model, tokenizer)
    found: dict[int, list[int]] = {}
    for group in alike([one.shown for one in prompts]):
        own = [prompts[n] for n in group]
        shown = [one.shown for one in own if one.shown]
        answers = generate_ids(
            model,
            [one.ids for one in own],
            max_new_tokens=max_new_tokens,
            pad=tokenizer.pad_token_id or 0,
            eos=ends,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=[seeds[n] for n in group] if seeds else (),
            never_empty=tokenizer,
            shown=stacked(shown, [len(one.ids) for one in own]) if shown else None,
        )
        found |= dict(zip(group, answers, strict=True))
    said = [found[n] for n in range(len(prompts))]
    return [
        Spoken(
            text=tokenizer.decode(ids, skip_special_tokens=True), tokens=len(ids), ended=bool(ids) and ids[-1] in ends, ids=ids
        )
        for ids in said
    ]


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
        """A prompt as the model takes it; see `asked`."""
        return asked(self.encoder, prompt, condition, name=self.answerer.model)

    def spoken(self, prompts: Sequence[Asked], seeds: Sequence[int]) -> list[Spoken]:
        """An answer to each prompt; see `spoken`."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p")
        return spoken(self.model, self.tokenizer, prompts, seeds, **{name: getattr(self.answerer, name) for name in names})

    def answers(self, prompts: Sequence[Asked], seeds: Sequence[int]) -> list[Spoken]:
        """The same, without blanks around the words."""
        return [replace(one, text=one.text.strip()) for one in self.spoken(prompts, seeds)]


def opened_speaker(answerer: Answerer, device: Any) -> Speaker:
    """The model that is named, as one that sees where it does.

    Raises:
        UserError: no such model, processor, tokenizer or template.
    """
    seeing = sees(answerer)
    return speaker_of(answerer, sighted_encoder(answerer) if seeing else opened_encoder(answerer), device, seeing=seeing)


def speaker_of(answerer: Answerer, encoder: Any, device: Any, *, seeing: bool) -> Speaker:
    """The model behind an encoder of its own, opened.

    Raises:
        UserError: no such model, or weights that do not fit it.
    """
    model = opened_model(answerer, device, sees=seeing)
    return Speaker(
        answerer=answerer,
        model=model,
        encoder=encoder,
        tokenizer=encoder.processor.tokenizer if seeing else encoder.tokenizer,
        provenance=provenance_of(answerer, model),
    )


def sees(answerer: Answerer) -> bool:
    """Whether it is the tuned model of a run that sees, or its config is that of a family that does; the tiny model sees.

    Raises:
        UserError: there is no config.
    """
    from mmalign.multimodal.families import FAMILIES

    if answerer.tuned is not None:
        return sees_by_run(answerer.tuned)
    return answerer.model == TINY or _config_of(answerer).model_type in FAMILIES


def sighted_encoder(answerer: Answerer) -> Any:
    """`multimodal.processing.SightedEncoder` with the model's processor; no weights are read.

    Raises:
        UserError: no such processor, or no such file of a template.
    """
    from mmalign.multimodal.opening import family_of, fit_processor, open_processor
    from mmalign.multimodal.processing import SightedEncoder

    with own_words():
        processor = open_processor(
            str(answerer.model),
            revision=answerer.revision,
            trust_remote_code=answerer.trust_remote_code,
            tiny=answerer.tiny,
        )
        known = SimpleNamespace(config=_config_of(answerer))
        family = family_of(known)
        fit_processor(processor, known)
        if answerer.chat_template is not None:
            processor.chat_template = template_text(answerer.chat_template)
    return SightedEncoder(
        processor=processor,
        model_type=known.config.model_type,
        family=family,
        config=known.config,
        template=answerer.template or "auto",
        template_kwargs=answerer.chat_template_kwargs or {},
        system_prompt=answerer.system_prompt,
        max_prompt_length=answerer.max_prompt_length,
        as_video=bool(answerer.as_video),
        num_frames=answerer.num_frames,
        settings=answerer.processor or {},
    )


def _config_of(answerer: Answerer) -> Any:
    from transformers import AutoConfig

    from mmalign.multimodal.tiny import tiny_folder

    name = str(tiny_folder(answerer.tiny)) if answerer.model == TINY else str(answerer.model)
    try:
        return AutoConfig.from_pretrained(name, revision=answerer.revision, trust_remote_code=answerer.trust_remote_code)
    except (OSError, ValueError) as fault:
        first = str(fault).strip().splitlines()[0]
        raise UserError(f"model: cannot open {answerer.model} ({first}). Name a folder or a hub id.") from fault
