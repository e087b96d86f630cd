"""What losses know of more than their own rows: values of the batches of all processes, some with a memory of earlier ones.

A loss asks for one by parameter name. The values carry no gradient; gathering, reducing and remembering are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Statistic:
    """One datum made of all processes' logps.

    Args:
        values: what a process contributes, of its `(policy, reference)`, detached; the batch is the last axis, or the last but
            one of `everyone`.
        reduce: mean or standard deviation (unbiased) over all processes' values, or all of them, this process's own first.
        memory: None: of this batch alone. "running": the mean of everything since the start, each batch weighted by its number
            of values. A number: exponential moving average over batches with this decay, starting from the first batch.
    """

    values: Callable[[Tensor, Tensor], Tensor]
    reduce: Literal["mean", "std", "all"]
    memory: Literal["running"] | float | None = None


def log_ratios(policy: Float[Tensor, "batch k"], reference: Float[Tensor, "batch k"]) -> Float[Tensor, " values"]:
    """Log-ratio policy - reference of every candidate, in nats, detached."""
    return (policy - reference).detach().flatten()


def gaps(policy: Float[Tensor, "batch k"], reference: Float[Tensor, "batch k"]) -> Float[Tensor, " batch"]:
    """Log-ratio of the best candidate less that of the worst, in nats, detached: the margin that beta multiplies."""
    ratios = (policy - reference).detach()
    return ratios[:, 0] - ratios[:, -1]


def both_logps(policy: Float[Tensor, "batch k"], reference: Float[Tensor, "batch k"]) -> Float[Tensor, "2 batch k"]:
    """The logps themselves, policy's then reference's, detached."""
    return torch.stack([policy.detach(), reference.detach()])


STATISTICS: dict[str, Statistic] = {
    "anchor": Statistic(log_ratios, "mean"),
    "shift": Statistic(log_ratios, "mean", memory="running"),
    "gap_mean": Statistic(gaps, "mean", memory=0.9),
    "gap_std": Statistic(gaps, "std", memory=0.9),
    "everyone": Statistic(both_logps, "all"),
}
