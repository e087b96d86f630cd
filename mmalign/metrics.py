"""What a run reports about preferences, under TRL's names in every modality."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

logger = logging.getLogger(__name__)

Sums = dict[str, tuple[Tensor, Tensor]]


def preference_metrics(
    losses: Float[Tensor, " batch"],
    rewards: Float[Tensor, "batch k"],
    readings: Mapping[str, Float[Tensor, "batch k"]],
    labels: Float[Tensor, " batch"] | None = None,
    scores: Float[Tensor, "batch k"] | None = None,
    prob: Float[Tensor, " batch"] | None = None,
) -> Sums:
    """Sums and counts of every metric of one batch, on its device: no synchronisation until they are read.

    `rewards/accuracies` is the share of ordered pairs whose rewards are in order, a tie counting one half;
    `rewards/saturation` the mean gradient factor sigma(-margin): 0.5 at the start, 0 when nothing is left to learn.

    Args:
        losses, rewards: what the loss returned.
        readings: further quantities of every candidate, e.g. logps of policy and reference, errors.
        labels: unpaired data, k = 1: 1 is counted as chosen, 0 as rejected.
        scores: ranked data: candidates are in order where the scores are; without them column i is better than j > i.
        prob: soft labels: a pair of 0.5 is a tie, which no order of rewards gets right or wrong.
    """
    sums: Sums = {"loss": _sum(losses.detach())}
    columns = {"rewards": rewards, **readings}
    if labels is not None:
        chosen = labels > 0.5
        for name, values in columns.items():
            sums[_named(name, "chosen")] = _sum(values[:, 0], chosen)
            sums[_named(name, "rejected")] = _sum(values[:, 0], ~chosen)
        return sums
    for name, values in columns.items():
        sums[_named(name, "chosen")] = _sum(values[:, 0])
        if values.shape[1] > 1:
            sums[_named(name, "rejected")] = _sum(values[:, -1])
    if rewards.shape[1] > 1:
        margins = rewards[:, :, None] - rewards[:, None, :]
        order = torch.ones_like(rewards).cumsum(1).neg() if scores is None else scores
        decided = torch.ones_like(rewards[:, 0], dtype=torch.bool) if prob is None else prob != 0.5
        ordered = (order[:, :, None] > order[:, None, :]) & decided[:, None, None]
        accuracies = (margins > 0).float() + 0.5 * (margins == 0).float()
        sums["rewards/accuracies"] = _sum(accuracies, ordered)
        sums["rewards/margins"] = _sum(rewards[:, 0] - rewards[:, -1], decided)
        sums["rewards/saturation"] = _sum(torch.sigmoid(-margins), ordered)
    return sums


def add(total: Sums, more: Sums) -> Sums:
    """The sums of two batches together."""
    out = dict(total)
    for name, (value, count) in more.items():
        old = out.get(name)
        out[name] = (value, count) if old is None else (old[0] + value, old[1] + count)
    return out


def peak_memory() -> float:
    """Peak memory of this process in GB (2^30 bytes): of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def forget_after(path: Path, step: int) -> None:
    """Drop from a JSONL file the metrics of steps that will be taken again, and a line cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            logger.info("%s: dropped a line cut short", path)
    part = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)


def _named(name: str, which: str) -> str:
    """`logps` -> `logps/chosen`; `logps/ref` -> `logps/ref_chosen`."""
    return f"{name}_{which}" if "/" in name else f"{name}/{which}"


def _sum(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    values = values.detach().double()
    if mask is None:
        return values.sum(), torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device)
    return torch.where(mask, values, torch.zeros_like(values)).sum(), mask.double().sum()
