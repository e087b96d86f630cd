"""PickScore, which of several images people would pick for a prompt: a CLIP tuned on Pick-a-Pic."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from mmalign.scorers.clip import CosineScorer, load_transformers_clip, transformers_clip

DIVISOR = 26.0  # of the variant in reinforcement-learning trainers, which brings scores near 1


def pick_score(
    *,
    model: str = "yuvalkirstain/PickScore_v1",
    revision: str | None = None,
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    scale: Literal["logits", "logits/26", "cosine"] = "logits",
    batch_size: int = 32,
    device: str = "auto",
) -> CosineScorer:
    """PickScore v1: the scaled cosine of a CLIP ViT-H/14 tuned on people's picks.

    exp(logit_scale) cos(image, prompt);  scale `logits/26`: that over 26;  scale `cosine`: cos

    Source: Kirstain et al. (2023), Pick-a-Pic, arXiv 2305.01569; yuvalkirstain/PickScore for the scale. `logits/26` is the
    variant of flow_grpo and verl-omni, `cosine` that of Salesforce's DiffusionDPO. The paper's probability that image i of
    several is picked is the softmax of their `logits`. Typical values with real weights: 20 to 23 (logits).

    Images: RGB, the shorter side to 224 pixels bicubic by PIL, centre crop to 224x224, CLIP's mean and deviation: what the
    processor says. Prompts are cut at 77 tokens, end token kept; the first cut is logged. Float32.
    `score_pixels` takes pixels in [0, 1] and has a gradient in every scale.

    Args:
        model: folder or hub id of the tuned `CLIPModel`.
        revision: the model's hub branch, tag or commit.
        processor: folder or hub id of the CLIP processor; the published one is that of the model it was tuned from.
        scale: which of the three formulas.
        batch_size: images, and prompts, per forward.
        device: `auto` is the GPU if there is one.

    Raises:
        UserError: no CLIP model or processor to be had there, or keys that do not fit, listed.
    """
    network, loaded = load_transformers_clip(
        place="pick_score.model", model=model, revision=revision, processor=processor, device=device
    )
    logit_scale: float = network.logit_scale.exp().item()
    factor = {"logits": logit_scale, "logits/26": logit_scale / DIVISOR, "cosine": 1.0}[scale]

    def formula(cosine: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return factor * cosine

    clip = transformers_clip(name="pick_score", network=network, processor=loaded, batch_size=batch_size)
    return CosineScorer(name="pick_score", clip=clip, formula=formula)
