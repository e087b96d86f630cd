"""Tiny random pipelines of the families' real classes: `model: tiny` in a config, for smoke runs and tests on any laptop.

Random weights make no pictures; everything else (loading, encoding, training, saving, sampling) is the real code.
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmalign.errors import UserError
from mmalign.models.quiet import quiet_libraries

TINY = "tiny"
# 3 x 32 x 32 pixels become 4 x 8 x 8 latents; a prompt is 16 tokens.
IMAGE_SIZE = 32
LATENT_SHAPE = (4, 8, 8)
_VERSION = 1  # of the recipe; another one is another folder


def tiny_folder(family: str) -> Path:
    """The folder of a family's tiny pipeline in the user's cache, built at the first call (a second, below 1 MB).

    Raises:
        UserError: a family without one.
    """
    if family not in BUILDERS:
        raise UserError(f"model: got {TINY} for family {family}, want one of {', '.join(BUILDERS)}.")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmalign" / "tiny"
    folder = root / f"{family}-{_VERSION}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=root, prefix=f".{family}-"))
        try:
            tiny_pipeline(family, scratch / family)
            os.replace(scratch / family, folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def tiny_pipeline(family: str, folder: Path | str, *, seed: int = 0, **changes: dict[str, Any]) -> Path:
    """Save a random pipeline of `family` ("sd15", "sd2" or "sdxl") into `folder`: below 1 MB, about a second.

    `changes` overrides entries of a part's config: `scheduler={"rescale_betas_zero_snr": True}`, also of
    `unet`, `vae` and `text_encoder`.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with quiet_libraries():
            BUILDERS[family](changes).save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """A CLIPTokenizer of 256 byte characters (alone and ending a word) and two specials: no merges, 16 tokens long."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    entries = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: index for index, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def _text_config(hidden_size: int, **changes: Any) -> Any:
    from transformers import CLIPTextConfig

    ids = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    shape = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "projection_dim": hidden_size}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16}
    return CLIPTextConfig(vocab_size=514, **{**ids, **shape, **depth, **changes})


def _vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    channels = (8, 8, 16)
    return AutoencoderKL(
        **{
            "block_out_channels": channels,
            "down_block_types": ("DownEncoderBlock2D",) * len(channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(channels),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": LATENT_SHAPE[0],
            "sample_size": IMAGE_SIZE,
            "scaling_factor": 0.18215,
            **changes,
        }
    ).eval()


def _unet(cross_attention_dim: int, **changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": LATENT_SHAPE[1],
            "in_channels": LATENT_SHAPE[0],
            "out_channels": LATENT_SHAPE[0],
            "block_out_channels": (16, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": cross_attention_dim,
            **changes,
        }
    ).eval()


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _build_sd(family: str, changes: dict[str, dict[str, Any]]) -> Any:
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    schedule = {**SCHEDULE, **changes.get("scheduler", {})}
    linear = {"use_linear_projection": True} if family == "sd2" else {}
    if family == "sd2":
        scheduler = DDIMScheduler(**{"clip_sample": False, "prediction_type": "v_prediction", **schedule})
    else:
        scheduler = PNDMScheduler(**{"skip_prk_steps": True, **schedule})
    activation = "gelu" if family == "sd2" else "quick_gelu"
    return StableDiffusionPipeline(
        vae=_vae(**changes.get("vae", {})),
        text_encoder=CLIPTextModel(_text_config(16, **{"hidden_act": activation, **changes.get("text_encoder", {})})).eval(),
        tokenizer=tiny_tokenizer(),
        unet=_unet(16, **{**linear, **changes.get("unet", {})}),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _build_sdxl(changes: dict[str, dict[str, Any]]) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added["projection_class_embeddings_input_dim"] = 6 * 8 + 24
    depth = {"transformer_layers_per_block": (1, 1), "use_linear_projection": True}
    return StableDiffusionXLPipeline(
        vae=_vae(**{"scaling_factor": 0.13025, "force_upcast": True, **changes.get("vae", {})}),
        text_encoder=CLIPTextModel(_text_config(16, **changes.get("text_encoder", {}))).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(24, hidden_act="gelu")).eval(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=_unet(16 + 24, **{**added, **depth, **changes.get("unet", {})}),
        scheduler=EulerDiscreteScheduler(**{**SCHEDULE, **changes.get("scheduler", {})}),
        add_watermarker=False,
    )


BUILDERS: dict[str, Callable[[dict[str, dict[str, Any]]], Any]] = {
    "sd15": functools.partial(_build_sd, "sd15"),
    "sd2": functools.partial(_build_sd, "sd2"),
    "sdxl": _build_sdxl,
}
