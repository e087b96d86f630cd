"""Options of an adapter that are small records of their own."""

import math
from dataclasses import dataclass
from typing import Literal

from mmalign.errors import UserError
from mmalign.families import Family, find_family
from mmalign.records import Media


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

    def __post_init__(self) -> None:
        """Refuse weights that would not be there, or not count."""
        if self.rank < 1:
            raise ValueError(f"rank: got {self.rank}, want 1 or more, or lora: null to train all weights.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha: got {self.alpha}, want a positive number, or null for the rank.")
        if self.targets is not None and not self.targets:
            raise ValueError("targets: got an empty list, want at least one layer name, or null for the usual ones.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, want a share from 0 to below 1. For preferences: 0.")


@dataclass(frozen=True, kw_only=True)
class WinnerGuard:
    """Diffusion-SDPO's safeguard for pairs; see `likelihoods.winner_guard`."""

    mu: float = 0.9
    per: Literal["pair", "batch"] = "pair"

    def __post_init__(self) -> None:
        """Refuse a share without meaning."""
        if not 0 <= self.mu <= 1:
            raise ValueError(f"mu: got {self.mu}, want the share of the winner's descent to keep, 0 to 1. Published: 0.9, 0.6.")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Images made during training, always from the same prompts and seeds.

    Args:
        prompts: one image each.
        sources: files of the source images, one a prompt, for a family that edits.
        seed, steps, guidance_scale: of the sampler; a guidance of 1 is none.
    """

    prompts: tuple[str, ...]
    sources: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        """Refuse what could only fail when the run is nearly over."""
        if not self.prompts:
            raise ValueError("prompts: got none, want one or more, or validation: null.")
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, want 1 or more.")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, want 0 or more; 1 is no guidance.")

    def check_sources(self, family: Family) -> None:
        """Refuse sources that are not what the family wants.

        Raises:
            ValueError: not one a prompt for a family that edits; any for another.
            UserError: one that is missing or damaged.
        """
        wanted = len(self.prompts) if family.edits else 0
        if len(self.sources) != wanted:
            kind = "edits" if family.edits else "does not edit"
            raise ValueError(f"validation.sources: got {len(self.sources)}, want {wanted}: {family.name} {kind}.")
        for media in self.media():
            media.inspect()

    def media(self) -> list[Media]:
        """The source images."""
        return [Media(path=path, where="adapter.validation.sources") for path in self.sources]


def check_frames(family: Family, frames: int | None) -> None:
    """Refuse a number of frames that the family cannot have.

    Raises:
        ValueError: none for a family of videos, one for a family of images, or one that its autoencoder would cut.
    """
    multiple = family.frame_multiple
    if multiple is None:
        if frames is not None:
            raise ValueError(f"frames: got {frames} for {family.name}, which makes images. Set it to null.")
    elif frames is None or frames < 1 or frames % multiple != 1 % multiple:
        got = "none" if frames is None else frames
        raise ValueError(f"frames: got {got} for {family.name}, want 1 more than a multiple of {multiple}, such as 81.")


def check_numbers_of_frames(images: tuple[int, ...], frames: int, where: str) -> None:
    """Refuse a row whose candidates are too short or of unequal length, where that shows without reading a file.

    Args:
        images: the different numbers of images in a candidate. One image may be a file of many frames.
        frames: the wanted number.
        where: the row.
    Raises:
        UserError: a candidate without a video, or with too few frames; candidates of different lengths.
    """
    several = [count for count in images if count > 1]
    if 0 in images:
        raise UserError(f"{where}: got a candidate without a video, want one each. Complete or remove the row.")
    if several and min(several) < frames:
        raise UserError(f"{where}: got a video of {min(several)} frames, want {frames} or more. Set adapter.frames lower.")
    if len(several) > 1:
        lengths = " and ".join(map(str, several))
        raise UserError(f"{where}: got videos of {lengths} frames in one row, want one length. Cut them, or remove the row.")


def told_family(name: str, guidance_embedding: float | None) -> Family:
    """The family of that name, whose networks are told this guidance scale in training; None: its own.

    Raises:
        ValueError: a scale for a family whose networks are told none.
    """
    family = find_family(name)
    return family if guidance_embedding is None else family.with_guidance(guidance_embedding)
