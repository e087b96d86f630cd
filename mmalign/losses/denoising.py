"""Pairwise losses of the diffusion papers: logps `(batch, 2)` are -1/2 * mean squared error, the preferred candidate first.

`spo`'s are those of a sampler's step. Every one honours a per-pair `weight` and a soft `prob`, as in `mmalign.losses.pairwise`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.losses.links import PreferenceLoss, check_beta, check_candidates, check_positive, logistic, two_sided, weighted
from mmalign.losses.pairwise import check_margin, hinge


def dro(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 2.0,
    margin: float | Float[Tensor, " batch"] = 0.001,
) -> PreferenceLoss:
    """Diffusion-DRO: hinge on the implicit-reward margin of an expert sample over the policy's own.

    max(0, margin - (r_chosen - r_rejected)),  r = beta * (policy - reference)

    Source: Wu et al. 2025, published train.py, where it is written on errors: error = -2 * logp. The paper's loss is this one
        minus the constant margin: the same gradient.
    Args:
        policy, reference: logps; column 0 the expert image, column 1 the policy's own sample.
        prob, weight: as in `dpo`.
        beta: reward per nat. 2 reproduces the published code.
        margin: reward units, one number; a call from Python may give one per pair. Published: 0.001.
    Raises:
        ValueError: beta is not positive, or margin below zero.
    """
    check_beta("dro", beta)
    check_candidates("dro", 2, policy, reference)
    check_margin("dro", margin)
    return hinge(policy, reference, prob, weight, beta=beta, margin=margin)


def spo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 10.0,
    clip: float = 0.1,
) -> PreferenceLoss:
    """SPO: logistic loss on clamped log-ratios of one sampler step.

    -log sigma(beta * (log c_chosen - log c_rejected)),  c = clamp(exp(policy - reference), 1 - clip, 1 + clip)

    A clamped candidate has no gradient. Log-ratios are about 1e-3, so a loss near ln 2 is normal.

    Source: Liang et al. 2024, eq. 9, with the clamp of the published train_spo.py, which the paper does not mention.
    Args:
        policy, reference: logps of the two successors, mean over dimensions.
        prob, weight: as in `dpo`.
        beta: reward per nat. Published: 10 (LPO: 500).
        clip: half-width of the allowed ratio. Published: 0.1.
    """
    check_beta("spo", beta)
    check_candidates("spo", 2, policy, reference)
    if not 0.0 < clip < 1.0:
        raise ValueError(f"spo.clip: got {clip}, want a number between 0 and 1.")
    # Clamped in logarithms: the same value and gradient, and no overflow of the ratio.
    ratios = (policy - reference).clamp(math.log1p(-clip), math.log1p(clip))
    losses = logistic(beta * (ratios[:, 0] - ratios[:, 1]), prob)
    return PreferenceLoss(weighted(losses, weight), (beta * ratios).detach())


def mapo(
    policy: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    snr: float = 0.5,
    scale: float = 1000.0,
    parametrisation: Literal["v1", "aaai"] = "v1",
) -> PreferenceLoss:
    """MaPO: margin-aware preference optimisation without a reference, on errors e = -2 * policy.

    v1:    e_chosen - beta * log sigma(scale * (phi(e_chosen) - phi(e_rejected))),  phi(e) = snr e / (exp(snr e) - 1)
    aaai:  e_chosen - log sigma(phi(e_chosen) - phi(e_rejected)) / beta,            phi(e) = (e / (exp(e) - 1))^beta

    phi(0) is its limit 1 with slope -1/2; the published code gives 0/0 there.

    Source: Hong et al. 2024. v1 is arXiv v1 and the public code; aaai is the AAAI-26 paper, which has no public code.
    Args:
        policy: logps, best first: -1/2 * mean squared error.
        prob, weight: as in `dpo`; under a soft `prob` the roles of the two candidates are averaged.
        beta: v1: weight of the margin term, published 0.1. aaai: sharpness, published 8 (general) to 1024 (personalisation).
        snr: v1 only. Published: 0.5.
        scale: v1 only, the number of training timesteps. Published: 1000.
        parametrisation: which of the two.
    Raises:
        ValueError: beta, snr or scale is not positive.
    """
    check_beta("mapo", beta)
    check_candidates("mapo", 2, policy)
    check_positive("mapo", "snr", snr)
    check_positive("mapo", "scale", scale)
    error = -2 * policy
    if parametrisation == "v1":
        log_score, score_scale, margin_weight = _log_error_odds(snr * error), scale, beta
    else:
        log_score, score_scale, margin_weight = beta * _log_error_odds(error), 1.0, 1 / beta
    below_one = torch.expm1(log_score)  # scores near 1 lose their difference in float32, scores minus 1 do not
    logit = score_scale * (below_one[:, 0] - below_one[:, 1])
    won = error[:, 0] - margin_weight * logsigmoid(logit)
    lost = error[:, 1] - margin_weight * logsigmoid(-logit)
    return PreferenceLoss(weighted(two_sided(won, lost, prob), weight), (score_scale * (1 + below_one)).detach())


def _log_error_odds(error: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch 2"]:
    """log(x / (exp(x) - 1)) for x >= 0: its Taylor series near 0, where the quotient is 0/0; never an overflow above."""
    near_zero = error < 0.05
    safe = torch.where(near_zero, torch.ones_like(error), error)
    square = torch.where(near_zero, error, torch.zeros_like(error)) ** 2
    series = -error / 2 - square / 24 + square**2 / 2880 - square**3 / 181440
    return torch.where(near_zero, series, safe.log() - safe - torch.log(-torch.expm1(-safe)))
