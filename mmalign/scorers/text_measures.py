"""Scorers that count what is in a text: quick, no weights, the prompt is not read. For smoke runs and for watching."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, kw_only=True)
class TextMeasure:
    """A scorer that applies `measure` to each text by itself; the prompt is not read."""

    name: str
    measure: Callable[[str], float]
    judges: ClassVar[str] = "texts"

    def __call__(self, prompts: Sequence[Any], texts: Sequence[str]) -> Float[Tensor, " n"]:
        """One number per text; prompts only has to be as long as texts."""
        return torch.tensor([self.measure(text) for _, text in zip(prompts, texts, strict=True)], dtype=torch.float32)


def text_length() -> TextMeasure:
    """How many words a text has; words are runs of letters."""
    return TextMeasure(name="text_length", measure=lambda text: float(len(WORD.findall(text))))


def short_words() -> TextMeasure:
    """How short the words of a text are: minus their mean number of letters; -100 for a text without words."""
    return TextMeasure(name="short_words", measure=_shortness)


def _shortness(text: str) -> float:
    words = WORD.findall(text)
    return -sum(map(len, words)) / len(words) if words else -100.0
