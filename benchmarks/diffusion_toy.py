"""The toy of the diffusion benchmarks: a random pipeline of the real classes in SD 1.5's proportions, and random pairs."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmalign.records import Content, Example, Media, Sample


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the toy is.

    `full` has an eighth of SD 1.5's channels in UNet and VAE, and one of its eight attention heads (so that a head is as wide
    as SD 1.5's), at 256 pixels. By FLOPs, encoding an image costs 1.21 UNet forward passes and encoding a prompt 0.03 (SD 1.5
    at 512 pixels: 1.39 and 0.016).

    Args:
        resolution: pixels a side.
        layers: per level, of UNet and VAE.
        unet, vae: channels of each level; the VAE's four levels make 1 latent of 8 x 8 pixels.
        text_width, text_layers: of the CLIP text encoder.
        batch_size: pairs a step. Published (Salesforce launcher): 1 pair a micro-batch.
        num_pairs: different pairs, each with its own prompt.
        draws: seeded (timestep, noise) draws a pair.
        records: of the latent store that is read, 32 KB each.
        decode: sides in pixels of the JPEG pairs that are preprocessed, and the resolution wanted.
    """

    resolution: int
    layers: int = 2
    unet: tuple[int, ...]
    vae: tuple[int, int, int, int]
    text_width: int
    text_layers: int
    batch_size: int
    num_pairs: int
    draws: int
    records: int
    decode: tuple[tuple[int, int], ...]


SIZES = {
    "tiny": Size(
        resolution=32,
        layers=1,
        unet=(16, 32),
        vae=(8, 8, 8, 16),
        text_width=16,
        text_layers=1,
        batch_size=2,
        num_pairs=2,
        draws=2,
        records=64,
        decode=((64, 64),),
    ),
    "small": Size(
        resolution=128,
        unet=(40, 80, 80),
        vae=(16, 32, 32, 32),
        text_width=64,
        text_layers=2,
        batch_size=1,
        num_pairs=4,
        draws=2,
        records=512,
        decode=((512, 512),),
    ),
    "full": Size(
        resolution=256,
        unet=(40, 80, 160, 160),
        vae=(16, 32, 64, 64),
        text_width=96,
        text_layers=6,
        batch_size=1,
        num_pairs=4,
        draws=2,
        records=8192,
        decode=((512, 512), (768, 1024), (1024, 1024)),
    ),
}


def save_pipeline(size: Size, folder: Path) -> Path:
    """Write the random pipeline as a stock diffusers folder."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scheduler = PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        )
        StableDiffusionPipeline(
            vae=_vae(size),
            text_encoder=_text_encoder(size),
            tokenizer=_tokenizer(),
            unet=_unet(size),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def pairs(size: Size) -> list[Example]:
    """Pairs of random PNG images with a random prompt each."""
    rng = np.random.default_rng(0)
    out = []
    for number in range(size.num_pairs):
        prompt = Content(text=" ".join(rng.choice(["red", "blue", "a", "house", "cat", "under", "sky"], 8)))
        samples = (Sample(prompt=prompt, completion=Content(images=(_image(rng, size.resolution, "PNG"),))) for _ in range(2))
        out.append(Example(id=f"pair-{number}", samples=tuple(samples)))
    return out


def jpeg_pairs(side: int, number: int) -> list[Example]:
    """Pairs of JPEG images of photographic weight (70 to 210 KB at 512 to 1024 pixels), for the measurement of loading."""
    rng = np.random.default_rng(1)
    out = []
    for place in range(number):
        images = [Content(images=(_image(rng, side, "JPEG"),)) for _ in range(2)]
        samples = tuple(Sample(prompt=Content(text="a prompt"), completion=image) for image in images)
        out.append(Example(id=f"jpeg-{place}", samples=samples))
    return out


def _image(rng: np.random.Generator, side: int, kind: str) -> Media:
    """A smooth image with grain, so that JPEG neither collapses nor explodes."""
    coarse = Image.fromarray(rng.integers(0, 256, (max(side // 32, 2), max(side // 32, 2), 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    grainy = np.clip(smooth + rng.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grainy).save(file, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return Media(data=file.getvalue())


def _unet(size: Size) -> Any:
    from diffusers import UNet2DConditionModel

    crossed = len(size.unet) - 1
    return UNet2DConditionModel(
        sample_size=size.resolution // 8,
        block_out_channels=size.unet,
        down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
        layers_per_block=size.layers,
        norm_num_groups=8,
        attention_head_dim=1,  # diffusers' name for the number of heads
        cross_attention_dim=size.text_width,
    )


def _vae(size: Size) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=size.layers,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=size.resolution,
        scaling_factor=1.0,  # a sample of a random VAE has about the deviation 1 that 0.18215 gives to SD 1.5's
    )


def _text_encoder(size: Size) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=max(1, size.text_width // 48),
        max_position_embeddings=77,
    )
    return CLIPTextModel(config)


def _tokenizer() -> Any:
    """CLIP's tokenizer with characters for words: 77 tokens long."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    entries = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={entry: index for index, entry in enumerate(entries)}, merges=[], model_max_length=77)
