"""Open-vocabulary detectors of transformers behind one call: images and names in, named and scored boxes out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.scorers.checkpoints import check_keys, first_line
from mmalign.scorers.composition_prompts import with_article
from mmalign.scorers.composition_rules import Detection

Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A frozen open-vocabulary detector.

    Args:
        batch_size: images per forward.
        scores_and_boxes: of images of one size, all asked for the same names: each box's score under each name, and the
            boxes as left, top, right and bottom in pixels.
    """

    batch_size: int
    scores_and_boxes: Callable[[list[Image], Names], tuple[Float[Tensor, "n boxes names"], Float[Tensor, "n boxes 4"]]]

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], names: Sequence[Names], *, threshold: float) -> list[list[Detection]]:
        """What of names i is seen in image i with a score above the threshold. A box bears the name it scores highest under.

        Images of one size that are asked for the same names go together, so that no image and no text is padded and the
        batch does not change what is found.
        """
        groups: dict[tuple[tuple[int, int], Names], list[int]] = {}
        for place, (image, wanted) in enumerate(zip(images, names, strict=True)):
            groups.setdefault((image.size, wanted), []).append(place)
        found: list[list[Detection]] = [[] for _ in images]
        for (size, wanted), places in groups.items():
            for start in range(0, len(places), self.batch_size):
                part = places[start : start + self.batch_size]
                scores, boxes = self.scores_and_boxes([images[place].convert("RGB") for place in part], wanted)
                for place, score, box in zip(part, scores.float().cpu(), boxes.float().cpu(), strict=True):
                    found[place] = _detections(score, box, wanted, size, threshold)
        return found


def open_detector(*, model: str, revision: str | None, batch_size: int, device: str, place: str) -> Detector:
    """The detector of a folder or hub id.

    OWL-ViT and OWLv2 are asked for `a photo of a dog`, each box scored against each text. Grounding DINO and MM Grounding
    DINO are asked for `dog. traffic light.`; a box's score under a name is the highest over the name's tokens (the published
    code takes it over all tokens and then reads a phrase from those above a second threshold).

    Args:
        model: e.g. `google/owlv2-base-patch16-ensemble`, `IDEA-Research/grounding-dino-base`.
        revision: hub branch, tag or commit.
        batch_size: images per forward.
        device: `auto` is the GPU if there is one.
        place: the setting that a message names.

    Raises:
        UserError: no such detector, one of another kind, or weights missing, listed.
    """
    from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

    kinds: dict[str, Callable[[Any, Any], Any]] = {
        "owlvit": _owl,
        "owlv2": _owl,
        "grounding-dino": _grounding_dino,
        "mm-grounding-dino": _grounding_dino,
    }
    try:
        kind: str = AutoConfig.from_pretrained(model, revision=revision).model_type
        if kind not in kinds:
            raise ValueError(f"a model of type {kind}")
        network, loaded = AutoModelForZeroShotObjectDetection.from_pretrained(
            model, revision=revision, dtype=torch.float32, output_loading_info=True
        )
        processor: Any = AutoProcessor.from_pretrained(model, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{place}: got {model!r}, want a folder or hub id with a detector ({', '.join(kinds)}) and its processor "
            f"({first_line(error)}). Save both with save_pretrained, or check the name and the connection."
        ) from error
    check_keys(place, missing=loaded["missing_keys"], unexpected=(), misshapen={})
    network = network.to(torch_device(device)).eval().requires_grad_(False)
    return Detector(batch_size=batch_size, scores_and_boxes=kinds[kind](network, processor))


def _owl(network: Any, processor: Any) -> Any:
    def scores_and_boxes(
        images: list[Image], names: Names
    ) -> tuple[Float[Tensor, "n boxes names"], Float[Tensor, "n boxes 4"]]:
        texts = [f"a photo of {with_article(name)}" for name in names]
        inputs = processor(text=[texts] * len(images), images=images, return_tensors="pt").to(network.device)
        outputs = network(**inputs)
        # OWLv2 pads an image to a square at the right and the bottom; OWL-ViT squashes it.
        width, height = images[0].size
        side = (max(images[0].size),) * 2 if network.config.model_type == "owlv2" else (width, height)
        return outputs.logits.sigmoid(), _corners(outputs.pred_boxes, side)

    return scores_and_boxes


def _grounding_dino(network: Any, processor: Any) -> Any:
    def scores_and_boxes(
        images: list[Image], names: Names
    ) -> tuple[Float[Tensor, "n boxes names"], Float[Tensor, "n boxes 4"]]:
        text = " ".join(f"{name}." for name in names)
        inputs = processor(text=[text] * len(images), images=images, return_tensors="pt").to(network.device)
        outputs = network(**inputs)
        probabilities = outputs.logits.sigmoid()
        places = _places_of_names(processor.tokenizer, names, inputs.input_ids[0])
        scores = torch.stack([probabilities[..., place].amax(dim=-1) for place in places], dim=-1)
        return scores, _corners(outputs.pred_boxes, images[0].size)

    return scores_and_boxes


def _places_of_names(tokenizer: Any, names: Names, tokens: Int[Tensor, " seq"]) -> list[list[int]]:
    """Where the tokens of each name stand, in a text that begins with one token and has a full stop after each name."""
    stop = tokenizer(".", add_special_tokens=False).input_ids
    expected, places = [int(tokens[0])], []
    for name in names:
        ids = tokenizer(name, add_special_tokens=False).input_ids
        places.append(list(range(len(expected), len(expected) + len(ids))))
        expected += [*ids, *stop]
    if tokens[: len(expected)].tolist() != expected:
        raise UserError(
            f"composition.model: got a tokenizer that reads {names} in another way together than alone, want BERT's words. "
            "Use the processor that was published with the detector."
        )
    return places


def _corners(boxes: Float[Tensor, "n boxes 4"], size: tuple[int, int]) -> Float[Tensor, "n boxes 4"]:
    """Centre, width and height in [0, 1] to corners in pixels of a frame of that width and height."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    frame = boxes.new_tensor(size)
    return torch.cat([(centre - half) * frame, (centre + half) * frame], dim=-1)


def _detections(
    scores: Float[Tensor, "boxes names"], boxes: Float[Tensor, "boxes 4"], names: Names, size: tuple[int, int], threshold: float
) -> list[Detection]:
    best, which = scores.max(dim=-1)
    width, height = size
    found = []
    for place in (best > threshold).nonzero().squeeze(1).tolist():
        left, top, right, bottom = boxes[place].tolist()
        box = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
        if box[0] < box[2] and box[1] < box[3]:
            found.append(Detection(name=names[int(which[place])], score=float(best[place]), box=box))
    return found
