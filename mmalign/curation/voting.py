"""Preference strength: several reward models vote on every pair, and the pair is turned, softened or given a margin."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import UserError


def preference_strength(
    chosen: Float[Tensor, "judges n"], rejected: Float[Tensor, "judges n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Mean and standard deviation over the judges of the reward difference of each pair.

    mu = mean_m(r_m(chosen) - r_m(rejected));  sd = sqrt(mean_m((r_m(chosen) - r_m(rejected) - mu)^2))

    Source: Secrets of RLHF II (arXiv 2401.06080). Ten reward models, trained on the data in other orders.

    Args:
        chosen, rejected: rewards by each judge; judges in different units are brought to one with `standardised`.
    """
    difference = chosen - rejected
    return difference.mean(0), difference.std(0, correction=0)


def standardised(scores: Float[Tensor, "judges n"]) -> Float[Tensor, "judges n"]:
    """Each judge's scores divided by their standard deviation, so that all judges speak in one unit. Ours.

    A judge that gives everything the same score stays as it is.
    """
    deviation = scores.std(1, correction=0, keepdim=True)
    return scores / deviation.where(deviation > 0, deviation.new_ones(()))


@dataclass(frozen=True, kw_only=True)
class Label:
    """What voting says of one pair.

    Args:
        flipped: the order is the opposite of the one the data had.
        prob: P(the candidate that now stands first is the better one). None: certain.
        margin: how far apart the two are, in the judges' units. None: not said.
    """

    flipped: bool
    prob: float | None = None
    margin: float | None = None


def denoised(
    strength: Sequence[float],
    *,
    flip: float = 0.0,
    labels: Literal["hard", "soft"] = "hard",
    temperature: float = 1.0,
    margin: bool = False,
) -> list[Label]:
    """Labels of pairs from their strength.

    The lowest `flip` share is turned, as far as it is negative, whose strength then is -mu;
    soft: prob = sigma(mu / temperature);  margin = max(mu, 0), for sp(-(d - margin))

    Source: Secrets of RLHF II: the lowest fifth is mostly wrong and is turned, the middle is softened, margins help
        everywhere. Departures: a pair is turned only if the judges lean against it, and p = sigma(mu) is our reading of "soft".

    Args:
        strength: mu of `preference_strength`.
        flip: share of all pairs, 0 to 1. Published: about 0.2.
        labels: hard, or soft.
        temperature: of soft labels, in the judges' units.
        margin: give every pair an adaptive margin.

    Raises:
        UserError: a share outside [0, 1], a temperature that is not positive.
    """
    if not 0 <= flip <= 1:
        raise UserError(f"flip: got {flip:g}, want a share from 0 to 1.")
    if not temperature > 0:
        raise UserError(f"temperature: got {temperature:g}, want a positive number, in the judges' units.")
    order = sorted(range(len(strength)), key=lambda place: (strength[place], place))
    turned = {place for place in order[: round(flip * len(strength))] if strength[place] < 0}
    said = []
    for place, given in enumerate(strength):
        mu = -given if place in turned else given
        said.append(
            Label(
                flipped=place in turned,
                prob=sigmoid(mu / temperature) if labels == "soft" else None,
                margin=max(mu, 0.0) if margin else None,
            )
        )
    return said


def vote_diversity(first: Float[Tensor, "judges n"], second: Float[Tensor, "judges n"]) -> Float[Tensor, ""]:
    """How differently the heads of an ensemble vote: mean cross-entropy of one head's verdict under another's.

    mean over i != j and pairs of -sum_y p_i(y) log p_j(y),  p_i = softmax over the two candidates, held fixed

    Source: P2C (Prefer to Classify, arXiv 2306.04925), published code diversity_loss; subtracted from the loss of an ensemble.

    Args:
        first, second: each head's reward of the two candidates of every pair.

    Raises:
        ValueError: fewer than two heads.
    """
    heads = len(first)
    if heads < 2:
        raise ValueError(f"vote_diversity: got {heads} heads, want at least 2")
    logps = torch.stack([first, second], -1).log_softmax(-1)
    crossed = -torch.einsum("iny,jny->ij", logps.detach().exp(), logps) / first.shape[1]
    return (crossed.sum() - crossed.diagonal().sum()) / (heads * (heads - 1))


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
