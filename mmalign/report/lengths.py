"""What is to be said of texts before and after training: how long, how varied, and how much of a win rate length explains."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.statistics import WinRate, win_rate

# A letter of Chinese or Japanese is a word, since these are written without spaces.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
DISTINCT_LOSS = 0.20  # a larger fall is told as a warning
LEAST_T = 2.0
LEAST_SHARE = 0.25
LENGTH_RULE = (
    f"the change of score correlates with the change of length beyond chance (|t| above {LEAST_T:g}), and length accounts for "
    f"at least {LEAST_SHARE:.0%} of the mean change of score"
)


def words(text: str) -> list[str]:
    """The words of a text, in lower case, without marks."""
    return WORD.findall(text.lower())


def distinct_pairs(texts: Sequence[Sequence[str]]) -> float | None:
    """Distinct pairs of neighbouring words over all pairs, of all texts together: collapse goes towards 0. None without a pair.

    Source: Li et al. 2016 (arXiv 1510.03055), distinct-2.
    """
    found = [pair for text in texts for pair in pairwise(text)]
    return len(set(found)) / len(found) if found else None


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """How one judge's change of score goes along with the change of length.

    Args:
        name: the judge.
        correlation: Pearson's, of the two changes over the pairs.
        t: sqrt(n - 2) r / sqrt(1 - r^2).
        slope: in units of the score a word, by least squares.
        share: slope * mean change of length / mean change of score; None where the score did not change.
        equal_length: the win rate when each change of score has slope * change of length taken off.
    """

    name: str
    correlation: float
    t: float
    slope: float
    share: float | None
    equal_length: WinRate

    @property
    def found(self) -> bool:
        """Whether LENGTH_RULE holds."""
        return abs(self.t) > LEAST_T and self.share is not None and self.share >= LEAST_SHARE


def length_bias(
    name: str,
    change: Float[Tensor, " n"],
    lengths: Float[Tensor, " n"],
    *,
    eps: float = 0.0,
    interval: str = "wilson",
) -> LengthBias | None:
    """Regress the change of score on the change of length, and count wins with the effect of length taken off.

    change_i = a + b * length_i + rest_i;  at equal length: a + rest_i = change_i - b * length_i

    Source: the idea of length-controlled win rates (Dubois et al. 2024, arXiv 2404.04475), here by a straight line per judge
    and without its logistic model of prompts. The interval takes b as known, so it is a little too narrow; and a quality that
    only longer answers can have is taken for length too.

    Args:
        name: of the judge.
        change: score after - score before of each pair, in units of the score.
        lengths: words after - words before of each pair.
        eps, interval: as in `statistics.win_rate`.

    Returns: None where one of the two does not vary, or of fewer than three pairs.
    """
    change, lengths = change.double(), lengths.double()
    if len(change) < 3 or float(lengths.std()) == 0 or float(change.std()) == 0:
        return None
    centred, other = lengths - lengths.mean(), change - change.mean()
    correlation = float((centred * other).sum() / (centred.square().sum() * other.square().sum()).sqrt())
    slope = float((centred * other).sum() / centred.square().sum())
    rest = max(1 - correlation**2, 1e-12)
    mean = float(change.mean())
    return LengthBias(
        name=name,
        correlation=correlation,
        t=correlation * math.sqrt((len(change) - 2) / rest),
        slope=slope,
        share=None if mean == 0 else slope * float(lengths.mean()) / mean,
        equal_length=win_rate(torch.zeros_like(change), change - slope * lengths, eps=eps, interval=interval),
    )


@dataclass(frozen=True, kw_only=True)
class TextChange:
    """Length and variety of answers to the same prompts and seeds before and after.

    Args:
        length_before, length_after: mean number of words.
        distinct_before, distinct_after: `distinct_pairs`, each two answers cut to the shorter one's length, because longer
            texts repeat more words by themselves. None without a pair of words.
        biases: of every judge for which it can be told.
    """

    length_before: float
    length_after: float
    distinct_before: float | None
    distinct_after: float | None
    biases: tuple[LengthBias, ...] = ()

    def results(self) -> dict[str, Any]:
        """Plain values for results.json."""
        plain = {name: value for name, value in vars(self).items() if name != "biases"}
        biases = {
            one.name: {
                **{name: value for name, value in vars(one).items() if name not in ("name", "equal_length")},
                "found": one.found,
                "win_rate_at_equal_length": one.equal_length.rate,
                "low": one.equal_length.low,
                "high": one.equal_length.high,
            }
            for one in self.biases
        }
        return {**plain, "length_bias": biases, "length_rule": LENGTH_RULE}

    def rows(self) -> list[tuple[str, str, str]]:
        """Rows of a table: name, before, after."""
        found = [("mean words", f"{self.length_before:.1f}", f"{self.length_after:.1f}")]
        if self.distinct_before is not None and self.distinct_after is not None:
            found.append(("distinct-2", f"{self.distinct_before:.3f}", f"{self.distinct_after:.3f}"))
        return found

    def lines(self) -> list[str]:
        """What the terminal tells of length."""
        return [""] * bool(self.biases) + [
            f"{one.name} at equal length: win rate {one.equal_length} (correlation with length {one.correlation:+.2f})"
            for one in self.biases
        ]

    def warnings(self) -> list[str]:
        """What a reader of the win rate must know."""
        found = [
            f"LENGTH: the win rate by {one.name} goes along with length: answers went from {self.length_before:.0f} to "
            f"{self.length_after:.0f} words, the change of score correlates with the change of length "
            f"({one.correlation:+.2f}), and at equal length the win rate is {one.equal_length.rate:.1%}. Balance the lengths "
            "of the preferences, or train with a loss that normalises or penalises length."
            for one in self.biases
            if one.found
        ]
        if self.distinct_before and self.distinct_after is not None:
            lost = 1 - self.distinct_after / self.distinct_before
            if lost > DISTINCT_LOSS:
                found.append(
                    f"distinct-2 fell by {100 * lost:.0f} %: answers repeat the same phrases, which is how collapse begins. "
                    "Lower the learning rate or train fewer steps."
                )
        return found


def length_and_variety(before: Sequence[str], after: Sequence[str], biases: Sequence[LengthBias | None]) -> TextChange:
    """Measure the answers; entry i of both belongs together."""
    old, new = [words(text) for text in before], [words(text) for text in after]
    cuts = [min(len(one), len(two)) for one, two in zip(old, new, strict=True)]
    return TextChange(
        length_before=sum(map(len, old)) / len(old),
        length_after=sum(map(len, new)) / len(new),
        distinct_before=distinct_pairs([text[:cut] for text, cut in zip(old, cuts, strict=True)]),
        distinct_after=distinct_pairs([text[:cut] for text, cut in zip(new, cuts, strict=True)]),
        biases=tuple(one for one in biases if one is not None),
    )
