"""A judge is asked in both orders: what it says whichever stands first counts, and what it says for itself is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class PairJudge(Protocol):
    """Says which of two responses to a prompt is better, as they are shown: first, then second."""

    @property
    def name(self) -> str:
        """Under which its verdicts are kept."""

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Float[Tensor, " n"]:
        """P(the first is better) of each pair, in [0, 1], on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What a judge said of pairs (a, b) in both orders.

    Args:
        forward: P(a is better), a shown first.
        backward: P(a is better), a shown second.
    """

    forward: Float[Tensor, " n"]
    backward: Float[Tensor, " n"]

    @property
    def prob(self) -> Float[Tensor, " n"]:
        """P(a is better): the mean of both orders."""
        return (self.forward + self.backward) / 2

    @property
    def consistent(self) -> Bool[Tensor, " n"]:
        """Whether both orders name the same winner; a tie in either order is none."""
        return (self.forward - 0.5) * (self.backward - 0.5) > 0

    @property
    def position_bias(self) -> float:
        """By how much the response shown first gains from it, mean probability above one half."""
        return float((self.forward - self.backward).mean()) / 2


def both_orders(judge: PairJudge, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Verdicts:
    """Ask a judge about pairs (a, b), once with a first and once with b first.

    Source: Judging LLM-as-a-Judge (arXiv 2306.05685): swap positions and keep consistent verdicts.
    """
    return Verdicts(forward=judge(prompts, a, b), backward=1 - judge(prompts, b, a))


def self_preference(
    forward: Float[Tensor, "n 2"], backward: Float[Tensor, "n 2"], gold: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """DBG: by how much a judge prefers its own response beyond what it deserves; its mean over items is the bias.

    (forward_A / (forward_A + forward_B) + backward_B / (backward_A + backward_B)) / 2 - gold

    Source: Beyond the Surface: Measuring Self-Preference in LLM Judgments (EMNLP 2025, arXiv 2506.02592).

    Args:
        forward: probability of the option tokens A and B, the judge's own response being A.
        backward: the same with its own response as B.
        gold: P(its own response is better) by a gold judge: people, or several strong models.
    """
    own = (forward[:, 0] / forward.sum(1) + backward[:, 1] / backward.sum(1)) / 2
    return own - gold
