"""Losses on k candidates a prompt: logps `(batch, k)`. `mask` tells lists of unequal length apart from their padding."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.losses.links import PreferenceLoss, check_beta, check_positive, log_loss, weighted


def rank_dpo(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    scores: Float[Tensor, "batch k"],
    weight: Float[Tensor, " batch"] | None = None,
    mask: Bool[Tensor, "batch k"] | None = None,
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
        mask: whether a candidate is there (True) or padding. None: all are.
        beta: reward per nat; not published, 5000 follows Diffusion-DPO SDXL.
        rank_by: tau from the scores (the paper's Algorithm 2) or from the model's implicit reward (LambdaRank, its figure).
        gain: exponential as published, the score itself, or none. Exponential without discount is the ablation +gain.
        discount: base of its logarithm, which only rescales the loss, or none.
        ties: equal scores share their mean rank, or keep their order in the list. By `rank_by: model` all are tied where policy
            and reference agree, and sharing makes the loss 0 there: keep their order.
    Raises:
        ValueError: beta is not positive, or rows of one candidate.
    """
    check_beta("rank_dpo", beta)
    _check_several("rank_dpo", policy)
    rewards = beta * _without_padding(policy - reference, mask)
    scores = _without_padding(scores, mask)
    tau = scores if rank_by == "label" else rewards.detach()
    ranks = _ranks(tau if mask is None else tau.masked_fill(~mask, -torch.inf), average=ties == "average")
    weights = torch.ones_like(_differences(rewards.detach()))
    if gain != "none":
        weights = (
            weights
            * _differences(torch.pow(2.0, scores.to(rewards)) - 1 if gain == "exponential" else scores.to(rewards)).abs()
        )
    if discount != "none":
        weights = weights * _differences(1 / (torch.log1p(ranks) if discount == "natural" else torch.log2(1 + ranks))).abs()
    preferred = _differences(scores) > 0
    if mask is not None:
        preferred = preferred & mask[:, :, None] & mask[:, None, :]
    losses = torch.where(preferred, -weights * logsigmoid(_differences(rewards)), 0.0).sum((1, 2))  # eq. 9
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def lipo(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    scores: Float[Tensor, "batch k"],
    weight: Float[Tensor, " batch"] | None = None,
    mask: Bool[Tensor, "batch k"] | None = None,
    *,
    beta: float = 0.1,
    rank_by: Literal["label", "model"] = "model",
    gain: Literal["exponential", "linear", "none"] = "exponential",
    discount: Literal["natural", "log2", "none"] = "natural",
) -> PreferenceLoss:
    """LiPO-lambda: the lambda loss of learning to rank on implicit rewards; `rank_dpo` with the ranks the policy gives now.

    sum over i preferred to j of |G_i - G_j| |1/D(tau_i) - 1/D(tau_j)| * -log sigma(r_i - r_j)
    G = 2^score - 1,  D(tau) = log(1 + tau),  tau = rank by r,  r = beta * (policy - reference)

    Candidates of equal reward, as all are at the start, are ranked in the order of the list: a tie would cost nothing.

    Source: Liu et al. 2024 (LiPO), the lambda loss; without gain and discount it is DPO on every pair of a list, its pairwise
        logistic loss.
    Args:
        policy, reference: logps; summed nats for text.
        scores: labels of the candidates, published in [0, 1]: mean probability of winning. Equal scores make no pair.
        weight, mask, gain, discount: as in `rank_dpo`.
        beta: reward per nat; not fixed by the paper.
        rank_by: tau from the policy's implicit rewards (published) or from the scores.
    Raises:
        ValueError: beta is not positive, or rows of one candidate.
    """
    check_beta("lipo", beta)
    _check_several("lipo", policy)
    return rank_dpo(
        policy, reference, scores, weight, mask, beta=beta, rank_by=rank_by, gain=gain, discount=discount, ties="stable"
    )


def plackett_luce(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    weight: Float[Tensor, " batch"] | None = None,
    mask: Bool[Tensor, "batch k"] | None = None,
    scores: Float[Tensor, "batch k"] | None = None,
    *,
    beta: float = 0.1,
    top_m: int | None = None,
) -> PreferenceLoss:
    """DPO on whole rankings: negative log-likelihood of the order under Plackett-Luce (ListMLE on implicit rewards).

    sum over i < k of log(sum over j >= i of exp(r_j)) - r_i,  r = beta * (policy - reference),  best first

    With k = 2 it is `dpo`, whatever the scores. Of more candidates those of equal score are not ranked among themselves, each
    only above those that follow them all, so that one best candidate before equal ones is `top_m: 1`. That is ours; without
    scores the order counts alone.

    Source: Rafailov et al. 2023 (DPO), appendix A.3, eq. 20; Xia et al. 2008 (ListMLE).
    Args:
        policy, reference: logps, best first.
        weight: factor of each list's loss.
        mask: whether a candidate is there (True) or padding, which may stand anywhere. None: all are.
        scores: what the order of three or more was made of, as by the view `ranked`, to tell ties; in any unit.
        beta: reward per nat. Published: 0.1.
        top_m: how many places of the ranking count, from the best; None: all. 1 is the best against all others. Candidates of
            equal score share their place.
    Raises:
        ValueError: beta is not positive, top_m below 1, or rows of one candidate.
    """
    check_beta("plackett_luce", beta)
    _check_several("plackett_luce", policy)
    if top_m is not None and top_m < 1:
        raise ValueError(f"plackett_luce.top_m: got {top_m}, want at least 1, or null for the whole ranking.")
    rewards = beta * _without_padding(policy - reference, mask)
    k = rewards.shape[1]
    there = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    ranked = there[:, None, :].expand(-1, k, -1)
    if scores is not None:  # a pair whose scores are equal was ordered by something else: views by scores leave it out
        ranked = ranked & ((_differences(_without_padding(scores, mask)) != 0) | (there.sum(1) == 2)[:, None, None])
    places = torch.ones(k, k, dtype=torch.bool, device=rewards.device)
    behind, ahead = places.triu(1) & ranked, places.tril(-1) & ranked
    counted = there & behind.any(2)  # who has nobody behind him costs nothing, whatever his reward
    counted = counted if top_m is None else counted & (ahead.sum(2) < top_m)
    behind = behind | torch.eye(k, dtype=torch.bool, device=rewards.device)
    met = rewards[:, None, :].expand(-1, k, -1).masked_fill(~behind, -torch.inf).masked_fill(~counted[:, :, None], 0.0)
    losses = torch.where(counted, met.logsumexp(2) - rewards, 0.0).sum(1)
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def info_nca(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    scores: Float[Tensor, "batch k"] | None = None,
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    mask: Bool[Tensor, "batch k"] | None = None,
    *,
    beta: float = 0.01,
    temperature: float = 1e-4,
) -> PreferenceLoss:
    """InfoNCA: cross-entropy between the softmax of the scores and that of the implicit rewards.

    -sum over i of q_i log softmax(r)_i,  r = beta * (policy - reference)
    q = softmax(scores / temperature); without scores 1 for the first candidate, or (prob, 1 - prob)

    A pair without scores is `dpo`.

    Source: Chen et al. 2024 (Noise Contrastive Alignment); the published code adds 0.01 to the first score to break its ties,
        here tied scores share their part of q.
    Args:
        policy, reference: logps, best first.
        scores: rewards of the candidates, in any unit.
        prob: pairs without scores: probability that the first candidate is better; 0.5 is a tie. None: 1.
        weight: factor of each row's loss.
        mask: whether a candidate is there (True) or padding. None: all are.
        beta: reward per nat. Published: 0.01.
        temperature: units of the scores. Published script: 1e-4, which leaves all of q to the best candidate.
    Raises:
        ValueError: beta or temperature is not positive, both scores and prob are given, prob with more than two
            candidates, or rows of one candidate.
    """
    check_beta("info_nca", beta)
    _check_several("info_nca", policy)
    rewards = beta * _without_padding(policy - reference, mask)
    target = _target("info_nca", rewards, scores, prob, mask, temperature)
    losses = -_expected(target, _log_softmax(rewards, mask)).sum(1)
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def nca(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    scores: Float[Tensor, "batch k"] | None = None,
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    mask: Bool[Tensor, "batch k"] | None = None,
    *,
    beta: float = 0.01,
    temperature: float = 1e-4,
) -> PreferenceLoss:
    """NCA: raises the good candidates' rewards in absolute terms, where `info_nca` and `dpo` raise them against each other.

    sum over i of -q_i log sigma(r_i) - 1/k log sigma(-r_i),  r = beta * (policy - reference),  q as in `info_nca`

    A pair without scores costs -log sigma(r_chosen) - 1/2 log sigma(-r_chosen) - 1/2 log sigma(-r_rejected).

    Source: Chen et al. 2024 (Noise Contrastive Alignment).
    Args:
        policy, reference, scores, prob, weight, mask, temperature: as in `info_nca`.
        beta: reward per nat. Published: 0.01 (TRL's default: 0.1).
    Raises:
        ValueError: beta or temperature is not positive, both scores and prob are given, or prob with more than two candidates.
    """
    check_beta("nca", beta)
    rewards = beta * _without_padding(policy - reference, mask)
    target = _target("nca", rewards, scores, prob, mask, temperature)
    there = torch.ones_like(rewards) if mask is None else mask.to(rewards)
    noise = there / there.sum(1, keepdim=True)
    losses = (_expected(target, log_loss(rewards)) + _expected(noise, log_loss(-rewards))).sum(1)
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def exo_listwise(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    scores: Float[Tensor, "batch k"],
    weight: Float[Tensor, " batch"] | None = None,
    mask: Bool[Tensor, "batch k"] | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 0.5,
) -> PreferenceLoss:
    """EXO with rewards: reverse KL divergence of the softmax of the implicit rewards from that of the scores.

    sum over i of p_i (log p_i - log q_i),  p = softmax(r),  q = softmax(scores / temperature),  r = beta * (policy - reference)

    `info_nca` is the forward divergence less the entropy of q: it covers what the scores spread over, this one seeks the best.

    Source: Ji et al. 2024 (EXO), the loss exo-rw of the published code.
    Args:
        policy, reference: logps, in any order.
        scores: rewards of the candidates, in any unit.
        weight: factor of each row's loss.
        mask: whether a candidate is there (True) or padding. None: all are.
        beta: reward per nat. Published script: 0.5 (there beta_pi).
        temperature: units of the scores. Published script: 0.5 (there beta_r).
    Raises:
        ValueError: beta or temperature is not positive, or rows of one candidate.
    """
    check_beta("exo_listwise", beta)
    _check_several("exo_listwise", policy)
    check_positive("exo_listwise", "temperature", temperature)
    rewards = beta * _without_padding(policy - reference, mask)
    logs = _log_softmax(rewards, mask).clamp(min=torch.finfo(rewards.dtype).min)  # a share of 0 times its logarithm is 0
    wanted = _log_softmax(_without_padding(scores, mask).to(rewards) / temperature, mask)
    share = logs.exp() if mask is None else logs.exp() * mask.to(rewards)
    losses = (share * (logs - wanted)).sum(1)
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def _check_several(name: str, policy: Float[Tensor, "batch k"]) -> None:
    """Refuse rows of one candidate, which has nothing to be compared with: the loss would be zero."""
    if policy.shape[1] < 2:
        raise ValueError(f"{name}: got {policy.shape[1]} candidates a prompt, want 2 or more. Choose another data.view.")


def _without_padding(values: Float[Tensor, "batch k"], mask: Bool[Tensor, "batch k"] | None) -> Float[Tensor, "batch k"]:
    """Zero where there is no candidate, so that what stands in the padding, NaN even, touches neither loss nor gradient."""
    return values if mask is None else values.masked_fill(~mask, 0.0)


def _log_softmax(values: Float[Tensor, "batch k"], mask: Bool[Tensor, "batch k"] | None) -> Float[Tensor, "batch k"]:
    """Over the candidates that are there; 0 in the padding, where a factor of 0 must not meet minus infinity."""
    if mask is None:
        return torch.log_softmax(values, 1)
    return torch.log_softmax(values.masked_fill(~mask, -torch.inf), 1).masked_fill(~mask, 0.0)


def _expected(share: Float[Tensor, "batch k"], values: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
    """Values times their share of the target; what has no share counts for nothing, though it be infinite."""
    return torch.where(share > 0, share * values, 0.0)


def _target(
    name: str,
    rewards: Float[Tensor, "batch k"],
    scores: Float[Tensor, "batch k"] | None,
    prob: Float[Tensor, " batch"] | None,
    mask: Bool[Tensor, "batch k"] | None,
    temperature: float,
) -> Float[Tensor, "batch k"]:
    """What part of the target distribution each candidate gets."""
    check_positive(name, "temperature", temperature)
    if scores is not None and prob is not None:
        raise ValueError(f"{name}: got both scores and prob, want one of them.")
    if scores is not None:
        wanted = _without_padding(scores, mask).to(rewards) / temperature
        return torch.softmax(wanted if mask is None else wanted.masked_fill(~mask, -torch.inf), 1)
    if prob is not None:
        if rewards.shape[1] != 2:
            raise ValueError(f"{name}: got prob with {rewards.shape[1]} candidates, want 2.")
        return torch.stack([prob, 1 - prob], 1).to(rewards)
    return torch.eye(1, rewards.shape[1], dtype=rewards.dtype, device=rewards.device).expand_as(rewards)


def _differences(values: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k k"]:
    return values[:, :, None] - values[:, None, :]


def _ranks(values: Float[Tensor, "batch k"], *, average: bool) -> Float[Tensor, "batch k"]:
    """Rank 1 for the largest value of each row; equal values share their mean rank or keep their order."""
    greater: Bool[Tensor, "batch k k"] = values[:, None, :] > values[:, :, None]
    equal: Bool[Tensor, "batch k k"] = values[:, None, :] == values[:, :, None]
    ahead_of_equals = (equal.sum(2) - 1) / 2 if average else torch.tril(equal, diagonal=-1).sum(2)
    return (1 + greater.sum(2) + ahead_of_equals).to(torch.promote_types(values.dtype, torch.float32))
