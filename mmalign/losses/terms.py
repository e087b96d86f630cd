"""Terms that are added to a preference loss: imitation, guards of the chosen response, further completions, distillation.

Each is a loss of its own; its share of the sum is the term's `weight` in the run's config.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from mmalign.losses.links import (
    PreferenceLoss,
    check_beta,
    check_candidates,
    check_finite,
    check_not_negative,
    check_positive,
    log_loss,
    logistic,
    weighted,
)

PerRow = Float[Tensor, " batch"]


def nll(
    policy: Float[Tensor, "batch k"],
    lengths: Float[Tensor, "batch k"] | None = None,
    mean_length: Float[Tensor, ""] | PerRow | None = None,
    weight: PerRow | None = None,
    *,
    reduction: Literal["sequence", "token", "sum"] = "sequence",
) -> PreferenceLoss:
    """Negative log-likelihood of the best candidate, the SFT term of RPO, CPO, MPO, SLiC and DRIFT.

    sequence: -policy / length, every response weighs the same
    token:    -policy / mean_length, every token weighs the same
    sum:      -policy, every token weighs the same; `sft` is this one

    The mean over rows of `token` is the mean over tokens: sum(-policy) / sum(length), where mean_length is the mean length of
    those rows. A mean_length of all rows of a step (or of the whole data) makes it exact under gradient accumulation and over
    processes; TRL's sft loss divides by the tokens of each micro-batch instead, so that a token weighs more in a short one.

    Source: Pang et al. 2024 (Iterative RPO) for `sequence`; Wang et al. 2024 (MPO) and TRL's `sft` for `token`; Liu et
        al. 2024 (regularised preference optimisation) for `sum`.
    Args:
        policy: summed logps, best first; the other columns are not used.
        lengths: number of scored tokens of each candidate; needed for `sequence`.
        mean_length: mean over rows of the best candidate's number of tokens, one number for many rows; needed for `token`.
            `adapter: text` gives that of all examples, or of 4096 that are spread evenly over more.
        weight: factor of each row's loss.
        reduction: see above. Published weight of the term: 1 with `sequence` (RPO), 5e-5 with `sum` (0.005 * beta 0.01).
    Raises:
        ValueError: the lengths that the reduction divides by are missing.
    """
    best = policy[:, 0]
    if reduction == "sequence":
        if lengths is None:
            raise ValueError("nll.reduction: got sequence without lengths, want lengths. Choose sum where there are no tokens.")
        losses = -best / lengths[:, 0].to(best)
    elif reduction == "token":
        if mean_length is None:
            raise ValueError("nll.reduction: got token without mean_length, want the mean length of all rows of a step.")
        losses = -best / mean_length.to(best)
    else:
        losses = -best
    return PreferenceLoss(weighted(losses, weight), policy.detach())


def chosen_guard(
    policy: Float[Tensor, "batch k"], reference: Float[Tensor, "batch k"], weight: PerRow | None = None
) -> PreferenceLoss:
    """Holds the chosen response where the reference has it: a penalty on its log-ratio below zero, outside the link.

    max(0, -(policy_chosen - reference_chosen))

    Source: the penalty of Pal et al. 2024 (DPO-Positive), which stands inside the link there: see `dpop`.
    Args:
        policy, reference: logps, best first; the other columns are not used.
        weight: factor of each row's loss.
    """
    ratios = policy - reference
    return PreferenceLoss(weighted(relu(-ratios[:, 0]), weight), ratios.detach())


def chosen_anchor(
    policy: Float[Tensor, "batch k"],
    reference: Float[Tensor, "batch k"],
    weight: PerRow | None = None,
    *,
    beta: float = 0.1,
    margin: float = 0.0,
) -> PreferenceLoss:
    """mDPO's anchor: the chosen response's own reward is to be positive.

    -log sigma(r_chosen - margin),  r = beta * (policy - reference)

    Source: Wang et al. 2024 (mDPO), the anchored preference loss; margin is the paper's delta.
    Args:
        policy, reference: logps, best first; the other columns are not used.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1.
        margin: reward units, of either sign: below zero the response may fall by as much. Published: 0.
    Raises:
        ValueError: beta is not positive, or margin is not finite.
    """
    check_beta("chosen_anchor", beta)
    check_finite("chosen_anchor", "margin", margin)
    rewards = beta * (policy - reference)
    return PreferenceLoss(weighted(log_loss(rewards[:, 0] - margin), weight), rewards.detach())


def rationale(
    rationale: Float[Tensor, "batch 1"],
    weight: PerRow | None = None,
    *,
    gamma: float = 0.1,
    link: Literal["logistic", "linear"] = "logistic",
) -> PreferenceLoss:
    """Learns the rationale of a preference beside the preference itself.

    logistic: -log sigma(gamma * rationale)
    linear:   -gamma * rationale

    Source: Just et al. 2024 (data-centric preference learning with rationales): linear in the paper, logistic in the code.
    Args:
        rationale: summed logp of the rationale, given prompt, chosen and rejected response.
        weight: factor of each row's loss.
        gamma: per nat. Published: 0.1 beside DPO, 1 (linear) beside ORPO.
        link: which of the two. Published code: logistic.
    Raises:
        ValueError: gamma is not positive.
    """
    check_positive("rationale", "gamma", gamma)
    rewards = gamma * rationale
    losses = log_loss(rewards) if link == "logistic" else -rewards
    return PreferenceLoss(weighted(losses[:, 0], weight), rewards.detach())


def selm(
    exploration: Float[Tensor, "batch 1"],
    reference_exploration: Float[Tensor, "batch 1"],
    weight: PerRow | None = None,
    *,
    beta: float = 0.01,
    alpha: float = 1e-3,
) -> PreferenceLoss:
    """SELM's optimism: pushes the policy away from what the reference would say, towards responses not yet tried.

    alpha * beta * (exploration - reference_exploration)

    To be added to `dpo` of the same beta with weight 1.

    Source: Zhang et al. 2024 (Self-Exploring Language Models) and its published code.
    Args:
        exploration: summed logp of a response sampled from the reference.
        reference_exploration: the reference's.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.01.
        alpha: strength of optimism. Published: 1e-3 (1e-4 in the last round).
    Raises:
        ValueError: beta or alpha is not positive.
    """
    check_beta("selm", beta)
    check_positive("selm", "alpha", alpha)
    rewards = beta * (exploration - reference_exploration)
    return PreferenceLoss(weighted(alpha * rewards[:, 0], weight), rewards.detach())


def tpo(
    policy: Float[Tensor, "batch 2"],
    gold: Float[Tensor, "batch 1"],
    gold_lengths: Float[Tensor, "batch 1"],
    lengths: Float[Tensor, "batch 2"] | None = None,
    prob: PerRow | None = None,
    weight: PerRow | None = None,
    *,
    beta: float = 0.01,
    normalised: bool = False,
    margin: float = 0.5,
    alpha: float = 1.0,
) -> PreferenceLoss:
    """TPO: a pair without a reference, and imitation of a third response that is better than both.

    -log sigma(beta * (policy_chosen - policy_rejected)) - alpha * gold / gold_length
    normalised (TPO-L): -log sigma(beta * (policy_chosen / n_chosen - policy_rejected / n_rejected) - margin) - ...

    Source: Saeidi et al. 2024 (Triple Preference Optimization) as in TRL. TRL's imitation is a mean over the tokens of a
        micro-batch; here each gold response weighs the same. Mean lengths in place of `gold_lengths` give the mean over tokens.
    Args:
        policy: summed logps, best first.
        gold: summed logp of the gold response.
        gold_lengths: its number of scored tokens.
        lengths: numbers of scored tokens of the pair; needed for `normalised`.
        prob: probability that the first candidate is better; 0.5 is a tie. None: 1.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.01.
        normalised: TPO-L. Published: both.
        margin: reward units, TPO-L only. Published: 0.5.
        alpha: share of the imitation. Published: 1.
    Raises:
        ValueError: beta is not positive, alpha or margin negative, or normalised without lengths.
    """
    check_candidates("tpo", 2, policy)
    check_beta("tpo", beta)
    check_not_negative("tpo", "alpha", alpha)
    check_not_negative("tpo", "margin", margin)
    if normalised and lengths is None:
        raise ValueError("tpo.normalised: got true without lengths, want lengths.")
    rewards = beta * (policy / lengths.to(policy) if normalised and lengths is not None else policy)
    logit = rewards[:, 0] - rewards[:, 1] - (margin if normalised else 0.0)
    losses = logistic(logit, prob) - alpha * (gold / gold_lengths.to(gold))[:, 0]
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def dckd(
    teacher_divergence: Float[Tensor, "batch k"],
    weight: PerRow | None = None,
    *,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
) -> PreferenceLoss:
    """DCKD: takes over a preference-tuned teacher's distributions on the chosen and on the rejected response.

    chosen_weight * D_chosen + rejected_weight * D_rejected,  D = mean over tokens of KL(teacher || policy)

    To be added to `nll`.

    Source: Gao et al. 2025 (ADPA), dual-constrained knowledge distillation.
    Args:
        teacher_divergence: D of each candidate, best first, in nats.
        weight: factor of each row's loss.
        chosen_weight, rejected_weight: shares of the two; the rejected are all candidates but the first. Published: 1.
    Raises:
        ValueError: a share is negative, or both are 0.
    """
    if not (min(chosen_weight, rejected_weight) >= 0 and max(chosen_weight, rejected_weight) > 0):
        raise ValueError(
            f"dckd: got chosen_weight {chosen_weight} and rejected_weight {rejected_weight}, want none negative, one positive."
        )
    losses = chosen_weight * teacher_divergence[:, 0] + rejected_weight * teacher_divergence[:, 1:].sum(1)
    return PreferenceLoss(weighted(losses, weight), -teacher_divergence.detach())


def adpa(
    advantage: Float[Tensor, "batch k"], weight: PerRow | None = None, *, which: Literal["chosen", "rejected"] = "rejected"
) -> PreferenceLoss:
    """ADPA: moves every token's distribution to where a preference-tuned teacher gained over its own reference.

    -advantage,  advantage = mean over tokens of sum over the vocabulary of pi(a) (log pi_teacher(a) - log pi_teacher_ref(a))

    To be added to `nll` with a weight of 1 to 5; the paper starts from a checkpoint of `dckd`.

    Source: Gao et al. 2025 (ADPA), advantage-guided distillation.
    Args:
        advantage: of each candidate, best first, in nats.
        weight: factor of each row's loss.
        which: the candidate that the student itself has sampled. Published: the rejected one, the data's response being chosen.
    """
    losses = -advantage[:, 0 if which == "chosen" else -1]
    return PreferenceLoss(weighted(losses, weight), advantage.detach())
