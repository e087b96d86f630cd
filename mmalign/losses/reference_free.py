"""Losses that need no reference: logps `(batch, 2)` of text, the preferred candidate first.

`prob` and `weight` mean what they mean in `mmalign.losses.pairwise.dpo`; under a soft `prob` the roles of the two candidates
are averaged, likelihood terms included.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from mmalign.losses.divergences import transform
from mmalign.losses.links import (
    PreferenceLoss,
    check_beta,
    check_candidates,
    check_finite,
    check_label_smoothing,
    check_not_negative,
    less_margin,
    logistic,
    per_token,
    two_sided,
    weighted,
)


def slic(
    policy: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    delta: float = 1.0,
    nll_weight: float = 0.1,
) -> PreferenceLoss:
    """SLiC-HF: hinge on the log-likelihoods themselves, and imitation of the preferred candidate.

    max(0, delta - (policy_chosen - policy_rejected)) - nll_weight * policy_chosen

    `hinge` is the same calibration on log-ratios to a reference.

    Source: Zhao et al. 2023, eq. 3, with the preferred candidate as the regularisation target.
    Args:
        policy: logps, best first.
        prob, weight: as in `dpo`.
        delta: nats that the margin must reach. Published: 1.
        nll_weight: the paper's lambda. Published: 0.1.
    Raises:
        ValueError: delta or nll_weight below zero.
    """
    check_candidates("slic", 2, policy)
    check_not_negative("slic", "delta", delta)
    check_not_negative("slic", "nll_weight", nll_weight)
    gap = policy[:, 0] - policy[:, 1]
    won = relu(delta - gap) - nll_weight * policy[:, 0]  # eq. 3
    lost = relu(delta + gap) - nll_weight * policy[:, 1]
    return PreferenceLoss(weighted(two_sided(won, lost, prob), weight), policy.detach())


def simpo(
    policy: Float[Tensor, "batch 2"],
    lengths: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """SimPO: logistic loss on mean token log-probs with a target margin.

    -log sigma(r_chosen - r_rejected - gamma - margin),  r = beta * policy / length

    Source: Meng et al. 2024, eq. 6.
    Args:
        policy: summed logps, best first.
        lengths: number of scored tokens of each candidate.
        prob, weight: as in `dpo`; each of the two orders must reach gamma.
        margin: reward units beyond gamma, per pair.
        beta: reward per mean nat of a token. Published: 2 to 2.5, for some models 10.
        gamma: reward units that every pair must reach. Published: 0.25 to 0.8 of beta.
        label_smoothing: as in `dpo`.
    Raises:
        ValueError: gamma below zero: pairs would be left alone while the worse candidate leads.
    """
    check_candidates("simpo", 2, policy)
    return _target_margin("simpo", per_token(policy, lengths), prob, weight, margin, beta, gamma, label_smoothing)


def alphapo(
    policy: Float[Tensor, "batch 2"],
    lengths: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """AlphaPO: SimPO whose reward bends with the likelihood.

    -log sigma(r_chosen - r_rejected - gamma - margin),  r = beta * (1 - exp(-alpha * policy / length)) / alpha

    alpha = 0 is `simpo`.

    Source: Gupta et al. 2025 (AlphaPO).
    Args:
        policy, lengths, prob, weight, margin, beta, gamma, label_smoothing: as in `simpo`.
        alpha: the bend, of either sign. Published: 0.25.
    Raises:
        ValueError: gamma below zero, or alpha is not finite.
    """
    check_candidates("alphapo", 2, policy)
    check_finite("alphapo", "alpha", alpha)
    scores = transform(per_token(policy, lengths), "alpha", alpha)
    return _target_margin("alphapo", scores, prob, weight, margin, beta, gamma, label_smoothing)


def _target_margin(
    name: str,
    scores: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None,
    weight: Float[Tensor, " batch"] | None,
    margin: Float[Tensor, " batch"] | None,
    beta: float,
    gamma: float,
    label_smoothing: float,
) -> PreferenceLoss:
    check_beta(name, beta)
    check_label_smoothing(name, label_smoothing)
    check_not_negative(name, "gamma", gamma)
    gap = beta * (scores[:, 0] - scores[:, 1])
    won = logistic(less_margin(gap - gamma, margin), None, label_smoothing)
    lost = logistic(less_margin(-gap - gamma, margin), None, label_smoothing)
    return PreferenceLoss(weighted(two_sided(won, lost, prob), weight), (beta * scores).detach())


def cpo(
    policy: Float[Tensor, "batch 2"],
    lengths: Float[Tensor, "batch 2"] | None = None,
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    normalise: Literal["none", "length"] = "length",
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """CPO: DPO with a uniform reference, and imitation of the preferred candidate.

    -log sigma(beta * (policy_chosen - policy_rejected) - margin) - nll_weight * policy_chosen [/ length_chosen]

    Source: Xu et al. 2024 (CPO), where the likelihood term is of the sequence (`normalise: none`). The authors' code
        and TRL take one mean over the chosen tokens of a micro-batch; `length` is the mean over each candidate's own tokens,
        which does not depend on what else is in the batch. The current ALMA code adds ARPO's penalty: that is not CPO.
    Args:
        policy, prob, weight, margin, label_smoothing: as in `dpo`.
        lengths: number of scored tokens of each candidate; needed by `normalise: length` where nll_weight is not 0.
        beta: reward per nat. Published: 0.1.
        nll_weight: factor of the likelihood term. Published: 1.
        normalise: how the likelihood term counts tokens.
    Raises:
        ValueError: nll_weight below zero, or lengths are needed and not there.
    """
    check_candidates("cpo", 2, policy)
    check_beta("cpo", beta)
    check_label_smoothing("cpo", label_smoothing)
    check_not_negative("cpo", "nll_weight", nll_weight)
    likelihood = policy
    if normalise == "length" and nll_weight > 0:
        if lengths is None:
            raise ValueError("cpo.normalise: got length on data without lengths, want none, or text.")
        likelihood = per_token(policy, lengths)
    gap = beta * (policy[:, 0] - policy[:, 1])
    won = logistic(less_margin(gap, margin), None, label_smoothing) - nll_weight * likelihood[:, 0]
    lost = logistic(less_margin(-gap, margin), None, label_smoothing) - nll_weight * likelihood[:, 1]
    return PreferenceLoss(weighted(two_sided(won, lost, prob), weight), (beta * policy).detach())


def orpo(
    policy: Float[Tensor, "batch 2"],
    lengths: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """ORPO: imitation of the preferred candidate, and a logistic loss on the odds of the two.

    -a_chosen - beta * log sigma(o(a_chosen) - o(a_rejected)),  a = policy / length,  o(a) = a - log(1 - e^a)

    Source: Hong et al. 2024, eq. 6 and 7. The authors' likelihood term (and TRL's) covers the prompt too; this one covers the
        response, as LLaMA-Factory's. At a = 0 the odds are infinite: they stop where a = -1e-7.
    Args:
        policy, lengths: as in `simpo`.
        prob, weight: as in `dpo`.
        beta: the paper's lambda, factor of the odds-ratio term, and of the rewards that are reported (beta * a, as TRL's).
            Published: 0.1.
    """
    check_candidates("orpo", 2, policy)
    check_beta("orpo", beta)
    means = per_token(policy, lengths)
    odds = _log_odds(means)
    gap = odds[:, 0] - odds[:, 1]  # eq. 7
    won = -means[:, 0] - beta * logsigmoid(gap)  # eq. 6
    lost = -means[:, 1] - beta * logsigmoid(-gap)
    return PreferenceLoss(weighted(two_sided(won, lost, prob), weight), (beta * means).detach())


def asft(
    policy: Float[Tensor, "batch 2"],
    lengths: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 1.0,
) -> PreferenceLoss:
    """ASFT: imitation of the preferred candidate, and each candidate's own odds pulled apart.

    -a_chosen - beta * (log sigma(o(a_chosen)) + log sigma(-o(a_rejected))),  a = policy / length,  o(a) = a - log(1 - e^a)

    As sigma(o(a)) = e^a, this is -(1 + beta) a_chosen - beta * log(1 - e^a_rejected).

    Source: Wang et al. 2024 (aligned supervised fine-tuning).
    Args:
        policy, lengths, prob, weight: as in `orpo`.
        beta: factor of the alignment term, and of the rewards that are reported (beta * a). Published: 1.
    """
    check_candidates("asft", 2, policy)
    check_beta("asft", beta)
    means = per_token(policy, lengths)
    odds = _log_odds(means)
    better, worse = -means - beta * logsigmoid(odds), -beta * logsigmoid(-odds)
    losses = two_sided(better[:, 0] + worse[:, 1], better[:, 1] + worse[:, 0], prob)
    return PreferenceLoss(weighted(losses, weight), (beta * means).detach())


def _log_odds(means: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch 2"]:
    return means - torch.log(-torch.expm1(means.clamp(max=-1e-7)))
