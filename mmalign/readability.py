"""What can be counted in a text: annotators and judges of the text quickstart, and how varied texts are."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def words(text: str) -> list[str]:
    """The words of a text, in lower case; digits and marks are none."""
    return [word.lower() for word in WORD.findall(text)]


def plainness(text: str) -> float:
    """Share of letters and single spaces among the characters of a text: 1 is plain prose, code and tables are less.

    A run of several spaces or of line breaks counts once as a space and else as other characters. An empty text: 0.
    """
    letters = sum(character.isalpha() for character in text)
    spaces = len(re.findall(r"(?<=\S)\s(?=\S)", text))
    return (letters + spaces) / len(text) if text else 0.0


def short_words(text: str) -> float:
    """Minus the mean number of letters of a word: the higher, the simpler. A text without words: -12.

    Source: mean word length is the word part of most readability formulas (Smith and Senter 1967, the Automated Readability
    Index, among them).
    """
    found = words(text)
    return -sum(map(len, found)) / len(found) if found else -12.0


@dataclass(frozen=True)
class CommonWords:
    """Share of the words of a text that are among the most common ones, as a word list has them.

    It never looks at a word's length. Source: the unfamiliar words of Dale and Chall (1948), with another list.
    """

    common: frozenset[str]

    def __call__(self, text: str) -> float:
        """A share in [0, 1]; 0 for a text without words."""
        found = words(text)
        return sum(word in self.common for word in found) / len(found) if found else 0.0


@dataclass(frozen=True)
class WordModel:
    """A naive Bayes classifier of words: how much a text speaks like the first of two kinds of texts.

    log-odds = sum over words of log P(word | first) - log P(word | second),  with add-one smoothing

    It sees words and no other character, so that a judge of characters and this one share no feature.
    """

    log_odds: Mapping[str, float]

    @classmethod
    def fitted(cls, first: Sequence[str], second: Sequence[str]) -> WordModel:
        """Count the words of two kinds of texts."""
        one, other = (Counter(word for text in texts for word in words(text)) for texts in (first, second))
        known = one.keys() | other.keys()
        sizes = [sum(counts.values()) + len(known) for counts in (one, other)]
        return cls({word: math.log((one[word] + 1) / sizes[0]) - math.log((other[word] + 1) / sizes[1]) for word in known})

    def __call__(self, text: str) -> float:
        """Mean log-odds of the words in nats, above 0 for the first kind; unknown words count 0, no words are 0."""
        found = words(text)
        return sum(self.log_odds.get(word, 0.0) for word in found) / len(found) if found else 0.0


def distinct(texts: Sequence[str], length: int = 2) -> float:
    """Distinct word sequences of this length over all of them: 1 never repeats, collapse goes towards 0.

    Source: Li et al. 2016 (arXiv 1510.03055), distinct-n; counted over all texts together.
    """
    found = [tuple(one[n : n + length]) for one in map(words, texts) for n in range(len(one) - length + 1)]
    return len(set(found)) / len(found) if found else 0.0
