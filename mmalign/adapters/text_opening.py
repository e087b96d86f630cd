"""Open a language model of texts for training, with its tokenizer, its reference and the reader of its examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmalign.adapters.text_policy import EXTRAS, Parts, asked_measures
from mmalign.adapters.text_reading import Reader
from mmalign.cache import weights_fingerprint
from mmalign.errors import UserError
from mmalign.language.chat import Encoder
from mmalign.language.network import TokenNetwork
from mmalign.language.opening import (
    add_lora,
    check_vocabulary,
    from_anywhere,
    frozen_copy,
    learned_positions,
    load_weights,
    open_model,
    open_tokenizer,
)
from mmalign.language.tiny import TINY, tiny_folder
from mmalign.likelihoods.tokens import GRADED

if TYPE_CHECKING:
    from mmalign.adapters.text import TextAdapter

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}


def text_parts(
    settings: TextAdapter,
    *,
    device: torch.device,
    mixed_precision: str,
    seed: int,
    needs_reference: bool,
    caching: int | None,
    weights: Path | None,
    asked: frozenset[str],
) -> Parts:
    """A language model as it is trained, and what goes with it; see `TextAdapter.open`."""
    tokenizer = open_tokenizer(
        settings.tokenizer or settings.model,
        revision=settings.revision if settings.tokenizer is None else None,
        trust_remote_code=settings.trust_remote_code,
        **({} if settings.gguf_file is None or settings.tokenizer else {"gguf_file": settings.gguf_file}),
    )
    if settings.chat_template is not None:
        tokenizer.chat_template = text_or_file(settings.chat_template)
    frozen, dtype = dtypes_of(settings, mixed_precision)
    model = _opened(settings, dtype, device)
    check_vocabulary(model, tokenizer)
    weights_key = weights_fingerprint(model) if settings.cache is not None else ""
    reference = frozen_copy(model, dtype) if needs_copy(settings, needs_reference, caching) else None
    if weights is not None:
        load_weights(model, weights)
    elif settings.lora is not None:
        lora = settings.lora
        add_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, seed=seed)
    else:
        model.requires_grad_(True)
    extras = tuple(name for name in EXTRAS if {name, f"reference_{name}"} & asked)
    encoder = Encoder(
        tokenizer=tokenizer,
        template=settings.template,
        template_kwargs=settings.chat_template_kwargs or {},
        system_prompt=settings.system_prompt,
        eos=settings.eos,
        max_prompt_length=settings.max_prompt_length,
        max_response_length=settings.max_response_length,
        positions=learned_positions(model),
    )
    return Parts(
        model=model,
        reference=reference,
        tokenizer=tokenizer,
        files=tokenizer,
        reader=Reader(encoder, extras, "draw" in asked, seed, settings.token_weights),
        network=lambda model, pack: TokenNetwork(model, pack=pack),
        base=str(tiny_folder(settings.tiny)) if settings.model == TINY else from_anywhere(settings.model),
        stock=("AutoModelForCausalLM", "AutoTokenizer"),
        frozen=frozen,
        autocast=None if mixed_precision == "no" else DTYPES[mixed_precision],
        fingerprint={"network": weights_key, "precision": f"{dtype} {mixed_precision} {settings.quantization}"},
        wanted=asked_measures(asked) if caching is None else asked_measures(asked) - GRADED,
    )


def dtypes_of(settings: Any, mixed_precision: str) -> tuple[torch.dtype, torch.dtype]:
    """Of frozen weights, and of those that policy and reference are opened in."""
    frozen = DTYPES[mixed_precision] if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return frozen, frozen if settings.lora is not None else torch.float32


def needs_copy(settings: Any, needs_reference: bool, caching: int | None) -> bool:
    """Whether the reference is a model of its own: in full fine-tuning, unless a cache knows its log-probabilities."""
    return settings.lora is None and needs_reference and (settings.cache is None or caching is not None)


def _opened(settings: TextAdapter, dtype: torch.dtype, device: torch.device) -> Any:
    more: dict[str, Any] = {} if settings.gguf_file is None else {"gguf_file": settings.gguf_file}
    return open_model(
        settings.model,
        revision=settings.revision,
        dtype=dtype,
        attention=settings.attention,
        quantization=settings.quantization,
        device=device,
        trust_remote_code=settings.trust_remote_code,
        tiny=settings.tiny,
        **more,
    )


def text_or_file(value: str) -> str:
    """A chat template, given as Jinja text or as the name of a file.

    Raises:
        UserError: no such file.
    """
    if "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except OSError as fault:
        raise UserError(f"adapter.chat_template: cannot read {value} ({fault}). Give a file, or Jinja text.") from fault
