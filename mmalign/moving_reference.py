"""A reference that follows the policy: the trained weights of some steps ago, or a moving average of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Following:
    """How the reference follows: every `every` steps, reference <- decay * reference + (1 - decay) * policy.

    Source: TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656): soft updates with decay 0.5 or less each step, hard ones with
        decay 0 every 512 or 1024 steps. Flow-GRPO's online DPO copies the policy every 40 steps.
    Args:
        decay: 0 copies the policy.
        every: optimiser steps between updates.
    """

    decay: float = 0.99
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay: got {self.decay}, want 0 to below 1. For a fixed reference set moving_reference: null.")
        if self.every < 1:
            raise ValueError(f"every: got {self.every}, want 1 or more.")


class MovingReference:
    """The weights that the reference has in place of the policy's, float32 as those are."""

    def __init__(self, parameters: Sequence[nn.Parameter], following: Following) -> None:
        """Begin as the policy. Costs the memory of the trained weights, which for a LoRA is little."""
        self.following = following
        self.weights = [parameter.detach().clone() for parameter in parameters]
        self.step = 0

    @contextmanager
    def reference(self, parameters: Sequence[nn.Parameter], network: nn.Module) -> Iterator[nn.Module]:
        """The network with the reference's weights, for the length of the block; nothing is copied."""
        self._exchange(parameters)
        try:
            yield network
        finally:
            self._exchange(parameters)

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """After each optimiser step."""
        self.step += 1
        if self.step % self.following.every == 0:
            with torch.no_grad():
                for own, parameter in zip(self.weights, parameters, strict=True):
                    own.lerp_(parameter.detach(), 1 - self.following.decay)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"step": self.step, "weights": [own.cpu() for own in self.weights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.step = int(state["step"])
        saved: list[Tensor] = state["weights"]
        self.weights = [one.to(own) for one, own in zip(saved, self.weights, strict=True)]

    def _exchange(self, parameters: Sequence[nn.Parameter]) -> None:
        for place, parameter in enumerate(parameters):
            parameter.data, self.weights[place] = self.weights[place], parameter.data
