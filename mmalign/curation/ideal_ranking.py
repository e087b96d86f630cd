"""What DPO can rank at all: a policy's ranking accuracy, its ceiling under ideal optimisation, the loss a pair must reach."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from mmalign.errors import UserError


def ranking_accuracy(logps: Float[Tensor, "batch 2"]) -> float:
    """Share of pairs of which the model finds the chosen response likelier: mean[L(w) > L(l)].

    Source: Preference Learning Algorithms Do Not Learn Preference Rankings (arXiv 2405.19534).

    Args:
        logps: chosen and rejected; sums, or divided by length for the normalised form; nats.
    """
    return float((logps[:, 0] > logps[:, 1]).double().mean())


def ideal_margins(reference: Float[Tensor, "batch 2"], *, beta: float, agreement: float = 0.75) -> Float[Tensor, " batch"]:
    """log of p_w / p_l under the policy that DPO would reach in the limit.

    log ref_w - log ref_l + log(a / (1 - a)) / beta

    Source: the same paper; its code does it for length-normalised log-probs, and its other branch divides two
        log-probabilities instead of subtracting them.

    Args:
        reference: logps of chosen and rejected under the reference, nats (sums, or per token).
        beta: of the loss.
        agreement: a, the share of annotators that prefer the chosen one. 0.75 where it is not known.

    Raises:
        UserError: beta not positive, agreement outside (0, 1).
    """
    if not beta > 0:
        raise UserError(f"beta: got {beta:g}, want a positive number.")
    if not 0 < agreement < 1:
        raise UserError(f"agreement: got {agreement:g}, want above 0 and below 1.")
    return reference[:, 0] - reference[:, 1] + math.log(agreement / (1 - agreement)) / beta


def ideal_ranking_accuracy(reference: Float[Tensor, "batch 2"], *, beta: float, agreement: float = 0.75) -> float:
    """The ranking accuracy of the policy that DPO would reach in the limit: mean[ideal margin > 0]."""
    return float((ideal_margins(reference, beta=beta, agreement=agreement) > 0).double().mean())


def flip_thresholds(reference: Float[Tensor, "batch 2"], *, beta: float) -> Float[Tensor, " batch"]:
    """The DPO loss at or below which a pair is ranked right: softplus(-beta c), c = log ref_l - log ref_w.

    Source: the same paper. A pair with c far above 0 is hard: its loss must come near 0 before the order turns.
    """
    return softplus(-beta * (reference[:, 1] - reference[:, 0]))


def rankable(reference: Float[Tensor, "batch 2"], *, beta: float, agreement: float = 0.75) -> Bool[Tensor, " batch"]:
    """Whether DPO could rank each pair right at all."""
    return torch.gt(ideal_margins(reference, beta=beta, agreement=agreement), 0)
