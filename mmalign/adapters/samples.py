"""Samples of a model in training, on fixed prompts and seeds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.adapters.options import Validation
from mmalign.adapters.prompts import source_image
from mmalign.families import Family, weight_dtype
from mmalign.models.casting import cast
from mmalign.models.diffusion import Denoiser
from mmalign.models.sampling import sample_images
from mmalign.records import animation


def save_samples(
    denoiser: Denoiser,
    pipe: Any,
    wanted: Validation,
    folder: Path,
    *,
    device: torch.device,
    size: tuple[int, int],
    frames: int | None,
) -> None:
    """One image, or animation, a validation prompt, as `000.png`, `001.png` ...

    Args:
        denoiser, pipe: the model; its network is the policy's.
        wanted: prompts, seed and sampler.
        folder: is made.
        device: of the network.
        size, frames: of the samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training = denoiser.training
    denoiser.eval()
    try:
        with _encoders_as_network(denoiser, pipe, device):
            images = sample_images(
                denoiser.family,
                pipe,
                wanted.prompts,
                [wanted.seed + number for number in range(len(wanted.prompts))],
                steps=wanted.steps,
                guidance_scale=wanted.guidance_scale,
                size=size,
                frames=frames,
                sources=[source_image(media, size) for media in wanted.media()],
            )
            for number, image in enumerate(images):
                (folder / f"{number:03d}.png").write_bytes(animation([image] if frames is None else image))
    finally:
        denoiser.train(training)


def encoders_of(family: Family, pipe: Any) -> list[nn.Module]:
    """The frozen parts of a pipeline, without those that its folder lacks."""
    return [part for part in (getattr(pipe, name, None) for name in family.encoders) if part is not None]


@contextmanager
def _encoders_as_network(denoiser: Denoiser, pipe: Any, device: torch.device) -> Iterator[None]:
    """The encoders on the device and in the dtype of the network: a pipeline of mixed dtypes cannot sample.

    Samples with a copy of the VAE, because casting it down and up again would round the one that encodes.
    """
    vae = pipe.vae
    pipe.vae = copy.deepcopy(vae)
    before: list[tuple[nn.Module, Any, Any]] = [(part, part.device, part.dtype) for part in encoders_of(denoiser.family, pipe)]
    try:
        for part, _, _ in before:
            cast(part, device, weight_dtype(denoiser.core))
        yield
    finally:
        for part, where, dtype in before:
            cast(part, where, dtype)
        pipe.vae = vae
