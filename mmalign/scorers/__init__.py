"""Scorers: judges that give each image, or text, a number, higher is better. SCORERS maps a name to what builds one."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmalign.errors import UserError
from mmalign.scorers.aesthetic import aesthetic
from mmalign.scorers.clip_score import clip_score, clip_score_open_clip
from mmalign.scorers.composition import composition
from mmalign.scorers.conversation import Prompt
from mmalign.scorers.digits import digit_judge, digit_legibility
from mmalign.scorers.hps import hps_v2
from mmalign.scorers.image_reward import image_reward
from mmalign.scorers.pick_score import pick_score
from mmalign.scorers.pixels import brightness, colourfulness, saturation, sharpness
from mmalign.scorers.preference import gpm_reward
from mmalign.scorers.text_measures import short_words, text_length
from mmalign.scorers.text_reward import text_reward
from mmalign.scorers.vqa import vqa_score


@runtime_checkable
class Scorer(Protocol):
    """What `score` and `evaluate` ask of a scorer. It batches inside and gives the same score in any batch."""

    @property
    def name(self) -> str:
        """The judge's name under which its verdicts are kept."""

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """Score i is of image i under prompt i; finite, on the CPU."""


@runtime_checkable
class TextScorer(Protocol):
    """A scorer of texts. It batches inside and gives the same score in any batch."""

    judges: ClassVar[str]  # "texts"; a scorer without it judges images

    @property
    def name(self) -> str:
        """The judge's name under which its verdicts are kept."""

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Score i is of text i under prompt i, a text or messages; finite, on the CPU."""


@runtime_checkable
class DifferentiableScorer(Scorer, Protocol):
    """A scorer that is a frozen network: it can also be trained through, and guide sampling."""

    def score_pixels(self, prompts: Sequence[str], pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """The same scores of pixels in [0, 1], any height and width, with a gradient to the pixels; on the scorer's device.

        The scorer preprocesses them as it does images, resize included. The graph is of all n: the caller chooses n.
        """


@runtime_checkable
class TaskScorer(Scorer, Protocol):
    """A scorer whose prompts are of several kinds, whose results `evaluate` gives by kind as well."""

    def task(self, prompt: str) -> str:
        """The kind of this prompt."""


def judged_kind(scorer: Any) -> str:
    """What a scorer judges: `images`, or `texts`."""
    kind: str = getattr(scorer, "judges", "images")
    return kind


def one_score_each(name: str, scores: Any, count: int) -> Float[Tensor, " n"]:
    """What a scorer gave, refused unless it is one number a candidate; an array of NumPy is taken for the tensor it holds.

    Raises:
        UserError: another shape, or neither tensor nor array.
    """
    if isinstance(scores, np.ndarray) and scores.dtype.kind in "iuf":
        scores = torch.tensor(scores.astype(np.float32 if scores.dtype in (np.float16, np.float32) else np.float64))
    if isinstance(scores, Tensor) and scores.shape == (count,):
        return scores
    got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
    raise UserError(
        f"scorer {name}: got {got} for {count} candidates, want a tensor of shape ({count},), one score each. "
        "Correct the scorer."
    )


def finite_scores(
    scorer: Scorer | TextScorer, prompts: Sequence[Any], candidates: Sequence[Image] | Sequence[str], places: Sequence[str]
) -> Float[Tensor, " n"]:
    """Scores, refused where they are NaN or infinite: such a candidate can be neither better nor worse than another.

    Args:
        scorer: the judge.
        prompts, candidates: as the scorer takes them.
        places: what to call each candidate in a message: `comparisons.parquet:17: candidate 2`.

    Raises:
        UserError: a score is not finite; the message names the candidate. Not one number a candidate.
    """
    judge: Callable[..., Any] = scorer
    scores = one_score_each(scorer.name, judge(prompts, candidates), len(places))
    for place, score in zip(places, scores.tolist(), strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"{place}: got {score} from scorer {scorer.name}, want a finite score. Look at it; remove the row if it is "
                "blank or broken, else the scorer is at fault."
            )
    return scores


SCORERS: dict[str, Callable[..., Scorer | TextScorer]] = {
    "aesthetic": aesthetic,
    "brightness": brightness,
    "clip_score": clip_score,
    "clip_score_open_clip": clip_score_open_clip,
    "colourfulness": colourfulness,
    "composition": composition,
    "digit_judge": digit_judge,
    "digit_legibility": digit_legibility,
    "gpm_reward": gpm_reward,
    "hps_v2": hps_v2,
    "image_reward": image_reward,
    "pick_score": pick_score,
    "saturation": saturation,
    "sharpness": sharpness,
    "short_words": short_words,
    "text_length": text_length,
    "text_reward": text_reward,
    "vqa_score": vqa_score,
}
