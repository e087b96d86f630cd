"""Blind Preference Optimization: a chosen response against rejected ones and one that was made without seeing the image."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.links import PreferenceLoss, check_beta, check_not_negative, log_loss, weighted


def blind_bpo(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    blind_weight: float = 1.0,
    reduction: Literal["sum", "mean"] = "sum",
) -> PreferenceLoss:
    """Blind Preference Optimization (BPO): DPO of the chosen against every rejected response and against the blind one.

    sum over rejected j of -log sigma(r_chosen - r_j) - blind_weight * log sigma(r_chosen - r_blind)
    r = beta * (policy - reference)

    Every response, the blind one too, is scored under the full prompt with its image: blind is only how it was made, by the
    base model without the image (`mmalign blind`, then the view `blind`).

    Not to be confused with what else is called BPO: Bootstrapped Preference Optimization (arXiv 2403.08730) is plain `dpo` on
    rejected responses made under a corrupted image; Black-Box Prompt Optimization (arXiv 2311.04155) rewrites prompts and
    trains no model; Bayesian, Bregman and Balanced ones are other losses of texts.

    Source: Li et al. 2025 (arXiv 2503.14189), the equation of the project page. The released recipe trains `dpo` on both pairs
        as rows of their own, which is the mean over pairs: `reduction: mean`, half of it for one rejected response.
    Args:
        policy, reference: summed logps: the chosen response, rejected ones, the blind one last.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1.
        blind_weight: share of the blind term. Published: 1.
        reduction: over the pairs of a row: the paper's sum, or the mean of the released recipe.
    Raises:
        ValueError: beta is not positive, blind_weight negative, or fewer than three responses.
    """
    check_beta("blind_bpo", beta)
    check_not_negative("blind_bpo", "blind_weight", blind_weight)
    num_pairs = policy.shape[1] - 1
    if num_pairs < 2:
        raise ValueError(
            f"blind_bpo: got {num_pairs + 1} responses a prompt, want chosen, rejected and blind. Make blind ones with "
            "`mmalign blind`, and set data.view to blind."
        )
    rewards = beta * (policy - reference)
    shares = torch.ones(num_pairs, dtype=rewards.dtype, device=rewards.device)
    shares[-1] = blind_weight
    losses = (shares * log_loss(rewards[:, :1] - rewards[:, 1:])).sum(1)
    if reduction == "mean":
        losses = losses / num_pairs
    return PreferenceLoss(weighted(losses, weight), rewards.detach())
