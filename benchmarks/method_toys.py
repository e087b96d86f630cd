"""The toys of the method benchmarks: random pipelines of the real classes in the proportions of SD 1.5, SDXL and SD3."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusion_toy
import torch
from diffusion_toy import pairs

from mmalign.families import FAMILIES
from mmalign.records import Content, Example


@dataclass(frozen=True, kw_only=True)
class Toy:
    """One random pipeline and how it is trained.

    Args:
        family: key of FAMILIES.
        resolution: pixels a side.
        parts: changes of the configs of its parts, on the tiny pipeline of the family; SD 1.5 has `diffusion_toy`'s instead.
        base: size of `diffusion_toy`.
        num_batches: different micro-batches.
        num_steps: of a DRO trajectory. Published: 20.
        replayed: own states of a DRO micro-step. Published: 4.
        accumulation: DRO's micro-steps of an update. Published: 16.
        pairs: transitions of an SPO micro-step. Published: 10 (SD 1.5), 2 (SDXL).
        sizes: k of the memory rows.
    """

    family: str
    resolution: int
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: str
    num_batches: int = 2
    num_steps: int = 20
    replayed: int = 4
    accumulation: int = 4
    pairs: int = 2
    sizes: tuple[int, ...] = (2, 4, 8)


def _vae(*channels: int) -> dict[str, Any]:
    # A sample of a random VAE has about the deviation 1 that the published factors give to real ones.
    return {"block_out_channels": channels, "layers_per_block": 2, "norm_num_groups": 8, "scaling_factor": 1.0}


# By FLOPs encoding an image costs 1.39 UNet passes in SD 1.5's toy (SD 1.5: 1.39), about 1 in SDXL's (0.72), about 0.5 in SD3's
# (0.55). SDXL's levels have none, 2 and 5 transformers a block (SDXL: none, 2, 10) at a tenth of its width; SD3's has two heads
# of 64, a sixth of its blocks, and reads a prompt as long as the image: 272 tokens (SD3: 333 beside 4096).
_SDXL = {
    "unet": {
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 2, 5),
    },
    "vae": _vae(32, 48, 64),
}
_SD3 = {
    "transformer": {
        "sample_size": 32,
        "num_layers": 4,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "caption_projection_dim": 128,
        "pos_embed_max_size": 32,
    },
    "vae": _vae(16, 32, 32),
}

TOYS: dict[str, dict[str, Toy]] = {
    "full": {
        "sd15": Toy(family="sd15", resolution=128, base="small", pairs=10),
        "sdxl": Toy(family="sdxl", resolution=64, parts=_SDXL, base="small"),
        "sd3": Toy(family="sd3", resolution=128, parts=_SD3, base="small"),
    },
    "tiny": {
        "sd15": Toy(family="sd15", resolution=32, base="tiny", num_steps=6, accumulation=2, num_batches=1, sizes=(2, 8)),
        "sdxl": Toy(family="sdxl", resolution=32, base="tiny", num_batches=1),
        "sd3": Toy(family="sd3", resolution=32, base="tiny", num_batches=1),
    },
}


def save(toy: Toy, folder: Path) -> Path:
    """Write the random pipeline as a stock diffusers folder."""
    if toy.family == "sd15":
        return diffusion_toy.save_pipeline(diffusion_toy.SIZES[toy.base], folder)
    build = FAMILIES[toy.family].tiny
    assert build is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build(toy.parts).save_pretrained(folder)
    return folder


def lists(toy: Toy, number: int, num_candidates: int) -> list[Example]:
    """Examples of k random images each, best first; with their scores, the share of comparisons won."""
    size = replace(diffusion_toy.SIZES[toy.base], resolution=toy.resolution, num_pairs=number * ((num_candidates + 1) // 2))
    made = pairs(size)
    out = []
    for place in range(number):
        samples = [sample for pair in made[place::number] for sample in pair.samples][:num_candidates]
        prompt = Content(text=f"red cat {place}")  # every tokenizer of the toys holds it
        scores = tuple(1 - rank / max(num_candidates - 1, 1) for rank in range(num_candidates))
        side = {"scores": scores} if num_candidates > 2 else {}
        same = tuple(replace(sample, prompt=prompt) for sample in samples)
        out.append(Example(id=f"list-{place}", samples=same, side=side))
    return out
