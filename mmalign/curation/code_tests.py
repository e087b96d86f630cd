"""CodeDPO: programs and tests that a model wrote rank each other, and programs become pairs by correctness and by speed."""

from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import UserError


def mutual_ranking(
    passed: Float[Tensor, "codes tests"], *, iterations: int = 10, damping: float = 0.85
) -> tuple[Float[Tensor, " codes"], Float[Tensor, " tests"]]:
    """Scores of programs and of tests: a program is good if it passes good tests, a test if good programs pass it.

    s <- (1 - d) s + d P t;  t <- (1 - d) t + d P^T s,  both from the scores before; all ones at the start

    Source: CodeDPO (ACL 2025, arXiv 2410.05605); 15 programs, 15 tests, 10 rounds, d = 0.85. Scores grow with every
        round and are not normalised, as in the paper: only their order within one prompt means something.

    Args:
        passed: 1 where a program passes a test.
        iterations: rounds.
        damping: d.

    Raises:
        UserError: a damping outside [0, 1].
    """
    if not 0 <= damping <= 1:
        raise UserError(f"damping: got {damping:g}, want 0 to 1.")
    codes, tests = torch.ones_like(passed[:, 0]), torch.ones_like(passed[0])
    for _ in range(iterations):
        codes, tests = (1 - damping) * codes + damping * passed @ tests, (1 - damping) * tests + damping * passed.T @ codes
    return codes, tests


def correctness_pair(scores: Sequence[float]) -> tuple[int, int] | None:
    """Places of the program that ranks highest and of the one that ranks lowest, the earlier of a tie; None if all tie.

    Source: CodeDPO, correctness: high score against low score.
    """
    if not scores or max(scores) == min(scores):
        return None
    return scores.index(max(scores)), scores.index(min(scores))


def speed_pairs(
    scores: Sequence[float], seconds: Sequence[float], *, correct: float, min_ratio: float = 1.0
) -> list[tuple[int, int]]:
    """Pairs (faster, slower) of programs that are both trusted.

    Source: CodeDPO, efficiency: correct and faster against correct and slower, the second stage of training.

    Args:
        scores: of `mutual_ranking`.
        seconds: running time of each program on the trusted tests.
        correct: score from which a program is trusted: say the median, or the highest of the prompt.
        min_ratio: how many times slower the slower one must be, above which a difference is no noise. Ours.
    """
    trusted = [place for place, score in enumerate(scores) if score >= correct]
    pairs = []
    for one, other in combinations(trusted, 2):
        faster, slower = (one, other) if seconds[one] <= seconds[other] else (other, one)
        if seconds[slower] > seconds[faster] * min_ratio:
            pairs.append((faster, slower))
    return pairs
