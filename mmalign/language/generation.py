"""Answers of a language model, alike whatever they are batched with: each prompt has a random generator of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class OwnDraws:
    """A logits processor that makes greedy choice a draw: Gumbel noise of each row's own generator on logits / temperature.

    Source: the Gumbel-max trick: argmax(logits / T + g) is a draw from softmax(logits / T).
    Args:
        temperature: above 0.
        seeds: one a row.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        """Seed the generators."""
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(
        self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Perturbed logits."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self.generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return scores.float() / self.temperature + gumbel.to(scores.device).float()


class Nucleus:
    """A logits processor that leaves the likeliest tokens: the top k, and of them those that make up top_p of the mass."""

    def __init__(self, top_k: int, top_p: float, temperature: float) -> None:
        """Keep the settings; 0 and 1.0 leave everything."""
        self.top_k, self.top_p, self.temperature = top_k, top_p, temperature

    def __call__(
        self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Logits with -inf for what is left out."""
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        kept = scores / self.temperature
        if self.top_k:
            kept = TopKLogitsWarper(self.top_k)(input_ids, kept)
        if self.top_p < 1:
            kept = TopPLogitsWarper(self.top_p)(input_ids, kept)
        return scores.masked_fill(kept == -torch.inf, -torch.inf)


class NeverEmpty:
    """A logits processor under which an answer does not end before it has a visible character.

    Args:
        tokenizer: tells what is visible; special tokens are not.
        ends: tokens that end an answer.
        start: where the answers begin in the rows of ids.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int], start: int) -> None:
        """Keep the settings; which rows have begun is remembered."""
        self.tokenizer, self.ends, self.start = tokenizer, list(ends), start
        self.begun: set[int] = set()

    def __call__(
        self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Logits with -inf for the ends, in rows that are still empty."""
        silent = [row for row in range(len(input_ids)) if row not in self.begun]
        for row in list(silent):
            if self.tokenizer.decode(input_ids[row, self.start :].tolist(), skip_special_tokens=True).strip():
                self.begun.add(row)
                silent.remove(row)
        if not silent or not self.ends:
            return scores
        held = scores.clone()
        held[torch.tensor(silent, device=scores.device)[:, None], torch.tensor(self.ends, device=scores.device)] = -torch.inf
        return held


@torch.no_grad()
def generate_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    pad: int,
    eos: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] = (),
    never_empty: Any = None,
    shown: Mapping[str, Tensor] | None = None,
) -> list[list[int]]:
    """Token ids that follow each prompt, up to and with the one that ends the text.

    Args:
        model: of transformers.
        prompts: token ids, at least one each.
        max_new_tokens: of an answer.
        pad, eos: token ids; padding is on the left.
        temperature: 0 takes the likeliest token.
        top_k, top_p: see `Nucleus`.
        seeds: one a prompt, for a temperature above 0.
        never_empty: a tokenizer: `NeverEmpty` holds.
        shown: further arguments of the model, of one prompt that shows something.
    """
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    processors: list[Any] = [] if never_empty is None else [NeverEmpty(never_empty, eos, longest)]
    if temperature > 0:
        if top_k or top_p < 1:
            processors.append(Nucleus(top_k, top_p, temperature))
        processors.append(OwnDraws(temperature, seeds))
    was_training, model = model.training, model.eval()
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=_settings(model, max_new_tokens, pad, eos),
        logits_processor=processors,
        **{name: tensor.to(device) for name, tensor in (shown or {}).items()},
    )
    model.train(was_training)
    answers: list[list[int]] = []
    for row in out[:, longest:].tolist():
        end = next((n for n, token in enumerate(row) if token in eos), len(row) - 1)
        answers.append(row[: end + 1])
    return answers


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] = (),
    batch_size: int = 8,
    never_empty: bool = False,
    shown: Mapping[str, Tensor] | None = None,
) -> list[list[int]]:
    """Answers as token ids; see `generate_ids`. Prompts of like length go together."""
    eos = ends_of(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        answers = generate_ids(
            model,
            [prompts[n] for n in group],
            max_new_tokens=max_new_tokens,
            pad=tokenizer.pad_token_id or 0,
            eos=eos,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=[seeds[n] for n in group] if seeds else (),
            never_empty=tokenizer if never_empty else None,
            shown=shown,
        )
        for n, answer in zip(group, answers, strict=True):
            out[n] = answer
    return out


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] = (),
    batch_size: int = 8,
    shown: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Answers as texts, without special tokens; see `generate_answers`."""
    answers = generate_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=seeds,
        batch_size=batch_size,
        shown=shown,
    )
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def ends_of(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's, those of the model's generation config, and the end of a ChatML turn."""
    told = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])}
    turn = tokenizer.get_vocab().get("<|im_end|>")
    return tuple(sorted(token for token in {*found, turn} if token is not None))


def _settings(model: Any, max_new_tokens: int, pad: int, eos: Sequence[int]) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=list(eos) or None,
        bos_token_id=model.config.get_text_config().bos_token_id,
        use_cache=True,
    )
