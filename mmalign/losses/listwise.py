"""Losses on k ranked candidates a prompt: logps `(batch, k)`."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.losses.links import PreferenceLoss, check_beta, weighted


def rank_dpo(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    scores: Float[Tensor, "batch k"],
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 5000.0,
    rank_by: Literal["label", "model"] = "label",
    gain: Literal["exponential", "linear", "none"] = "exponential",
    discount: Literal["natural", "log2", "none"] = "natural",
    ties: Literal["average", "stable"] = "average",
) -> PreferenceLoss:
    """RankDPO: DPO on every ordered pair of a list, weighted by the change in DCG that swapping the two would make.

    sum over i preferred to j of |G_i - G_j| |1/D(tau_i) - 1/D(tau_j)| * -log sigma(r_i - r_j)
    G = 2^score - 1,  D(tau) = log(1 + tau),  r = beta * (policy - reference)

    Pairs of equal score drop out. Without discount the weight is |G_i - G_j|; without gain |1/D(tau_i) - 1/D(tau_j)|; without
    both 1, which is `dpo` on every pair.

    With k = 2 it is a constant (0.532 natural, 0.369 log2, at scores 1 and 0) times `dpo`.

    Source: Karthik et al. 2024, eq. 9 (no public code; base of the logarithm, beta and the treatment of ties are not given).
    Args:
        policy, reference: logps; mean-per-dimension nats for diffusion.
        scores: share of comparisons won, in [0, 1]: wins / (number of scorers * (k - 1)).
        weight: factor of each list's loss.
        beta: reward per nat; not published, 5000 follows Diffusion-DPO SDXL.
        rank_by: tau from the scores (the paper's Algorithm 2) or from the model's implicit reward (LambdaRank, its figure).
        gain: exponential as published, the score itself, or none. Exponential without discount is the ablation +gain.
        discount: base of its logarithm, which only rescales the loss, or none.
        ties: equal scores share their mean rank, or keep their order in the list.
    """
    check_beta("rank_dpo", beta)
    rewards = beta * (policy - reference)
    ranks = _ranks(scores if rank_by == "label" else rewards.detach(), average=ties == "average")
    weights = torch.ones_like(_differences(rewards.detach()))
    if gain != "none":
        weights = (
            weights
            * _differences(torch.pow(2.0, scores.to(rewards)) - 1 if gain == "exponential" else scores.to(rewards)).abs()
        )
    if discount != "none":
        weights = weights * _differences(1 / (torch.log1p(ranks) if discount == "natural" else torch.log2(1 + ranks))).abs()
    preferred = _differences(scores) > 0
    losses = torch.where(preferred, -weights * logsigmoid(_differences(rewards)), 0.0).sum((1, 2))  # eq. 9
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def _differences(values: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k k"]:
    return values[:, :, None] - values[:, None, :]


def _ranks(values: Float[Tensor, "batch k"], *, average: bool) -> Float[Tensor, "batch k"]:
    """Rank 1 for the largest value of each row; equal values share their mean rank or keep their order."""
    greater: Bool[Tensor, "batch k k"] = values[:, None, :] > values[:, :, None]
    equal: Bool[Tensor, "batch k k"] = values[:, None, :] == values[:, :, None]
    ahead_of_equals = (equal.sum(2) - 1) / 2 if average else torch.tril(equal, diagonal=-1).sum(2)
    return (1 + greater.sum(2) + ahead_of_equals).to(torch.promote_types(values.dtype, torch.float32))
