"""DPO with another link, guard, weight or score: logps `(batch, 2)`, the preferred candidate first.

`prob`, `weight` and `margin` mean what they mean in `mmalign.losses.pairwise.dpo`; so do the divergences.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from mmalign.losses.divergences import Divergence, check_divergence, transform
from mmalign.losses.links import (
    PreferenceLoss,
    check_beta,
    check_candidates,
    check_label_smoothing,
    check_not_negative,
    less_margin,
    logistic,
    two_sided,
    weighted,
)
from mmalign.losses.pairwise import dpo


def tr_dpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """TR-DPO: `dpo` against a reference that follows the policy, which `training.moving_reference` makes it do.

    -log sigma(r_chosen - r_rejected - margin),  r = beta * (policy - reference);  reference <- a policy + (1 - a) reference

    The loss itself is DPO's: without `training.moving_reference` nothing follows, and a config is refused.

    Source: Gorbatovski et al. 2024. Published: a = 0.6 every 512 steps (soft), or a copy (hard).
    Args:
        policy, reference, prob, weight, margin, beta, label_smoothing: as in `dpo`.
    """
    check_candidates("tr_dpo", 2, policy, reference)
    check_beta("tr_dpo", beta)
    check_label_smoothing("tr_dpo", label_smoothing)
    return dpo(policy, reference, prob, weight, margin, beta=beta, label_smoothing=label_smoothing)


def exo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 1.0,
    label_smoothing: float = 1e-3,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """EXO-pref: reverse KL from the model's probability of preferring the first candidate to the label's.

    sigma(z) log(sigma(z) / q) + sigma(-z) log(sigma(-z) / (1 - q)),  z = r_chosen - r_rejected - margin
    r = beta * h(policy - reference),  q = prob (1 - e) + (1 - prob) e,  e = label_smoothing

    Source: Ji et al. 2024 (EXO), the form for preference labels. Its code has the unnormalised log-targets 0 and -10 for
        log(1 - e) and log(e); TRL's are these. TRL's beta is 0.1.
    Args:
        policy, reference, weight, margin, divergence, divergence_alpha: as in `dpo`.
        prob: probability that the first candidate is better: the target itself, smoothed. None: 1.
        beta: reward per nat. Published: 1.
        label_smoothing: share of the target that the second candidate keeps, above 0 and below 0.5. Published: 1e-3.
    Raises:
        ValueError: label_smoothing outside (0, 0.5): a target of zero is infinitely far.
    """
    check_candidates("exo", 2, policy, reference)
    check_beta("exo", beta)
    if not 0.0 < label_smoothing < 0.5:
        raise ValueError(f"exo.label_smoothing: got {label_smoothing}, want above 0 and below 0.5.")
    check_divergence("exo", divergence, divergence_alpha)
    scores = transform(policy - reference, divergence, divergence_alpha)
    logit = less_margin(beta * (scores[:, 0] - scores[:, 1]), margin)
    hard = torch.ones_like(logit) if prob is None else prob.to(logit)
    target_won = label_smoothing + hard * (1 - 2 * label_smoothing)
    target_lost = label_smoothing + (1 - hard) * (1 - 2 * label_smoothing)
    least = torch.finfo(logit.dtype).min  # a probability of 0 times its logarithm is 0
    log_won, log_lost = logsigmoid(logit).clamp(min=least), logsigmoid(-logit).clamp(min=least)
    losses = log_won.exp() * (log_won - target_won.log()) + log_lost.exp() * (log_lost - target_lost.log())
    return PreferenceLoss(weighted(losses, weight), (beta * scores).detach())


def discopop(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.05,
    tau: float = 0.05,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """DiscoPOP (LRML): a blend of logistic and exponential loss that shifts with the margin itself.

    (1 - s) * -log sigma(z) + s * exp(-z),  s = sigma(z / tau),  z = r_chosen - r_rejected - margin
    r = beta * h(policy - reference)

    Found by a language model, and not monotone: between two stationary points near z = 0 the loss rises with z.

    Source: Lu et al. 2024 (DiscoPOP).
    Args:
        policy, reference, prob, weight, margin, divergence, divergence_alpha: as in `dpo`.
        beta: reward per nat. Published: 0.05.
        tau: width of the shift, above 0 and at most 1. Published: 0.05.
    Raises:
        ValueError: tau outside (0, 1], where the exponential would win on badly ranked pairs.
    """
    check_candidates("discopop", 2, policy, reference)
    check_beta("discopop", beta)
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"discopop.tau: got {tau}, want above 0 and at most 1.")
    check_divergence("discopop", divergence, divergence_alpha)
    scores = transform(policy - reference, divergence, divergence_alpha)
    logit = less_margin(beta * (scores[:, 0] - scores[:, 1]), margin)
    losses = two_sided(_log_ratio_modulated(logit, tau), _log_ratio_modulated(-logit, tau), prob)
    return PreferenceLoss(weighted(losses, weight), (beta * scores).detach())


def _log_ratio_modulated(logit: Float[Tensor, " batch"], tau: float) -> Float[Tensor, " batch"]:
    """The exponential and its share in one exponent: neither overflows alone."""
    exponential = torch.exp(logsigmoid(logit / tau) - logit)
    return torch.sigmoid(-logit / tau) * -logsigmoid(logit) + exponential


def dpop(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.3,
    penalty: float = 50.0,
) -> PreferenceLoss:
    """DPO-Positive (Smaug): DPO that pays where the preferred candidate falls below the reference.

    -log sigma(beta * (t_chosen - t_rejected - penalty * max(0, -t_chosen)) - margin),  t = policy - reference

    Source: Pal et al. 2024 (Smaug): the penalty stands inside the sigmoid and is multiplied by beta.
    Args:
        policy, reference, weight, margin: as in `dpo`.
        prob: as in `dpo`; where the second candidate is the better one it is the one that must not fall.
        beta: reward per nat. Published: 0.3.
        penalty: the paper's lambda. Published: 50 (5 to 500); some toolkits ship 0.1.
    Raises:
        ValueError: penalty below zero.
    """
    check_candidates("dpop", 2, policy, reference)
    check_beta("dpop", beta)
    check_not_negative("dpop", "penalty", penalty)
    ratios = policy - reference
    delta, fall = ratios[:, 0] - ratios[:, 1], penalty * relu(-ratios)
    won = less_margin(beta * (delta - fall[:, 0]), margin)
    lost = less_margin(beta * (-delta - fall[:, 1]), margin)
    losses = two_sided(-logsigmoid(won), -logsigmoid(lost), prob)
    return PreferenceLoss(weighted(losses, weight), (beta * ratios).detach())


def wpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    agreement: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.01,
    clamp: bool = True,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """WPO: DPO weighted by how likely the policy would be to write the pair itself.

    w * -log sigma(r_chosen - r_rejected - margin),  w = min(1, exp(a_chosen + a_rejected)),  r = beta * h(policy - reference)

    The weight carries no gradient; the mean is over pairs, not over weights.

    Source: Zhou et al. 2024 (WPO), and the authors' code. TRL does not clamp the weight.
    Args:
        policy, reference, prob, weight, margin, label_smoothing, divergence, divergence_alpha: as in `dpo`.
        agreement: mean over tokens of the token's log-prob less log sum_v p_v^2: 0 where all tokens are equally likely.
        beta: reward per nat. Published: 0.01; TRL's is 0.1.
        clamp: no pair weighs more than 1. Published: True.
    """
    check_candidates("wpo", 2, policy, reference)
    check_beta("wpo", beta)
    check_label_smoothing("wpo", label_smoothing)
    check_divergence("wpo", divergence, divergence_alpha)
    scores = transform(policy - reference, divergence, divergence_alpha)
    log_weight = agreement.detach().sum(1)
    losses = logistic(less_margin(beta * (scores[:, 0] - scores[:, 1]), margin), prob, label_smoothing)
    losses = losses * (log_weight.clamp(max=0) if clamp else log_weight).exp()
    return PreferenceLoss(weighted(losses, weight), (beta * scores).detach())


def dove(
    joint: Float[Tensor, "batch 2"],
    reference_joint: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """DOVE (joint preference optimisation): DPO on prompt and response together, whose prompts may differ.

    -log sigma(r_chosen - r_rejected - margin),  r = beta * h(joint - reference_joint)

    Source: Bansal et al. 2024 (DOVE).
    Args:
        joint, reference_joint: summed log-probs of prompt and response (all tokens but the first), best first, in nats.
        prob, weight, margin, beta, label_smoothing, divergence, divergence_alpha: as in `dpo`.
    """
    check_beta("dove", beta)
    check_label_smoothing("dove", label_smoothing)
    check_divergence("dove", divergence, divergence_alpha)
    return dpo(
        joint,
        reference_joint,
        prob,
        weight,
        margin,
        beta=beta,
        label_smoothing=label_smoothing,
        divergence=divergence,
        divergence_alpha=divergence_alpha,
    )
