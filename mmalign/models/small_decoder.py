"""A small stand-in for a VAE's decoder, with which guesses can be looked at for a fraction of the cost: approximate."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from mmalign.errors import UserError
from mmalign.models.latents import decode_latents
from mmalign.models.quiet import quiet_libraries
from mmalign.scorers.checkpoints import first_line


def open_small_decoder(name: str, *, channels: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Scaled latents (n, c, h, w) -> pixels (n, 3, height, width) in [0, 1], by an `AutoencoderTiny` in float32.

    Args:
        name: folder or hub id: `madebyollin/taesd` (SD 1.x and 2.x), `madebyollin/taesdxl`, `madebyollin/taesd3`,
            `madebyollin/taef1` (FLUX.1). By FLOPs a decode costs a twentieth of the VAE's.
        channels: of the latents of the model that is sampled.
        device: where it runs.
    Raises:
        UserError: nothing there, another class, or latents with another number of channels.
    """
    from diffusers import AutoencoderTiny

    folder = Path(name).expanduser()
    place = str(folder) if folder.exists() else name
    try:
        with quiet_libraries():
            config = AutoencoderTiny.load_config(place)
            kind = config.get("_class_name", AutoencoderTiny.__name__)
            if kind == AutoencoderTiny.__name__:
                small = AutoencoderTiny.from_pretrained(place)
    except (OSError, ValueError, RuntimeError, KeyError) as fault:
        raise UserError(
            f"source.scorer.decoder: got {name}, which diffusers cannot load ({first_line(fault)}). Check the name and the "
            "files."
        ) from fault
    if kind != AutoencoderTiny.__name__:
        raise UserError(
            f"source.scorer.decoder: got {name}, which is a {kind}, want an AutoencoderTiny, such as madebyollin/taesd. "
            "Leave decoder out for the model's own VAE."
        )
    if small.config.latent_channels != channels:
        raise UserError(
            f"source.scorer.decoder: got {name} for latents of {small.config.latent_channels} channels, want {channels}, as "
            "the model's own. Name one that was made for this model."
        )
    small.to(device).eval().requires_grad_(False)
    del small.encoder

    def decode(latents: Tensor) -> Tensor:
        return decode_latents(SimpleNamespace(vae=small), latents)

    return decode
