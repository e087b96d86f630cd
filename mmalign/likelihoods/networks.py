"""What the likelihoods of noisy samples share: the type of a network and of what it measures, and how candidates are folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

# network(noisy (n, *dims), timestep (n,), **condition (n, ...)) -> (n, *dims)
Network = Callable[..., Tensor]
Measures = dict[str, Float[Tensor, "batch m"]]


def exact(tensor: Tensor) -> Tensor:
    """At least float32: differences of errors that agree to three digits are what the losses live on."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def folded(condition: Mapping[str, Tensor], num_candidates: int, per_candidate: frozenset[str]) -> dict[str, Tensor]:
    """Conditions `(batch, ...)`, or `(batch, k, ...)` where named in `per_candidate`, as `(batch * k, ...)`."""
    return {
        name: value.flatten(0, 1) if name in per_candidate else value.repeat_interleave(num_candidates, dim=0)
        for name, value in condition.items()
    }
