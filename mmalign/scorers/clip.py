"""CLIPScore, how well an image fits its prompt: over transformers or open_clip weights, differentiable to the pixels."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from PIL.Image import Image, Resampling
from torch import Tensor

from mmalign.devices import torch_device
from mmalign.errors import UserError

logger = logging.getLogger(__name__)

Scale = Literal["torchmetrics", "paper", "cosine"]


@dataclass(frozen=True, kw_only=True)
class PixelPreprocess:
    """Resize, crop and normalise pixels as a CLIP checkpoint was trained to see them, differentiably."""

    size: tuple[int, int]
    resize: Literal["shortest", "longest", "squash"]
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 height width"]:
        """Antialiased, as PIL's resize; overshoot is cut to [0, 1], as 8-bit images cut it.

        shortest: the shorter side to size, centre crop. longest: the longer side to size, black padding. squash: both sides.
        """
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import center_crop, normalize, resize

        height, width = pixels.shape[-2:]
        ratios = (self.size[0] / height, self.size[1] / width)
        if self.resize == "squash":
            target = list(self.size)
        elif self.resize == "longest":
            target = [round(side * min(ratios)) for side in (height, width)]
        else:
            target = [int(side * max(ratios) + 1e-6) for side in (height, width)]
        resized = resize(pixels, target, InterpolationMode(self.interpolation), antialias=True).clamp(0, 1)
        normalised: Tensor = normalize(center_crop(resized, list(self.size)), list(self.mean), list(self.std))
        return normalised


@dataclass(frozen=True, kw_only=True)
class CLIPScore:
    """A frozen CLIP as a scorer (see `clip_score`). Each distinct prompt of a call is encoded once."""

    name: str
    scale: Scale
    batch_size: int
    device: torch.device
    encode_prompts: Callable[[list[str]], Float[Tensor, "n dim"]]
    encode_pixels: Callable[[Float[Tensor, "n 3 h w"]], Float[Tensor, "n dim"]]
    preprocess_images: Callable[[list[Image]], Float[Tensor, "n 3 h w"]]
    preprocess_pixels: PixelPreprocess

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """Score i is of image i under prompt i; images go through the checkpoint's own preprocessing. On the CPU, float32."""
        if len(prompts) != len(images):
            raise ValueError(f"{self.name}: got {len(prompts)} prompts and {len(images)} images, want one prompt per image")
        text = self._prompt_features(prompts)
        scores = [torch.zeros(0)]
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels = self.preprocess_images([image.convert("RGB") for image in images[part]])
            features = self.encode_pixels(pixels.to(self.device))
            scores.append(self._score(features, text[part]).float().cpu())
        return torch.cat(scores)

    def score_pixels(self, prompts: Sequence[str], pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """The same score of pixels in [0, 1], with a gradient: for training through the scorer. One forward, not split.

        Where the cosine is negative the `torchmetrics` and `paper` scales are flat; `cosine` is not.
        """
        with torch.no_grad():
            text = self._prompt_features(prompts)
        features = self.encode_pixels(self.preprocess_pixels(pixels.to(self.device)))
        return self._score(features, text)

    def _prompt_features(self, prompts: Sequence[str]) -> Float[Tensor, "n dim"]:
        distinct = list(dict.fromkeys(prompts))
        if not distinct:
            return torch.zeros(0, 1, device=self.device)
        starts = range(0, len(distinct), self.batch_size)
        features = torch.cat([self.encode_prompts(distinct[start : start + self.batch_size]) for start in starts])
        place = {prompt: index for index, prompt in enumerate(distinct)}
        return features[[place[prompt] for prompt in prompts]]

    def _score(self, image: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        cosine = torch.cosine_similarity(image, text, dim=-1)
        if self.scale == "cosine":
            return cosine
        return (100.0 if self.scale == "torchmetrics" else 2.5) * cosine.clamp(min=0)


def clip_score(
    *,
    model: str,
    revision: str | None = None,
    scale: Scale = "torchmetrics",
    batch_size: int = 32,
    device: str = "auto",
) -> CLIPScore:
    """CLIPScore with a transformers CLIP.

    max(100 cos(image, prompt), 0);  scale `paper`: 2.5 max(cos, 0);  scale `cosine`: cos

    Source: Hessel et al. (2021), CLIPScore, equation 1, with w = 2.5 and the prefix "A photo depicts" before each caption;
    torchmetrics' convention is 100 and no prefix. No prefix is added here in any scale: put it into the prompts to compare
    with the paper. Typical values with real weights: 20 to 40 (torchmetrics).

    Images: RGB, then the checkpoint's own processor (224 pixels bicubic on the shorter side, centre crop, for OpenAI's).
    Prompts are cut at the model's context, 77 tokens for every published CLIP, end token kept; a cut is logged.

    Args:
        model: folder or hub id of a `CLIPModel` with its processor, e.g. `openai/clip-vit-large-patch14`.
        revision: hub branch, tag or commit.
        scale: which of the three formulas.
        batch_size: images, and prompts, per forward.
        device: `auto` is the GPU if there is one.

    Raises:
        UserError: no CLIP model or processor at `model`.
    """
    from transformers import CLIPModel, CLIPProcessor

    where = torch_device(device)
    try:
        network: Any = CLIPModel.from_pretrained(model, revision=revision, dtype=torch.float32)
        processor: Any = CLIPProcessor.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"clip_score.model: got {model!r}, want a folder or hub id with a CLIP model and its processor "
            f"({_first_line(error)}). Save both there with save_pretrained, or check the name and the connection."
        ) from error
    network = network.to(where).eval().requires_grad_(False)
    max_tokens = network.config.text_config.max_position_embeddings

    def encode_prompts(prompts: list[str]) -> Float[Tensor, "n dim"]:
        tokens = processor.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(where)
        _log_cut(prompts, tokens.attention_mask[:, -1] == 1, max_tokens)
        features: Tensor = network.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        return features

    def encode_pixels(pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        features: Tensor = network.get_image_features(pixels).pooler_output
        return features

    def preprocess_images(images: list[Image]) -> Float[Tensor, "n 3 h w"]:
        pixels: Tensor = processor.image_processor(images=images, return_tensors="pt").pixel_values
        return pixels

    return CLIPScore(
        name="clip_score",
        scale=scale,
        batch_size=batch_size,
        device=where,
        encode_prompts=encode_prompts,
        encode_pixels=encode_pixels,
        preprocess_images=preprocess_images,
        preprocess_pixels=_transformers_preprocess(processor.image_processor),
    )


def clip_score_open_clip(
    *,
    model: str,
    pretrained: str | None = None,
    scale: Scale = "torchmetrics",
    batch_size: int = 32,
    device: str = "auto",
) -> CLIPScore:
    """CLIPScore with an open_clip model; formula, scales and truncation as `clip_score`.

    Images: RGB, then open_clip's own evaluation transform for that model, letterboxing ones included. Context: the model's,
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
        loaded = open_clip.create_model_and_transforms(model, pretrained=pretrained, precision="fp32", device=where)
        tokenizer = open_clip.get_tokenizer(model)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"clip_score_open_clip.model: got {model!r} with pretrained {pretrained!r}, want a model that open_clip can load "
            f"({_first_line(error)}). open_clip.list_pretrained() lists names and tags."
        ) from error
    network, transform = loaded[0].eval().requires_grad_(False), loaded[2]

    def encode_prompts(prompts: list[str]) -> Float[Tensor, "n dim"]:
        tokens: Int[Tensor, "n seq"] = tokenizer(prompts).to(where)
        _log_cut(prompts, tokens[:, -1] != 0, tokens.shape[1])
        features: Tensor = network.encode_text(tokens)
        return features

    return CLIPScore(
        name="clip_score_open_clip",
        scale=scale,
        batch_size=batch_size,
        device=where,
        encode_prompts=encode_prompts,
        encode_pixels=network.encode_image,
        preprocess_images=lambda images: torch.stack([transform(image) for image in images]),
        preprocess_pixels=_open_clip_preprocess(open_clip.get_model_preprocess_cfg(network)),
    )


def _transformers_preprocess(processor: Any) -> PixelPreprocess:
    names: dict[int, Literal["bicubic", "bilinear"]] = {Resampling.BICUBIC: "bicubic", Resampling.BILINEAR: "bilinear"}
    size, crop = processor.size, processor.crop_size
    shortest = size.shortest_edge
    side = (crop.height, crop.width) if processor.do_center_crop else (size.height, size.width)
    if int(processor.resample) not in names or (shortest and (not processor.do_center_crop or side != (shortest, shortest))):
        raise UserError(
            f"clip_score.model: got an image processor with size {size}, crop {crop}, resample {processor.resample}, want "
            "shortest_edge with a crop of that size, or height and width, bicubic or bilinear. Use a standard CLIP processor."
        )
    return PixelPreprocess(
        size=side,
        resize="shortest" if shortest else "squash",
        interpolation=names[int(processor.resample)],
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )


def _open_clip_preprocess(config: dict[str, Any]) -> PixelPreprocess:
    size = config["size"]
    return PixelPreprocess(
        size=(size, size) if isinstance(size, int) else tuple(size),
        resize=config["resize_mode"],
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _log_cut(prompts: Sequence[str], full: Tensor, max_tokens: int) -> None:
    num_full = int(full.sum())
    if num_full:
        logger.info("%d of %d prompts fill all %d tokens; what lies beyond is not read", num_full, len(prompts), max_tokens)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
