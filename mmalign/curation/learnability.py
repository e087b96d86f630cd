"""DavIR: how much of a response a model learns, relative to what it had to learn; and the best share of anything."""

from collections.abc import Sequence

from mmalign.errors import UserError


def davir_scores(base: Sequence[float], tuned: Sequence[float]) -> list[float]:
    """Learnability of each response: the share of its loss that tuning took away.

    s = (NLL_base - NLL_tuned) / NLL_base

    Source: DavIR (ACL 2025, arXiv 2310.13008). Sums and token means give the same score: both have the same denominator.

    Args:
        base: negative log-likelihood of each response under the model before tuning, nats; positive.
        tuned: the same under the model tuned on all the data.

    Raises:
        ValueError: lists of different lengths, or a base that is not positive.
    """
    if len(base) != len(tuned):
        raise ValueError(f"davir_scores: got {len(base)} base and {len(tuned)} tuned losses, want as many of both")
    if any(not nll > 0 for nll in base):
        raise ValueError(f"davir_scores: got a base loss of {min(base)}, want positive ones: negative log-likelihoods")
    return [(before - after) / before for before, after in zip(base, tuned, strict=True)]


def top_share(scores: Sequence[float], share: float) -> list[int]:
    """Places of the highest scores, best first: round(share * n) of them, at least one; the earlier of a tie.

    Args:
        scores: any unit, higher is better.
        share: above 0, at most 1. DavIR keeps 0.06 of Alpaca.

    Raises:
        UserError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"share: got {share:g}, want above 0 and at most 1.")
    count = max(1, round(share * len(scores))) if scores else 0
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]
