"""Losses that are told how much better the preferred candidate is: logps `(batch, 2)`, the preferred candidate first."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.losses.divergences import Divergence, check_divergence, transform
from mmalign.losses.links import (
    PreferenceLoss,
    check_beta,
    check_candidates,
    check_not_negative,
    check_positive,
    logistic,
    weighted,
)


def odpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    margin: Float[Tensor, " batch"] | None = None,
    scores: Float[Tensor, "batch 2"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """ODPO: DPO whose margin must exceed an offset that grows with the gap between the scores.

    -log sigma(r_chosen - r_rejected - alpha * log(gap)),  r = beta * h(policy - reference),  gap of the scores

    Equal scores teach nothing, which is the limit. For an offset that is in reward units already, use `dpo` with `margin`.

    Source: Amini et al. 2024 (ODPO), with its logarithmic scaling.
    Args:
        policy, reference, weight, beta, divergence, divergence_alpha: as in `dpo`.
        margin: the gap of each pair, in score units.
        scores: the scores of both candidates, best first; used where there is no margin.
        alpha: reward units per e-fold of the gap. Published: 1.
    Raises:
        ValueError: neither margin nor scores, or alpha below zero.
    """
    check_candidates("odpo", 2, policy, reference)
    check_beta("odpo", beta)
    check_not_negative("odpo", "alpha", alpha)
    check_divergence("odpo", divergence, divergence_alpha)
    values = transform(policy - reference, divergence, divergence_alpha)
    gap = _gap("odpo", values, margin, scores).clamp(min=torch.finfo(torch.float32).tiny)
    losses = logistic(beta * (values[:, 0] - values[:, 1]) - alpha * gap.log(), None)
    return PreferenceLoss(weighted(losses, weight), (beta * values).detach())


def rpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    margin: Float[Tensor, " batch"] | None = None,
    scores: Float[Tensor, "batch 2"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    reward_scale: float = 1.0,
    distance: Literal["backward_kl", "forward_kl", "square"] = "backward_kl",
) -> PreferenceLoss:
    """RPO (reward-aware): the implicit-reward margin matches the margin of given rewards.

    backward_kl: KL of sigma(g) from sigma(z),  forward_kl: KL of sigma(z) from sigma(g),  square: (z - g)^2
    z = r_chosen - r_rejected,  r = beta * (policy - reference),  g = reward_scale * gap

    KL of p from q is p log(p / q) + (1 - p) log((1 - p) / (1 - q)). The gradient of backward_kl is that of `dpo` with
    `prob` sigma(g).

    Source: Adler et al. 2024 (Nemotron-4: backward_kl); Sun et al. 2025; the names are NeMo-Aligner's.
    Args:
        policy, reference, weight: as in `dpo`.
        margin: the gap of each pair, in units of the given rewards.
        scores: the rewards of both candidates, best first; used where there is no margin.
        beta: reward per nat. Published: 0.1.
        reward_scale: reward units per unit of the given rewards. Published: 1.
        distance: of the two Bernoulli distributions, or of the margins.
    Raises:
        ValueError: neither margin nor scores, or reward_scale not positive.
    """
    check_candidates("rpo", 2, policy, reference)
    check_beta("rpo", beta)
    check_positive("rpo", "reward_scale", reward_scale)
    rewards = beta * (policy - reference)
    logit, goal = rewards[:, 0] - rewards[:, 1], reward_scale * _gap("rpo", rewards, margin, scores)
    if distance == "square":
        losses = (logit - goal) ** 2
    else:
        p, q = (goal, logit) if distance == "backward_kl" else (logit, goal)
        losses = _bernoulli_kl(p, q)
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def _gap(
    name: str,
    values: Float[Tensor, "batch 2"],
    margin: Float[Tensor, " batch"] | None,
    scores: Float[Tensor, "batch 2"] | None,
) -> Float[Tensor, " batch"]:
    if margin is not None:
        return margin.to(values)
    if scores is not None:
        return (scores[:, 0] - scores[:, 1]).to(values)
    raise ValueError(
        f"{name}: got data without margin and scores, want one of them: how much better the best candidate is. Set "
        "data.view.margin: gap, where the rows have scores, or give them a margin."
    )


def _bernoulli_kl(p: Float[Tensor, " batch"], q: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """KL of sigma(p) from sigma(q), both given as logits."""
    won = torch.sigmoid(p) * (logsigmoid(p) - logsigmoid(q))
    lost = torch.sigmoid(-p) * (logsigmoid(-p) - logsigmoid(-q))
    return won + lost
