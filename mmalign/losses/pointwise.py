"""Losses on single candidates: logps `(batch, 1)` (or the first column of more)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.losses.links import PreferenceLoss, check_beta, weighted


def batch_mean_ratio(policy: Float[Tensor, "batch k"], reference: Float[Tensor, "batch k"]) -> Float[Tensor, " values"]:
    """The values whose mean over all processes is KTO's anchor: every candidate's log-ratio, detached."""
    return (policy - reference).detach().flatten()


def kto(
    policy: Float[Tensor, "batch 1"],
    reference: Float[Tensor, "batch 1"],
    labels: Bool[Tensor, " batch"] | Float[Tensor, " batch"] | Int[Tensor, " batch"],
    anchor: Float[Tensor, ""] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PreferenceLoss:
    """KTO and Diffusion-KTO: prospect-theoretic utility of unpaired candidates against an anchor.

    lambda_y * (1 - sigma(s * beta * (policy - reference - max(0, anchor)))),  s = +1 desirable, -1 undesirable

    Source: Ethayarajh et al. 2024, eq. 8; Li et al. 2024 (Diffusion-KTO), published code, where the anchor is the mean
        log-ratio of the batch over all processes.
    Args:
        policy, reference: logps, one candidate a row.
        labels: 1 (or True) desirable, 0 (or False) undesirable.
        anchor: reference point in nats, gathered over processes and detached; None: the mean of this batch. In training it is
            the mean of a micro-batch over all processes, as published: accumulating does not widen it.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1 for text; Diffusion-KTO's 1000 on errors without the half is 2000 here.
        desirable_weight, undesirable_weight: lambda of each class. Published: 1.
    """
    check_beta("kto", beta)
    ratio = (policy - reference)[:, 0]
    if anchor is None:
        anchor = batch_mean_ratio(policy, reference).mean()
    desirable = labels.to(ratio) > 0.5
    sign = 2 * desirable.to(ratio) - 1
    utility_weight = torch.where(desirable, ratio.new_tensor(desirable_weight), ratio.new_tensor(undesirable_weight))
    losses = utility_weight * torch.sigmoid(-sign * beta * (ratio - anchor.detach().clamp(min=0)))  # eq. 8
    return PreferenceLoss(weighted(losses, weight), (beta * (policy - reference)).detach())


def output_anchor(drift: Float[Tensor, "batch k"], weight: Float[Tensor, " batch"] | None = None) -> PreferenceLoss:
    """Keeps the network's outputs near the reference's: a penalty to be added to a preference loss with a small weight.

    mean over candidates of drift,  drift = mean((output - reference output)^2)

    Source: the anchor term of SimpleTuner's flow DPO as its documentation states it, alpha * 1/2 [MSE_w + MSE_l]; alpha is the
        weight of this loss in the sum. It bounds what a preference loss does to the error of the rejected sample.
    Args:
        drift: mean squared distance of the policy's output from the reference's, of every candidate.
        weight: factor of each row.
    """
    return PreferenceLoss(weighted(drift.mean(1), weight), -drift.detach())


def sft(policy: Float[Tensor, "batch k"], weight: Float[Tensor, " batch"] | None = None) -> PreferenceLoss:
    """Supervised fine-tuning on the best candidate: its negative log-likelihood.

    -policy_best

    Source: the honest baseline of every preference paper. For diffusion this is 1/2 * the mean squared error.
    Args:
        policy: logps, best first; the other columns are not used.
        weight: factor of each row, e.g. exp(reward / temperature) for reward-weighted regression.
    """
    return PreferenceLoss(weighted(-policy[:, 0], weight), policy.detach())
