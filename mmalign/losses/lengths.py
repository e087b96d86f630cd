"""DPO that knows how long its candidates are: logps `(batch, 2)` of text, the preferred candidate first.

`prob`, `weight` and `margin` mean what they mean in `mmalign.losses.pairwise.dpo`; so do the divergences.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.divergences import Divergence, check_divergence, transform
from mmalign.losses.links import (
    PreferenceLoss,
    check_beta,
    check_candidates,
    check_label_smoothing,
    check_not_negative,
    less_margin,
    logistic,
    logistic_loss,
    per_token,
    weighted,
)


def ln_dpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    lengths: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 5.0,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """LN-DPO: length-normalised DPO (Tulu 3's `dpo_norm`, TRL's `sigmoid_norm`).

    -log sigma(r_chosen - r_rejected - margin),  r = beta * h(policy - reference) / length

    Source: Lambert et al. 2024 (Tulu 3).
    Args:
        policy, reference, prob, weight, margin, label_smoothing, divergence, divergence_alpha: as in `dpo`.
        lengths: number of scored tokens of each candidate.
        beta: reward per mean nat of a token. Published: 5 (2 to 10).
    """
    check_candidates("ln_dpo", 2, policy, reference)
    check_beta("ln_dpo", beta)
    check_label_smoothing("ln_dpo", label_smoothing)
    check_divergence("ln_dpo", divergence, divergence_alpha)
    scores = per_token(transform(policy - reference, divergence, divergence_alpha), lengths)
    return logistic_loss(scores, prob, weight, margin, beta, label_smoothing)


def ld_dpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    shared: Float[Tensor, "batch 2"],
    reference_shared: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    alpha_reference: float | None = None,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """LD-DPO: tokens past the length that both candidates have count for less.

    -log sigma(r_chosen - r_rejected - margin),  r = beta * h(l_policy - l_reference),  l = shared + alpha * (logp - shared)

    alpha = 1 is DPO; alpha = 0 sees only the first min(length_chosen, length_rejected) tokens of each.

    Source: Liu et al. 2024 (LD-DPO), with TRL's reading: the reference is summed as the policy is, so that the two still form a
        ratio. LLaMA-Factory, ms-swift and TRL before 1.0 desensitise the policy alone: `alpha_reference: 1`.
    Args:
        policy, reference, prob, weight, margin, beta, label_smoothing, divergence, divergence_alpha: as in `dpo`.
        shared, reference_shared: summed log-probs of the first min(length_chosen, length_rejected) tokens, in nats.
        alpha: weight of the later tokens, 0 to 1. Published: 0.5 (0.3 to 0.6).
        alpha_reference: the same of the reference. None: as alpha.
    Raises:
        ValueError: an alpha outside [0, 1].
    """
    check_candidates("ld_dpo", 2, policy, reference)
    check_beta("ld_dpo", beta)
    check_label_smoothing("ld_dpo", label_smoothing)
    check_divergence("ld_dpo", divergence, divergence_alpha)
    of_reference = alpha if alpha_reference is None else alpha_reference
    for setting, value in {"alpha": alpha, "alpha_reference": of_reference}.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"ld_dpo.{setting}: got {value}, want 0 to 1.")
    ratios = torch.lerp(shared, policy, alpha) - torch.lerp(reference_shared, reference, of_reference)
    scores = transform(ratios, divergence, divergence_alpha)
    return logistic_loss(scores, prob, weight, margin, beta, label_smoothing)


def davir_dpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """DavIR-DPO: DPO on the share of its surprise that the policy takes off each candidate.

    -log sigma(r_chosen - r_rejected - margin),  r = beta * (policy - reference) / |reference|

    Source: Zhou et al. 2023 (DavIR), the normalisation of its data score put into DPO. Scores are of order 0.1, so beta is not
        DPO's.
    Args:
        policy, reference, prob, weight, margin, label_smoothing: as in `dpo`.
        beta: reward per unit of relative change. Not published; tune 1 to 10.
    """
    check_candidates("davir_dpo", 2, policy, reference)
    check_beta("davir_dpo", beta)
    check_label_smoothing("davir_dpo", label_smoothing)
    scores = (policy - reference) / reference.abs().clamp(min=torch.finfo(torch.float32).eps)
    return logistic_loss(scores, prob, weight, margin, beta, label_smoothing)


def length_dpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    lengths: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """R-DPO (length): what a candidate's length alone would explain of its being preferred is not learned.

    -log sigma(r_chosen - r_rejected + alpha * (length_chosen - length_rejected) - margin),  r = beta * h(policy - reference)

    Source: Park et al. 2024 (R-DPO).
    Args:
        policy, reference, prob, weight, margin, beta, divergence, divergence_alpha: as in `dpo`.
        lengths: number of scored tokens of each candidate.
        alpha: reward units per token of difference. Published: 0.005 to 0.05.
    Raises:
        ValueError: alpha below zero, which would favour the longer candidate.
    """
    check_candidates("length_dpo", 2, policy, reference)
    check_beta("length_dpo", beta)
    check_not_negative("length_dpo", "alpha", alpha)
    check_divergence("length_dpo", divergence, divergence_alpha)
    scores = transform(policy - reference, divergence, divergence_alpha)
    longer = lengths.to(scores)
    logit = beta * (scores[:, 0] - scores[:, 1]) + alpha * (longer[:, 0] - longer[:, 1])
    losses = logistic(less_margin(logit, margin), prob)
    return PreferenceLoss(weighted(losses, weight), (beta * scores).detach())
