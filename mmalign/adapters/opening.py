"""What adapters of a diffusion pipeline set alike: sizes, precision, timesteps, one image a candidate; and its opening."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from mmalign.config import Choice
from mmalign.errors import UserError
from mmalign.families import Family
from mmalign.models.diffusion import open_pipeline
from mmalign.models.other_vae import replace_vae
from mmalign.noise import Schedule

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@runtime_checkable
class PipelineSettings(Protocol):
    """Where an adapter's pipeline is."""

    @property
    def model(self) -> str:
        """Local folder or hub id."""

    @property
    def revision(self) -> str | None:
        """Of a hub id."""

    @property
    def variant(self) -> str | None:
        """Of the files."""

    @property
    def vae(self) -> str | None:
        """Local folder or hub id of another VAE than the model's own."""


def size_of(resolution: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of a resolution, which is a side or both."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def check_resolution(family: Family, resolution: int | tuple[int, int]) -> None:
    """Refuse a resolution that the family's VAE and network would cut.

    Raises:
        ValueError: no multiple of what the family asks for.
    """
    if any(side <= 0 or side % family.size_multiple for side in size_of(resolution)):
        raise ValueError(f"resolution: got {resolution}, want multiples of {family.size_multiple}, such as 512.")


def check_single_images(kinds: Mapping[tuple[int, tuple[int, ...]], str]) -> None:
    """Refuse examples that are not one image a candidate; `kinds` as `records.Examples` has them.

    Raises:
        UserError: names the first such row.
    """
    for (_, images), where in kinds.items():
        if images != (1,):
            raise UserError(f"{where}: got candidates with {images[0]} images, want 1 each. Complete or remove the row.")


def check_timesteps(timesteps: Choice, weights: Choice | None, schedule: Schedule) -> None:
    """Refuse timesteps or their weights that the model's schedule cannot have.

    Raises:
        UserError: timesteps outside the schedule, or weights that it does not define.
    """
    try:
        tried = timesteps.build(torch.tensor([0.5]), schedule.num_timesteps)
        if weights is not None:
            weights.build(schedule, tried)
    except ValueError as fault:
        raise UserError(f"adapter.{fault}") from fault


def frozen_dtype(dtype: str, mixed_precision: str) -> torch.dtype:
    """Of the weights that are not trained: a name in DTYPES, or auto, that of the mixed precision."""
    return PRECISIONS.get(mixed_precision, torch.float32) if dtype == "auto" else DTYPES[dtype]


def opened_pipeline(family: Family, settings: PipelineSettings, dtype: torch.dtype) -> Any:
    """The pipeline that the settings name, with their VAE.

    Raises:
        UserError: no such model or VAE, one of another family, or a VAE that does not fit.
    """
    pipe = open_pipeline(family, settings.model, dtype=dtype, revision=settings.revision, variant=settings.variant)
    if settings.vae is not None:
        replace_vae(pipe, settings.vae, dtype)
    return pipe
