"""How a model ranks pairs by likelihood alone, and how well it could: before training, or of a batch within it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

AGREEMENT = 0.75  # share of annotators that agree with a label, where it is not known
MOST_NATS = 20.0  # of an exponent in `k3`


def ranking_accuracy(logps: Float[Tensor, "pairs 2"], lengths: Float[Tensor, "pairs 2"] | None = None) -> Float[Tensor, ""]:
    """Share of pairs whose chosen response is the likelier one, a tie counting one half.

    mean(L_w > L_l), or with lengths mean(L_w / n_w > L_l / n_l)

    Not the reward accuracy mean(L_w - Lref_w > L_l - Lref_l), which is near 1 where this is still below 1/2.

    Source: Chen et al. 2024 (Preference Learning Algorithms Do Not Learn Preference Rankings).
    Args:
        logps: summed logps of one model, chosen first.
        lengths: numbers of scored tokens.
    """
    values = logps if lengths is None else logps / lengths.to(logps)
    margins = values[:, 0] - values[:, 1]
    return ((margins > 0).double() + 0.5 * (margins == 0).double()).mean()


def idealised_margin(
    reference_margin: Float[Tensor, "*pairs"], *, beta: float, agreement: float = AGREEMENT
) -> Float[Tensor, "*pairs"]:
    """By how much a policy that fits the preferences perfectly under DPO's objective ranks a pair right, in nats.

    Lref_w - Lref_l + log(a / (1 - a)) / beta

    Source: Chen et al. 2024, as `ranking_accuracy`; the published code on margins of mean logps (its branch
        for summed ones divides logps instead of subtracting them).
    Args:
        reference_margin: Lref_w - Lref_l of summed logps, or of mean logps.
        beta: of DPO.
        agreement: share of annotators that agree with the label. Published: 0.75 if unknown.
    Raises:
        ValueError: beta is not positive, or agreement is outside (0, 1).
    """
    if not (beta > 0 and 0 < agreement < 1):
        raise ValueError(f"idealised_margin: got beta {beta}, agreement {agreement}, want beta above 0, agreement in (0, 1).")
    return reference_margin + math.log(agreement / (1 - agreement)) / beta


def idealised_ranking_accuracy(
    reference: Float[Tensor, "pairs 2"],
    lengths: Float[Tensor, "pairs 2"] | None = None,
    *,
    beta: float,
    agreement: float = AGREEMENT,
) -> Float[Tensor, ""]:
    """The best ranking accuracy that DPO can reach from this reference with this beta: share of positive idealised margins.

    Args:
        reference: summed logps of the reference, chosen first.
        lengths: numbers of scored tokens, for margins of mean logps.
        beta, agreement: as in `idealised_margin`.
    """
    values = reference if lengths is None else reference / lengths.to(reference)
    return (idealised_margin(values[:, 0] - values[:, 1], beta=beta, agreement=agreement) > 0).double().mean()


def flip_threshold(reference_margin: Float[Tensor, "*pairs"], *, beta: float) -> Float[Tensor, "*pairs"]:
    """The loss that DPO must reach on a pair for the policy to rank it right.

    log(1 + exp(-beta c)),  c = Lref_l - Lref_w:  L_w >= L_l if and only if the pair's DPO loss is not above it

    A pair that the reference ranks far wrong (c large) has a threshold near 0.

    Source: Chen et al. 2024, as `ranking_accuracy`.
    Args:
        reference_margin: Lref_w - Lref_l of summed logps.
        beta: of DPO.
    """
    return softplus(beta * reference_margin)


def k3(policy: Float[Tensor, "*samples"], reference: Float[Tensor, "*samples"]) -> Float[Tensor, "*samples"]:
    """Estimates KL(policy || reference) sample by sample; never negative.

    exp(-t) - 1 + t,  t = policy - reference

    The mean is unbiased over samples of the policy itself. Over a data set it is no divergence: read it as a distance that is
    0 where the two agree. The exponent is held at 20, so that one row that the policy has given up does not fill the mean.

    Source: Schulman 2020 (Approximating KL Divergence).
    Args:
        policy, reference: logps of the same samples.
    """
    ratios = (policy - reference).double()
    return torch.expm1((-ratios).clamp(max=MOST_NATS)) + ratios.clamp(min=-MOST_NATS)
