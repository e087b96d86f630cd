"""Scorers: judges that give each image a number, higher is better. SCORERS maps a name to the function that builds one."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmalign.errors import UserError
from mmalign.scorers.clip import clip_score, clip_score_open_clip
from mmalign.scorers.digits import digit_judge, digit_legibility
from mmalign.scorers.image_reward import image_reward
from mmalign.scorers.pixels import brightness, colourfulness, sharpness


@runtime_checkable
class Scorer(Protocol):
    """What `score` and `evaluate` ask of a scorer. It batches inside and gives the same score in any batch."""

    @property
    def name(self) -> str:
        """The judge's name under which its verdicts are kept."""

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """Score i is of image i under prompt i; finite, on the CPU."""


def finite_scores(
    scorer: Scorer, prompts: Sequence[str], images: Sequence[Image], places: Sequence[str]
) -> Float[Tensor, " n"]:
    """Scores, refused where they are NaN or infinite: such an image can be neither better nor worse than another.

    Args:
        scorer: the judge.
        prompts, images: as the scorer takes them.
        places: what to call each image in a message: `comparisons.parquet:17: candidate 2`.

    Raises:
        UserError: a score is not finite; the message names the image.
    """
    scores = scorer(prompts, images)
    for place, score in zip(places, scores.tolist(), strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"{place}: got {score} from scorer {scorer.name}, want a finite score. Look at the image; remove the row if "
                "it is blank or broken, else the scorer is at fault."
            )
    return scores


SCORERS: dict[str, Callable[..., Scorer]] = {
    "brightness": brightness,
    "clip_score": clip_score,
    "clip_score_open_clip": clip_score_open_clip,
    "colourfulness": colourfulness,
    "digit_judge": digit_judge,
    "digit_legibility": digit_legibility,
    "image_reward": image_reward,
    "sharpness": sharpness,
}
