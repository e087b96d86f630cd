"""Reward-augmented relabelling: each pair is seen twice, once under the score of either response as the goal."""

from collections.abc import Sequence

from mmalign.errors import UserError

GOAL = "Answer so that your response would be rated {score} by a careful judge; higher ratings are better responses."


def goal(score: float, template: str = GOAL) -> str:
    """The system prompt that asks for a response of this score; whole numbers are written without a decimal point.

    Raises:
        UserError: a template that does not name {score}.
    """
    if "{score}" not in template:
        raise UserError(f"template: got {template!r}, want a text with {{score}} in it.")
    return template.replace("{score}", str(int(score)) if score == int(score) else f"{score:g}")


def reward_conditioned(chosen_score: float, rejected_score: float, template: str = GOAL) -> tuple[tuple[str, bool], ...]:
    """The two rows of a pair, each as (system prompt, whether the responses change places).

    Under the chosen response's score it stays the chosen one; under the rejected response's score that is the better answer.

    Source: reward-augmented preference data (arXiv 2410.08067). The published variant without a system prompt
        never swaps; this one always does.

    Args:
        chosen_score, rejected_score: in one unit, which the template should tell.
        template: a text with {score}. Our own wording; published: a scale of 1 to 10.
    """
    return (goal(chosen_score, template), False), (goal(rejected_score, template), True)


def agrees(chosen: Sequence[float], rejected: Sequence[float]) -> bool:
    """Whether the mean of the fine-grained ratings does not contradict the overall order; published runs keep such rows."""
    return sum(chosen) / len(chosen) >= sum(rejected) / len(rejected)
