"""f-divergences: what a loss of the DPO family compares in place of the log-ratio of policy and reference."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.losses.links import check_finite

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

# Its square, which ipo takes, is still finite in float32.
LARGEST_EXPONENT = 40.0


def check_divergence(name: str, divergence: str, divergence_alpha: float) -> None:
    """Refuse a divergence that is not there, or an alpha that is no number."""
    if divergence not in get_args(Divergence):
        raise ValueError(f"{name}.divergence: got {divergence}, want one of {', '.join(get_args(Divergence))}.")
    check_finite(name, "divergence_alpha", divergence_alpha)


def transform(ratios: Float[Tensor, "batch k"], divergence: Divergence, divergence_alpha: float) -> Float[Tensor, "batch k"]:
    """h(t) of the log-ratio t = policy - reference: f'(e^t) of the divergence, shifted so that h(0) = 0.

    reverse_kl: t,  forward_kl: 1 - e^-t,  js: log 2 - log(1 + e^-t),  alpha: (1 - e^(-a t)) / a

    a = 1 is forward KL and a = 0 reverse KL. The shift cancels in differences; where scores are divided by lengths it does
    not, and only with it a policy that agrees with the reference scores zero.

    Source: Wang et al. 2023 (f-DPO), table 1, without its constants. TRL's coefficient c of the alpha divergence is 1 - a.
    Exponents stop at 40 (TRL: 80): a candidate that the policy holds e^40 times less likely than the reference has no gradient.
    Args:
        ratios: nats.
        divergence: which h.
        divergence_alpha: a, used by alpha only. Published default: 0.5.
    """
    if divergence == "reverse_kl" or (divergence == "alpha" and divergence_alpha == 0):
        return ratios
    if divergence == "js":
        return _log_mean_with_one(ratios)
    a = 1.0 if divergence == "forward_kl" else divergence_alpha
    return -torch.expm1((-a * ratios).clamp(max=LARGEST_EXPONENT)) / a


def _log_mean_with_one(ratios: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
    """-log((1 + e^-t) / 2), which loses no digits near t = 0."""
    near_zero = ratios.abs() < 1
    safe = torch.where(near_zero, ratios, torch.zeros_like(ratios))
    return torch.where(near_zero, -torch.log1p(torch.expm1(-safe) / 2), math.log(2) + logsigmoid(ratios))
