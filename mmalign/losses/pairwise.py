"""Losses on one pair a prompt: logps `(batch, 2)`, the preferred candidate first.

Every one honours a per-pair `weight` and a soft `prob`, the probability that the first candidate is better (a tie is 0.5).
The losses of DPO's family compare log-ratios t = policy - reference, or h(t) of another divergence (`transform`).
For diffusion and flow, logps are -1/2 * mean squared error, so Diffusion-DPO's "beta 5000 with the half" is `beta=5000`.
"""

from __future__ import annotations

from typing import Literal

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
    logistic_loss,
    per_token,
    two_sided,
    weighted,
)


def dpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    beta_scale: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """DPO and Diffusion-DPO: logistic loss on the implicit-reward margin of the pair.

    -log sigma(r_chosen - r_rejected - margin),  r = beta * h(policy - reference)

    Source: Rafailov et al. 2023, eq. 7; Wallace et al. 2023 (Diffusion-DPO), eq. 14, in the published code's form: mean
        squared error with the factor 1/2. `label_smoothing`: Mitchell 2023 (conservative DPO); `margin`: Amini et al. 2024;
        `divergence`: Wang et al. 2023 (f-DPO).
    Args:
        policy, reference: logps, best first; mean-per-dimension nats for diffusion, summed nats for text.
        prob: probability that the first candidate is better; 0.5 is a tie. None: 1.
        weight: factor of each pair's loss.
        margin: reward units that the margin must exceed, per pair.
        beta_scale: factor of beta, per pair. None: 1.
        beta: reward per nat. Published: 0.1 for text; 2000 (SD 1.5) and 5000 (SDXL) for diffusion.
        label_smoothing: probability that a label is wrong, at least 0 and below 0.5.
        divergence, divergence_alpha: h, and the a of `alpha`; see `transform`. Published: reverse_kl, 0.5.
    Raises:
        ValueError: beta not positive, label_smoothing outside [0, 0.5), or an unknown divergence.
    """
    check_beta("dpo", beta)
    check_candidates("dpo", 2, policy, reference)
    check_label_smoothing("dpo", label_smoothing)
    check_divergence("dpo", divergence, divergence_alpha)
    scores = transform(policy - reference, divergence, divergence_alpha)
    if beta_scale is not None:
        scores = beta_scale.to(scores)[:, None] * scores
    return logistic_loss(scores, prob, weight, margin, beta, label_smoothing)


def robust(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """Robust DPO: unbiased under labels that are flipped with a known probability.

    ((1 - e) * -log sigma(z) - e * -log sigma(-z)) / (1 - 2 e),  z = r_chosen - r_rejected - margin,  e = label_smoothing

    Source: Chowdhury et al. 2024 (rDPO), eq. 12. Unbounded below for e > 0, as published.
    Args:
        policy, reference, prob, weight, margin, beta, divergence, divergence_alpha: as in `dpo`.
        label_smoothing: known flip probability, at least 0 and below 0.5. Published: 0.1 in the noisy-label experiments.
    Raises:
        ValueError: label_smoothing outside [0, 0.5).
    """
    check_beta("robust", beta)
    check_candidates("robust", 2, policy, reference)
    check_label_smoothing("robust", label_smoothing)
    check_divergence("robust", divergence, divergence_alpha)
    scores = transform(policy - reference, divergence, divergence_alpha)
    logit = less_margin(beta * (scores[:, 0] - scores[:, 1]), margin)
    kept, flipped = -logsigmoid(logit), -logsigmoid(-logit)
    scale = 1 - 2 * label_smoothing
    won = ((1 - label_smoothing) * kept - label_smoothing * flipped) / scale  # eq. 12
    lost = ((1 - label_smoothing) * flipped - label_smoothing * kept) / scale
    return PreferenceLoss(weighted(two_sided(won, lost, prob), weight), (beta * scores).detach())


def ipo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    lengths: Float[Tensor, "batch 2"] | None = None,
    *,
    beta: float = 0.1,
    scale_free: bool = False,
    normalise: Literal["auto", "none", "length"] = "auto",
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """IPO: squared distance of the log-ratio margin from a fixed target.

    (delta - margin / beta - 1 / (2 beta))^2,  delta = s_chosen - s_rejected,  s = h(policy - reference) [/ length]

    `scale_free` multiplies by beta^2, (beta * delta - margin - 1/2)^2, which keeps the loss and its gradient of one size for
    any beta: use it for diffusion, where delta is about 1e-3.

    Source: Azar et al. 2023, eq. 17 (beta is the paper's tau), which is written on summed log-probs. On text its authors mean
        the average over tokens, by which their results were measured and which TRL 1.16's `loss_type: ipo` takes: `auto` does
        so too, with the same beta. The code of the DPO authors, OpenRLHF and NeMo sums (`normalise: none`).
    Args:
        policy, reference, prob, weight, margin, divergence, divergence_alpha: as in `dpo`.
        lengths: number of scored tokens of each candidate, on text; needed by `normalise: length`.
        beta: reward per nat. Published: 0.1 for text.
        scale_free: the form with target 1/2 in reward units. Published: False.
        normalise: length: the mean over each candidate's tokens. none: their sum. auto: length where the data have lengths, as
            texts do and images do not.
    Raises:
        ValueError: `normalise: length` without lengths, beta not positive, or an unknown divergence.
    """
    check_beta("ipo", beta)
    check_candidates("ipo", 2, policy, reference)
    check_divergence("ipo", divergence, divergence_alpha)
    scores = transform(policy - reference, divergence, divergence_alpha)
    if normalise == "length" or (normalise == "auto" and lengths is not None):
        if lengths is None:
            raise ValueError("ipo.normalise: got length on data without lengths, want none, or text.")
        scores = per_token(scores, lengths)
    logit = beta * (scores[:, 0] - scores[:, 1])
    offset = 0.5 if margin is None else margin.to(logit) + 0.5
    losses = two_sided((logit - offset) ** 2, (-logit - offset) ** 2, prob)
    if not scale_free:
        losses = losses / beta**2  # eq. 17
    return PreferenceLoss(weighted(losses, weight), (beta * scores).detach())


def hinge(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    margin: float | Float[Tensor, " batch"] = 1.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PreferenceLoss:
    """Hinge on the implicit-reward margin (SLiC's calibration loss on DPO's score, RSO).

    max(0, margin - (r_chosen - r_rejected)),  r = beta * h(policy - reference)

    Source: Liu et al. 2023 (RSO), eq. 9; Zhao et al. 2023 (SLiC-HF), eq. 3.
    Args:
        policy, reference, prob, weight, beta, divergence, divergence_alpha: as in `dpo`.
        margin: reward units, one number; a call from Python may give one per pair. Published: 1.
    Raises:
        ValueError: beta is not positive, margin below zero, or an unknown divergence.
    """
    check_beta("hinge", beta)
    check_candidates("hinge", 2, policy, reference)
    check_margin("hinge", margin)
    check_divergence("hinge", divergence, divergence_alpha)
    scores = transform(policy - reference, divergence, divergence_alpha)
    logit = beta * (scores[:, 0] - scores[:, 1])
    losses = two_sided(relu(margin - logit), relu(margin + logit), prob)
    return PreferenceLoss(weighted(losses, weight), (beta * scores).detach())


def check_margin(name: str, margin: float | Tensor) -> None:
    """Refuse a hinge that leaves pairs alone while the worse candidate leads; margins per pair are data, and not looked at."""
    if not isinstance(margin, Tensor):
        check_not_negative(name, "margin", margin)
