"""Rows with images under one model: log-probabilities with and without the images, and greedy answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.adapters.text_tokens import tokens_of
from mmalign.blind_model import Asked, asked, spoken
from mmalign.errors import UserError
from mmalign.exams.sight import Answers, Likelihoods
from mmalign.language.chat import Encoded
from mmalign.likelihoods import Tokens
from mmalign.multimodal.degradations import Condition, drop
from mmalign.records import Content, Sample

KL = "teacher_divergence"  # what a network calls the divergence from a lesson


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A row as models take it.

    Args:
        encoded: answers with the prompt's images, the chosen one, rejected ones, blind ones; where `absent`, the chosen one
            again without images. None: there is no chosen answer.
        num_answers: with images.
        num_rejected: of them.
        absent: whether the last one is without images.
        asked: prompts for a greedy answer, by what they show.
    """

    encoded: Encoded | None
    num_answers: int
    num_rejected: int
    absent: bool
    asked: Mapping[str, Asked]

    @classmethod
    def of(
        cls,
        encoder: Any,
        prompt: Content,
        answers: Sequence[Content],
        *,
        num_rejected: int,
        absent: bool,
        conditions: Mapping[str, Condition | None],
    ) -> Shown:
        """Encode a row.

        Args:
            encoder: `multimodal.processing.SightedEncoder`.
            prompt: with its images.
            answers: the chosen one, rejected ones, blind ones; empty: none is scored.
            num_rejected: how many are rejected.
            absent: whether the chosen one is scored without images too.
            conditions: name -> what a greedy answer is asked under; None: the prompt as it is.
        Raises:
            UserError: what the processor or the template refuses, or a chosen answer of other tokens without the images.
        """
        samples = [Sample(prompt=prompt, completion=answer) for answer in answers]
        under: list[Condition | None] = [None] * len(samples)
        if absent:
            samples, under = [*samples, samples[0]], [*under, Condition(degradation=drop())]
        encoded = encoder(samples, under) if samples else None
        if encoded is not None and absent and _scored(encoded, 0) != _scored(encoded, len(answers)):
            raise UserError("its chosen answer has other tokens when the image is taken out. Give another chat template.")
        return cls(
            encoded=encoded,
            num_answers=len(answers),
            num_rejected=num_rejected,
            absent=absent,
            asked={name: _prompt(encoder, prompt, condition) for name, condition in conditions.items()},
        )


def lengths_of(shown: Shown) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Scored tokens of the chosen answer, of rejected and of blind ones."""
    found = () if shown.encoded is None else shown.encoded.lengths[: shown.num_answers]
    middle = 1 + shown.num_rejected
    return found[:1], found[1:middle], found[middle:]


def likelihoods(network: Any, rows: Sequence[Shown], *, device: torch.device, pad: int = 0) -> list[Likelihoods | None]:
    """Log-probabilities of rows of one form; two passes, and no logits of more than a tile of tokens.

    The divergence is exact over the vocabulary: the states that predict the chosen answer with the images are the lesson of
    those without them.

    Args:
        network: `language.network.TokenNetwork`.
        rows: with the same number of answers, all with `absent` or none.
        device: of the network.
        pad: token that fills rows up where the network does not pack.
    """
    encoded = [row.encoded for row in rows if row.encoded is not None]
    if not encoded:
        return [None] * len(rows)
    k, absent = rows[0].num_answers, rows[0].absent
    tokens = tokens_of(encoded, k, int(absent), wanted=frozenset())
    shown = tokens.select(range(len(rows) * k))

    def layout(some: Tokens) -> Any:
        return (some.packed() if network.packs else some.padded(pad=pad)).to(device)

    sums, lesson = network.observe(layout(shown))
    logps = sums["logps"].double().view(len(rows), k).tolist()
    blind: dict[str, Tensor] = {}
    if absent:
        without = tokens.select(range(len(rows) * k, len(rows) * (k + 1)))
        chosen = lesson.take(_places(shown, range(0, len(rows) * k, k)).to(device))
        blind = network(layout(without), frozenset({KL}), chosen)
    return [
        Likelihoods(
            chosen=logps[n][0],
            rejected=tuple(logps[n][1 : 1 + row.num_rejected]),
            blind=tuple(logps[n][1 + row.num_rejected :]),
            absent=float(blind["logps"][n]) if absent else None,
            divergence=float(blind[KL][n]) if absent else None,
        )
        for n, row in enumerate(rows)
    ]


def said(model: Any, tokenizer: Any, rows: Sequence[Shown], max_new_tokens: int) -> list[Answers | None]:
    """Greedy answers to every prompt of rows, all of them in one batch.

    Args:
        model, tokenizer: of transformers.
        rows: any.
        max_new_tokens: of an answer.
    """
    jobs = [(n, name) for n, row in enumerate(rows) for name in row.asked]
    found = spoken(model, tokenizer, [rows[n].asked[name] for n, name in jobs], max_new_tokens=max_new_tokens)
    told = dict(zip(jobs, found, strict=True))
    out: list[Answers | None] = []
    for n in range(len(rows)):
        own = told.get((n, "own"))
        words = {name: one.text for (row, name), one in told.items() if row == n and name != "own"}
        out.append(None if own is None else Answers(own=own.text, tokens=own.tokens, ended=own.ended, **words))
    return out


def _prompt(encoder: Any, prompt: Content, condition: Condition | None) -> Asked:
    """A prompt under a condition; one that takes the images away leaves a prompt of text."""
    shown = prompt if condition is None else condition.prompt(prompt)
    return asked(encoder, shown)


def _scored(encoded: Encoded, number: int) -> list[int]:
    return [encoded.continuations[number][place] for place in encoded.scored[number]]


def _places(tokens: Tokens, chosen: Sequence[int]) -> Tensor:
    """Where the scored tokens of some continuations stand among those of all."""
    counts = tokens.scored().long()
    starts = counts.cumsum(0) - counts
    return torch.cat([torch.arange(int(starts[n]), int(starts[n] + counts[n])) for n in chosen])
