"""Human Preference Score v2 and v2.1: an open_clip ViT-H/14 tuned on people's rankings of images."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.scorers.checkpoints import load_checked, read_checkpoint
from mmalign.scorers.clip import CosineScorer, PixelPreprocess, open_clip_clip

FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
PLAIN = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}  # what open_clip's config of a plain CLIP says
FACTORS = {"cosine": 1.0, "leaderboard": 100.0}


def hps_v2(
    *,
    version: Literal["v2", "v2.1"] = "v2.1",
    checkpoint: str = "xswu/HPSv2",
    revision: str | None = None,
    model: str = "ViT-H-14",
    scale: Literal["cosine", "leaderboard"] = "cosine",
    batch_size: int = 32,
    device: str = "auto",
) -> CosineScorer:
    """HPSv2 or v2.1: the cosine of a CLIP ViT-H/14 tuned on the Human Preference Dataset v2.

    cos(image, prompt);  scale `leaderboard`: 100 cos

    Source: Wu et al. (2023), Human Preference Score v2, arXiv 2306.09341; tgxs002/HPSv2 `hpsv2.score` gives the cosine, its
    tables 100 times that. Departures from that package: float32 where it runs under autocast; images are made RGB before the
    resize, not after it; an image whose longer side is 224 already is padded too. Typical values with real weights: 0.25 to
    0.31 (cosine).

    Images: RGB, the longer side to 224 pixels bicubic by PIL, padded with black on both sides to 224x224 (letterbox: nothing is
    cut off), CLIP's mean and deviation. Prompts are cut at 77 tokens, end token kept; the first cut is logged.
    `score_pixels` takes pixels in [0, 1] and has a gradient.

    Args:
        version: which published file of a hub id or a folder is read. Where `checkpoint` is a file, that is read, and a file
            does not say which version it is.
        checkpoint: hub id, folder, or the file itself.
        revision: hub branch, tag or commit.
        model: open_clip's name of the CLIP that the checkpoint is of.
        scale: which of the two formulas.
        batch_size: images, and prompts, per forward.
        device: `auto` is the GPU if there is one.

    Raises:
        UserError: no such checkpoint, keys that do not fit the model, listed, or a model that is not a plain CLIP of open_clip.
    """
    where = torch_device(device)
    state = read_checkpoint(checkpoint, file=FILES[version], revision=revision, place="hps_v2.checkpoint")
    network = _untrained(model, where)
    load_checked(network, state, place="hps_v2.checkpoint")

    def formula(cosine: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return FACTORS[scale] * cosine

    clip = open_clip_clip(
        name="hps_v2",
        model=model,
        network=network.eval().requires_grad_(False),
        preprocess=_letterbox(network.visual.image_size),
        batch_size=batch_size,
    )
    return CosineScorer(name="hps_v2", clip=clip, formula=formula)


def _untrained(model: str, device: torch.device) -> Any:
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None or config.keys() - PLAIN or "hf_model_name" in config["text_cfg"]:
        raise UserError(
            f"hps_v2.model: got {model!r}, want open_clip's name of a plain CLIP such as ViT-H-14. Keep the published one."
        )
    with device:
        return open_clip.CLIP(**config)


def _letterbox(size: tuple[int, int]) -> PixelPreprocess:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return PixelPreprocess(
        size=size, resize="longest", interpolation="bicubic", mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD
    )
