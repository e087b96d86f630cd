"""Losses on one pair a prompt: logps `(batch, 2)`, the preferred candidate first.

Every one honours a per-pair `weight` and a soft `prob`, the probability that the first candidate is better (a tie is 0.5).
For diffusion and flow, logps are -1/2 * mean squared error, so Diffusion-DPO's "beta 5000 with the half" is `beta=5000`.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from mmalign.losses.links import (
    PreferenceLoss,
    check_beta,
    check_label_smoothing,
    logistic,
    pair_delta,
    two_sided,
    weighted,
)


def dpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """DPO and Diffusion-DPO: logistic loss on the implicit-reward margin of the pair.

    -log sigma(r_chosen - r_rejected - margin),  r = beta * (policy - reference)

    Source: Rafailov et al. 2023, eq. 7; Wallace et al. 2023 (Diffusion-DPO), eq. 14, in the published code's form: mean
        squared error with the factor 1/2. `label_smoothing`: Mitchell 2023 (conservative DPO); `margin`: Amini et al. 2024.
    Args:
        policy, reference: logps, best first; mean-per-dimension nats for diffusion, summed nats for text.
        prob: probability that the first candidate is better; 0.5 is a tie. None: 1.
        weight: factor of each pair's loss.
        margin: reward units that the margin must exceed, per pair.
        beta: reward per nat. Published: 0.1 for text; 2000 (SD 1.5) and 5000 (SDXL) for diffusion.
        label_smoothing: probability that a label is wrong, at least 0 and below 0.5.
    Raises:
        ValueError: beta not positive, or label_smoothing outside [0, 0.5).
    """
    check_beta("dpo", beta)
    check_label_smoothing("dpo", label_smoothing)
    logit = beta * pair_delta(policy, reference)
    if margin is not None:
        logit = logit - margin.to(logit)
    losses = logistic(logit, prob, label_smoothing)
    return PreferenceLoss(weighted(losses, weight), (beta * (policy - reference)).detach())


def robust(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> PreferenceLoss:
    """Robust DPO: unbiased under labels that are flipped with a known probability.

    ((1 - e) * -log sigma(z) - e * -log sigma(-z)) / (1 - 2 e),  z = r_chosen - r_rejected - margin,  e = label_smoothing

    Source: Chowdhury et al. 2024 (rDPO), eq. 12. Unbounded below for e > 0, as published.
    Args:
        policy, reference, prob, weight, margin, beta: as in `dpo`.
        label_smoothing: known flip probability, at least 0 and below 0.5. Published: 0.1 in the noisy-label experiments.
    Raises:
        ValueError: label_smoothing outside [0, 0.5).
    """
    check_beta("robust", beta)
    check_label_smoothing("robust", label_smoothing)
    logit = beta * pair_delta(policy, reference)
    if margin is not None:
        logit = logit - margin.to(logit)
    kept, flipped = -logsigmoid(logit), -logsigmoid(-logit)
    scale = 1 - 2 * label_smoothing
    won = ((1 - label_smoothing) * kept - label_smoothing * flipped) / scale  # eq. 12
    lost = ((1 - label_smoothing) * flipped - label_smoothing * kept) / scale
    return PreferenceLoss(weighted(two_sided(won, lost, prob), weight), (beta * (policy - reference)).detach())


def ipo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    scale_free: bool = False,
) -> PreferenceLoss:
    """IPO: squared distance of the log-ratio margin from a fixed target.

    (delta - margin / beta - 1 / (2 beta))^2,  delta = (policy - reference)_chosen - (policy - reference)_rejected

    `scale_free` multiplies by beta^2, (beta * delta - margin - 1/2)^2, which keeps the loss and its gradient of one size for
    any beta: use it for diffusion, where delta is about 1e-3.

    Source: Azar et al. 2023, eq. 17 (beta is the paper's tau).
    Args:
        policy, reference, prob, weight, margin: as in `dpo`.
        beta: reward per nat. Published: 0.1 for text.
        scale_free: the form with target 1/2 in reward units. Published: False.
    """
    check_beta("ipo", beta)
    logit = beta * pair_delta(policy, reference)
    offset = 0.5 if margin is None else margin.to(logit) + 0.5
    losses = two_sided((logit - offset) ** 2, (-logit - offset) ** 2, prob)
    if not scale_free:
        losses = losses / beta**2  # eq. 17
    return PreferenceLoss(weighted(losses, weight), (beta * (policy - reference)).detach())


def hinge(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    margin: float | Float[Tensor, " batch"] = 1.0,
) -> PreferenceLoss:
    """Hinge on the implicit-reward margin (SLiC's calibration loss on DPO's score, RSO).

    max(0, margin - (r_chosen - r_rejected)),  r = beta * (policy - reference)

    Source: Liu et al. 2023 (RSO), eq. 9; Zhao et al. 2023 (SLiC-HF), eq. 3.
    Args:
        policy, reference, prob, weight, beta: as in `dpo`.
        margin: reward units, one number or one per pair. Published: 1.
    """
    check_beta("hinge", beta)
    logit = beta * pair_delta(policy, reference)
    losses = two_sided(relu(margin - logit), relu(margin + logit), prob)
    return PreferenceLoss(weighted(losses, weight), (beta * (policy - reference)).detach())
