"""The result type of every loss, and the pieces that several losses share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PreferenceLoss:
    """What every loss returns.

    Args:
        losses: one unreduced loss per prompt; the caller reduces, over all processes.
        rewards: implicit reward of every candidate, detached, in the loss's own reward units.
    """

    losses: Float[Tensor, " batch"]
    rewards: Float[Tensor, "batch k"]


def check_label_smoothing(name: str, label_smoothing: float) -> None:
    """Refuse a flip probability that would turn the labels around."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"{name}.label_smoothing: got {label_smoothing}, want at least 0 and below 0.5.")


def check_beta(name: str, beta: float) -> None:
    """Refuse a beta that would teach nothing or the opposite."""
    check_positive(name, "beta", beta)


def check_positive(name: str, setting: str, value: float) -> None:
    """Refuse a strength or scale that would teach nothing, the opposite, or infinities."""
    check_finite(name, setting, value)
    if value <= 0:
        raise ValueError(f"{name}.{setting}: got {value}, want a positive number.")


def check_not_negative(name: str, setting: str, value: float) -> None:
    """Refuse a strength or margin that would pull the other way, or infinitely."""
    check_finite(name, setting, value)
    if value < 0:
        raise ValueError(f"{name}.{setting}: got {value}, want zero or more.")


def check_finite(name: str, setting: str, value: float) -> None:
    """Refuse what is no finite number."""
    if not math.isfinite(value):
        raise ValueError(f"{name}.{setting}: got {value}, want a finite number.")


def check_candidates(name: str, wanted: int, policy: Tensor, reference: Tensor | None = None) -> None:
    """Refuse rows of another number of candidates, of which some would not be looked at, and a reference of other rows."""
    if policy.ndim != 2 or policy.shape[1] != wanted:
        remedies = {
            1: " Give each candidate a row of its own.",
            2: " Single candidates are for kto and sft, lists for rank_dpo and plackett_luce.",
        }
        raise ValueError(f"{name}: got logps of shape {tuple(policy.shape)}, want (batch, {wanted}).{remedies.get(wanted, '')}")
    if reference is not None and reference.shape != policy.shape:
        raise ValueError(
            f"{name}: got reference logps of shape {tuple(reference.shape)}, want {tuple(policy.shape)}, as the policy's."
        )


def pair_delta(policy: Float[Tensor, "batch 2"], reference: Float[Tensor, "batch 2"]) -> Float[Tensor, " batch"]:
    """How much more than the reference the policy prefers the best candidate, in nats."""
    ratios = policy - reference
    return ratios[:, 0] - ratios[:, 1]


def less_margin(logit: Float[Tensor, " batch"], margin: Float[Tensor, " batch"] | None) -> Float[Tensor, " batch"]:
    """Take the margin that each pair must exceed off its logit; no margin means zero."""
    return logit if margin is None else logit - margin.to(logit)


def per_token(logps: Float[Tensor, "batch k"], lengths: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
    """Mean over the scored tokens of each candidate; zero where there is none."""
    return logps / lengths.to(logps).clamp(min=1)


def two_sided(
    link_won: Float[Tensor, " batch"],
    link_lost: Float[Tensor, " batch"],
    prob: Float[Tensor, " batch"] | None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Expected link value when the first candidate is better with probability `prob` and labels flip by chance.

    q * link(won) + (1 - q) * link(lost),  q = prob (1 - label_smoothing) + (1 - prob) label_smoothing
    """
    if prob is None and label_smoothing == 0.0:
        return link_won
    probability = torch.ones_like(link_won) if prob is None else prob.to(link_won)
    target = probability * (1 - label_smoothing) + (1 - probability) * label_smoothing
    # A side that counts for nothing must not spoil the sum when it has overflowed.
    won = torch.where(target > 0, target * link_won, torch.zeros_like(link_won))
    lost = torch.where(target < 1, (1 - target) * link_lost, torch.zeros_like(link_lost))
    return won + lost


def log_loss(logit: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """-log sigma(logit), to the last digit whatever the logit: torch's softplus is a straight line beyond 20."""
    return -logsigmoid(logit)


def logistic(
    logit: Float[Tensor, " batch"], prob: Float[Tensor, " batch"] | None, label_smoothing: float = 0.0
) -> Float[Tensor, " batch"]:
    """-q log sigma(logit) - (1 - q) log sigma(-logit), the negative log-likelihood under Bradley-Terry."""
    return two_sided(log_loss(logit), log_loss(-logit), prob, label_smoothing)


def weighted(losses: Float[Tensor, " batch"], weight: Float[Tensor, " batch"] | None) -> Float[Tensor, " batch"]:
    """Losses times their per-example weight; no weight means one."""
    return losses if weight is None else losses * weight.to(losses)


def logistic_loss(
    scores: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None,
    weight: Float[Tensor, " batch"] | None,
    margin: Float[Tensor, " batch"] | None,
    beta: float,
    label_smoothing: float,
) -> PreferenceLoss:
    """DPO's own loss on any score of the two candidates: -log sigma(beta * (s_first - s_second) - margin)."""
    losses = logistic(less_margin(beta * (scores[:, 0] - scores[:, 1]), margin), prob, label_smoothing)
    return PreferenceLoss(weighted(losses, weight), (beta * scores).detach())
