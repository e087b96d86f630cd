"""LAION's aesthetic predictors: a small head on a CLIP image embedding, trained on people's ratings from 1 to 10."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn

from mmalign.scorers.checkpoints import load_checked, read_checkpoint
from mmalign.scorers.clip import Clip, check_lengths, check_pixels, load_transformers_clip, transformers_clip


@dataclass(frozen=True, kw_only=True)
class AestheticScorer:
    """A frozen CLIP's image tower with a head (see `aesthetic`); the prompt is not read."""

    name: str
    clip: Clip
    head: nn.Module

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """One rating per image, in any mode and of any size; prompts only has to be as long as images. On the CPU, float32."""
        check_lengths(self.name, prompts, len(images))
        return self._rated(self.clip.of_images(images)).float().cpu() if images else torch.zeros(0)

    def score_pixels(self, prompts: Sequence[str], pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """The same rating of pixels in [0, 1], with a gradient, on the scorer's device. One forward, not split.

        It differs from the rating of the 8-bit image by what rounding to 8 bits does.
        """
        check_pixels(self.name, prompts, pixels)
        return self._rated(self.clip.of_pixels(pixels))

    def _rated(self, features: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        ratings: Tensor = self.head(nn.functional.normalize(features, dim=-1)).squeeze(-1)
        return ratings


def aesthetic(
    *,
    head: str,
    version: Literal["v1", "v2"] = "v2",
    file: str | None = None,
    model: str = "openai/clip-vit-large-patch14",
    revision: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> AestheticScorer:
    """LAION Aesthetic v1 or v2: how people would rate an image by its looks, about 1 to 10.

    head(e / |e|),  e the CLIP image embedding;  v2: five linear layers, no activation between them;  v1: one linear layer

    Source: LAION, aesthetic-predictor (v1: `sa_0_4_vit_l_14_linear.pth`) and improved-aesthetic-predictor (v2:
    `sac+logos+ava1-l14-linearMSE.pth`, widths 768, 1024, 128, 64, 16, 1, with dropout when it was trained). Departure: float32
    where the published code runs CLIP in float16 on a GPU. Typical values with real weights: 4.5 to 7 (v2), 4 to 7 (v1).

    Images: RGB, as the CLIP's processor says: the shorter side to 224 pixels bicubic by PIL, centre crop to 224x224. The prompt
    is not read. `score_pixels` takes pixels in [0, 1] and has a gradient.

    Args:
        head: the head's file, or a folder or hub id that holds it.
        version: of the head.
        file: the head's file in that folder or hub id.
        model: folder or hub id of the `CLIPModel` and processor that the head was trained on.
        revision: the model's hub branch, tag or commit.
        batch_size: images per forward.
        device: `auto` is the GPU if there is one.

    Raises:
        UserError: no such head or CLIP, or keys that do not fit, listed; the head's width has to be that CLIP's.
    """
    state = read_checkpoint(head, file=file, place="aesthetic.head")
    network, processor = load_transformers_clip(place="aesthetic.model", model=model, revision=revision, device=device)
    rating = {"v1": _head_v1, "v2": _head_v2}[version](network.config.projection_dim)
    load_checked(rating, state, place="aesthetic.head")
    return AestheticScorer(
        name="aesthetic",
        clip=transformers_clip(name="aesthetic", network=network, processor=processor, batch_size=batch_size),
        head=rating.to(network.device).eval().requires_grad_(False),
    )


def _head_v1(width: int) -> nn.Module:
    return nn.Linear(width, 1)


def _head_v2(width: int) -> nn.Module:
    """Its keys are those of the published file: `layers.0`, `.2`, `.4`, `.6` and `.7`, with dropout at 1, 3 and 5."""
    layers = (
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*layers)))
