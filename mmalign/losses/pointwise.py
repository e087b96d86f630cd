"""Losses that judge every candidate by itself, against a point of reference: logps `(batch, 1)`, or each column of more."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.losses.links import PreferenceLoss, check_beta, check_candidates, check_not_negative, log_loss, two_sided, weighted
from mmalign.losses.statistics import log_ratios

Labels = Bool[Tensor, " batch"] | Float[Tensor, " batch"] | Int[Tensor, " batch"]


def kto(
    policy: Float[Tensor, "batch 1"],
    reference: Float[Tensor, "batch 1"],
    labels: Labels,
    anchor: Float[Tensor, ""] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PreferenceLoss:
    """KTO and Diffusion-KTO: prospect-theoretic utility of unpaired candidates against an anchor.

    lambda_y * (1 - sigma(s * beta * (policy - reference - max(0, anchor)))),  s = +1 desirable, -1 undesirable

    Source: Ethayarajh et al. 2024, eq. 8; Li et al. 2024 (Diffusion-KTO), published code, where the anchor is the mean
        log-ratio of the batch over all processes.
    Args:
        policy, reference: logps, one candidate a row.
        labels: 1 (or True) desirable, 0 (or False) undesirable.
        anchor: reference point in nats, gathered over processes and detached; None: the mean of this batch. In training it is
            the mean of a micro-batch over all processes, as published: accumulating does not widen it.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1 for text; Diffusion-KTO's 1000 on errors without the half is 2000 here.
        desirable_weight, undesirable_weight: lambda of each class. Published: 1.
    Raises:
        ValueError: beta is not positive, or a lambda below zero.
    """
    check_beta("kto", beta)
    check_candidates("kto", 1, policy, reference)
    check_not_negative("kto", "desirable_weight", desirable_weight)
    check_not_negative("kto", "undesirable_weight", undesirable_weight)
    ratio = (policy - reference)[:, 0]
    if anchor is None:
        anchor = log_ratios(policy, reference).mean()
    desirable = labels.to(ratio) > 0.5
    sign = 2 * desirable.to(ratio) - 1
    utility_weight = torch.where(desirable, ratio.new_tensor(desirable_weight), ratio.new_tensor(undesirable_weight))
    losses = utility_weight * torch.sigmoid(-sign * beta * (ratio - anchor.detach().clamp(min=0)))  # eq. 8
    return PreferenceLoss(weighted(losses, weight), (beta * (policy - reference)).detach())


def apo_zero_unpaired(
    policy: Float[Tensor, "batch 1"],
    reference: Float[Tensor, "batch 1"],
    labels: Labels,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PreferenceLoss:
    """APO-zero on unpaired candidates: KTO with its anchor at 0, so that no row depends on the rest of the batch.

    lambda_y * (1 - sigma(s * r)),  s = +1 desirable, -1 undesirable,  r = beta * (policy - reference)

    Source: D'Oosterlinck et al. 2024 (APO), in TRL's unpaired form.
    Args:
        policy, reference, labels, weight, desirable_weight, undesirable_weight: as in `kto`.
        beta: reward per nat. Published: 0.1.
    Raises:
        ValueError: beta is not positive, or a lambda below zero.
    """
    check_candidates("apo_zero_unpaired", 1, policy, reference)
    check_beta("apo_zero_unpaired", beta)
    check_not_negative("apo_zero_unpaired", "desirable_weight", desirable_weight)
    check_not_negative("apo_zero_unpaired", "undesirable_weight", undesirable_weight)
    return kto(
        policy,
        reference,
        labels,
        torch.zeros((), dtype=policy.dtype, device=policy.device),
        weight,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def bco(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    labels: Labels | None = None,
    shift: Float[Tensor, ""] | None = None,
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    shifted: bool = True,
) -> PreferenceLoss:
    """BCO: a binary classifier of good and bad candidates whose logit is the implicit reward less its running mean.

    unpaired: -log sigma(r - d) desirable, -log sigma(-(r - d)) undesirable
    pair:     -log sigma(r_chosen - d) - log sigma(-(r_rejected - d)),  r = beta * (policy - reference),  d = beta * shift

    Source: Jung et al. 2024 (BCO), with d the running mean of all rewards; `shifted: false` is the pair loss of TRL from
        version 1 on (bco_pair), which has no shift. The paper's importance weights of undesirable rows, the density ratio of
        prompts, are `weight` (published: clamped to 0.5 .. 10).
    Args:
        policy, reference: logps; one candidate a row with labels, or the better and the worse one.
        labels: of one candidate a row: 1 (or True) desirable, 0 (or False) undesirable.
        shift: running mean of the log-ratios of all candidates so far in nats, gathered over processes; None: 0.
        prob: pairs: probability that the first candidate is better; 0.5 is a tie. None: 1.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1.
        shifted: whether the running mean is taken off. Published: True.
    Raises:
        ValueError: beta is not positive, one candidate a row without labels, pairs with labels, or more than two candidates.
    """
    check_beta("bco", beta)
    rewards = beta * (policy - reference)
    num_candidates = policy.shape[1]
    if num_candidates != (2 if labels is None else 1):
        given = "without labels" if labels is None else "with labels"
        raise ValueError(f"bco: got {num_candidates} candidates a row {given}, want 2 without labels or 1 with labels.")
    logits = rewards - beta * shift.detach().to(rewards) if shifted and shift is not None else rewards
    if labels is None:
        good, bad = log_loss(logits), log_loss(-logits)
        losses = two_sided(good[:, 0] + bad[:, 1], bad[:, 0] + good[:, 1], prob)
    else:
        losses = torch.where(labels.to(rewards) > 0.5, log_loss(logits[:, 0]), log_loss(-logits[:, 0]))
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def gpo(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    scores: Float[Tensor, "batch k"],
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """GPO: regresses the log-ratio of every candidate onto its mean preference score against the others.

    mean over candidates of (policy - reference - score / beta)^2

    Source: Zhang et al. 2024 (general preference model), with the log-partition taken as 0. There the scores are mean skew
        scores (`mmalign.losses.reward_models.mean_skew_scores`), which unlike one reward a candidate can express cycles. With
        P - 1/2 for the scores, P the mean probability of winning, it is SPPO.
    Args:
        policy, reference: logps of the candidates, in any order.
        scores: mean skew score of each against the others: positive where it is preferred.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1 to 1.
    Raises:
        ValueError: beta is not positive.
    """
    check_beta("gpo", beta)
    ratios = policy - reference
    losses = ((ratios - scores.to(ratios) / beta) ** 2).mean(1)
    return PreferenceLoss(weighted(losses, weight), (beta * ratios).detach())


def output_anchor(drift: Float[Tensor, "batch k"], weight: Float[Tensor, " batch"] | None = None) -> PreferenceLoss:
    """Keeps the network's outputs near the reference's: a penalty to be added to a preference loss with a small weight.

    mean over candidates of drift,  drift = mean((output - reference output)^2)

    Source: the anchor term of SimpleTuner's flow DPO as its documentation states it, alpha * 1/2 [MSE_w + MSE_l]; alpha is the
        weight of this loss in the sum. It bounds what a preference loss does to the error of the rejected sample.
    Args:
        drift: mean squared distance of the policy's output from the reference's, of every candidate.
        weight: factor of each row.
    """
    return PreferenceLoss(weighted(drift.mean(1), weight), -drift.detach())


def sft(policy: Float[Tensor, "batch k"], weight: Float[Tensor, " batch"] | None = None) -> PreferenceLoss:
    """Supervised fine-tuning on the best candidate: its negative log-likelihood.

    -policy_best

    For text that is the sum over the answer's tokens. TRL's `sft` is a mean over tokens: here `nll` with `reduction: token`.

    Source: the honest baseline of every preference paper. For diffusion this is 1/2 * the mean squared error.
    Args:
        policy: logps, best first; the other columns are not used.
        weight: factor of each row, e.g. exp(reward / temperature) for reward-weighted regression.
    """
    return PreferenceLoss(weighted(-policy[:, 0], weight), policy.detach())
