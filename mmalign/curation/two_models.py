"""Pairs without a judge: delta learning (a better small model over a worse one), DRIFT (a new answer over a disliked one)."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Answer = TypeVar("Answer")


def delta_pairs(strong: Mapping[str, Answer], weak: Mapping[str, Answer]) -> list[tuple[str, Answer, Answer]]:
    """(prompt, chosen, rejected) for every prompt that both models answered differently, in the order of the strong model.

    Source: the delta learning hypothesis (arXiv 2507.06187): what matters is the gap, not how good the chosen answer is.
        Published: chosen by a 3B, rejected by a 1.5B model of one family, plain DPO.

    Args:
        strong, weak: prompt -> answer.
    """
    return [(prompt, strong[prompt], weak[prompt]) for prompt in strong if prompt in weak and strong[prompt] != weak[prompt]]


def dissatisfaction_pairs(
    log: Sequence[tuple[str, str, str]],
    *,
    generate: Callable[[Sequence[str]], Sequence[str]],
    ask: str = "{prompt}\n\nAn earlier answer:\n{answer}\n\nThe user said of it:\n{feedback}\n\nGive a better answer.",
) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) from answers that users disliked; an answer that comes out the same makes no pair.

    chosen: a fresh sample of the current policy, which sees the feedback;  rejected: the logged answer. Neither sees the
    feedback in training.

    Source: DRIFT (arXiv 2510.02341): temperature 0.7, top-p 0.9; repeated with the new policy; NLL of weight 0.001 added.

    Args:
        log: (prompt, answer, what the user said) of turns that users were dissatisfied with.
        generate: samples of the current policy, one a request.
        ask: the request; our wording.
    """
    requests = [
        ask.replace("{prompt}", prompt).replace("{answer}", answer).replace("{feedback}", said) for prompt, answer, said in log
    ]
    fresh = generate(requests)
    pairs = [(prompt, new, answer) for (prompt, answer, _), new in zip(log, fresh, strict=True)]
    return [pair for pair in pairs if pair[1].strip() and pair[1] != pair[2]]
