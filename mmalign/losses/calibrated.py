"""Losses that say where each candidate's own reward should go: logps `(batch, 2)`, the preferred candidate first.

`prob` and `weight` mean what they mean in `mmalign.losses.pairwise.dpo`.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.losses.links import PreferenceLoss, check_beta, check_candidates, pair_delta, two_sided, weighted


def apo_zero(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """APO-zero: raise the preferred candidate and lower the other, for a policy worse than the preferred one.

    sigma(-r_chosen) + sigma(r_rejected),  r = beta * (policy - reference)

    Source: D'Oosterlinck et al. 2024 (APO).
    Args:
        policy, reference, prob, weight: as in `dpo`.
        beta: reward per nat. Published: 0.1.
    """
    check_candidates("apo_zero", 2, policy, reference)
    check_beta("apo_zero", beta)
    rewards = beta * (policy - reference)
    up, down = torch.sigmoid(-rewards), torch.sigmoid(rewards)
    losses = two_sided(up[:, 0] + down[:, 1], up[:, 1] + down[:, 0], prob)
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def apo_down(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """APO-down: lower both candidates, the other more, for a policy better than the preferred one.

    sigma(r_chosen) + sigma(-(r_chosen - r_rejected)),  r = beta * (policy - reference)

    Source: D'Oosterlinck et al. 2024 (APO).
    Args:
        policy, reference, prob, weight: as in `dpo`.
        beta: reward per nat. Published: 0.1.
    """
    check_candidates("apo_down", 2, policy, reference)
    check_beta("apo_down", beta)
    rewards = beta * (policy - reference)
    logit = rewards[:, 0] - rewards[:, 1]
    won = torch.sigmoid(rewards[:, 0]) + torch.sigmoid(-logit)
    lost = torch.sigmoid(rewards[:, 1]) + torch.sigmoid(logit)
    return PreferenceLoss(weighted(two_sided(won, lost, prob), weight), rewards.detach())


def sppo(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    prob: Float[Tensor, " batch"] | None = None,
    scores: Float[Tensor, "batch k"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 1e-3,
    target: Literal["prob", "scores"] = "prob",
) -> PreferenceLoss:
    """SPPO: each candidate's log-ratio regressed on how often it wins.

    mean over candidates of (policy - reference - (P - 1/2) / beta)^2

    P is prob and 1 - prob of a pair, without `prob` 1 and 0 (SPPO-hard); or the scores of any number of candidates.

    Source: Wu et al. 2024 (SPPO; 1 / beta is the paper's eta) and the authors' code, which halves the sum over the pair;
        TRL's `sppo_hard` does not, and is twice this.
    Args:
        policy, reference: logps.
        prob: probability that the first of two candidates wins.
        scores: `target: scores`: the probability of each candidate to win against the policy's samples, 0 to 1.
        weight: factor of each row's loss.
        beta: 1 / eta, reward per nat. Published: 1e-3.
        target: where P is taken from.
    Raises:
        ValueError: `target: scores` without scores; `target: prob` with scores and no prob, or with another number of
            candidates than 2.
    """
    check_beta("sppo", beta)
    ratios = policy - reference
    if target == "scores":
        if scores is None:
            raise ValueError("sppo.target: got scores on data without them, want prob.")
        wins = scores.to(ratios)
    else:
        if ratios.shape[1] != 2:
            raise ValueError(f"sppo.target: got prob for {ratios.shape[1]} candidates, want scores.")
        if scores is not None and prob is None:
            raise ValueError("sppo.target: got prob on data with scores and no prob, want scores, or data without scores.")
        first = torch.ones_like(ratios[:, 0]) if prob is None else prob.to(ratios)
        wins = torch.stack([first, 1 - first], dim=1)
    losses = ((ratios - (wins - 0.5) / beta) ** 2).mean(1)
    return PreferenceLoss(weighted(losses, weight), (beta * ratios).detach())


def cal_dpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """Cal-DPO: a logistic loss on log-ratios, each of which is calibrated to half a reward unit either way.

    -log sigma(t_chosen - t_rejected) + (t_chosen - 1 / (2 beta))^2 + (t_rejected + 1 / (2 beta))^2,  t = policy - reference

    Source: Xiao et al. 2024 (Cal-DPO); the logistic term has no beta.
    Args:
        policy, reference, prob, weight: as in `dpo`.
        beta: reward per nat. Published: 0.1 (the targets are then 5 nats).
    """
    check_candidates("cal_dpo", 2, policy, reference)
    check_beta("cal_dpo", beta)
    ratios, delta, goal = policy - reference, pair_delta(policy, reference), 0.5 / beta
    above, below = (ratios - goal) ** 2, (ratios + goal) ** 2
    won = -logsigmoid(delta) + above[:, 0] + below[:, 1]
    lost = -logsigmoid(-delta) + above[:, 1] + below[:, 0]
    return PreferenceLoss(weighted(two_sided(won, lost, prob), weight), (beta * ratios).detach())
