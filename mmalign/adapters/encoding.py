"""From pixels and prompts to what a diffusion network is given, and back: by a pipeline's frozen parts or from the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mmalign.adapters.prompts import Prompt, encoded_prompts, texts_of
from mmalign.adapters.samples import encoders_of
from mmalign.families import Family, unconditional
from mmalign.models.diffusion import decode_latents, encode_images, latent_shape

if TYPE_CHECKING:
    from mmalign.adapters.diffusion_cache import Cache


class Encoding:
    """VAE and text encoders of an opened pipeline. Nothing is encoded in batches, so that none changes the numbers.

    What is decoded together is for the caller to choose: rows that always stand together.
    """

    def __init__(
        self, family: Family, pipe: Any, *, device: torch.device, size: tuple[int, int], frames: int | None = None
    ) -> None:
        """Take a pipeline's parts as they are.

        Args:
            family, pipe: the model.
            device: of what is given to the network.
            size: (height, width) in pixels of images that the model makes itself.
            frames: of a video; None: images.
        """
        self.family, self.pipe, self.device, self.size, self.frames = family, pipe, device, size, frames
        self.cache: Cache | None = None  # stands for the encoders once it is filled

    @property
    def parts(self) -> list[nn.Module]:
        """The encoders that the pipeline has."""
        return encoders_of(self.family, self.pipe)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(channels, height, width) of the latents of an image of this size; (channels, frames, height, width) of a video."""
        return latent_shape(self.pipe, size, self.frames)

    def encode(self, pixels: UInt8[Tensor, "n 3 *dims"], *, check: bool = True) -> dict[str, Tensor]:
        """Mean and std of the scaled latents of 8-bit pixels."""
        parts = [encode_images(self.pipe, one.to(self.device)[None].float() / 127.5 - 1, check=check) for one in pixels]
        return {"mean": torch.cat([mean for mean, _ in parts]), "std": torch.cat([std for _, std in parts])}

    def decode(self, latents: Float[Tensor, "n c *latent"]) -> Float[Tensor, "n 3 *dims"]:
        """Pixels in [0, 1] of scaled latents, in one pass."""
        return decode_latents(self.pipe, latents)

    def encode_prompts(self, prompts: Sequence[Prompt], sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The condition of each prompt; `sources` are 8-bit pixels by key."""
        return encoded_prompts(self.family, self.pipe, prompts, sources)

    def latents(self, batch: Mapping[str, Any]) -> tuple[Float[Tensor, "batch k *dims"], Float[Tensor, "batch k *dims"]]:
        """Mean and std of the latents of a collated batch."""
        shape = self.latent_shape(batch["size"])
        names = [name for row in batch["images"] for name in row]
        if self.cache is not None and self.cache.frames is not None:
            found = self.cache.latents(names, shape)
        else:
            encoded = self.encode(batch["pixels"], check=False)  # NaN shows in the loss, where the loop looks once a step
            where = {name: place for place, name in enumerate(batch["names"])}
            index = torch.tensor([where[name] for name in names])
            found = {field: value[index.to(value.device)] for field, value in encoded.items()}
        rows = (len(batch["images"]), -1, *shape)
        mean, std = (found[name].to(self.device, torch.float32).reshape(rows) for name in ("mean", "std"))
        return mean, std

    def prompts(self, prompts: Sequence[Prompt], sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The condition of each prompt, each distinct one encoded or read once, on the device."""
        distinct = list(dict.fromkeys(prompts))
        if self.cache is not None and self.cache.frames is not None:
            encoded = self.cache.prompts_of(distinct)
        else:
            encoded = self.encode_prompts(distinct, sources)
        index = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return {name: value[index.to(value.device)].to(self.device) for name, value in encoded.items()}

    def conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """All that the network is told of images that it makes itself, (n, ...) each, on the device.

        Raises:
            UserError: the family edits source images.
        """
        return {**self.prompts(texts_of(self.family, prompts), {}), **self._sizes(len(prompts))}

    def unconditional(self, count: int) -> dict[str, Tensor]:
        """The same without a prompt, as the stock sampler's guidance has it.

        Raises:
            UserError: the family edits source images.
        """
        texts_of(self.family, [""])
        empty = unconditional(self.family, self.pipe, 1)
        rows = {name: value.to(self.device).expand(count, *value.shape[1:]) for name, value in empty.items()}
        return {**rows, **self._sizes(count)}

    def _sizes(self, count: int) -> dict[str, Tensor]:
        sizes = self.family.size_condition(self.size, (0, 0), self.size)
        return {name: value.to(self.device).expand(count, *value.shape) for name, value in sizes.items()}
