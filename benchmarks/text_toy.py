"""The toy of the text benchmark: a random Llama with a tokenizer of characters, and pairs of random texts of known length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mmalign.language.tiny import tiny_tokenizer
from mmalign.records import Content, Example, Sample

LETTERS = list("abcdefghijklmnopqrstuvwxyz ")
VARIED, WIDE = "varied", "varied-wide"  # as ratios: lengths are drawn; WIDE runs the pairs of a step as one micro-batch


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the toy is.

    Args:
        width, layers, heads, inner: of the Llama; keys and values have as many heads as queries. Output layer and embedding
            are not tied.
        vocabs: sizes of the vocabulary. The texts use 257 entries; what the output layer costs does not depend on which.
        lengths: by ratio prompt : answer, tokens of the prompt and of each answer.
        varied: median tokens of prompt and answer where lengths vary (log-normal, sigma 0.8, at most 4 medians).
        batch_size, accumulation: pairs a micro-batch, and micro-batches a step, where lengths vary; elsewhere 1 and 1.
        documents: texts that are tokenised.
        head: tokens of each answer where the output layer is measured alone.
    """

    width: int
    layers: int
    heads: int
    inner: int
    vocabs: dict[str, int]
    lengths: dict[str, tuple[int, int]]
    varied: tuple[int, int]
    batch_size: int = 4
    accumulation: int = 4
    documents: int = 256
    head: int = 128


SIZES = {
    "tiny": Size(
        width=32,
        layers=2,
        heads=2,
        inner=64,
        vocabs={"small": 320},
        lengths={"1:1": (12, 12), "4:1": (32, 8)},
        varied=(12, 8),
        batch_size=2,
        accumulation=2,
        documents=8,
        head=8,
    ),
    "full": Size(
        width=384,
        layers=12,
        heads=6,
        inner=1024,
        vocabs={"32k": 32_000, "128k": 128_000},
        lengths={"1:1": (256, 256), "4:1": (512, 128), "8:1": (1024, 128)},
        varied=(96, 48),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Args:
        vocab: name of a vocabulary of the size.
        ratio: of prompt to answer, or `varied`, or `varied-wide`.
        lora: low-rank weights (rank 8, all linear layers but the output layer) instead of full fine-tuning.
        again: time the peer twice, to show the noise.
    """

    vocab: str
    ratio: str
    lora: bool
    again: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """As tables show it."""
        named = {VARIED: "varied lengths", WIDE: "varied lengths, the step one micro-batch"}
        lengths = named.get(self.ratio, f"prompt : answer {self.ratio}")
        return f"vocabulary {self.vocab}, {lengths}, {'LoRA' if self.lora else 'full'}"

    def batches(self, size: Size) -> tuple[int, int]:
        """Pairs a micro-batch, and micro-batches a step."""
        return {
            VARIED: (size.batch_size, size.accumulation),
            WIDE: (size.batch_size * size.accumulation, 1),
        }.get(self.ratio, (1, 1))


def save_model(size: Size, vocab: int, folder: Path) -> Path:
    """Write the random model and its tokenizer as a transformers folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pairs(size: Size, case: Case) -> list[Example]:
    """Pairs of random texts, for one step: one of fixed length, or several of drawn lengths."""
    rng = np.random.default_rng(0)
    if case.ratio not in (VARIED, WIDE):
        prompt, answer = size.lengths[case.ratio]
        lengths = [(prompt, answer, answer)]
    else:
        medians = np.array([size.varied[0], size.varied[1], size.varied[1]])
        draws = np.exp(rng.normal(0, 0.8, (size.batch_size * size.accumulation, 3)))
        lengths = [tuple(row) for row in np.clip((medians * draws).astype(int), 4, 4 * medians).tolist()]
    return [_pair(rng, number, *row) for number, row in enumerate(lengths)]


def rows_of(examples: Sequence[Example]) -> list[dict[str, str]]:
    """The same pairs in TRL's format."""
    return [
        {"prompt": best.prompt.words(), "chosen": best.completion.words(), "rejected": worst.completion.words()}
        for best, worst in (example.samples for example in examples)
    ]


def _pair(rng: np.random.Generator, number: int, prompt: int, chosen: int, rejected: int) -> Example:
    """A character is a token, and the end of an answer is one more."""
    question = Content(text=_text(rng, prompt))
    answers = [Content(text=_text(rng, length - 1)) for length in (chosen, rejected)]
    return Example(id=f"pair-{number}", samples=tuple(Sample(prompt=question, completion=one) for one in answers))


def _text(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(LETTERS, length))
