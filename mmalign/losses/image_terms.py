"""DPO beside a preference of images: the chosen response under its own image against the same one under a worse image.

What the worse image is (`degraded`), the run's `adapter.degradation` says, or the data; policy and reference see the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.links import (
    PreferenceLoss,
    check_beta,
    check_candidates,
    check_finite,
    check_not_negative,
    log_loss,
    weighted,
)
from mmalign.losses.pairwise import dpo

PerRow = Float[Tensor, " batch"]


def image_preference(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    degraded: Float[Tensor, "batch 1"],
    reference_degraded: Float[Tensor, "batch 1"],
    weight: PerRow | None = None,
    *,
    beta: float = 0.1,
    gradient: Literal["both", "image"] = "both",
) -> PreferenceLoss:
    """The image term that mDPO, Re-Align and others share: the chosen response is to be likelier under its image.

    -log sigma(r_chosen - r_degraded),  r = beta * (policy - reference)

    To be added to a preference loss of responses.

    Source: Wang et al. 2024 (mDPO), conditional preference optimisation; `gradient: image` is V-DPO's `language_bias_reduce`,
        which holds the policy's score under the worse image.
    Args:
        policy, reference: summed logps, best first; the other columns are not used.
        degraded, reference_degraded: those of the best candidate under the degraded image.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1.
        gradient: through both scores, or through that under the image alone. Published: both.
    Raises:
        ValueError: beta is not positive.
    """
    check_beta("image_preference", beta)
    rewards = beta * (policy - reference)
    worse = beta * ((degraded if gradient == "both" else degraded.detach()) - reference_degraded)
    return PreferenceLoss(weighted(log_loss(rewards[:, 0] - worse[:, 0]), weight), rewards.detach())


def mdpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    degraded: Float[Tensor, "batch 1"],
    reference_degraded: Float[Tensor, "batch 1"],
    weight: PerRow | None = None,
    reference_redrawn: Float[Tensor, "batch 1"] | None = None,
    *,
    beta: float = 0.1,
    margin: float = 0.0,
    variant: Literal["paper", "released"] = "paper",
) -> PreferenceLoss:
    """mDPO: preference of responses, preference of images, and an anchor that keeps the chosen response's reward positive.

    -log sigma(r_chosen - r_rejected) - log sigma(r_chosen - r_degraded) - log sigma(r_chosen - margin)

    Source: Wang et al. 2024 (mDPO, arXiv 2406.11839). The worse image is a crop that keeps 1 to 20 % of the area
        (`adapter.degradation: crop`). The published code draws a crop for the policy and another for the reference, so that
        r_degraded compares two images: `variant: released`, to compare with. Else both see one.
    Args:
        policy, reference: summed logps, the chosen response first.
        degraded, reference_degraded: those of the chosen response under the degraded image.
        weight: factor of each row's loss.
        reference_redrawn: `released` alone: the reference's logp under another draw of the degraded image.
        beta: reward per nat. Published: 0.1.
        margin: the paper's delta, in reward units, of either sign. Published: 0.
        variant: see above.
    Raises:
        ValueError: beta is not positive, margin is not finite, or released without another draw.
    """
    check_candidates("mdpo", 2, policy, reference)
    check_beta("mdpo", beta)
    check_finite("mdpo", "margin", margin)
    if variant == "released":
        if reference_redrawn is None:
            raise ValueError("mdpo.variant: got released without reference_redrawn, want it under another draw.")
        reference_degraded = reference_redrawn
    response, image = _response_and_image(policy, reference, degraded, reference_degraded, beta)
    losses = response.losses + image.losses + log_loss(beta * (policy - reference)[:, 0] - margin)
    return PreferenceLoss(weighted(losses, weight), response.rewards)


def re_align(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    degraded: Float[Tensor, "batch 1"],
    reference_degraded: Float[Tensor, "batch 1"],
    weight: PerRow | None = None,
    rival: Float[Tensor, "batch 2"] | None = None,
    reference_rival: Float[Tensor, "batch 2"] | None = None,
    degraded_rival: Float[Tensor, "batch 1"] | None = None,
    reference_degraded_rival: Float[Tensor, "batch 1"] | None = None,
    *,
    beta: float = 0.1,
    variant: Literal["paper", "released"] = "paper",
) -> PreferenceLoss:
    """Re-Align (its rDPO, which is not robust DPO): preference of responses and of images, the worse image a retrieved one.

    -log sigma(r_chosen - r_rejected) - log sigma(r_chosen - r_degraded),  r = beta * (policy - reference)
    released: r_rejected and r_degraded are made of rivals, r = beta * (rival - reference_rival)

    Source: Xing et al. 2025 (Re-Align), the paper's equations. The published trainer does not score the tokens of the rejected
        response, nor those of the chosen one under the retrieved image, but what the model itself finds likeliest in their
        places (second likeliest where that is the token), policy and reference each by itself: `variant: released`, to
        compare with; the rejected response is then only a text along which the model is pushed off its own choices.
    Args:
        policy, reference, weight: as in `mdpo`.
        degraded, reference_degraded: logps of the chosen response under a similar image (view `retrieved`).
        rival, reference_rival: `released` alone: logps of the likeliest other tokens in the places of both responses; the first
            column is not used.
        degraded_rival, reference_degraded_rival: the same of the chosen response under the similar image.
        beta: reward per nat. Published: 0.1.
        variant: see above.
    Raises:
        ValueError: beta is not positive, or released without rivals.
    """
    check_candidates("re_align", 2, policy, reference)
    check_beta("re_align", beta)
    if variant == "released":
        if rival is None or reference_rival is None or degraded_rival is None or reference_degraded_rival is None:
            raise ValueError("re_align.variant: got released without rivals, want those of policy and reference.")
        policy = torch.cat([policy[:, :1], rival[:, 1:]], 1)
        reference = torch.cat([reference[:, :1], reference_rival[:, 1:]], 1)
        degraded, reference_degraded = degraded_rival, reference_degraded_rival
    response, image = _response_and_image(policy, reference, degraded, reference_degraded, beta)
    return PreferenceLoss(weighted(response.losses + image.losses, weight), response.rewards)


def chip(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    degraded: Float[Tensor, "batch 1"],
    reference_degraded: Float[Tensor, "batch 1"],
    divergence: Float[Tensor, "batch 2"],
    weight: PerRow | None = None,
    *,
    beta: float = 0.1,
    kappa: float = 0.1,
    variant: Literal["paper", "released"] = "paper",
) -> PreferenceLoss:
    """CHiP: preferences of responses (by segments and tokens) and of images.

    paper:    -log sigma(t) - log sigma(v),  released: -log sigma(t + v)
    t = r_chosen - r_rejected - beta * kappa * (D_rejected - sg(D_chosen)),  v = r_chosen - r_degraded

    D = sum over the response's tokens of KL(reference || policy); sg holds the gradient. Segments are the weights of tokens:
    `adapter.token_weights: {name: changed_segments, gamma: 4, average: false}`.

    Source: Fu et al. 2025 (CHiP, arXiv 2501.16629). The paper adds terms of responses, segments, tokens and images; here the
        first three are one, TDPO2's logit on weighted tokens, beside that of images. The published code has all in one link.
        There the helper of D drops the last row of a batch, and token weights multiply sums of the reference; not here.
    Args:
        policy, reference: logps, weighted where the run weighs tokens, the chosen response first.
        degraded, reference_degraded: those of the chosen response under the degraded image. Published: noise of step 500 on
            normalised pixels, `adapter.degradation: {name: noise, space: normalised}`.
        divergence: D of the two responses, nats.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1.
        kappa: share of the divergences. Published: 0.1.
        variant: see above.
    Raises:
        ValueError: beta is not positive, or kappa negative.
    """
    check_candidates("chip", 2, policy, reference)
    check_beta("chip", beta)
    check_not_negative("chip", "kappa", kappa)
    rewards = beta * (policy - reference)
    textual = rewards[:, 0] - rewards[:, 1] - beta * kappa * (divergence[:, 1] - divergence[:, 0].detach())
    visual = rewards[:, 0] - beta * (degraded - reference_degraded)[:, 0]
    losses = log_loss(textual + visual) if variant == "released" else log_loss(textual) + log_loss(visual)
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def _response_and_image(
    policy: Tensor, reference: Tensor, degraded: Tensor, reference_degraded: Tensor, beta: float
) -> tuple[PreferenceLoss, PreferenceLoss]:
    """The two terms that mDPO and Re-Align share."""
    image = image_preference(policy, reference, degraded, reference_degraded, beta=beta)
    return dpo(policy, reference, beta=beta), image
