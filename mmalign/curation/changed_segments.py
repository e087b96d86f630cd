"""Which tokens of two answers differ, and weights that make them count for more: RLHF-V's dense DPO."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from mmalign.errors import UserError
from mmalign.language.chat import Encoded
from mmalign.records import Example

# Before both answers when they are compared: they follow one prompt, with which a shared beginning is long enough to match.
PROMPT = -1


def changed_tokens(one: Sequence[int], other: Sequence[int], *, min_match: int = 3) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Places of the tokens of each sequence that stand for others in the other one.

    What lies between two common runs of `min_match` tokens or more is changed, if it is empty in neither: what was only put in,
    or only left out, is not marked.

    Source: RLHF-V, diff_lib.py, on Python's difflib; the order of the two matters where several matches are as long.
    Args:
        one, other: token ids.
        min_match: tokens that a common run must have. Published: 3.
    """
    matcher = difflib.SequenceMatcher(None, one, other)
    *blocks, end = matcher.get_matching_blocks()
    left: list[int] = []
    right: list[int] = []
    start, begin = 0, 0
    for a, b, size in (*(block for block in blocks if block.size >= min_match), end):
        if a > start and b > begin:
            left += range(start, a)
            right += range(begin, b)
        start, begin = a + size, b + size
    return tuple(left), tuple(right)


def changed_segments(
    example: Example, encoded: Encoded, *, gamma: float = 5.0, min_match: int = 3, average: bool = True
) -> list[list[float]]:
    """Token weights of a pair: gamma where chosen and rejected answer differ, 1 elsewhere, for the loss `ddpo` or `chip`.

    average: w_t / sum of w, so that the weighted sum of log-probs is their weighted mean;  else w_t

    Source: Yu et al. 2023 (RLHF-V, arXiv 2312.00849): gamma 5 and the mean, (sum of unchanged + gamma * sum of changed) /
        (|unchanged| + gamma |changed|). Its published LLaVA scripts sum, with gamma 1; CHiP sums, with gamma 4 (LLaVA-1.6)
        or 2. There whole padded rows are compared; here the two answers behind one prompt.
    Args:
        example, encoded: what is weighed, and its token ids.
        gamma: weight of changed tokens. Published: 5.
        min_match: see `changed_tokens`. Published: 3.
        average: see above. Published: yes in the paper.
    Raises:
        UserError: other than two answers, or a gamma or min_match that is not positive.
    """
    where = f"{example.id}: adapter.token_weights: changed_segments"
    if len(example.samples) != 2:
        raise UserError(f"{where} got {len(example.samples)} answers, want two, chosen and rejected. Set data.view to pair.")
    if not gamma > 0 or min_match < 1:
        raise UserError(f"{where} got gamma {gamma:g} and min_match {min_match}, want both above 0. Correct the config.")
    answers = [  # chosen, rejected
        [ids[place] for place in places] for ids, places in zip(encoded.continuations[:2], encoded.scored[:2], strict=True)
    ]
    shared = [PROMPT] * min_match
    places = changed_tokens([*shared, *answers[1]], [*shared, *answers[0]], min_match=min_match)
    weights = []
    for answer, changed in zip(answers, reversed(places), strict=True):
        marked = {place - min_match for place in changed}
        own = [gamma if place in marked else 1.0 for place in range(len(answer))]
        total = sum(own) if average else 1.0
        weights.append([weight / total for weight in own])
    return weights
