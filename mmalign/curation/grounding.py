"""R3: a reward by rule: relevance, and for open questions length, but no repetition."""

from collections.abc import Callable
from typing import Literal


def length_incentive(text: str) -> float:
    """Words of a text in hundreds: words / 100."""
    return len(text.split()) / 100


def uniqueness(text: str) -> float:
    """Share of the trigrams of words that are different: unique trigrams / trigrams; 1 below three words, which is ours."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def r3_reward(
    prompt: str,
    response: str,
    *,
    relevance: Callable[[str, str], float],
    mode: Literal["open", "closed"] = "open",
    shape: Callable[[float], float] = float,
) -> float:
    """Reverse reward of a response.

    open: relevance * words / 100 * uniqueness;  closed: F(relevance) * uniqueness, so that length earns nothing

    Source: R3 (rule-based reverse reward; naver-ai/RRR).

    Args:
        prompt, response: texts.
        relevance: (prompt, response) -> dot product of a retriever's embeddings.
        mode: open-ended questions, or closed ones, which have an answer.
        shape: F, of closed questions; the identity unless given.
    """
    found = relevance(prompt, response)
    if mode == "open":
        return found * length_incentive(response) * uniqueness(response)
    return shape(found) * uniqueness(response)
