"""CLIPScore, how well an image fits its prompt: over transformers or open_clip weights, differentiable to the pixels."""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.scorers.clip import (
    CosineScorer,
    load_transformers_clip,
    open_clip_clip,
    open_clip_preprocess,
    transformers_clip,
)

Scale = Literal["torchmetrics", "paper", "cosine"]
FORMULAS: dict[Scale, Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]] = {
    "torchmetrics": lambda cosine: 100.0 * cosine.clamp(min=0),
    "paper": lambda cosine: 2.5 * cosine.clamp(min=0),
    "cosine": lambda cosine: cosine,
}
SHOWN_CHARACTERS = 1000  # of what open_clip says of keys that do not fit


def clip_score(
    *,
    model: str,
    revision: str | None = None,
    scale: Scale = "torchmetrics",
    batch_size: int = 32,
    device: str = "auto",
) -> CosineScorer:
    """CLIPScore with a transformers CLIP.

    max(100 cos(image, prompt), 0);  scale `paper`: 2.5 max(cos, 0);  scale `cosine`: cos

    Source: Hessel et al. (2021), CLIPScore, equation 1, with w = 2.5 and the prefix "A photo depicts" before each caption;
    torchmetrics' convention is 100 and no prefix. No prefix is added here in any scale: put it into the prompts to compare
    with the paper. Typical values with real weights: 20 to 40 (torchmetrics).

    Images: RGB, then as the checkpoint's processor says (224 pixels bicubic on the shorter side, centre crop, for OpenAI's),
    by PIL's resize; transformers 5 alone would take torchvision's, which may differ by one step of 8 bits.
    Prompts are cut at the model's context, 77 tokens for every published CLIP, end token kept; the first cut is logged.
    Where the cosine is negative the `torchmetrics` and `paper` scales have no gradient; `cosine` has.

    Args:
        model: folder or hub id of a `CLIPModel` with its processor, e.g. `openai/clip-vit-large-patch14`.
        revision: hub branch, tag or commit.
        scale: which of the three formulas.
        batch_size: images, and prompts, per forward.
        device: `auto` is the GPU if there is one.

    Raises:
        UserError: no CLIP model or processor at `model`, or keys that do not fit, listed.
    """
    network, processor = load_transformers_clip(place="clip_score.model", model=model, revision=revision, device=device)
    clip = transformers_clip(name="clip_score", network=network, processor=processor, batch_size=batch_size)
    return CosineScorer(name="clip_score", clip=clip, formula=FORMULAS[scale])


def clip_score_open_clip(
    *,
    model: str,
    pretrained: str | None = None,
    scale: Scale = "torchmetrics",
    batch_size: int = 32,
    device: str = "auto",
) -> CosineScorer:
    """CLIPScore with an open_clip model; formula, scales and truncation as `clip_score`.

    Images: RGB, then as open_clip's own evaluation transform of that model, letterboxing ones included. Context: the model's,
    77 tokens for CLIP.

    Args:
        model: open_clip name (`ViT-L-14`), or `hf-hub:owner/name`, or `local-dir:folder` with open_clip_config.json.
        pretrained: tag (`laion2b_s32b_b82k`) or weights file; required for a plain name, not allowed with a schema.
        scale: which of the three formulas.
        batch_size: images, and prompts, per forward.
        device: `auto` is the GPU if there is one.

    Raises:
        UserError: unknown model, missing weights, or `pretrained` left out (open_clip would go on with random weights).
    """
    import open_clip

    has_schema = ":" in model
    if has_schema == (pretrained is not None):
        wants = "no value, as the schema names the weights" if has_schema else "a tag or a weights file"
        raise UserError(
            f"clip_score_open_clip.pretrained: got {pretrained!r} for model {model!r}, want {wants}. "
            "open_clip.list_pretrained() lists names and tags."
        )
    where = torch_device(device)
    try:
        network = open_clip.create_model(model, pretrained=pretrained, precision="fp32", device=where, require_pretrained=True)
        clip = open_clip_clip(
            name="clip_score_open_clip",
            model=model,
            network=network.eval().requires_grad_(False),
            preprocess=open_clip_preprocess(open_clip.get_model_preprocess_cfg(network)),
            batch_size=batch_size,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"clip_score_open_clip.model: got {model!r} with pretrained {pretrained!r}, want a model that open_clip can load "
            f"({' '.join(str(error).split())[:SHOWN_CHARACTERS]}). open_clip.list_pretrained() lists names and tags."
        ) from error
    return CosineScorer(name="clip_score_open_clip", clip=clip, formula=FORMULAS[scale])
