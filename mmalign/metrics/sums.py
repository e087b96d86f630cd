"""Metrics as sums and counts, which add over batches and processes; quantiles as counts below fixed edges, which do too."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

# Name -> its sum and its count. A vector instead of a sum is a histogram: how many values lie below each of EDGES.
Sums = dict[str, tuple[Tensor, Tensor]]

QUANTILES = (0.1, 0.5, 0.9)
STEPS_PER_OCTAVE = 4
OCTAVES = (-12, 13)  # the smallest edge is 2^-12, the largest 2^13
POSITIVE = [2 ** (step / STEPS_PER_OCTAVE) for step in range(OCTAVES[0] * STEPS_PER_OCTAVE, OCTAVES[1] * STEPS_PER_OCTAVE + 1)]
EDGES = [*(-edge for edge in reversed(POSITIVE)), 0.0, *POSITIVE]


def add(total: Sums, more: Sums) -> Sums:
    """The sums of two batches together."""
    out = dict(total)
    for name, (value, count) in more.items():
        old = out.get(name)
        out[name] = (value, count) if old is None else (old[0] + value, old[1] + count)
    return out


def masked_sum(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum and count of the values, or of those under the mask, in float64, detached."""
    values = values.detach().double()
    if mask is None:
        return values.sum(), torch.full((), float(values.numel()), dtype=torch.float64, device=values.device)
    return torch.where(mask, values, torch.zeros_like(values)).sum(), mask.double().sum()


def histogram(values: Float[Tensor, " n"], mask: Tensor) -> tuple[Float[Tensor, " edges"], Tensor]:
    """How many of the values under the mask lie below each edge, and how many there are.

    Args:
        values: any numbers; what lies beyond the outermost edges (8192) counts as lying there.
        mask: which of them count.
    """
    values = values.detach().double()
    # Made on the device: a copy from the host would wait for it.
    steps = torch.arange(len(POSITIVE), dtype=torch.float64, device=values.device)
    positive = torch.exp2(steps / STEPS_PER_OCTAVE + OCTAVES[0])
    edges = torch.cat([-positive.flip(0), torch.zeros_like(positive[:1]), positive])
    return ((values[:, None] < edges) & mask[:, None]).double().sum(0), mask.double().sum()


def table(sums: Sums) -> Float[Tensor, " numbers"]:
    """All sums and counts in one tensor, to be added up over processes and copied to the host at once."""
    return torch.cat([part.double().reshape(-1) for name in sorted(sums) for part in sums[name]])


def averages(sums: Sums, numbers: Sequence[float]) -> dict[str, float]:
    """Name -> sum / count of each metric that has counted something; of a histogram its quantiles `_q10`, `_q50`, `_q90`.

    A quantile is exact to within its bin, a quarter of an octave (19 %), or 2^-12 around 0.

    Args:
        sums: whose names and shapes `table` was made from.
        numbers: `table` of them, of this process or added up over all.
    """
    out, start = {}, 0
    for name in sorted(sums):
        size = sums[name][0].numel()
        value, count = numbers[start : start + size], numbers[start + size]
        start += size + 1
        if not count:
            continue
        if sums[name][0].ndim == 0:
            out[name] = value[0] / count
        else:
            out |= {f"{name}_q{round(100 * q)}": _quantile([below / count for below in value], q) for q in QUANTILES}
    return out


def _quantile(below: Sequence[float], share: float) -> float:
    """Where the distribution function, known at the edges and a straight line between them, reaches a share."""
    if below[0] >= share:
        return EDGES[0]
    for (left, right), (low, high) in zip(pairwise(EDGES), pairwise(below), strict=True):
        if high >= share:
            return left + (right - left) * (share - low) / (high - low)
    return EDGES[-1]
