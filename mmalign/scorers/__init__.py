"""Scorers: judges that give each image a number, higher is better. SCORERS maps a name to the function that builds one."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from jaxtyping import Float
from torch import Tensor

from mmalign.scorers.clip import clip_score, clip_score_open_clip
from mmalign.scorers.digits import digit_judge, digit_legibility
from mmalign.scorers.pixels import brightness, colourfulness, sharpness

if TYPE_CHECKING:
    from PIL.Image import Image


class Scorer(Protocol):
    """What `score` and `evaluate` ask of a scorer. It batches inside and gives the same score in any batch."""

    @property
    def name(self) -> str:
        """The judge's name under which its verdicts are kept."""

    def __call__(self, prompts: Sequence[str], images: Sequence["Image"]) -> Float[Tensor, " n"]:
        """Score i is of image i under prompt i; finite, on the CPU."""


SCORERS: dict[str, Callable[..., Scorer]] = {
    "brightness": brightness,
    "clip_score": clip_score,
    "clip_score_open_clip": clip_score_open_clip,
    "colourfulness": colourfulness,
    "digit_judge": digit_judge,
    "digit_legibility": digit_legibility,
    "sharpness": sharpness,
}
