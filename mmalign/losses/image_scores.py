"""DPO whose scores know the image better: weighted or anchored tokens, guided scores, and what the model itself would say."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.divergences import LARGEST_EXPONENT
from mmalign.losses.links import (
    PreferenceLoss,
    check_beta,
    check_candidates,
    check_finite,
    check_label_smoothing,
    check_not_negative,
    check_positive,
    log_loss,
    logistic,
    weighted,
)
from mmalign.losses.pairwise import dpo

PerRow = Float[Tensor, " batch"]
LEAST_BETA = 1e-3


def ddpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    prob: PerRow | None = None,
    weight: PerRow | None = None,
    margin: PerRow | None = None,
    *,
    beta: float = 0.5,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """RLHF-V's dense DPO (DDPO): `dpo` on responses whose corrected segments weigh more than the rest.

    -log sigma(r_chosen - r_rejected - margin),  r = beta * (s_policy - s_reference),  s = sum_t w_t log p_t [/ sum_t w_t]

    The weights are the run's: `adapter.token_weights: changed_segments`, with the paper's weighted mean by default. The loss
    itself is DPO's: without weights of tokens nothing is dense.

    Source: Yu et al. 2023 (RLHF-V, arXiv 2312.00849): weighted mean, gamma 5, beta 0.5, learning rate 5e-7. The published
        scripts of LLaVA have beta 0.1, gamma 1 and sums, which is plain DPO.
    Args:
        policy, reference, prob, weight, margin, label_smoothing: as in `dpo`.
        beta: reward per weighted mean nat of a token. Published: 0.5.
    Raises:
        ValueError: beta is not positive, or label_smoothing outside [0, 0.5).
    """
    check_candidates("ddpo", 2, policy, reference)
    check_beta("ddpo", beta)
    check_label_smoothing("ddpo", label_smoothing)
    return dpo(policy, reference, prob, weight, margin, beta=beta, label_smoothing=label_smoothing)


def mmrlhf(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    scores: Float[Tensor, "batch 2"],
    prob: PerRow | None = None,
    weight: PerRow | None = None,
    *,
    beta: float = 0.1,
    scale: float = 0.1,
    slope: float = 0.5,
    variant: Literal["paper", "released"] = "paper",
) -> PreferenceLoss:
    """MM-RLHF's dynamic beta: `dpo` in which a pair that a reward model finds clear counts for more.

    -log sigma(b (D_chosen - D_rejected)),  D = policy - reference,  b = max(beta * (1 + scale * k), 0.001)
    paper: k = 1 - exp(-slope * gap),  released: k = gap,  gap = score_chosen - score_rejected

    The published run adds 0.25 of the likelihood: `[mmrlhf, {name: nll, weight: 0.25, reduction: token}]`.

    Source: Zhang et al. 2025 (MM-RLHF, arXiv 2502.10391), k a bounded function of the margin of rewards; the published code
        reads k from the data (its `ls_factor`, here the gap).
    Args:
        policy, reference, prob, weight: as in `dpo`.
        scores: of the two responses, in the reward model's units (view `pair` with `with_scores`).
        beta: reward per nat of a pair without a gap. Published: 0.1.
        scale: the w of the paper, by how much k moves beta. Published: 0.1.
        slope: per unit of the gap, how fast k nears its bound; `paper` only. No code is published.
        variant: see above.
    Raises:
        ValueError: beta or slope is not positive, or scale negative.
    """
    check_candidates("mmrlhf", 2, policy, reference)
    check_beta("mmrlhf", beta)
    check_not_negative("mmrlhf", "scale", scale)
    check_positive("mmrlhf", "slope", slope)
    ratios = policy - reference
    gap = (scores[:, 0] - scores[:, 1]).to(ratios)
    clear = gap if variant == "released" else -torch.expm1((-slope * gap).clamp(max=LARGEST_EXPONENT))
    own = (beta * (1 + scale * clear)).clamp(min=LEAST_BETA)[:, None]
    rewards = own * ratios
    losses = logistic(rewards[:, 0] - rewards[:, 1], prob)
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def povid(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    greedy: Float[Tensor, "batch 1"],
    reference_greedy: Float[Tensor, "batch 1"],
    weight: PerRow | None = None,
    *,
    beta: float = 0.1,
    noisy_weight: float = 0.5,
) -> PreferenceLoss:
    """POVID, second stage: DPO, half of it against what the model itself would say at each place under a noisy image.

    (1 - noisy_weight) * -log sigma(r_chosen - r_rejected) + noisy_weight * -log sigma(r_chosen - r_greedy)

    The first stage is `dpo` on responses into which a language model put errors.

    Source: Zhou et al. 2024 (POVID, arXiv 2402.11411) and its published code.
    Args:
        policy, reference: summed logps, the chosen response first.
        greedy: summed logp under the clean image of the tokens that are likeliest under the noisy one (noise, step 500), place
            by place after the chosen response's beginning; the noisy pass has no gradient.
        reference_greedy: the same of the reference and its own likeliest tokens.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1.
        noisy_weight: share of the second term, 0 to 1. Published: 0.5.
    Raises:
        ValueError: beta is not positive, or noisy_weight outside [0, 1].
    """
    check_candidates("povid", 2, policy, reference)
    check_beta("povid", beta)
    if not 0.0 <= noisy_weight <= 1.0:
        raise ValueError(f"povid.noisy_weight: got {noisy_weight}, want 0 to 1.")
    rewards = beta * (policy - reference)
    noisy = beta * (greedy - reference_greedy)
    own = log_loss(rewards[:, 0] - rewards[:, 1])
    losses = (1 - noisy_weight) * own + noisy_weight * log_loss(rewards[:, 0] - noisy[:, 0])
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def vdpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    each_degraded: Float[Tensor, "batch 2"],
    prob: PerRow | None = None,
    weight: PerRow | None = None,
    *,
    beta: float = 0.1,
    gamma: float = 2.0,
) -> PreferenceLoss:
    """V-DPO: DPO on scores that are guided by the image, as classifier-free guidance guides samples.

    -log sigma(beta (D_chosen - D_rejected)),  D = gamma * policy - (gamma - 1) * sg(degraded) - reference

    Source: Xie et al. 2024 (V-DPO, arXiv 2411.02712), whose strength of guidance is gamma - 1. With `language_bias_reduce`
        of the code, whose mean is over both terms, the loss is `[{name: vdpo, weight: 0.5}, {name: image_preference, gradient:
        image, weight: 0.5}]`. The published script has gamma 0, with which the loss has no gradient at all; it is refused here.
    Args:
        policy, reference, prob, weight: as in `dpo`.
        each_degraded: the policy's summed logps under an empty image (`adapter.degradation: blank`); without a gradient.
        beta: reward per nat. Published: 0.1.
        gamma: 1 or more; 1 is DPO. Published: see above.
    Raises:
        ValueError: beta is not positive, or gamma below 1.
    """
    check_candidates("vdpo", 2, policy, reference)
    check_beta("vdpo", beta)
    check_finite("vdpo", "gamma", gamma)
    if gamma < 1:
        raise ValueError(
            f"vdpo.gamma: got {gamma}, want 1 (DPO) or more: below, images are unlearned; at 0 nothing is learned."
        )
    ratios = policy - reference
    scores = beta * (ratios + (gamma - 1) * (policy - each_degraded.detach()))
    losses = logistic(scores[:, 0] - scores[:, 1], prob)
    return PreferenceLoss(weighted(losses, weight), (beta * ratios).detach())


def tpo_visual(
    anchored: Float[Tensor, "batch 2"],
    reference_anchored: Float[Tensor, "batch 2"],
    weight: PerRow | None = None,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """TPO, the visually anchored one: DPO on tokens that count by how much the image makes of them.

    -log sigma(r_chosen - r_rejected),  r = beta * (anchored - reference_anchored),  anchored = sum_t [log p_t + log s_t]
    s_t = sigma(d_t) + 1/2 for the chosen, 3/2 - sigma(d_t) for the rejected response
    d_t = logit of the token under the image less that under the degraded one

    Source: Gu et al. 2024 (TPO, arXiv 2412.14487) and its published code; the gradient goes through s. Not the temporal TPO of
        videos (plain DPO), nor the triple one of texts (`tpo`).
    Args:
        anchored: of each response under the policy, the chosen one first.
        reference_anchored: the reference's, with its own d.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1.
    Raises:
        ValueError: beta is not positive.
    """
    check_beta("tpo_visual", beta)
    rewards = beta * (anchored - reference_anchored)
    return PreferenceLoss(weighted(log_loss(rewards[:, 0] - rewards[:, 1]), weight), rewards.detach())


def opa_dpo(
    policy: Float[Tensor, "batch 3"],
    reference: Float[Tensor, "batch 3"],
    each_degraded: Float[Tensor, "batch 3"],
    reference_each_degraded: Float[Tensor, "batch 3"],
    weight: PerRow | None = None,
    tokens: Float[Tensor, "batch 3 seq"] | None = None,
    reference_tokens: Float[Tensor, "batch 3 seq"] | None = None,
    each_degraded_tokens: Float[Tensor, "batch 3 seq"] | None = None,
    reference_each_degraded_tokens: Float[Tensor, "batch 3 seq"] | None = None,
    *,
    beta: float = 0.1,
    image_weight: float = 0.2,
    anchor_weight: float = 1.0,
    margin: float = 0.0,
    variant: Literal["paper", "released"] = "paper",
) -> PreferenceLoss:
    """OPA-DPO: a standard and a corrected response against the model's own, both against themselves under a masked image.

    sum over y in (standard, corrected) of
    -log sigma(r_y - r_original) - image_weight * log sigma(r_y - r_y~) - anchor_weight * log sigma(r_y - margin)

    The reference is to be a model tuned on the standard and corrected responses (`sft`); how bad each token is may weigh it
    (`adapter.token_weights`).

    Source: Yang et al. 2025 (OPA-DPO). The published code compares responses token by token, padding included, and anchors the
        corrected response downwards: `variant: released`, to compare with, is `opa_dpo_tokens` row by row.
    Args:
        policy, reference: logps of the standard response, the corrected one, and the original one that was corrected.
        each_degraded, reference_each_degraded: those under the degraded image; the third column is not used. Published: 30 % of
            the pixels masked.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1.
        image_weight: share of the image terms. Published: 0.2.
        anchor_weight: share of the anchors. Published: 1.
        margin: of the anchors, reward units. Published: 0.
        tokens, reference_tokens: `released` alone: log-probs of the tokens of the three responses, 0 where there is none.
        each_degraded_tokens, reference_each_degraded_tokens: those under the degraded image.
        variant: see above.
    Raises:
        ValueError: beta is not positive, a weight negative, margin not finite, or released with a margin or without tokens.
    """
    check_candidates("opa_dpo", 3, policy, reference)
    check_beta("opa_dpo", beta)
    check_not_negative("opa_dpo", "image_weight", image_weight)
    check_not_negative("opa_dpo", "anchor_weight", anchor_weight)
    check_finite("opa_dpo", "margin", margin)
    rewards = beta * (policy - reference)
    if variant == "released":
        by_token = (tokens, reference_tokens, each_degraded_tokens, reference_each_degraded_tokens)
        losses = _released_rows(by_token, beta, image_weight, anchor_weight, margin)
        return PreferenceLoss(weighted(losses, weight), rewards.detach())
    masked = beta * (each_degraded - reference_each_degraded)
    good = rewards[:, :2]
    losses = log_loss(good - rewards[:, 2:]) + image_weight * log_loss(good - masked[:, :2])
    losses = losses + anchor_weight * log_loss(good - margin)
    return PreferenceLoss(weighted(losses.sum(1), weight), rewards.detach())


def opa_dpo_tokens(
    policy: Float[Tensor, "batch 3 seq"],
    reference: Float[Tensor, "batch 3 seq"],
    degraded: Float[Tensor, "batch 2 seq"],
    reference_degraded: Float[Tensor, "batch 2 seq"],
    badness: Float[Tensor, "batch 2 seq"] | None = None,
    relations: Float[Tensor, "batch seq"] | None = None,
    *,
    beta: float = 0.1,
    image_weight: float = 0.2,
    anchor_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """OPA-DPO as it was released, to compare with: means over the places of padded responses, one's place with another's.

    mean_t l(z(s, o)) + mean_t l(z(k_a a, k_o o)) + image_weight * [mean_t l(z(s, s~)) + mean_t l(z(h a, h a~))]
    + anchor_weight * mean_t [2 l(beta d_s) + 2 l(-beta d_a)],  l(x) = -log sigma(x),  z(x, y) = beta (d_x - d_y)

    Padded places (all values 0) add log 2 to each mean; the corrected response's reward is pushed down. Not for training:
    `opa_dpo` is.

    Source: zhyang2226/OPA-DPO, dpo_trainer.py.
    Args:
        policy, reference: log-probs of the tokens of standard, corrected and original response, 0 where there is none.
        degraded, reference_degraded: those of the first two under the masked image.
        badness: k, factors of the corrected and of the original response's tokens. None: 1.
        relations: h, factors of the corrected response's tokens. None: 1.
        beta, image_weight, anchor_weight: as in `opa_dpo`.
    """
    factors = torch.ones_like(policy[:, :2]) if badness is None else badness.to(policy)
    relation = torch.ones_like(policy[:, 0]) if relations is None else relations.to(policy)
    shares = (beta, image_weight, anchor_weight)
    return _places(policy - reference, degraded - reference_degraded, factors, relation, *shares).mean()


def _places(
    delta: Tensor, masked: Tensor, factors: Tensor, relation: Tensor, beta: float, image_weight: float, anchor_weight: float
) -> Float[Tensor, "batch seq"]:
    """The sum of all terms of OPA-DPO as released at each place of padded responses."""
    standard, corrected, original = delta.unbind(1)
    pairs = (
        (1.0, standard, original),
        (1.0, factors[:, 0] * corrected, factors[:, 1] * original),
        (image_weight, standard, masked[:, 0]),
        (image_weight, relation * corrected, relation * masked[:, 1]),
    )
    anchors = 2 * log_loss(beta * standard) + 2 * log_loss(-beta * corrected)
    preferences = [share * log_loss(beta * (better - worse)) for share, better, worse in pairs]
    return torch.stack(preferences).sum(0) + anchor_weight * anchors


def _released_rows(
    by_token: tuple[Tensor | None, ...], beta: float, image_weight: float, anchor_weight: float, margin: float
) -> PerRow:
    """OPA-DPO as released, a mean over places in every row."""
    policy, reference, degraded, reference_degraded = by_token
    if policy is None or reference is None or degraded is None or reference_degraded is None:
        raise ValueError("opa_dpo.variant: got released without tokens, want those of policy and reference.")
    if margin:
        raise ValueError(f"opa_dpo.margin: got {margin} with variant released, want 0.")
    ones = torch.ones_like(policy)
    delta, masked = policy - reference, degraded - reference_degraded
    return _places(delta, masked, ones[:, :2], ones[:, 0], beta, image_weight, anchor_weight).mean(1)
