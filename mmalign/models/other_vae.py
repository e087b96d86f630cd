"""Another autoencoder in a pipeline: one that is repaired for half precision, or tuned, of the same latents."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.errors import UserError
from mmalign.models.latents import vae_dtype
from mmalign.models.quiet import quiet_libraries
from mmalign.scorers.checkpoints import first_line

logger = logging.getLogger(__name__)

CHANNELS = ("latent_channels", "z_dim")
LEVELS = ("block_out_channels", "encoder_block_out_channels", "dim_mult")  # each but one halves the sides
SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def replace_vae(pipe: Any, vae: str, dtype: torch.dtype) -> None:
    """Put another autoencoder of the pipeline's own class in.

    Args:
        pipe: a stock pipeline.
        vae: a folder with an autoencoder's `config.json`, a pipeline's, whose `vae` is meant, or a hub id of an autoencoder.
        dtype: as in `open_pipeline`: of a VAE whose config says force_upcast it is float32.
    Raises:
        UserError: nothing there, another class, or latents of another shape.
    """
    place = _place(vae)
    kind = type(pipe.vae)
    try:
        with quiet_libraries():
            _check(vae, kind.load_config(place), pipe.vae.config, kind.__name__)
            found = kind.from_pretrained(place)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as fault:
        raise UserError(
            f"adapter.vae: got {vae}, which diffusers cannot load ({first_line(fault)}). Check the name and the files."
        ) from fault
    nn.Module.to(found, vae_dtype(found.config, dtype))
    pipe.register_modules(vae=found)


def _place(vae: str) -> str:
    folder = Path(vae).expanduser()
    if (folder / "model_index.json").is_file():
        return str(folder / "vae")
    return str(folder) if folder.exists() else vae


def _check(vae: str, config: Mapping[str, Any], wanted: Mapping[str, Any], kind: str) -> None:
    """Refuse latents of another shape; warn of another scale, which is another space of latents."""
    named = config.get("_class_name", kind)
    if named != kind:
        raise UserError(f"adapter.vae: got {vae}, which is a {named}, want a {kind}, as the model's own. Name another.")
    (channels, factor), (own_channels, own_factor) = _latents(config), _latents(wanted)
    if (channels, factor) != (own_channels, own_factor):
        raise UserError(
            f"adapter.vae: got {vae} with {channels} latent channels at 1/{factor} of the sides, want {own_channels} at "
            f"1/{own_factor}, as the model's own. Name a VAE that was made for this model."
        )
    for name in SCALES:
        if (given := config.get(name, wanted.get(name))) != wanted.get(name):
            logger.warning(
                "adapter.vae: %s has %s %s where the model's own has %s: probably made for another model.",
                *(vae, name, given, wanted.get(name)),
            )


def _latents(config: Mapping[str, Any]) -> tuple[int | None, int]:
    """(channels, pixels of a side that make one latent)."""
    channels = next((config[name] for name in CHANNELS if config.get(name)), None)
    levels = next((len(config[name]) for name in LEVELS if config.get(name)), 1)
    return channels, int(2 ** (levels - 1))
