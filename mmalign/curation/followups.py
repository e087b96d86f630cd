"""FLR: what users would say next as a reward that needs no training."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor


def followup_reward(positive: Sequence[float], negative: Sequence[float]) -> float:
    """How much likelier pleased follow-ups are than displeased ones, after a dialogue and its response.

    r = mean_i log p(positive_i | dialogue, response) - mean_j log p(negative_j | dialogue, response)

    Source: FLR (follow-up likelihood as reward, arXiv 2409.13948).

    Args:
        positive, negative: log-likelihood of each follow-up of a fixed set, nats.

    Raises:
        ValueError: one of the two is empty.
    """
    if not positive or not negative:
        raise ValueError(f"followup_reward: got {len(positive)} and {len(negative)} follow-ups, want at least one of both")
    return sum(positive) / len(positive) - sum(negative) / len(negative)


def followup_rewards(
    dialogues: Sequence[str],
    responses: Sequence[str],
    *,
    positive: Sequence[str],
    negative: Sequence[str],
    logps: Callable[[Sequence[str], Sequence[str]], Float[Tensor, " n"]],
    turn: str = "{dialogue}\n{response}\n",
) -> list[float]:
    """Rewards of responses by one model.

    Source: as `followup_reward`.

    Args:
        dialogues, responses: entry i of both belongs together.
        positive, negative: what pleased and displeased users say, in the paper by sub-category.
        logps: (contexts, continuations) -> summed log-probs, nats.
        turn: how dialogue and response stand before the follow-up.
    """
    followups = [*positive, *negative]
    contexts = [turn.format(dialogue=d, response=r) for d, r in zip(dialogues, responses, strict=True) for _ in followups]
    values = logps(contexts, followups * len(dialogues)).reshape(len(dialogues), len(followups)).tolist()
    return [followup_reward(row[: len(positive)], row[len(positive) :]) for row in values]
