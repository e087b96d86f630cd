"""What the scorers over a CLIP share: preprocessing, the two towers over transformers or open_clip, and the cosine scorer."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image, Resampling
from torch import Tensor

from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.scorers.checkpoints import check_keys, first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PixelPreprocess:
    """Resize, crop or pad, and normalise as a checkpoint was trained to see images: of pixels differentiably, of images by PIL.

    Args:
        size: height and width in pixels that the network takes.
        resize: shortest: the shorter side to size, centre crop. longest: the longer side to size, black padding to a square
            (letterbox). squash: both sides.
        interpolation: antialiased, as PIL's.
        mean, std: of each channel, for values in [0, 1].
        crop: which way half a pixel goes where what is cut off is odd: `round` to the even one as torchvision, so OpenAI's
            and open_clip's own code, or `floor` as transformers.
    """

    size: tuple[int, int]
    resize: Literal["shortest", "longest", "squash"]
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: Literal["round", "floor"] = "round"

    def __call__(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 height width"]:
        """Of pixels in [0, 1], with a gradient. What bicubic overshoots is cut to [0, 1], as 8-bit images cut it."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        target = self._target(pixels.shape[-2], pixels.shape[-1])
        resized = resize(pixels, list(target), InterpolationMode(self.interpolation), antialias=True).clamp(0, 1)
        left, top, right, bottom = self._box(*target)
        cropped = torch.nn.functional.pad(resized, (-left, right - target[1], -top, bottom - target[0]))
        return self._normalised(cropped)

    def of_images(self, images: Sequence[Image]) -> Float[Tensor, "n 3 height width"]:
        """Of images in any mode, made RGB first, by PIL's 8-bit resize as in the published code. On the CPU."""
        if not images:
            return torch.zeros(0, 3, *self.size)
        method = Resampling.BILINEAR if self.interpolation == "bilinear" else Resampling.BICUBIC
        arrays = []
        for image in images:
            height, width = self._target(image.height, image.width)
            fitted = image.convert("RGB").resize((width, height), method).crop(self._box(height, width))
            arrays.append(np.asarray(fitted, dtype=np.float32))
        return self._normalised(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        ratios = (self.size[0] / height, self.size[1] / width)
        if self.resize == "squash":
            return self.size
        if self.resize == "longest":
            return max(1, round(height * min(ratios))), max(1, round(width * min(ratios)))
        if self.size[0] != self.size[1]:  # open_clip rounds here, and only here
            return round(height * max(ratios)), round(width * max(ratios))
        return int(height * max(ratios) + 1e-6), int(width * max(ratios) + 1e-6)

    def _box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the part that is kept; below zero and beyond the image where it is padded."""
        left, top = (self._offset(have, want) for have, want in ((width, self.size[1]), (height, self.size[0])))
        return left, top, left + self.size[1], top + self.size[0]

    def _offset(self, have: int, want: int) -> int:
        if have < want:
            return -((want - have) // 2)
        return round((have - want) / 2) if self.crop == "round" else (have - want) // 2

    def _normalised(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


@dataclass(kw_only=True)
class Clip:
    """A frozen CLIP's features of prompts, of images and, with a gradient, of pixels.

    Args:
        name: the scorer's, for messages.
        batch_size: images, and prompts, per forward.
        device: where the towers are.
        max_tokens: the model's context; longer prompts are cut there, end token kept.
        tokenise: prompts and a length -> token ids cut or padded to that length.
        text_tower, image_tower: token ids, and preprocessed pixels, to features that are not yet normalised.
        preprocess: what the image tower wants.
    """

    name: str
    batch_size: int
    device: torch.device
    max_tokens: int
    tokenise: Callable[[list[str], int], Int[Tensor, "n seq"]]
    text_tower: Callable[[Int[Tensor, "n seq"]], Float[Tensor, "n dim"]]
    image_tower: Callable[[Float[Tensor, "n 3 h w"]], Float[Tensor, "n dim"]]
    preprocess: PixelPreprocess
    _told: bool = field(default=False, init=False)

    @torch.no_grad()
    def of_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "n dim"]:
        """Each distinct prompt is encoded once. That prompts are cut is said once, by a warning with the first count."""
        distinct = list(dict.fromkeys(prompts))
        if not distinct:
            return torch.zeros(0, 1, device=self.device)
        tokens = self.tokenise(distinct, self.max_tokens)
        self._tell_of_cuts(tokens, self.tokenise(distinct, self.max_tokens + 1))
        starts = range(0, len(distinct), self.batch_size)
        parts = (tokens[start : start + self.batch_size].to(self.device) for start in starts)
        features = torch.cat([self.text_tower(part) for part in parts])
        place = {prompt: index for index, prompt in enumerate(distinct)}
        return features[[place[prompt] for prompt in prompts]]

    @torch.no_grad()
    def of_images(self, images: Sequence[Image]) -> Float[Tensor, "n dim"]:
        """`batch_size` images a forward."""
        starts = range(0, len(images), self.batch_size)
        parts = (self.preprocess.of_images(images[start : start + self.batch_size]) for start in starts)
        features = [self.image_tower(part.to(self.device)) for part in parts]
        return torch.cat(features) if features else torch.zeros(0, 1, device=self.device)

    def of_pixels(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        """Of pixels in [0, 1], in one forward, with a gradient to the pixels."""
        return self.image_tower(self.preprocess(pixels.to(self.device, torch.float32)))

    def _tell_of_cuts(self, tokens: Int[Tensor, "n seq"], longer: Int[Tensor, "n seq_plus_1"]) -> None:
        """A prompt is cut if room for one more token changes the tokens before it: its end moves there."""
        cut: Bool[Tensor, " n"] = (tokens != longer[:, : self.max_tokens]).any(dim=1)
        if cut.any() and not self._told:
            self._told = True
            logger.warning(
                "%s: %d of %d prompts are longer than %d tokens; what lies beyond is not read, here and in later prompts. "
                "Put what matters first.",
                self.name,
                int(cut.sum()),
                len(tokens),
                self.max_tokens,
            )


@dataclass(frozen=True, kw_only=True)
class CosineScorer:
    """A frozen CLIP as a scorer: a function of the cosine of an image's and its prompt's features."""

    name: str
    clip: Clip
    formula: Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """Score i is of image i under prompt i, in any mode and of any size. On the CPU, float32."""
        check_lengths(self.name, prompts, len(images))
        cosine = torch.cosine_similarity(self.clip.of_images(images), self.clip.of_prompts(prompts), dim=-1)
        return self.formula(cosine).float().cpu()

    def score_pixels(self, prompts: Sequence[str], pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """The same score of pixels in [0, 1], with a gradient, on the scorer's device. One forward, not split.

        It differs from the score of the 8-bit image by what rounding to 8 bits does.
        """
        check_pixels(self.name, prompts, pixels)
        return self.formula(torch.cosine_similarity(self.clip.of_pixels(pixels), self.clip.of_prompts(prompts), dim=-1))


def check_lengths(name: str, prompts: Sequence[str], num_images: int) -> None:
    """Raises ValueError unless there is one prompt per image."""
    if len(prompts) != num_images:
        raise ValueError(f"{name}: got {len(prompts)} prompts and {num_images} images, want one prompt per image")


def check_pixels(name: str, prompts: Sequence[str], pixels: Tensor) -> None:
    """Raises ValueError unless there is one prompt per image, and pixels are (n, 3, height, width) of a floating type."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"{name}: got pixels of shape {tuple(pixels.shape)} and type {pixels.dtype}, want (n, 3, height, width) of a "
            "floating type in [0, 1]"
        )
    check_lengths(name, prompts, len(pixels))


def load_transformers_clip(
    *, place: str, model: str, revision: str | None = None, processor: str | None = None, device: str = "auto"
) -> tuple[Any, Any]:
    """A frozen float32 `CLIPModel` and its `CLIPProcessor`, keys and shapes of the checkpoint checked.

    Args:
        place: the setting that a message names: `pick_score.model`; for a processor its neighbour, `pick_score.processor`.
        model: folder or hub id.
        revision: the model's hub branch, tag or commit.
        processor: folder or hub id where it is not the model's; no revision then.
        device: `auto` is the GPU if there is one.

    Raises:
        UserError: nothing to be had there, or keys missing, unexpected or of another shape, listed.
    """
    from transformers import CLIPModel, CLIPProcessor

    where = torch_device(device)
    if processor is None:
        loaded = _pretrained(CLIPProcessor, place, model, "a CLIP model and its processor", revision=revision)
    else:
        of_processor = ".".join([*place.split(".")[:-1], "processor"])
        loaded = _pretrained(CLIPProcessor, of_processor, processor, "a CLIP processor")
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}  # checked here instead
    network, found = _pretrained(CLIPModel, place, model, "a CLIP model", revision=revision, **options)
    check_keys(
        place,
        missing=found["missing_keys"],
        unexpected=[key for key in found["unexpected_keys"] if not key.endswith(".embeddings.position_ids")],  # 0, 1, 2 ...
        misshapen={key: (tuple(got), tuple(want)) for key, got, want in found["mismatched_keys"]},
    )
    return network.to(where).eval().requires_grad_(False), loaded


def transformers_clip(*, name: str, network: Any, processor: Any, batch_size: int) -> Clip:
    """The towers of a transformers CLIP.

    Args:
        name: the scorer's.
        network, processor: as `load_transformers_clip` gives them.
        batch_size: images, and prompts, per forward.

    Raises:
        UserError: an image processor that is not a standard CLIP's.
    """

    def tokenise(prompts: list[str], length: int) -> Int[Tensor, "n seq"]:
        tokens = processor.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids: Tensor = tokens.input_ids
        return ids

    return Clip(
        name=name,
        batch_size=batch_size,
        device=network.device,
        max_tokens=network.config.text_config.max_position_embeddings,
        tokenise=tokenise,
        # The text tower is causal and read at its end token, so what pads after it needs no mask.
        text_tower=lambda tokens: _features(network.get_text_features(tokens)),
        image_tower=lambda pixels: _features(network.get_image_features(pixels)),
        preprocess=_transformers_preprocess(f"{name}.model", processor.image_processor),
    )


def open_clip_clip(*, name: str, model: str, network: Any, preprocess: PixelPreprocess, batch_size: int) -> Clip:
    """The towers of an open_clip model.

    Args:
        name: the scorer's.
        model: open_clip's name of it, which says which tokeniser it has.
        network: frozen.
        preprocess: what its image tower wants.
        batch_size: images, and prompts, per forward.
    """
    import open_clip

    tokeniser = open_clip.get_tokenizer(model)
    return Clip(
        name=name,
        batch_size=batch_size,
        device=next(network.parameters()).device,
        max_tokens=tokeniser.context_length,
        tokenise=tokeniser,
        text_tower=network.encode_text,
        image_tower=network.encode_image,
        preprocess=preprocess,
    )


def open_clip_preprocess(config: dict[str, Any]) -> PixelPreprocess:
    """From open_clip's own evaluation settings of a model."""
    size = config["size"]
    return PixelPreprocess(
        size=(size, size) if isinstance(size, int) else tuple(size),
        resize=config["resize_mode"],
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _pretrained(kind: Any, place: str, source: str, wants: str, **options: Any) -> Any:
    from safetensors import SafetensorError

    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{place}: got {source!r}, want a folder or hub id with {wants} ({first_line(error)}). "
            "Save it there with save_pretrained, or check the name and the connection."
        ) from error


def _features(output: Any) -> Tensor:
    """transformers 5 gives an output object, transformers 4 the tensor itself."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _transformers_preprocess(place: str, processor: Any) -> PixelPreprocess:
    names: dict[int, Literal["bicubic", "bilinear"]] = {Resampling.BICUBIC: "bicubic", Resampling.BILINEAR: "bilinear"}
    size, crop = processor.size, processor.crop_size
    shortest = size.shortest_edge
    resized = (shortest, shortest) if shortest else (size.height, size.width)
    side = (crop.height, crop.width) if processor.do_center_crop else resized
    if int(processor.resample) not in names or side != resized or (shortest and not processor.do_center_crop):
        raise UserError(
            f"{place}: got an image processor with size {size}, crop {crop}, resample {processor.resample}, want "
            "shortest_edge with a crop of that size, or height and width, bicubic or bilinear. Use a standard CLIP processor."
        )
    return PixelPreprocess(
        size=side,
        resize="shortest" if shortest else "squash",
        interpolation=names[int(processor.resample)],
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        crop="floor",
    )
