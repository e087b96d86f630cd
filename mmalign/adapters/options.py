"""Options of an adapter that are small records of their own."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank weights instead of full fine-tuning.

    Args:
        rank: published 4 to 64.
        alpha: scale alpha / rank; None: the rank.
        targets: names of layers; None: the family's (attention).
        dropout: 0 for preference training.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WinnerGuard:
    """Diffusion-SDPO's safeguard for pairs; see `likelihoods.winner_guard`."""

    mu: float = 0.9
    per: Literal["pair", "batch"] = "pair"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Images made during training, always from the same prompts and seeds."""

    prompts: tuple[str, ...]
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        """Refuse what could only fail when the run is nearly over."""
        if not self.prompts:
            raise ValueError("prompts: got none, want one or more, or validation: null.")
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, want 1 or more.")
