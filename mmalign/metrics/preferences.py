"""The metrics of one batch of preferences."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from mmalign.metrics.ranking import AGREEMENT, flip_threshold, idealised_margin, k3
from mmalign.metrics.sums import Sums, histogram, masked_sum

PairMask = Bool[Tensor, "batch k k"]
GAPS = {"each_absent": "blind_gap", "degraded": "degraded_gap", "each_degraded": "degraded_gap"}


def preference_metrics(
    losses: Float[Tensor, " batch"],
    rewards: Float[Tensor, "batch k"],
    readings: Mapping[str, Float[Tensor, "batch _"]],
    labels: Float[Tensor, " batch"] | None = None,
    scores: Float[Tensor, "batch m"] | None = None,
    prob: Float[Tensor, " batch"] | None = None,
    lengths: Float[Tensor, "batch m"] | None = None,
    blind: Float[Tensor, " batch"] | None = None,
    beta: float | None = None,
) -> Sums:
    """Sums and counts of every metric of one batch, on its device: no synchronisation until they are read.

    `rewards/*` are the loss's own rewards z; `logps/ratio_*` the plain log-ratios t = policy - reference, in nats, which no
    divergence, normalisation or clip of the loss has touched.

    - `rewards/accuracies`: share of ordered pairs whose rewards are in order, a tie counting one half; `rewards/margins`, and
      `rewards/margin_q10`, `_q50`, `_q90`: mean and quantiles of the best candidate's reward less the worst's, the quantiles
      read off a histogram whose bins are 19 % wide; `rewards/saturation`: mean gradient factor sigma(-margin), 0.5 at the
      start, 0 when nothing is left to learn.
    - `ranking/accuracy`, `ranking/accuracy_mean`: share of pairs whose better candidate has the higher summed, or mean, logp;
      `ranking/reference`: the same of the reference; `ranking/idealised`: what DPO could reach from it; of the losses that
      plain DPO with this beta gives, `ranking/flip_threshold` is the mean of what a pair must reach to be ranked right,
      `ranking/flip_satisfied` the share that has, `ranking/flipped` that share among pairs the reference ranks wrong.
    - `logps/chosen_falling`: share of rows whose chosen response has become less likely than under the reference. Usual; if it
      is not wanted, dpop, nca, apo_zero or a term nll or chosen_guard hold it.
    - `kl/k3`: KL divergence from the reference where candidates are the policy's own samples (`mmalign.metrics.k3`).
    - `lengths/chosen`, `lengths/rejected`, `lengths/difference`: scored tokens.
    - `blind_gap/chosen`, `degraded_gap/chosen`: by how many nats the images make the chosen response likelier than none, or
      degraded ones, do under the policy, where the loss measures it so; `.../per_token`: of a scored token.
    - `rewards/accuracies_blind`, `rewards/margins_blind`: of the pair (chosen, blind), where the last candidate was made
      without seeing the image; `rewards/blind`, `logps/blind`, `lengths/blind` ... are its values. All other metrics are then
      those of the candidates before it, whose only ordered pairs are (chosen, rejected).

    Args:
        losses, rewards: what the loss returned; the rewards may be of a further completion, k = 1 beside more candidates.
        readings: further quantities of every candidate, e.g. `logps` of the policy, `logps/ref` of the reference, errors.
        labels: unpaired data, k = 1: 1 is counted as chosen, 0 as rejected.
        scores: ranked data: candidates are in order where the scores are; without them column i is better than j > i.
        prob: soft labels: a pair of 0.5 is a tie, which no order of rewards gets right or wrong.
        lengths: scored tokens of every candidate.
        blind: given by the view `blind`, whose last candidate is the blind one.
        beta: of the loss, for what depends on it.
    """
    if blind is not None and rewards.shape[1] > 2:
        return _with_blind(losses, rewards, readings, prob, lengths, beta)
    sums: Sums = {"loss": masked_sum(losses.detach())}
    columns = {"rewards": rewards, **readings}
    policy, reference = readings.get("logps"), readings.get("logps/ref")
    chosen = torch.ones_like(losses, dtype=torch.bool) if labels is None else labels > 0.5
    if lengths is not None:
        columns["lengths"] = lengths
    if policy is not None and reference is not None:
        columns["logps/ratio"] = ratio = policy - reference
        sums["kl/k3"] = masked_sum(k3(policy.detach(), reference))
        sums["logps/chosen_falling"] = masked_sum((ratio[:, 0] < 0).double(), chosen)
    for name, values in columns.items():
        sums |= _of_column(name, values, chosen, paired=labels is None)
        if name in GAPS and policy is not None:
            gap = policy[:, 0] - values[:, 0]
            sums[f"{GAPS[name]}/chosen"] = masked_sum(gap, chosen)
            sums |= {} if lengths is None else {f"{GAPS[name]}/per_token": masked_sum(gap / lengths[:, 0], chosen)}
    if labels is not None:
        return sums
    decided = torch.ones_like(chosen) if prob is None else prob != 0.5
    if rewards.shape[1] > 1:
        sums |= _of_rewards(rewards, _ordered(rewards, scores, decided), decided)
    if policy is not None and policy.shape[1] > 1:  # rewards of a term on one further completion are no ranking of these
        ordered = _ordered(policy, scores, decided)
        sums |= _of_ranking(policy, reference, ordered, beta)
        if lengths is not None:
            sums["ranking/accuracy_mean"] = masked_sum(_in_order(policy / lengths), ordered)
            sums["lengths/difference"] = masked_sum(lengths[:, 0] - lengths[:, -1])
    return sums


def _with_blind(
    losses: Float[Tensor, " batch"],
    rewards: Float[Tensor, "batch k"],
    readings: Mapping[str, Float[Tensor, "batch _"]],
    prob: Float[Tensor, " batch"] | None,
    lengths: Float[Tensor, "batch k"] | None,
    beta: float | None,
) -> Sums:
    """The metrics of chosen and rejected candidates, and beside them those of the blind one, which is the last."""
    k = rewards.shape[1]
    seeing = {name: values[:, :-1] if values.shape[1] == k else values for name, values in readings.items()}
    alone = torch.zeros_like(rewards[:, :-1])
    alone[:, 0] = 1  # rejected candidates are not ordered among themselves
    theirs = None if lengths is None else lengths[:, :-1]
    sums = preference_metrics(losses, rewards[:, :-1], seeing, scores=alone, prob=prob, lengths=theirs, beta=beta)
    columns = {"rewards": rewards, **{name: values for name, values in readings.items() if values.shape[1] == k}}
    if lengths is not None:
        columns["lengths"] = lengths
    if "logps" in columns and "logps/ref" in columns:
        columns["logps/ratio"] = columns["logps"] - columns["logps/ref"]
    sums |= {_named(name, "blind"): masked_sum(values[:, -1]) for name, values in columns.items()}
    pair = rewards[:, [0, -1]]
    sums["rewards/accuracies_blind"] = masked_sum(_in_order(pair)[:, 0, 1])
    sums["rewards/margins_blind"] = masked_sum(pair[:, 0] - pair[:, 1])
    return sums


def _of_column(name: str, values: Float[Tensor, "batch m"], chosen: Bool[Tensor, " batch"], *, paired: bool) -> Sums:
    """The best candidate's values and the worst's, or those of desirable rows and of undesirable ones."""
    sums = {_named(name, "chosen"): masked_sum(values[:, 0], chosen)}
    if not paired:
        sums[_named(name, "rejected")] = masked_sum(values[:, 0], ~chosen)
    elif values.shape[1] > 1:
        sums[_named(name, "rejected")] = masked_sum(values[:, -1])
    return sums


def _of_rewards(rewards: Float[Tensor, "batch k"], ordered: PairMask, decided: Bool[Tensor, " batch"]) -> Sums:
    margin = rewards[:, 0] - rewards[:, -1]
    return {
        "rewards/accuracies": masked_sum(_in_order(rewards), ordered),
        "rewards/margins": masked_sum(margin, decided),
        "rewards/margin": histogram(margin, decided),
        "rewards/saturation": masked_sum(torch.sigmoid(-_margins(rewards)), ordered),
    }


def _of_ranking(
    policy: Float[Tensor, "batch k"], reference: Float[Tensor, "batch k"] | None, ordered: PairMask, beta: float | None
) -> Sums:
    sums = {"ranking/accuracy": masked_sum(_in_order(policy), ordered)}
    if reference is None:
        return sums
    sums["ranking/reference"] = masked_sum(_in_order(reference), ordered)
    if beta is not None:
        margins = _margins(reference.double())
        thresholds = flip_threshold(margins, beta=beta)
        satisfied = softplus(-beta * (_margins(policy.double()) - margins)) <= thresholds
        sums["ranking/idealised"] = masked_sum(idealised_margin(margins, beta=beta, agreement=AGREEMENT) > 0, ordered)
        sums["ranking/flip_threshold"] = masked_sum(thresholds, ordered)
        sums["ranking/flip_satisfied"] = masked_sum(satisfied, ordered)
        sums["ranking/flipped"] = masked_sum(satisfied, ordered & (margins < 0))
    return sums


def _ordered(
    values: Float[Tensor, "batch k"], scores: Float[Tensor, "batch m"] | None, decided: Bool[Tensor, " batch"]
) -> PairMask:
    """Which candidate is better than which."""
    order = torch.ones_like(values).cumsum(1).neg() if scores is None else scores
    return (_margins(order) > 0) & decided[:, None, None]


def _margins(values: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k k"]:
    return values[:, :, None] - values[:, None, :]


def _in_order(values: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k k"]:
    """1 where the first of two candidates has the larger value, one half where both have the same."""
    margins = _margins(values)
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def _named(name: str, which: str) -> str:
    """`logps` -> `logps/chosen`; `logps/ref` -> `logps/ref_chosen`."""
    return f"{name}_{which}" if "/" in name else f"{name}/{which}"
