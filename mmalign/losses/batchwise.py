"""Losses of a pair that depend on the other pairs of the batch: logps `(batch, 2)`, the preferred candidate first."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.losses.links import (
    PreferenceLoss,
    check_beta,
    check_candidates,
    check_label_smoothing,
    check_not_negative,
    less_margin,
    logistic,
    pair_delta,
    weighted,
)
from mmalign.losses.statistics import both_logps


def aot(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    everyone: Float[Tensor, "2 n 2"] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """AOT paired: the distribution of the policy's margins must lie above that of the reference's.

    -log sigma(beta * (d_(i) - e_(i))),  d, e = logp_chosen - logp_rejected of policy and reference, each sorted

    A row's own margin meets the reference's margin of its rank among all processes' rows (TRL sorts each process's rows). The
    objective depends on how many rows there are. There is no weight and no prob: a margin meets
    the reference's margin of another row.

    Source: Melnyk et al. 2024 (AOT).
    Args:
        policy, reference: logps, best first.
        everyone: logps of policy and reference of all processes' rows, this process's own first. None: these rows.
        beta: reward per nat. Published: 0.1.
        label_smoothing: as in `dpo`.
    """
    check_candidates("aot", 2, policy, reference)
    check_beta("aot", beta)
    check_label_smoothing("aot", label_smoothing)
    rows = both_logps(policy, reference) if everyone is None else everyone.detach()
    margins = rows[:, :, 0] - rows[:, :, 1]
    partners = _of_equal_rank(margins[0], margins[1], len(policy))
    losses = logistic(beta * (policy[:, 0] - policy[:, 1] - partners), None, label_smoothing)
    return PreferenceLoss(losses, (beta * (policy - reference)).detach())


def aot_unpaired(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    everyone: Float[Tensor, "2 n 2"] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """AOT unpaired: the distribution of the preferred candidates' log-ratios must lie above that of the others'.

    -log sigma(beta * (t_chosen_(i) - t_rejected_(i))),  t = policy - reference, each column sorted over the batch

    The loss of a row is that of its preferred candidate and the other candidate of the same rank among all processes' rows;
    the gradient of the row's own other candidate, which meets another row, comes with it. There is no weight and no prob.

    Source: Melnyk et al. 2024 (AOT).
    Args:
        policy, reference, everyone, beta, label_smoothing: as in `aot`.
    """
    check_candidates("aot_unpaired", 2, policy, reference)
    check_beta("aot_unpaired", beta)
    check_label_smoothing("aot_unpaired", label_smoothing)
    rows = both_logps(policy, reference) if everyone is None else everyone.detach()
    chosen, rejected = (rows[0] - rows[1]).unbind(1)
    ratios = policy - reference
    met_by_chosen = _of_equal_rank(chosen, rejected, len(policy))
    met_by_rejected = _of_equal_rank(rejected, chosen, len(policy))
    losses = logistic(beta * (ratios[:, 0] - met_by_chosen), None, label_smoothing)
    of_rejected = logistic(beta * (met_by_rejected - ratios[:, 1]), None, label_smoothing)
    return PreferenceLoss(losses + of_rejected - of_rejected.detach(), (beta * ratios).detach())


def _of_equal_rank(values: Float[Tensor, " n"], others: Float[Tensor, " n"], num_own: int) -> Float[Tensor, " own"]:
    """The other value of the same rank, for the first `num_own` values; equal values rank in their order."""
    ranks = values.argsort(stable=True).argsort()[:num_own]
    return others.sort().values[ranks]


def beta_dpo(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    gap_mean: Float[Tensor, ""],
    gap_std: Float[Tensor, ""],
    draw: Float[Tensor, " batch"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    rho: float = 0.2,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """beta-DPO: beta follows the batch's margins, and pairs whose margin is unusual are likely to be left out.

    -log sigma(b * delta - margin) of the kept pairs,  b = max(beta * (1 + alpha * (mean of kept delta - gap_mean)), 0.001)
    delta = (policy - reference)_chosen - (policy - reference)_rejected

    A share 1 - rho of the pairs is kept (rounded down, at least one), drawn without replacement with the weights
    exp(-(delta - gap_mean)^2 / (2 gap_std^2)): those with the largest log weight - log(-log draw). Their losses are scaled so
    that the mean over the batch is the mean over the kept. Neither beta nor the choice carries a gradient.

    Source: Wu et al. 2024 (beta-DPO), and the authors' code, whose default alpha is 0. There the pairs of all processes
        are one batch; here each process draws among its own, by the same means.
    Args:
        policy, reference, prob, weight, margin, label_smoothing: as in `dpo`.
        gap_mean, gap_std: moving mean and standard deviation of delta over batches, in nats. A gap_std of 0 weighs all alike.
        draw: uniform in [0, 1), one number a pair.
        beta: reward per nat of a batch whose mean delta is gap_mean; the rewards are at this beta. Published: 0.1.
        alpha: change of beta, relative, per nat. Published: 0.6.
        rho: share of the pairs that is left out. Published: 0.2.
    Raises:
        ValueError: rho outside [0, 1), or alpha below zero.
    """
    check_candidates("beta_dpo", 2, policy, reference)
    check_beta("beta_dpo", beta)
    check_label_smoothing("beta_dpo", label_smoothing)
    check_not_negative("beta_dpo", "alpha", alpha)
    if not 0.0 <= rho < 1.0:
        raise ValueError(f"beta_dpo.rho: got {rho}, want at least 0 and below 1.")
    delta = pair_delta(policy, reference)
    gaps, centre = delta.detach(), gap_mean.detach().to(delta)
    kept = _kept(gaps - centre, gap_std.detach().to(delta), draw, rho)
    num_kept = kept.sum()
    kept_mean = torch.where(kept, gaps, torch.zeros_like(gaps)).sum() / num_kept
    batch_beta = (beta * (1 + alpha * (kept_mean - centre))).clamp(min=1e-3)
    losses = logistic(less_margin(batch_beta * delta, margin), prob, label_smoothing)
    losses = torch.where(kept, losses * (len(kept) / num_kept), torch.zeros_like(losses))
    return PreferenceLoss(weighted(losses, weight), (beta * (policy - reference)).detach())


def _kept(
    deviations: Float[Tensor, " batch"], spread: Float[Tensor, ""], draw: Float[Tensor, " batch"], rho: float
) -> Bool[Tensor, " batch"]:
    """A sample without replacement by Gumbel keys: which pairs stay."""
    standard = torch.where(spread > 0, deviations / spread, torch.zeros_like(deviations))
    keys = -0.5 * standard**2 - torch.log(-torch.log(draw.to(standard)))
    num_kept = max(1, int(len(keys) * (1 - rho)))
    kept = torch.zeros_like(keys, dtype=torch.bool)
    kept[keys.topk(num_kept).indices] = True
    return kept
