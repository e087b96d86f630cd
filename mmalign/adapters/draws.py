"""Every random number of a step, from (seed, content of the example, draw): the same however batches are split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.cache import content_key

Way = Literal["shared", "independent"]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of a micro-batch.

    Args:
        drop: whether an example is trained on the empty prompt.
        u: uniform on [0, 1), of which timesteps are made: one an example, or one a candidate.
        noise: likewise.
        posterior: of the sample of the VAE's posterior of each candidate.
    """

    drop: tuple[bool, ...]
    u: Float[Tensor, "batch m"]
    noise: Float[Tensor, "batch n *dims"]
    posterior: Float[Tensor, "batch k *dims"]


def drawn(
    batch: Mapping[str, Any], shape: tuple[int, ...], *, seed: int, prompt_dropout: float, timestep: Way, noise: Way
) -> Draws:
    """Draw for every example of a batch.

    Args:
        batch: as `Reader.collate` makes it; the order of an example's candidates does not matter to what each one gets.
        shape: of one latent.
        seed: of the run.
        prompt_dropout, timestep, noise: as in the adapter's settings.
    """
    drop, u, noises, posterior = [], [], [], []
    for key, draw, images in zip(batch["unordered"], batch["draw"], batch["images"], strict=True):
        place = torch.tensor(sorted(range(len(images)), key=images.__getitem__)).argsort()
        own_u, own_noise = (place if way == "independent" else place[:1] * 0 for way in (timestep, noise))
        generator = torch.Generator().manual_seed(int(content_key(seed, key, draw)[:15], 16))
        first = torch.rand(1 + len(own_u), generator=generator, dtype=torch.float64)
        drop.append(bool(first[0] < prompt_dropout))
        u.append(first[1:][own_u])
        noises.append(torch.randn((len(own_noise), *shape), generator=generator)[own_noise])
        posterior.append(torch.randn((len(images), *shape), generator=generator)[place])
    return Draws(drop=tuple(drop), u=torch.stack(u), noise=torch.stack(noises), posterior=torch.stack(posterior))
