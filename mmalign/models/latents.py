"""Between pixels and scaled latents, for the autoencoders of all families: of images, and of videos by their frames."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import UserError


def vae_dtype(vae_config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """The dtype to keep a VAE in when the pipeline has `dtype`: float32 where its config says force_upcast.

    The SDXL VAE overflows to NaN in float16 and loses detail in bfloat16; the repaired one (fp16-fix) says
    force_upcast false and runs in `dtype`. Those of SD 1.x and 2.x say nothing, which diffusers reads as true.
    """
    return torch.float32 if vae_config.get("force_upcast", False) else dtype


@torch.no_grad()
def encode_images(
    pipe: Any, pixels: Float[Tensor, "n 3 *dims"], *, check: bool = True
) -> tuple[Float[Tensor, "n c *latent"], Float[Tensor, "n c *latent"]]:
    """Mean and standard deviation of the scaled latents: (x - shift) / scale of the VAE's posterior, as float32.

    Computed in the VAE's dtype, which `open_pipeline` chose. A latent is mean + std * noise. An autoencoder without posterior
    (AutoencoderTiny, AutoencoderDC) has std 0.
    Args:
        pixels: in [-1, 1], on any device, (n, 3, height, width), or (n, 3, frames, height, width) of videos; sides divisible
            by the VAE's factor.
        check: look for NaN, for which the host must wait for the device.
    Raises:
        UserError: the VAE gave NaN or infinite latents, and `check` is on.
    """
    vae = pipe.vae
    still = _knows_frames(vae) and pixels.ndim == 4
    encoded = vae.encode((pixels.unsqueeze(2) if still else pixels).to(vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
    else:
        found = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        mean, std = found.float(), torch.zeros_like(found, dtype=torch.float32)
    if check and not torch.isfinite(mean).all():
        raise UserError(f"VAE: got NaN or infinite latents in {vae.dtype}. Set dtype: bfloat16, or use a VAE made for float16.")
    shift, scale = _shift_and_scale(vae, mean)
    mean, std = (mean - shift) / scale, std / scale
    return (mean.squeeze(2), std.squeeze(2)) if still else (mean, std)


def decode_latents(pipe: Any, latents: Float[Tensor, "n c *latent"]) -> Float[Tensor, "n 3 *dims"]:
    """Pixels of scaled latents, clamped to [0, 1], as float32; the inverse of `encode_images`, with a gradient."""
    vae = pipe.vae
    still = _knows_frames(vae) and latents.ndim == 4
    found = (latents.unsqueeze(2) if still else latents).to(vae.device).float()
    shift, scale = _shift_and_scale(vae, found)
    pixels: Tensor = vae.decode((found * scale + shift).to(vae.dtype), return_dict=False)[0]
    return ((pixels.squeeze(2) if still else pixels).float() / 2 + 0.5).clamp(0, 1)


def latent_shape(pipe: Any, size: tuple[int, int], frames: int | None = None) -> tuple[int, ...]:
    """(channels, height, width) of the latents of an image, (channels, frames, height, width) of a video.

    Args:
        size: (height, width) in pixels.
        frames: of the video; None: an image.
    """
    config = pipe.vae.config
    channels = config.get("latent_channels") or config.get("z_dim")
    factor = spatial_factor(pipe)
    sides = (size[0] // factor, size[1] // factor)
    if frames is None:
        return (channels, *sides)
    return (channels, 1 + (frames - 1) // pipe.vae_scale_factor_temporal, *sides)


def spatial_factor(pipe: Any) -> int:
    """Pixels of a side that make one latent."""
    if hasattr(pipe, "vae_scale_factor_spatial"):
        return int(pipe.vae_scale_factor_spatial)
    return int(pipe.vae_scale_factor)


def _knows_frames(vae: Any) -> bool:
    return "latents_mean" in vae.config and "z_dim" in vae.config


def _shift_and_scale(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Raw latent = scaled latent * scale + shift, per channel where the VAE's config says so."""
    config = vae.config
    if _knows_frames(vae):
        shape = (1, -1) + (1,) * (like.ndim - 2)
        mean, std = (torch.tensor(config[name]).to(like).view(shape) for name in ("latents_mean", "latents_std"))
        return mean, std
    return config.get("shift_factor") or 0.0, 1 / config.scaling_factor
