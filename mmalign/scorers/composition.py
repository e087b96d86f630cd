"""Compositional checks in the manner of GenEval: does an open-vocabulary detector find what the prompt asks for?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmalign.errors import UserError
from mmalign.scorers.clip import Clip, check_lengths, load_transformers_clip, transformers_clip
from mmalign.scorers.composition_prompts import COLOURS, OBJECTS, Composition, parse_composition
from mmalign.scorers.composition_rules import Detection, Verdict, crop, judge, pixel_colour
from mmalign.scorers.detectors import Detector, open_detector

COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


@dataclass(frozen=True, kw_only=True)
class CompositionCheck:
    """A detector and the rules as a scorer (see `composition`)."""

    name: str = "composition"
    detector: Detector
    colour_of: Callable[[Image, Detection], str]
    objects: tuple[str, ...]
    threshold: float
    max_overlap: float
    margin: float

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """1.0 where image i shows what prompt i asks for, else 0.0. Raises UserError for a prompt outside the grammar."""
        return torch.tensor([float(verdict.passed) for verdict in self.verdicts(prompts, images)])

    def verdicts(self, prompts: Sequence[str], images: Sequence[Image]) -> list[Verdict]:
        """The same with reasons and boxes, to look at single images."""
        check_lengths(self.name, prompts, len(images))
        wanted = [self._composition(prompt) for prompt in prompts]
        names = [tuple(thing.name for thing in composition.things) for composition in wanted]
        found = self.detector(images, names, threshold=self.threshold)
        return [self._judge(*each) for each in zip(wanted, images, found, strict=True)]

    def task(self, prompt: str) -> str:
        """Which of the six tasks a prompt belongs to, for results by task."""
        return self._composition(prompt).task

    def _composition(self, prompt: str) -> Composition:
        return parse_composition(prompt, objects=self.objects)

    def _judge(self, composition: Composition, image: Image, found: Sequence[Detection]) -> Verdict:
        return judge(
            composition,
            found,
            lambda detection: self.colour_of(image, detection),
            threshold=self.threshold,
            max_overlap=self.max_overlap,
            margin=self.margin,
        )


def composition(
    *,
    model: str,
    revision: str | None = None,
    colour_model: str | None = None,
    more_objects: tuple[str, ...] = (),
    threshold: float = 0.3,
    max_overlap: float = 0.5,
    margin: float = 0.1,
    batch_size: int = 8,
    device: str = "auto",
) -> CompositionCheck:
    """Compositional check: 1 if the image shows the objects, count, colours or position that the prompt asks for, else 0.

    Six tasks: one object, two objects, counting, colour, relative position, colours of two objects. The prompt itself says
    what is expected (`composition_prompts.parse_composition`); the rules are in `composition_rules.judge`. `mmalign evaluate`
    gives the share of each task and the mean of these shares.

    Source: in the manner of GenEval (Ghosh et al. 2023, arXiv 2310.11513), with another detector, other prompts and boxes in
    place of masks. This is not GenEval, and its numbers must not be compared with GenEval's. Compare images by the same
    detector and settings only.

    Images: RGB, then the detector's own processor.

    Args:
        model: folder or hub id of an OWL-ViT, OWLv2, Grounding DINO or MM Grounding DINO, e.g.
            `google/owlv2-base-patch16-ensemble`, `IDEA-Research/grounding-dino-base`.
        revision: hub branch, tag or commit.
        colour_model: folder or hub id of a CLIP that names the colour of a box as the one of ten that fits best, zero-shot,
            e.g. `openai/clip-vit-large-patch14`, which GenEval uses; none: the rule of `composition_rules.pixel_colour`.
        more_objects: names in the singular that prompts may use beside the built-in ones.
        threshold: a detection counts above this score, 0 to 1. Detectors differ: 0.1 to 0.3 is usual for OWLv2, 0.25 to 0.4
            for Grounding DINO. GenEval's 0.3, and 0.9 for counting, are its own detector's.
        max_overlap: of two boxes of one object, intersection over union; above it the less sure one is dropped. GenEval: 1.
        margin: how far apart centres must be for a position, as a share of the summed sizes. GenEval: 0.1.
        batch_size: images per forward.
        device: `auto` is the GPU if there is one.

    Raises:
        UserError: no such detector or CLIP; later a prompt outside the grammar.
    """
    for name, value in (("threshold", threshold), ("max_overlap", max_overlap), ("margin", margin)):
        if not 0 <= value <= 1:
            raise UserError(f"composition.{name}: got {value}, want 0 to 1.")
    colour_of: Callable[[Image, Detection], str] = _pixel_colour
    if colour_model is not None:
        network, processor = load_transformers_clip(place="composition.colour_model", model=colour_model, device=device)
        clip = transformers_clip(name="composition", network=network, processor=processor, batch_size=batch_size)
        colour_of = ZeroShotColour(clip=clip)
    place = "composition.model"
    return CompositionCheck(
        detector=open_detector(model=model, revision=revision, batch_size=batch_size, device=device, place=place),
        colour_of=colour_of,
        objects=(*OBJECTS, *(name.lower() for name in more_objects)),
        threshold=threshold,
        max_overlap=max_overlap,
        margin=margin,
    )


@dataclass(frozen=True, kw_only=True)
class ZeroShotColour:
    """The colour of a detected object by a CLIP.

    argmax over colours of cos(CLIP(crop of the box), mean over COLOUR_TEXTS of CLIP(text) / |CLIP(text)|)
    """

    clip: Clip

    @torch.no_grad()
    def __call__(self, image: Image, detection: Detection) -> str:
        """One of COLOURS, always."""
        seen = self.clip.of_images([crop(image, detection.box)])
        texts = [text.format(colour=colour, name=detection.name) for colour in COLOURS for text in COLOUR_TEXTS]
        features = torch.nn.functional.normalize(self.clip.of_prompts(texts), dim=-1)
        means = features.reshape(len(COLOURS), len(COLOUR_TEXTS), -1).mean(dim=1)
        return COLOURS[int(torch.cosine_similarity(seen, means, dim=-1).argmax())]


def _pixel_colour(image: Image, detection: Detection) -> str:
    return pixel_colour(image, detection.box)
